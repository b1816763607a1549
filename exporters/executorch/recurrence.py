"""The recurrences in words that XNNPACK knows: products of matrices a head, masks as numbers, no dynamic slice inside.

What may enter: `ops`. The batch is one. Of one token each is the plain recurrence; of more, the matrix form of
`ops.recurrence`, whose masks over pairs of tokens are cut once for all layers from constants (`square`). Heads come first:
[H, T, D].
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from ...ops.recurrence import CHUNK

_SIDE = CHUNK + 1
"""Of the masks: a cut of all of one would not be a cut, and torch.export would say so of the dynamic length."""
QUARTERS = tuple(1 << i for i in range(CHUNK.bit_length() - 1))
"""The block sizes by whose doubling a triangular matrix is inverted (see `ops.recurrence`)."""


def until_mask() -> torch.Tensor:
    """[i, l]: 1 where token l is not after token i."""
    return torch.ones(_SIDE, _SIDE).tril()


def after_mask() -> torch.Tensor:
    """[j, l]: 1 where token l is after token j."""
    return torch.ones(_SIDE, _SIDE).triu(1)


def identity_mask() -> torch.Tensor:
    return torch.eye(_SIDE)


def quarter_mask(size: int) -> torch.Tensor:
    """1 in the lower left quarter of each diagonal block of twice `size`."""
    block = torch.arange(_SIDE) // size
    rows, columns = block.unsqueeze(1), block.unsqueeze(0)
    return ((rows == columns + 1) & (columns % 2 == 0)).to(torch.float32)


def of_head_mask(heads: int, width: int) -> torch.Tensor:
    """[H, H * Dk]: 1 where a key dimension is of the head. It sums over them without a view of two dynamic lengths."""
    return torch.eye(heads).repeat_interleave(width, 1)


def square(mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The part of a mask for the tokens ids [1, T]."""
    return mask.narrow(0, 0, ids.shape[1]).narrow(1, 0, ids.shape[1])


def row(mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[1, T] of ones."""
    return mask.narrow(0, _SIDE - 1, 1).narrow(1, 0, ids.shape[1])


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[1, T, groups, D] as [heads, T, D]."""
    groups, width = x.shape[2], x.shape[3]
    if groups != heads:
        x = torch.cat([x.view(-1, groups, 1, width)] * (heads // groups), 2)
    return x.view(-1, heads, width).permute(1, 0, 2)


def _by_token(out: torch.Tensor) -> torch.Tensor:
    """[heads, T, D] as [1, T, heads, D]."""
    return out.permute(1, 0, 2).unsqueeze(0)


# ---- causal convolution ---------------------------------------------------------------------------------------------


def causal_conv_step(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [1, 1, C]: one product and one sum."""
    seen = torch.cat((state, x.permute(0, 2, 1)), 2)  # [1, C, K]
    out = (seen * weight).sum(2, keepdim=True).permute(0, 2, 1)
    return out if bias is None else out + bias, seen.narrow(2, 1, state.shape[2])


def causal_conv(
    x: torch.Tensor, rows: list[torch.Tensor], bias: torch.Tensor | None, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [1, T, C]; rows: K of [C], the columns of the weight."""
    length, before = x.shape[1], state.shape[2]
    seen = torch.cat((state.permute(0, 2, 1), x), 1)
    out = seen.narrow(1, 0, length) * rows[0]
    for tap in range(1, before + 1):
        out = out + seen.narrow(1, tap, length) * rows[tap]
    return out if bias is None else out + bias, seen.narrow(1, length, before).permute(0, 2, 1)


# ---- decays ---------------------------------------------------------------------------------------------------------


def _fading(
    fade: torch.Tensor, until: torch.Tensor, after: torch.Tensor, whole: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of log decays [1, N, T]: what is left of token j at token i, [N, T, T], 0 for j > i; of what was before the chunk at
    token i, [1, N, T]; of token j after the chunk, [1, N, T]; and of what was before it there, [1, N, 1].
    """
    each = fade.view(fade.shape[1], 1, -1)
    between = torch.exp(linear(each * until, after)) * until
    reached, left, total = (torch.exp(linear(fade, mask)) for mask in (until, after, whole))
    return between, reached, left, total


# ---- gated delta rule -----------------------------------------------------------------------------------------------


def delta_rule_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    heads = v.shape[2]
    queries, keys, values = (_by_head(x, heads) for x in (q, k, v))
    faded = state.squeeze(0) * torch.exp(g).view(heads, 1, 1)
    change = (values - torch.bmm(keys, faded)) * beta.view(heads, 1, 1)
    new = faded + keys.permute(0, 2, 1) * change
    return _by_token(torch.bmm(queries * scale, new)), new.unsqueeze(0)


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float,
    until: torch.Tensor,
    after: torch.Tensor,
    whole: torch.Tensor,
    identity: torch.Tensor,
    quarters: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, before = v.shape[2], state.squeeze(0)
    queries, keys, values = (_by_head(x, heads) for x in (q, k, v))
    queries, turned, rate = queries * scale, keys.permute(0, 2, 1), beta.permute(2, 1, 0)
    between, reached, left, total = _fading(g.permute(0, 2, 1), until, after, whole)
    reached, left, total = (x.permute(1, 2, 0) for x in (reached, left, total))  # [H, T or 1, 1]
    answers = torch.bmm(keys, turned) * between * rate
    inverse = identity - answers * quarters[0]
    for quarter in quarters[1:]:
        inverse = inverse - torch.bmm(torch.bmm(inverse, answers * quarter), inverse)
    change = torch.bmm(inverse, rate * (values - torch.bmm(keys * reached, before)))
    out = torch.bmm(queries * reached, before) + torch.bmm(torch.bmm(queries, turned) * between, change)
    new = before * total + torch.bmm((keys * left).permute(0, 2, 1), change)
    return _by_token(out), new.unsqueeze(0)


# ---- gated linear attention -----------------------------------------------------------------------------------------


def linear_attention_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    heads = v.shape[2]
    queries, keys, values = (_by_head(x, heads) for x in (q, k, v))
    faded = state.squeeze(0) * torch.exp(g).view(heads, -1, 1)
    new = faded + keys.permute(0, 2, 1) * values
    return _by_token(torch.bmm(queries * scale, new)), new.unsqueeze(0)


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    scale: float,
    until: torch.Tensor,
    after: torch.Tensor,
    whole: torch.Tensor,
    of_head: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """of_head: see `of_head_mask`."""
    heads, before, decays = v.shape[2], state.squeeze(0), g.shape[3]
    queries, keys, values = (_by_head(x, heads) for x in (q, k, v))
    queries = queries * scale
    between, reached, left, total = _fading(g.view(1, -1, heads * decays).permute(0, 2, 1), until, after, whole)
    reached, left = (x.view(heads, decays, -1).permute(0, 2, 1) for x in (reached, left))  # [H, T, 1 or Dk]
    if decays == 1:
        weights = torch.bmm(queries, keys.permute(0, 2, 1)) * between
    else:
        weights = _weights_by_key(queries, keys, between, of_head)
    out = torch.bmm(queries * reached, before) + torch.bmm(weights, values)
    new = before * total.view(heads, decays, 1) + torch.bmm((keys * left).permute(0, 2, 1), values)
    return _by_token(out), new.unsqueeze(0)


def _weights_by_key(
    queries: torch.Tensor, keys: torch.Tensor, between: torch.Tensor, of_head: torch.Tensor
) -> torch.Tensor:
    """[H, T, T] of queries, keys [H, T, Dk] and what is left of each key dimension, [H * Dk, T, T]."""
    heads, width = queries.shape[0], queries.shape[2]
    of_query, of_key = (x.permute(0, 2, 1).reshape(heads * width, -1, 1) for x in (queries, keys))
    pairs = between * of_query * of_key.permute(0, 2, 1)
    return linear(pairs.permute(1, 2, 0), of_head).permute(2, 0, 1)


# ---- selective scan -------------------------------------------------------------------------------------------------


def selective_scan_step(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rate = dt.permute(0, 2, 1)  # [1, C, 1]
    new = state * torch.exp(rate * a) + (rate * x.permute(0, 2, 1)) * b
    return (new * c).sum(2, keepdim=True).permute(0, 2, 1), new


def selective_scan(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A constant number of tokens, one after the other: the form without a loop moves many times the memory."""
    outs = []
    for at in range(x.shape[1]):
        here = [y.narrow(1, at, 1) for y in (x, dt, b, c)]
        out, state = selective_scan_step(here[0], here[1], a, here[2], here[3], state)
        outs.append(out)
    return torch.cat(outs, 1), state
