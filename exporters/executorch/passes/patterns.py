"""Forms of several nodes that a pass turns into one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def joined_rest(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(the concatenation, x) where `node` rotates x[..., :n] and its only user joins x[..., n:] to the result."""
    part, joins = _slice_of_last(node.args[0]), list(node.users)
    if part is None or part[1] != 0 or len(joins) != 1 or joins[0].target is not torch.ops.aten.cat.default:
        return None
    parts, axis = joins[0].args[0], joins[0].args[1] if len(joins[0].args) > 1 else 0
    if not isinstance(parts, list | tuple) or len(parts) != 2 or parts[0] is not node or axis not in (-1, 3):
        return None
    rest = (part[0], part[2], int(part[0].meta["val"].shape[-1]))
    return (joins[0], part[0]) if _slice_of_last(parts[1]) == rest else None


def _slice_of_last(node: Any) -> tuple[fx.Node, int, int] | None:
    """(x, start, end) of x[..., start:end]."""
    aten = torch.ops.aten
    if not isinstance(node, fx.Node) or node.target not in (aten.slice.Tensor, aten.narrow.default):
        return None
    x, axis, start, stop = (*node.args, 0, 0, 2**63 - 1)[:4] if len(node.args) < 4 else node.args[:4]
    assert isinstance(x, fx.Node)
    size = x.meta["val"].shape[-1]
    if axis not in (-1, x.meta["val"].dim() - 1) or len(node.args) > 4 or not isinstance(start, int):
        return None
    assert isinstance(stop, int)
    end = start + stop if node.target is aten.narrow.default else min(stop, size)
    return x, start, end


def exact_gelu(erf: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(the node of the GELU, x) where `erf` belongs to an exact GELU."""
    inner = _times_number(erf.args[0])
    above = list(erf.users)
    if inner is None or len(above) != 1 or abs(inner[1] - 0.5**0.5) > 1e-12:
        return None
    x, plus = inner[0], above[0]
    if plus.target is not torch.ops.aten.add.Tensor or 1.0 not in plus.args or plus.kwargs or len(plus.users) != 1:
        return None
    (product,) = plus.users
    others = [a for a in product.args if a is not plus]
    if product.target is not torch.ops.aten.mul.Tensor or len(others) != 1 or _times_number(others[0]) != (x, 0.5):
        return None
    return product, x


def _times_number(node: Any) -> tuple[fx.Node, float] | None:
    """(x, c) of x * c."""
    if not isinstance(node, fx.Node) or node.target is not torch.ops.aten.mul.Tensor:
        return None
    numbers = [a for a in node.args if isinstance(a, float)]
    nodes = [a for a in node.args if isinstance(a, fx.Node)]
    return (nodes[0], numbers[0]) if len(numbers) == len(nodes) == 1 else None
