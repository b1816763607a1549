"""Rewrites of plain ATen: forms of one or several nodes for which XNNPACK has one op."""

from __future__ import annotations

import torch
from torch import fx

from . import patterns
from .rewriting import Rewriting

_LARGEST = 4096
"""The most elements of a filled tensor that is stored."""


def exact_gelu(rewriting: Rewriting, node: fx.Node) -> None:
    """x / 2 (1 + erf(x / sqrt 2)) becomes XNNPACK's one op for it; any other erf stays."""
    match = patterns.exact_gelu(node)
    if match is not None:
        result, x = match
        result.target, result.args, result.kwargs = torch.ops.aten.gelu.default, (x,), {}


def linear(rewriting: Rewriting, node: fx.Node) -> None:
    """A product with a constant matrix is a linear."""
    x, matrix = node.args
    if isinstance(matrix, fx.Node) and matrix.op == "get_attr" and rewriting.value(matrix).dim() == 2:
        weight = rewriting.constant(("turned", matrix.target), lambda: rewriting.value(matrix).t())
        node.target, node.args = torch.ops.aten.linear.default, (x, weight)


def filled(rewriting: Rewriting, node: fx.Node) -> None:
    """A small float tensor of one number is a constant where its shape is known."""
    like: torch.Tensor = node.meta["val"]
    number = node.args[1] if len(node.args) > 1 else float(node.target is torch.ops.aten.ones_like.default)
    if like.dtype == torch.float32 and all(isinstance(d, int) for d in like.shape) and like.numel() <= _LARGEST:
        assert isinstance(number, int | float)
        shape = tuple(like.shape)
        constant = rewriting.constant(("filled", shape, number), lambda: torch.full(shape, float(number)))
        node.replace_all_uses_with(constant)
