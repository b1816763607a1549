"""The recurrences of linear-attention and state-space layers.

Causal convolution, gated delta rule (arXiv 2412.06464), gated linear attention (HGRN-2, arXiv 2404.07904; Mamba-2,
arXiv 2405.21060) and selective scan (Mamba, arXiv 2312.00752). Each takes the state before the tokens and returns the state
after them. One token is the decode step: the plain recurrence. More tokens are a chunk of prefill, in matrix form. A reference
takes up to `CHUNK` tokens and has no loop over them, so a dynamic length stays dynamic. In eager mode the ops take any length,
chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .define import define

CHUNK = 64
"""The most tokens of a decomposed recurrence: its masks and its triangular inverse are built for that many."""

WORK_BYTES = 256 << 20
"""Memory that an op may take besides its inputs and outputs. As many rows of the batch as fit in it run together, at least one."""


def _levels(length: Any, dynamic: int = CHUNK) -> list[int]:
    """1, 2, 4 … below the length, or below `dynamic` where the length is dynamic."""
    most = length if isinstance(length, int) else dynamic
    return [1 << i for i in range(12) if 1 << i < most]


def _is_step(x: Tensor) -> bool:
    """Whether dimension 1 is the constant 1. A dynamic length must not be compared: that would fix it."""
    return isinstance(x.shape[1], int) and x.shape[1] == 1


def _spread(x: Tensor, heads: int) -> Tensor:
    """[B, T, groups, D] as [B, heads, T, D]: head h reads group h // (heads / groups)."""
    batch, length, groups, width = x.shape
    if groups != heads:
        x = x.unsqueeze(3).expand(-1, -1, -1, heads // groups, -1).reshape(batch, length, heads, width)
    return x.transpose(1, 2)


def _decays(fade: Tensor, length: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Decays from log decays [..., T, 1]: from token j to token i, [..., T, T], 0 for j > i; from the start of the chunk to
    token i, [..., T, 1]; and from token j to the end of the chunk, [..., T, 1].

    Each is a sum of its own, never a difference of running totals: a difference loses the small decays behind a large one.
    """
    at = torch.arange(length, device=fade.device)
    past = at.unsqueeze(1) >= at.unsqueeze(0)
    until, after = past.to(fade.dtype), torch.logical_not(past).to(fade.dtype)  # [i, l]: l <= i; [j, l]: l > j
    between = torch.matmul(until, fade * after.transpose(0, 1))
    return torch.exp(between) * until, torch.exp(torch.matmul(until, fade)), torch.exp(torch.matmul(after, fade))


def _like(x: Tensor) -> Tensor:
    """An empty tensor of the shape and type of x, contiguous."""
    return x.new_empty(x.shape)


# ---- causal convolution ---------------------------------------------------------------------------------------------


@define(fake=lambda x, weight, bias, state: (_like(x), _like(state)))
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution without activation. x: [B, T, C]; weight: [C, K]; bias: [C]; state: [B, C, K-1].

    The state is the last K-1 inputs before x, oldest first. Returns [B, T, C] and the state after x.
    """
    length, taps = x.shape[1], weight.shape[1]
    inputs = torch.cat((state.transpose(1, 2), x), 1)  # [B, K-1+T, C]
    wide = weight.to(x.dtype)
    out = inputs.narrow(1, 0, length) * wide[:, 0]
    for tap in range(1, taps):
        out = out + inputs.narrow(1, tap, length) * wide[:, tap]
    if bias is not None:
        out = out + bias.to(x.dtype)
    return out, inputs.narrow(1, length, taps - 1).transpose(1, 2).contiguous()


# ---- gated delta rule -----------------------------------------------------------------------------------------------


def _delta_by_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    heads, length = v.shape[2], min(CHUNK, v.shape[1])
    widths = k.shape[3] + v.shape[3]
    row = 4 * heads * (6 * length * length + 4 * length * widths + 2 * state.shape[2] * state.shape[3])
    return _in_chunks(gated_delta_rule, (q, k, v, g, beta), state, row, (scale,))


@define(fake=lambda q, k, v, g, beta, state, scale: (_like(v), _like(state)), eager=_delta_by_chunks)
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`S = exp(g) S; S += k (beta (v - S' k))'; out = scale S' q` a token (arXiv 2412.06464). float32.

    q, k: [B, T, groups, Dk], normalised by the caller; v: [B, T, H, Dv]; g (log decay, at most 0), beta: [B, T, H];
    state: [B, H, Dk, Dv]. Head h reads group h // (H / groups). Returns [B, T, H, Dv] and the state after the tokens.
    """
    heads, length = v.shape[2], v.shape[1]
    queries, keys, values = _spread(q, heads) * scale, _spread(k, heads), v.transpose(1, 2)  # [B, H, T, D]
    rate = beta.transpose(1, 2).unsqueeze(-1)  # [B, H, T, 1]
    if _is_step(v):
        faded = state * torch.exp(g.transpose(1, 2)).unsqueeze(-1)
        change = (values - torch.matmul(keys, faded)) * rate  # [B, H, 1, Dv]
        new = faded + keys.transpose(2, 3) * change
        return torch.matmul(queries, new).transpose(1, 2), new
    between, since_start, to_end = _decays(g.transpose(1, 2).unsqueeze(-1), length)
    # (I + A) change = rate * (v - keys times the state before the chunk); A_ij: how much of the change at key j key i reads.
    reads = between * torch.matmul(keys, keys.transpose(2, 3)) * rate
    inverse = _inverse_of_unit_lower(reads, length)
    change = torch.matmul(inverse, rate * (values - torch.matmul(keys * since_start, state)))
    out = torch.matmul(queries * since_start, state)
    out = out + torch.matmul(between * torch.matmul(queries, keys.transpose(2, 3)), change)
    new = state * since_start.narrow(2, length - 1, 1) + torch.matmul((keys * to_end).transpose(2, 3), change)
    return out.transpose(1, 2), new


def _inverse_of_unit_lower(lower: Tensor, length: Any) -> Tensor:
    """(I + strictly lower part of [B, H, T, T])^-1, by doubling diagonal blocks: as stable as substitution.

    With X the inverse of the diagonal blocks of size b, those of size 2b have -X L X in their lower left quarter.
    """
    at = torch.arange(length, device=lower.device)
    rows, columns = at.unsqueeze(1), at.unsqueeze(0)
    inverse = (rows == columns).to(lower.dtype).expand(lower.shape)
    for size in _levels(length):
        block_row, block_column = rows // size, columns // size
        quarter = torch.logical_and(block_row == block_column + 1, block_column % 2 == 0)
        part = torch.where(quarter, lower, torch.zeros_like(lower))
        inverse = inverse - torch.matmul(torch.matmul(inverse, part), inverse)
    return inverse


# ---- gated linear attention -----------------------------------------------------------------------------------------


def _linear_by_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    heads, length = v.shape[2], min(CHUNK, v.shape[1])
    pairs = g.shape[3] * length * length  # between tokens, for each decay
    row = 4 * heads * (4 * pairs + 4 * length * (k.shape[3] + v.shape[3]) + 2 * state.shape[2] * state.shape[3])
    return _in_chunks(linear_attention, (q, k, v, g), state, row, (scale,))


@define(fake=lambda q, k, v, g, state, scale: (_like(v), _like(state)), eager=_linear_by_chunks)
def linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`S = diag(exp(g)) S + k v'; out = scale S' q` a token. float32.

    q, k: [B, T, groups, Dk]; v: [B, T, H, Dv]; g (log decay, at most 0): [B, T, H, 1] (Mamba-2) or [B, T, H, Dk] (HGRN-2);
    state: [B, H, Dk, Dv]. Head h reads group h // (H / groups). Returns [B, T, H, Dv] and the state after the tokens.
    """
    heads, length = v.shape[2], v.shape[1]
    queries, keys, values = _spread(q, heads) * scale, _spread(k, heads), v.transpose(1, 2)  # [B, H, T, D]
    fade = g.transpose(1, 2)  # [B, H, T, 1 or Dk]
    if _is_step(v):
        new = state * torch.exp(fade).transpose(2, 3) + keys.transpose(2, 3) * values
        return torch.matmul(queries, new).transpose(1, 2), new
    if g.shape[3] == 1:
        between, since_start, to_end = _decays(fade, length)
        weights = between * torch.matmul(queries, keys.transpose(2, 3))
    else:  # a decay for each key dimension: pair by pair, because a product of two exponentials would overflow
        between, since_start, to_end = _decays(fade.transpose(2, 3).unsqueeze(-1), length)  # [B, H, Dk, T, …]
        since_start, to_end = since_start.squeeze(-1).transpose(2, 3), to_end.squeeze(-1).transpose(2, 3)
        pairs = queries.transpose(2, 3).unsqueeze(-1) * keys.transpose(2, 3).unsqueeze(3)  # [B, H, Dk, T, T]
        weights = (pairs * between).sum(2)
    out = torch.matmul(queries * since_start, state) + torch.matmul(weights, values)
    carried = torch.matmul((keys * to_end).transpose(2, 3), values)
    return out.transpose(1, 2), state * since_start.narrow(2, length - 1, 1).transpose(2, 3) + carried


# ---- selective scan -------------------------------------------------------------------------------------------------


def _scan_by_chunks(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    row = 4 * 7 * (1 + min(CHUNK, x.shape[1])) * a.numel()

    def scan(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(x, dt, a, b, c, state)

    return _in_chunks(scan, (x, dt, b, c), state, row)


@define(fake=lambda x, dt, a, b, c, state: (_like(x), _like(state)), eager=_scan_by_chunks)
def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`h = exp(dt a) h + dt x b; y = h c` a token, without the skip (Mamba-1, arXiv 2312.00752). float32.

    x, dt: [B, T, C]; a: [C, N], negative; b, c: [B, T, N]; state: [B, C, N]. Returns [B, T, C] and the state after.
    """
    length = x.shape[1]
    decay = torch.exp(dt.unsqueeze(-1) * a)  # [B, T, C, N]
    value = (dt * x).unsqueeze(-1) * b.unsqueeze(2)
    if _is_step(x):
        new = state * decay.squeeze(1) + value.squeeze(1)
        return (new * c).sum(-1).unsqueeze(1), new
    # The state before the tokens is the first element; each level reaches twice as far back.
    value = torch.cat((state.unsqueeze(1), value), 1)
    decay = torch.cat((torch.zeros_like(state).unsqueeze(1), decay), 1)
    for reach in _levels(length + 1, CHUNK + 1):
        zeros = torch.zeros_like(value.narrow(1, 0, 1)).expand(-1, reach, -1, -1)
        value = value + decay * torch.cat((zeros, value), 1).narrow(1, 0, length + 1)
        decay = decay * torch.cat((zeros, decay), 1).narrow(1, 0, length + 1)
    states = value.narrow(1, 1, length)
    return (states * c.unsqueeze(2)).sum(-1), states.narrow(1, length - 1, 1).squeeze(1)


# ---- eager mode -----------------------------------------------------------------------------------------------------


def _in_chunks(
    reference: Callable[..., tuple[Tensor, Tensor]],
    tokens: Sequence[Tensor],
    state: Tensor,
    row_bytes: int,
    constants: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """The reference over all tokens (dimension 1 of each tensor), `CHUNK` at a time. Outputs own their storage.

    row_bytes: memory for a chunk of one row of the batch; `WORK_BYTES` then says how many rows run together.
    """
    together = max(1, WORK_BYTES // max(1, row_bytes))
    parts = []
    for first in range(0, max(1, int(state.shape[0])), together):
        rows, new_state, outs = [t[first : first + together] for t in tokens], state[first : first + together], []
        for at in range(0, int(tokens[0].shape[1]), CHUNK):
            out, new_state = reference(*(t[:, at : at + CHUNK] for t in rows), new_state, *constants)
            outs.append(out)
        # a state may be a view of the states at all tokens
        parts.append((torch.cat(outs, 1), new_state.clone(memory_format=torch.contiguous_format)))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts]), torch.cat([new_state for _, new_state in parts])
