"""Rewrites of recurrences: each node is pointed at its function in `recurrence`, the one for a step or the one for more tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from .. import recurrence
from .rewriting import Rewriting


def causal_conv(rewriting: Rewriting, node: fx.Node) -> None:
    x, weight, bias, state = node.args
    if _is_step(x):
        node.target = recurrence.causal_conv_step
        return
    assert isinstance(weight, fx.Node)
    taps = rewriting.value(weight).unbind(1)
    rows = [
        rewriting.constant(("tap", weight.target, i), partial(torch.Tensor.float, tap)) for i, tap in enumerate(taps)
    ]
    node.target = recurrence.causal_conv
    node.args = (x, rows, bias, state)


def gated_delta_rule(rewriting: Rewriting, node: fx.Node) -> None:
    if _is_step(node.args[0]):
        node.target = recurrence.delta_rule_step
        return
    quarters = [
        _mask(rewriting, ("quarter", size), partial(recurrence.quarter_mask, size)) for size in recurrence.QUARTERS
    ]
    identity = _mask(rewriting, ("identity",), recurrence.identity_mask)
    node.target = recurrence.delta_rule
    node.args = (*node.args, _decay_masks(rewriting), identity, quarters)


def linear_attention(rewriting: Rewriting, node: fx.Node) -> None:
    if _is_step(node.args[0]):
        node.target = recurrence.linear_attention_step
        return
    _, _, heads, decays = node.args[3].meta["val"].shape  # type: ignore[union-attr]
    of_head = rewriting.constant(("of_head", heads, decays), partial(recurrence.of_head_mask, heads, decays))
    node.target = recurrence.linear_attention
    node.args = (*node.args, _decay_masks(rewriting), of_head)


def selective_scan(rewriting: Rewriting, node: fx.Node) -> None:
    step = _is_step(node.args[0])
    node.target = recurrence.selective_scan_step if step else recurrence.selective_scan


def diagonal_scan(rewriting: Rewriting, node: fx.Node) -> None:
    node.target = recurrence.diagonal_scan


def generalized_delta_rule(rewriting: Rewriting, node: fx.Node) -> None:
    node.target = recurrence.generalized_delta_rule


def _decay_masks(rewriting: Rewriting) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The nodes of `recurrence.Masks`."""
    until = _mask(rewriting, ("until",), recurrence.until_mask)
    constant = rewriting.constant(("until",), recurrence.until_mask)
    ones = rewriting.once(recurrence.row, constant, rewriting.input(0))
    return until, _mask(rewriting, ("after",), recurrence.after_mask), ones


def _mask(rewriting: Rewriting, key: tuple[Any, ...], make: Callable[[], torch.Tensor]) -> fx.Node:
    """The part of a mask for this call's tokens, cut once for all layers."""
    return rewriting.once(recurrence.square, rewriting.constant(key, make), rewriting.input(0))


def _is_step(x: Any) -> bool:
    """Whether [1, T, …] has the constant length 1."""
    length = x.meta["val"].shape[1]
    return isinstance(length, int) and length == 1
