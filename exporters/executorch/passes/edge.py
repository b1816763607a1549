"""Passes over an exported program on its way to ExecuTorch's edge dialect, around the cutting into delegates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from executorch.exir.passes.replace_aten_with_edge_pass import aten_to_edge, should_lower_to_edge
from torch import fx

from ..internals import OpOverload, overload_name, parameters

ATEN = torch.ops.aten
_VIEW_COPIES = {
    getattr(ATEN, name): getattr(ATEN, f"{name}_copy")
    for name in ("view", "transpose", "select", "slice", "unsqueeze", "squeeze", "permute", "expand")
}
_WITHOUT_EFFECT = (ATEN.alias.default, ATEN.detach.default)
_WITH_NUMBER: dict[Any, Any] = {packet.Tensor: packet.Scalar for packet in (ATEN.add, ATEN.sub, ATEN.mul, ATEN.div)}
"""The kernels of ExecuTorch that take a number. XNNPACK is given it as a constant."""


def cut_splits(graph: fx.Graph) -> None:
    """Requires: known sizes. Ensures: no split; its parts are slices, which XNNPACK has."""
    for node in list(graph.nodes):
        if node.target not in (ATEN.split_with_sizes.default, ATEN.split.Tensor, ATEN.chunk.default):
            continue
        axis, at = node.args[2] if len(node.args) > 2 else 0, 0
        parts = {user.args[1]: user for user in node.users}
        for index, value in enumerate(node.meta["val"]):
            size = value.shape[axis]
            if index in parts:
                with graph.inserting_before(node):
                    cut = graph.call_function(ATEN.slice.Tensor, (node.args[0], axis, at, at + size))
                cut.meta = dict(parts[index].meta)
                parts[index].replace_all_uses_with(cut)
                graph.erase_node(parts[index])
            at += size
        graph.erase_node(node)


def cut_selections(graph: fx.Graph) -> None:
    """Requires: nothing. Ensures: x[..., i, ...] of floats, with a known size and i, is a slice of one and a view."""
    for node in list(graph.nodes):
        if node.target is not ATEN.select.int or not is_float(node):
            continue
        x, axis, index = node.args
        axis %= x.meta["val"].dim()
        size = x.meta["val"].shape[axis]
        if not isinstance(size, int) or not isinstance(index, int):
            continue
        with graph.inserting_before(node):
            cut = graph.call_function(ATEN.slice.Tensor, (x, axis, index % size, index % size + 1))
        cut.meta["val"] = x.meta["val"].narrow(axis, index % size, 1)
        node.target, node.args = ATEN.squeeze.dims, (cut, [axis])


def copy_views(graph: fx.Graph) -> None:
    """Requires: nothing. Ensures: views are copies and values are dense: XNNPACK and ExecuTorch's kernels have no strides.

    The one dynamic size of a view is inferred: XNNPACK takes no computed sizes. Nodes that change nothing are bypassed.
    """
    for node in graph.nodes:
        if node.target is ATEN.expand.default and str(node.meta["val"].shape) == str(node.args[0].meta["val"].shape):
            node.replace_all_uses_with(node.args[0])
        if node.target is ATEN.clone.default and node.args[0].op == "call_function":
            node.replace_all_uses_with(node.args[0])  # a computed value, dense already
        if node.target in _WITHOUT_EFFECT:
            node.replace_all_uses_with(node.args[0])
        if node.target is ATEN.expand.default:
            kept = zip(node.args[1], expanded_sizes(node), strict=True)
            node.args = (node.args[0], [-1 if isinstance(size, fx.Node) and new == 1 else size for size, new in kept])
        if node.target is ATEN.view.default:
            dynamic = [isinstance(size, fx.Node) for size in node.args[1]]
            if sum(dynamic) == 1:
                sizes = zip(node.args[1], dynamic, strict=True)
                node.args = (node.args[0], [-1 if inferred else size for size, inferred in sizes])
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            copies = _VIEW_COPIES.get(node.target.overloadpacket)
            if copies is not None:
                node.target = getattr(copies, overload_name(node.target))
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
            node.meta["val"] = node.meta["val"].contiguous()


def to_edge(graph: fx.Graph) -> None:
    """Requires: delegates are cut out. Ensures: the other ATen ops are edge ops; no tags and no assertions are left."""
    for node in list(graph.nodes):
        node.meta.pop("delegation_tag", None)
        if node.target is ATEN._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.op == "call_function" and should_lower_to_edge(node.target):
            _take_numbers(graph, node)
            node.target = aten_to_edge(node.target)


BEFORE_DELEGATES: tuple[Callable[[fx.Graph], None], ...] = (cut_splits, cut_selections, copy_views)
"""In this order. After the delegates comes `to_edge`."""


def _take_numbers(graph: fx.Graph, node: fx.Node) -> None:
    """A number becomes a tensor where a kernel wants one: ExecuTorch would end the process and raise no error."""
    if node.target in _WITH_NUMBER and not isinstance(node.args[1], fx.Node):
        node.target = _WITH_NUMBER[node.target]
    assert isinstance(node.target, OpOverload)
    for index, (argument, parameter) in enumerate(zip(node.args, parameters(node.target), strict=False)):
        if isinstance(argument, int | float) and isinstance(parameter.type, torch.TensorType):
            with graph.inserting_before(node):
                number = graph.call_function(aten_to_edge(ATEN.full.default), ([], argument))
            number.meta["val"] = node.meta["val"].new_full((), argument, dtype=torch.tensor(argument).dtype)
            node.update_arg(index, number)


def expanded_sizes(node: fx.Node) -> list[Any]:
    """The new size of each dimension that an expansion widens, 1 for the others."""
    after, before = node.meta["val"].shape, node.args[0].meta["val"].shape  # type: ignore[union-attr]
    before = [1] * (len(after) - len(before)) + list(before)
    return [1 if str(a) == str(b) else a for a, b in zip(after, before, strict=True)]


def is_float(node: fx.Node) -> bool:
    """Whether the node's value is a float32 tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32
