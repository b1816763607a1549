"""The private parts of torch and ExecuTorch that this package uses, gathered so that an upgrade has one file to check."""

from __future__ import annotations

from typing import Any

import torch
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.backend.backend_api import _create_partitions as create_partitions
from executorch.exir.backend.backend_api import _insert_lowered_submodule as insert_lowered_submodule
from executorch.exir.backend.utils import _maybe_duplicate_constant_nodes as duplicate_constant_nodes
from executorch.exir.tracer import _default_decomposition_table as default_decompositions
from torch._ops import HigherOrderOperator, OpOverload

__all__ = [
    "HigherOrderOperator",  # control flow and effects in a graph are recognised by their type, which has no public name
    "NamedDataStore",  # a delegate's constants go into the program as named data, and only this class writes its form
    "OpOverload",  # an op in a graph is recognised by its type, which has no public name
    "check",
    "create_partitions",  # cuts the tagged nodes out; the public way would copy every weight on the way to the delegate
    "default_decompositions",  # ExecuTorch's own table, without which its kernels lack ops; no public function returns it
    "duplicate_constant_nodes",  # each delegate needs its own node of a constant; the public way does this after its copies
    "insert_lowered_submodule",  # puts a delegate that is written already in the place of its nodes
    "kernel_names",
    "overload_name",
    "parameters",
]


def check(condition: bool | torch.SymBool) -> None:
    """Tell torch.export a bound of a size that is known at run time only: the documented function has a private name."""
    torch._check(condition)  # type: ignore[no-untyped-call]


def kernel_names() -> set[str]:
    """The kernels that are registered in this process: the only way to learn it before a program is loaded."""
    from executorch.extension.pybindings import portable_lib  # loads ExecuTorch's runtime

    return set(portable_lib._get_operator_names())


def parameters(op: OpOverload) -> list[Any]:
    """An op's parameters with their types: torch has an op's schema under this name alone."""
    return list(op._schema.arguments)


def overload_name(op: OpOverload) -> str:
    """`Tensor` of `aten::add.Tensor`: needed to take the same overload of another op."""
    return op._overloadname
