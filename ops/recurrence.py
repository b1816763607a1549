"""The recurrences of linear-attention and state-space layers.

Causal convolution, gated delta rule (arXiv 2412.06464), generalized delta rule (RWKV-7, arXiv 2503.14456), gated linear attention
(HGRN-2, arXiv 2404.07904; Mamba-2, arXiv 2405.21060), selective scan (Mamba, arXiv 2312.00752) and diagonal scan (RG-LRU, arXiv
2402.19427). Each takes the state before the tokens and returns the state after them. One token is the decode step: the plain
recurrence. More tokens are a chunk of prefill, in matrix form. A reference takes up to `CHUNK` tokens and has no loop over them,
so a dynamic length stays dynamic. In eager mode the ops take any length, chunk by chunk.
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


# ---- generalized delta rule -----------------------------------------------------------------------------------------


def _generalized_by_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    heads, length, width = v.shape[2], min(CHUNK, v.shape[1]), k.shape[3]
    pairs = width * length * length  # between tokens, for each decay
    row = 4 * heads * (4 * pairs + 6 * length * length + 8 * length * width + 2 * width * v.shape[3])
    return _in_chunks(generalized_delta_rule, (q, k, v, g, a, b), state, row)


@define(fake=lambda q, k, v, g, a, b, state: (_like(v), _like(state)), eager=_generalized_by_chunks)
def generalized_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`S = diag(exp(g)) S + b (S' a)' + k v'; out = S' q` a token (RWKV-7, arXiv 2503.14456). float32.

    q, k, g (log decay, at most 0), a, b: [B, T, H, Dk]; v: [B, T, H, Dv]; state: [B, H, Dk, Dv]. With a = -k and b = rate k it is
    the delta rule under a decay for each key dimension. Returns [B, T, H, Dv] and the state after the tokens.
    """
    queries, keys, values, fade, reads, writes = (x.transpose(1, 2) for x in (q, k, v, g, a, b))  # [B, H, T, D]
    if _is_step(v):
        read = torch.matmul(reads, state)
        new = state * torch.exp(fade).transpose(2, 3) + writes.transpose(2, 3) * read + keys.transpose(2, 3) * values
        return torch.matmul(queries, new).transpose(1, 2), new
    length = v.shape[1]
    at = torch.arange(length, device=v.device)
    past = (at.unsqueeze(1) > at.unsqueeze(0)).to(v.dtype)  # [i, l]: l < i
    column = fade.transpose(2, 3).unsqueeze(-1)  # [B, H, Dk, T, 1]
    # What a token reads is the state before it: from behind token j to before token i, pair by pair as in linear attention.
    between = torch.exp(torch.matmul(past, column * past)) * past  # [B, H, Dk, T, T]
    since_start = torch.exp(torch.matmul(past, fade))  # [B, H, T, Dk], to before token i
    to_end = torch.exp(torch.matmul(past.transpose(0, 1), fade))  # from behind token j
    faded = queries * torch.exp(fade)

    def pairs(x: Tensor, y: Tensor) -> Tensor:
        return (x.transpose(2, 3).unsqueeze(-1) * y.transpose(2, 3).unsqueeze(3) * between).sum(2)  # [B, H, T, T]

    # (I - A) read = a times the state before the chunk + what earlier keys wrote; A_ij: how much token i reads of read j.
    inverse = _inverse_of_unit_lower(-pairs(reads, writes), length)
    read = torch.matmul(inverse, torch.matmul(reads * since_start, state) + torch.matmul(pairs(reads, keys), values))
    out = torch.matmul(faded * since_start, state)
    out = out + torch.matmul(pairs(faded, writes), read) + torch.matmul(pairs(faded, keys), values)
    out = out + (queries * writes).sum(-1, keepdim=True) * read + (queries * keys).sum(-1, keepdim=True) * values
    total = torch.exp(fade.sum(2, keepdim=True)).transpose(2, 3)
    carried = torch.matmul((writes * to_end).transpose(2, 3), read)
    new = state * total + carried + torch.matmul((keys * to_end).transpose(2, 3), values)
    return out.transpose(1, 2), new


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
    decay = torch.exp(dt.unsqueeze(-1) * a)  # [B, T, C, N]
    value = (dt * x).unsqueeze(-1) * b.unsqueeze(2)
    if _is_step(x):
        new = state * decay.squeeze(1) + value.squeeze(1)
        return (new * c).sum(-1).unsqueeze(1), new
    states = _states_of(decay, value, state)
    return (states * c.unsqueeze(2)).sum(-1), states.narrow(1, x.shape[1] - 1, 1).squeeze(1)


def _states_of(decay: Tensor, value: Tensor, state: Tensor) -> Tensor:
    """`h = decay h + value` after each token, [B, T, …] as both, from the state [B, …] before them."""
    length = value.shape[1]
    # The state before the tokens is the first element; each level reaches twice as far back.
    value = torch.cat((state.unsqueeze(1), value), 1)
    decay = torch.cat((torch.zeros_like(state).unsqueeze(1), decay), 1)
    for reach in _levels(length + 1, CHUNK + 1):
        zeros = torch.zeros_like(value.narrow(1, 0, 1)).expand(-1, reach, *[-1] * (value.dim() - 2))
        value = value + decay * torch.cat((zeros, value), 1).narrow(1, 0, length + 1)
        decay = decay * torch.cat((zeros, decay), 1).narrow(1, 0, length + 1)
    return value.narrow(1, 1, length)


# ---- diagonal scan --------------------------------------------------------------------------------------------------


def _diagonal_by_chunks(decay: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    row = 4 * 7 * (1 + min(CHUNK, value.shape[1])) * value.shape[2]
    return _in_chunks(diagonal_scan, (decay, value), state, row)


@define(fake=lambda decay, value, state: (_like(value), _like(state)), eager=_diagonal_by_chunks)
def diagonal_scan(decay: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`h = decay h + value` a token, each channel by itself (RG-LRU, arXiv 2402.19427). float32.

    decay (0 to 1), value: [B, T, C]; state: [B, C]. Returns h [B, T, C] and the state after the tokens.
    """
    if _is_step(value):
        new = state.unsqueeze(1) * decay + value
        return new, new.squeeze(1)
    states = _states_of(decay, value, state)
    return states, states.narrow(1, value.shape[1] - 1, 1).squeeze(1)


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
