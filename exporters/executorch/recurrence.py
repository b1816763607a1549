"""The recurrences in ATen that XNNPACK computes: a matrix product for each head, masks as numbers, no slice of dynamic length.

The batch is one, and heads come first: [H, T, D]. For one token each is the plain recurrence. For more it is the matrix form of
`ops.recurrence`; its masks over pairs of tokens are cut from constants, once for all layers (`square`).
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from ...ops.recurrence import CHUNK

_SIDE = CHUNK + 1
"""The side of a mask. It is larger than any cut of it: else torch.export would fix the dynamic length."""

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
    """1 in the lower left quarter of each diagonal block of size 2 * `size`."""
    block = torch.arange(_SIDE) // size
    rows, columns = block.unsqueeze(1), block.unsqueeze(0)
    return ((rows == columns + 1) & (columns % 2 == 0)).to(torch.float32)


def of_head_mask(heads: int, width: int) -> torch.Tensor:
    """[H, H * Dk]: 1 where a key dimension is of the head. Its product sums over them; a view would have two unknown sizes."""
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
    inputs = torch.cat((state, x.permute(0, 2, 1)), 2)  # [1, C, K]
    out = (inputs * weight).sum(2, keepdim=True).permute(0, 2, 1)
    return out if bias is None else out + bias, inputs.narrow(2, 1, state.shape[2])


def causal_conv(
    x: torch.Tensor, rows: list[torch.Tensor], bias: torch.Tensor | None, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [1, T, C]; rows: K of [C], the columns of the weight."""
    length, before = x.shape[1], state.shape[2]
    inputs = torch.cat((state.permute(0, 2, 1), x), 1)
    out = inputs.narrow(1, 0, length) * rows[0]
    for tap in range(1, before + 1):
        out = out + inputs.narrow(1, tap, length) * rows[tap]
    return out if bias is None else out + bias, inputs.narrow(1, length, before).permute(0, 2, 1)


# ---- decays ---------------------------------------------------------------------------------------------------------


Masks = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""`until_mask`, `after_mask` and a row of ones, cut to the tokens of the call."""


def _decays(fade: torch.Tensor, masks: Masks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decays from log decays [1, N, T]: from token j to token i, [N, T, T], 0 for j > i; from the start of the chunk to token i,
    [1, N, T]; from token j to the end of the chunk, [1, N, T]; and over all of it, [1, N, 1].
    """
    until, after, _ = masks
    each = fade.view(fade.shape[1], 1, -1)
    between = torch.exp(linear(each * until, after)) * until
    since_start, to_end, total = (torch.exp(linear(fade, mask)) for mask in masks)
    return between, since_start, to_end, total


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
    masks: Masks,
    identity: torch.Tensor,
    quarters: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, before = v.shape[2], state.squeeze(0)
    queries, keys, values = (_by_head(x, heads) for x in (q, k, v))
    queries, turned, rate = queries * scale, keys.permute(0, 2, 1), beta.permute(2, 1, 0)
    between, since_start, to_end, total = _decays(g.permute(0, 2, 1), masks)
    since_start, to_end, total = (x.permute(1, 2, 0) for x in (since_start, to_end, total))  # [H, T or 1, 1]
    reads = torch.bmm(keys, turned) * between * rate
    inverse = identity - reads * quarters[0]
    for quarter in quarters[1:]:
        inverse = inverse - torch.bmm(torch.bmm(inverse, reads * quarter), inverse)
    change = torch.bmm(inverse, rate * (values - torch.bmm(keys * since_start, before)))
    out = torch.bmm(queries * since_start, before) + torch.bmm(torch.bmm(queries, turned) * between, change)
    new = before * total + torch.bmm((keys * to_end).permute(0, 2, 1), change)
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
    masks: Masks,
    of_head: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """of_head: see `of_head_mask`."""
    heads, before, decays = v.shape[2], state.squeeze(0), g.shape[3]
    queries, keys, values = (_by_head(x, heads) for x in (q, k, v))
    queries = queries * scale
    between, since_start, to_end, total = _decays(g.view(1, -1, heads * decays).permute(0, 2, 1), masks)
    since_start, to_end = (x.view(heads, decays, -1).permute(0, 2, 1) for x in (since_start, to_end))  # [H, T, 1 or Dk]
    if decays == 1:
        weights = torch.bmm(queries, keys.permute(0, 2, 1)) * between
    else:
        weights = _weights_by_key(queries, keys, between, of_head)
    out = torch.bmm(queries * since_start, before) + torch.bmm(weights, values)
    new = before * total.view(heads, decays, 1) + torch.bmm((keys * to_end).permute(0, 2, 1), values)
    return _by_token(out), new.unsqueeze(0)


def _weights_by_key(
    queries: torch.Tensor, keys: torch.Tensor, between: torch.Tensor, of_head: torch.Tensor
) -> torch.Tensor:
    """[H, T, T] of queries, keys [H, T, Dk] and the decays of each key dimension, [H * Dk, T, T]."""
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
    """A constant number of tokens, one after the other: the form without a loop moves much more memory."""
    outs = []
    for at in range(x.shape[1]):
        x_t, dt_t, b_t, c_t = (y.narrow(1, at, 1) for y in (x, dt, b, c))
        out, state = selective_scan_step(x_t, dt_t, a, b_t, c_t, state)
        outs.append(out)
    return torch.cat(outs, 1), state


# ---- diagonal scan --------------------------------------------------------------------------------------------------


def diagonal_scan(decay: torch.Tensor, value: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A constant number of tokens, one after the other."""
    h, outs = state.unsqueeze(1), []
    for at in range(value.shape[1]):
        h = h * decay.narrow(1, at, 1) + value.narrow(1, at, 1)
        outs.append(h)
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1), h.squeeze(1)


# ---- generalized delta rule -----------------------------------------------------------------------------------------


def generalized_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A constant number of tokens, one after the other: the form without a loop has a matrix for each key dimension."""
    heads, s, outs = v.shape[2], state.squeeze(0), []
    for at in range(v.shape[1]):
        q_t, k_t, v_t, g_t, a_t, b_t = (x.narrow(1, at, 1).view(heads, 1, -1) for x in (q, k, v, g, a, b))
        written = b_t.permute(0, 2, 1) * torch.bmm(a_t, s)
        s = s * torch.exp(g_t.permute(0, 2, 1)) + written + k_t.permute(0, 2, 1) * v_t
        outs.append(torch.bmm(q_t, s).permute(1, 0, 2).unsqueeze(0))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1), s.unsqueeze(0)
