"""The recurrences of linear-attention and state-space layers, for up to `CHUNK` tokens at once. What may enter: torch.

Causal convolution, gated delta rule (arXiv 2412.06464), gated linear attention (HGRN-2, arXiv 2404.07904; Mamba-2,
arXiv 2405.21060) and selective scan (Mamba, arXiv 2312.00752). Each takes the state before the tokens and gives it after
them; one token is the decode step, more are a chunk of prefill in matrix form. A reference is its decomposition: it has no
loop over tokens, so a dynamic length stays dynamic, and where the length is the constant 1 it is the plain recurrence.
The ops themselves take any length, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

CHUNK = 64
"""The most tokens of a decomposed recurrence: its masks and its triangular inverse are built for that many."""

WORK_BYTES = 256 << 20
"""What an op may take besides its inputs and outputs: as many rows of the batch at once as that holds, one at least."""


def _levels(length: Any, dynamic: int = CHUNK) -> list[int]:
    """1, 2, 4 … below the length, or below `dynamic` where the length is dynamic."""
    most = length if isinstance(length, int) else dynamic
    return [1 << i for i in range(12) if 1 << i < most]


def _is_step(x: torch.Tensor) -> bool:
    """Whether dimension 1 is the constant 1; a dynamic one must not be asked."""
    return isinstance(x.shape[1], int) and x.shape[1] == 1


def _spread(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, T, groups, D] as [B, heads, T, D]: head h reads group h // (heads / groups)."""
    batch, length, groups, width = x.shape
    if groups != heads:
        x = x.unsqueeze(3).expand(-1, -1, -1, heads // groups, -1).reshape(batch, length, heads, width)
    return x.transpose(1, 2)


def _fading(fade: torch.Tensor, length: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of log decays [..., T, 1]: what is left of token j at token i, [..., T, T], 0 for j > i; of what was before the chunk at
    token i, [..., T, 1]; and of token j after the chunk, [..., T, 1].

    Sums of their own, never differences of running totals: those lose the small decays behind a large one.
    """
    at = torch.arange(length, device=fade.device)
    seen = at.unsqueeze(1) >= at.unsqueeze(0)
    until, after = seen.to(fade.dtype), torch.logical_not(seen).to(fade.dtype)  # [i, l]: l <= i; [j, l]: l > j
    between = torch.matmul(until, fade * after.transpose(0, 1))
    return torch.exp(between) * until, torch.exp(torch.matmul(until, fade)), torch.exp(torch.matmul(after, fade))


# ---- causal convolution ---------------------------------------------------------------------------------------------


def causal_conv_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    length, taps = x.shape[1], weight.shape[1]
    seen = torch.cat((state.transpose(1, 2), x), 1)  # [B, K-1+T, C]
    wide = weight.to(x.dtype)
    out = seen.narrow(1, 0, length) * wide[:, 0]
    for tap in range(1, taps):
        out = out + seen.narrow(1, tap, length) * wide[:, tap]
    if bias is not None:
        out = out + bias.to(x.dtype)
    return out, seen.narrow(1, length, taps - 1).transpose(1, 2).contiguous()


@torch.library.custom_op("edgewright::causal_conv", mutates_args=())
def causal_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depthwise causal convolution without activation. x: [B, T, C]; weight: [C, K]; bias: [C]; state: [B, C, K-1].

    The state is the last K-1 inputs before x, oldest first. Returns [B, T, C] and the state after x.
    """
    return causal_conv_reference(x, weight, bias, state)


@causal_conv.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


# ---- gated delta rule -----------------------------------------------------------------------------------------------


def gated_delta_rule_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, length = v.shape[2], v.shape[1]
    queries, keys, values = _spread(q, heads) * scale, _spread(k, heads), v.transpose(1, 2)  # [B, H, T, D]
    rate = beta.transpose(1, 2).unsqueeze(-1)  # [B, H, T, 1]
    if _is_step(v):
        faded = state * torch.exp(g.transpose(1, 2)).unsqueeze(-1)
        change = (values - torch.matmul(keys, faded)) * rate  # [B, H, 1, Dv]
        new = faded + keys.transpose(2, 3) * change
        return torch.matmul(queries, new).transpose(1, 2), new
    decay, reached, left = _fading(g.transpose(1, 2).unsqueeze(-1), length)
    # (I + A) change = rate * (v - what the state before the chunk answers); A_ij is how far key j answers for key i.
    answers = decay * torch.matmul(keys, keys.transpose(2, 3)) * rate
    inverse = _inverse_of_unit_lower(answers, length)
    change = torch.matmul(inverse, rate * (values - torch.matmul(keys * reached, state)))
    out = torch.matmul(queries * reached, state)
    out = out + torch.matmul(decay * torch.matmul(queries, keys.transpose(2, 3)), change)
    new = state * reached.narrow(2, length - 1, 1) + torch.matmul((keys * left).transpose(2, 3), change)
    return out.transpose(1, 2), new


def _inverse_of_unit_lower(lower: torch.Tensor, length: Any) -> torch.Tensor:
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


@torch.library.custom_op("edgewright::gated_delta_rule", mutates_args=())
def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`S = exp(g) S; S += k (beta (v - S' k))'; out = scale S' q` a token (arXiv 2412.06464). float32.

    q, k: [B, T, groups, Dk], normalised by the caller; v: [B, T, H, Dv]; g (log decay, at most 0), beta: [B, T, H];
    state: [B, H, Dk, Dv]. Head h reads group h // (H / groups). Returns [B, T, H, Dv] and the state after the tokens.
    """
    heads, length = v.shape[2], min(CHUNK, v.shape[1])
    row = (
        4 * heads * (6 * length * length + 4 * length * (k.shape[3] + v.shape[3]) + 2 * state.shape[2] * state.shape[3])
    )
    return _in_chunks(gated_delta_rule_reference, (q, k, v, g, beta), state, row, (scale,))


@gated_delta_rule.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


# ---- gated linear attention -----------------------------------------------------------------------------------------


def linear_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, length = v.shape[2], v.shape[1]
    queries, keys, values = _spread(q, heads) * scale, _spread(k, heads), v.transpose(1, 2)  # [B, H, T, D]
    fade = g.transpose(1, 2)  # [B, H, T, 1 or Dk]
    if _is_step(v):
        new = state * torch.exp(fade).transpose(2, 3) + keys.transpose(2, 3) * values
        return torch.matmul(queries, new).transpose(1, 2), new
    if g.shape[3] == 1:
        decay, reached, left = _fading(fade, length)
        weights = decay * torch.matmul(queries, keys.transpose(2, 3))
    else:  # a decay for each key dimension: pair by pair, as a product of two exponentials would overflow
        decay, reached, left = _fading(fade.transpose(2, 3).unsqueeze(-1), length)  # [B, H, Dk, T, …]
        reached, left = reached.squeeze(-1).transpose(2, 3), left.squeeze(-1).transpose(2, 3)
        pairs = queries.transpose(2, 3).unsqueeze(-1) * keys.transpose(2, 3).unsqueeze(3)  # [B, H, Dk, T, T]
        weights = (pairs * decay).sum(2)
    out = torch.matmul(queries * reached, state) + torch.matmul(weights, values)
    carried = torch.matmul((keys * left).transpose(2, 3), values)
    return out.transpose(1, 2), state * reached.narrow(2, length - 1, 1).transpose(2, 3) + carried


@torch.library.custom_op("edgewright::linear_attention", mutates_args=())
def linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`S = diag(exp(g)) S + k v'; out = scale S' q` a token. float32.

    q, k: [B, T, groups, Dk]; v: [B, T, H, Dv]; g (log decay, at most 0): [B, T, H, 1] (Mamba-2) or [B, T, H, Dk] (HGRN-2);
    state: [B, H, Dk, Dv]. Head h reads group h // (H / groups). Returns [B, T, H, Dv] and the state after the tokens.
    """
    heads, length = v.shape[2], min(CHUNK, v.shape[1])
    pairs = g.shape[3] * length * length  # between tokens, for each decay
    row = 4 * heads * (4 * pairs + 4 * length * (k.shape[3] + v.shape[3]) + 2 * state.shape[2] * state.shape[3])
    return _in_chunks(linear_attention_reference, (q, k, v, g), state, row, (scale,))


@linear_attention.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


# ---- selective scan -------------------------------------------------------------------------------------------------


def selective_scan_reference(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
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
        nothing = torch.zeros_like(value.narrow(1, 0, 1)).expand(-1, reach, -1, -1)
        value = value + decay * torch.cat((nothing, value), 1).narrow(1, 0, length + 1)
        decay = decay * torch.cat((nothing, decay), 1).narrow(1, 0, length + 1)
    states = value.narrow(1, 1, length)
    return (states * c.unsqueeze(2)).sum(-1), states.narrow(1, length - 1, 1).squeeze(1)


@torch.library.custom_op("edgewright::selective_scan", mutates_args=())
def selective_scan(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h = exp(dt a) h + dt x b; y = h c` a token, without the skip (Mamba-1, arXiv 2312.00752). float32.

    x, dt: [B, T, C]; a: [C, N], negative; b, c: [B, T, N]; state: [B, C, N]. Returns [B, T, C] and the state after.
    """
    row = 4 * 7 * (1 + min(CHUNK, x.shape[1])) * a.numel()

    def reference(
        x: torch.Tensor, dt: torch.Tensor, b: torch.Tensor, c: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return selective_scan_reference(x, dt, a, b, c, state)

    return _in_chunks(reference, (x, dt, b, c), state, row)


@selective_scan.register_fake
def _(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


def _in_chunks(
    reference: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    tokens: Sequence[torch.Tensor],
    state: torch.Tensor,
    row_bytes: int,
    constants: Sequence[float] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference over all tokens (dimension 1 of each tensor), `CHUNK` at a time. Outputs own their storage.

    row_bytes: what it takes for a chunk of one row of the batch; `WORK_BYTES` says how many rows it gets together.
    """
    most = max(1, WORK_BYTES // max(1, row_bytes))
    rows = []
    for first in range(0, max(1, int(state.shape[0])), most):
        given, reached, made = [t[first : first + most] for t in tokens], state[first : first + most], []
        for at in range(0, int(tokens[0].shape[1]), CHUNK):
            out, reached = reference(*(t[:, at : at + CHUNK] for t in given), reached, *constants)
            made.append(out)
        # a state may be a view of the states at all tokens
        rows.append((torch.cat(made, 1), reached.clone(memory_format=torch.contiguous_format)))
    if len(rows) == 1:
        return rows[0]
    return torch.cat([out for out, _ in rows]), torch.cat([reached for _, reached in rows])
