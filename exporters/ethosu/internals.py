"""The private parts of torch and ExecuTorch that this package uses, gathered so that an upgrade has one file to check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx


def register_quantized_ops() -> None:
    """Define `quantized_decomposed::*`, its embeddings too: torch and ExecuTorch do so when these modules are imported."""
    import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401
    import torch.ao.quantization.fx._decomposed  # noqa: F401


def operator_support(partitioner: Any, program: torch.export.ExportedProgram) -> Callable[[fx.Node], bool]:
    """Whether the NPU takes a node for itself: the partitioner says of refused nodes only that they have no tag."""
    from executorch.exir.backend.utils import WhyNoPartitionReporter

    support = partitioner._create_operator_support(program, WhyNoPartitionReporter())
    return lambda node: bool(support.is_node_supported({}, node))


def replace_delegate(delegate: Any, compiled: bytes, specs: Sequence[Any]) -> None:
    """Give a lowered delegate other bytes and specs: one lowering serves several configurations of a family."""
    delegate._processed_bytes, delegate._compile_specs = compiled, specs


def spec_list(spec: Any) -> list[Any]:
    """A compile spec as a delegate stores it: the class has no public way to it."""
    specs: list[Any] = spec._to_list()
    return specs


def op_name(target: Any) -> str | None:
    """`aten::add` of any overload, None of a Python function: torch has an op's schema under this name alone."""
    return str(target._schema.name) if hasattr(target, "_schema") else None
