"""Passes over constants: what is known before the program runs is computed here, and equal constants and results are one node."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass

from ..internals import OpOverload
from .rewriting import Rewriting

_CASTS = {torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default}
_SMALL = 4096
"""The most elements of a constant that is compared by content."""


def fold_casts(rewriting: Rewriting) -> None:
    """Requires: parameters are `get_attr` nodes. Ensures: none of them is cast; the cast is a constant of its own.

    XNNPACK takes no computed weights.
    """
    for node in list(rewriting.graph.nodes):
        if node.target not in _CASTS or not isinstance(node.args[0], fx.Node) or node.args[0].op != "get_attr":
            continue
        source, dtype = node.args[0], node.meta["val"].dtype
        with rewriting.graph.inserting_before(node):
            value = rewriting.value(source)
            cast = rewriting.constant(("cast", source.target, dtype), partial(value.to, dtype))
        node.replace_all_uses_with(cast)
        rewriting.graph.erase_node(node)


def fold_constants(rewriting: Rewriting) -> None:
    """Requires: nothing. Ensures: no ATen op reads parameters alone (as `-exp(A_log)` does); its result is a constant.

    States are no constants.
    """
    for node in list(rewriting.graph.nodes):
        inputs = node.all_input_nodes
        computes = isinstance(node.target, OpOverload) and node.target.namespace == "aten"
        fixed = all(n.op == "get_attr" and not _is_state(n) for n in inputs)
        if not computes or not inputs or not fixed or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), rewriting.value)
        with rewriting.graph.inserting_before(node):
            folded = rewriting.constant(("folded", node.name), partial(node.target, *args, **kwargs))
        folded.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(folded)
        rewriting.graph.erase_node(node)


def share_constants(rewriting: Rewriting) -> None:
    """Requires: nothing. Ensures: small float tensors of equal content (rotary frequencies) are one node, before all calls."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(rewriting.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = rewriting.value(node)
        key: tuple[Any, ...] = (node.target,)
        if tensor.numel() <= _SMALL and tensor.dtype == torch.float32 and not _is_state(node):
            key = (tuple(tensor.shape), tensor.detach().numpy().tobytes())
        if key in first:
            node.replace_all_uses_with(first[key])
            rewriting.graph.erase_node(node)
        else:
            first[key] = node
    entry = next(n for n in rewriting.graph.nodes if n.op != "placeholder")
    for node in first.values():  # before everything, so that they come before their new users
        if node is not entry:
            entry.prepend(node)


def share_results(rewriting: Rewriting) -> None:
    """Requires: equal constants are one node. Ensures: equal calls are (positions and masks, which each layer computes)."""
    shared = CSEPass()(rewriting.module)
    assert shared is not None
    rewriting.replace_module(shared.graph_module)


def _is_state(node: fx.Node) -> bool:
    return str(node.target).startswith("state_")
