"""The `edgewright::` ops in ATen that XNNPACK and ExecuTorch's kernels compute, and the forms in which codes are stored.

`passes` points the private nodes at these functions, and tracing inlines them. They avoid what XNNPACK refuses (a slice of
dynamic length, a mask of booleans), so that one delegate spans everything between two writes to a KV cache.
"""

from __future__ import annotations

import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized  # noqa: F401  registers the embedding kernels
import torch

from ...errors import UserError
from ...ops.packing import repack, swap_nibbles
from .internals import check


def container(bits: int, group: int, columns: int) -> int:
    """Bits of a linear's stored codes: 4, or 8 with one scale per channel. Raises UserError for a form that XNNPACK lacks."""
    if bits <= 4 and group % 32 == 0:
        return 4
    if group == columns:
        return 8
    raise UserError(
        f"{bits}-bit weights in groups of {group} do not exist for executorch; give groups of a multiple of 32 to 4 bits "
        "and less, and 5 bits and more one scale per channel"
    )


def no_kernel(graph: str, op: str) -> UserError:
    """The error for an op that ExecuTorch cannot compute."""
    return UserError(f"--format executorch: the graph '{graph}' uses {op}, which has no kernel; leave this target out")


def table_bits(bits: int) -> int:
    """Bits of an embedding's stored codes: its kernels read 2, 4 and 8."""
    return {2: 2, 3: 4, 4: 4}.get(bits, 8)


def quantized_embedding(ids: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of a table of `bits` 2, 4 or 8 by ExecuTorch's own kernel."""
    name = "embedding_byte" if bits == 8 else f"embedding_{bits}bit"
    half = 1 << (bits - 1)
    out: torch.Tensor = getattr(torch.ops.quantized_decomposed, name).dtype(
        codes, scales, None, -half, half - 1, ids, dtype=torch.float32
    )
    return out


def frequencies(inv_freq: torch.Tensor, width: int) -> torch.Tensor:
    """inv_freq [half] for each of `width` dimensions: twice for the rotated ones, 0 for those behind them, which do not turn."""
    return torch.cat((inv_freq, inv_freq, torch.zeros(width - 2 * inv_freq.shape[0])))


def rotary_tables(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, seq, 1, width]."""
    angles = (positions.to(torch.float32).view(1, -1, 1) * frequencies).unsqueeze(2)
    return angles.cos(), angles.sin()


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """The halves change places by a matrix of 0, 1 and -1, which is exact: XNNPACK refuses slices of dynamic length."""
    return x * cos + torch.nn.functional.linear(x, rotation) * sin


def mask_bias(mask: torch.Tensor) -> torch.Tensor:
    """bool [1, 1, S or 1, T] -> float32 [1, S or 1, T] to add to scores."""
    return _bias(mask.squeeze(0))


def causal_bias(positions: torch.Tensor, slots: torch.Tensor, window: int) -> torch.Tensor:
    """float32 [seq, slots]: 0 where the token at `positions` sees the cache slot, the lowest float elsewhere."""
    allowed = slots.unsqueeze(0) <= positions.unsqueeze(1)
    if window:
        allowed = torch.logical_and(allowed, slots.unsqueeze(0) > positions.unsqueeze(1) - window)
    return _bias(allowed)


def _bias(allowed: torch.Tensor) -> torch.Tensor:
    lowest = torch.full((), torch.finfo(torch.float32).min)
    return torch.where(allowed, torch.zeros((), dtype=torch.float32), lowest)


def biased(distances: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
    """float32 [H, S, slots]: a causal bias [S, slots] and a relative one of distances [M, H]."""
    back = (positions.unsqueeze(1) - slots.unsqueeze(0)).clamp(0, distances.shape[0] - 1)
    return torch.nn.functional.embedding(back, distances).permute(2, 0, 1) + causal


def per_group(bias: torch.Tensor, groups: int) -> torch.Tensor:
    """[S, T] or [1, S, T] -> [1, groups * S, T]."""
    bias = bias if bias.dim() == 3 else bias.unsqueeze(0)
    return torch.cat([bias] * groups, 1) if groups > 1 else bias


def groups_below(bias: torch.Tensor, groups: int) -> torch.Tensor:
    """[H, S, T] -> [H / groups, groups * S, T]: the heads that share a key head one below the other."""
    return bias if groups == 1 else bias.reshape(bias.shape[0] // groups, -1, bias.shape[2])


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    softcap: float,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """q [1, S, H, D]; k [KV, D, T]; v [KV, T, D]; bias [1 or KV, G * S or 1, T], G = H / KV. Returns [1, S, H * D].

    scales: of k and v, [KV, 1, T] each, where these are codes.
    """
    heads, width, kv = q.shape[2], q.shape[3], k.shape[0]
    groups = heads // kv
    # The query heads that share a key head follow one another along the rows: no key is copied.
    q = torch.permute_copy(q.view(-1, kv, groups, width), (1, 2, 0, 3)).view(kv, -1, width)
    scores = torch.bmm(q, k) * scale
    if scales is not None:
        scores = scores * scales[0]
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores + bias, dim=-1)
    out = torch.bmm(weights if scales is None else weights * scales[1], v)
    return torch.permute_copy(out.view(kv, groups, -1, width), (2, 0, 1, 3)).view(1, -1, heads * width)


def bidirectional_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    kv, width = k.shape[2], k.shape[3]
    k, v = (x.view(-1, kv, width) for x in (k, v))
    return attend(q, k.permute(1, 2, 0), v.permute(1, 0, 2), bias, scale, softcap)


def cross_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    kv, width = k.shape[1], k.shape[3]
    return attend(q, k.view(kv, -1, width).permute(0, 2, 1), v.view(kv, -1, width), bias, scale, softcap)


def start_of(past_length: torch.Tensor, capacity: int) -> int:
    """The number of tokens in the cache, as a size known only at run time."""
    start = past_length[0].item()
    check(start >= 0)
    check(start < capacity)
    assert isinstance(start, int | torch.SymInt)
    return start


Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, or codes and scales of one of them."""


def _write(new: Pair, caches: Pair, start: int) -> None:
    """New keys and values [1, S, KV, D] into the buffers, behind their first `start` tokens."""
    for tensor, cache in zip(new, caches, strict=True):
        torch.ops.llama.update_cache(tensor, cache, start)


def flash_attention(q: torch.Tensor, new: Pair, caches: Pair, start: int, scale: float) -> tuple[torch.Tensor]:
    """ExecuTorch's own kernel, which reads the grouped heads and only the filled part of the cache."""
    _write(new, caches, start)
    out = torch.ops.llama.custom_sdpa(q, *caches, start, None, 0.0, True, scale)
    return (out.reshape(1, -1, q.shape[2] * q.shape[3]),)


def windowed_attention(
    q: torch.Tensor, new: Pair, caches: Pair, start: int, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor]:
    """The same kernel with a mask [S, filled]. It then reads all slots it is given, so it is given the filled ones."""
    _write(new, caches, start)
    return (shared_attention(q, *caches, start, bias, scale),)


def capped_attention(
    q: torch.Tensor, new: Pair, caches: Pair, start: int, bias: torch.Tensor, scale: float, softcap: float
) -> tuple[torch.Tensor]:
    """The same with soft-capping, spelled out over the filled part of the cache; bias [1 or KV, G * S, filled]."""
    _write(new, caches, start)
    kv, width, end = caches[0].shape[2], caches[0].shape[3], bias.shape[2]
    keys, values = (cache.narrow(1, 0, end).view(-1, kv, width) for cache in caches)
    return (attend(q, keys.permute(1, 2, 0), values.permute(1, 0, 2), bias, scale, softcap),)


def merged_attention(
    q: torch.Tensor,
    new: Pair,
    caches: Pair,
    cross: Pair,
    start: int,
    bias: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor]:
    """Over the filled part of the caches and `cross` [1, KV, T, D] together; bias [1, G * S, filled + T]."""
    _write(new, caches, start)
    kv, width, end = caches[0].shape[2], caches[0].shape[3], slots.shape[0]
    own = [cache.narrow(1, 0, end).view(-1, kv, width).permute(1, 0, 2) for cache in caches]
    keys, values = (torch.cat((x, y.squeeze(0)), 1) for x, y in zip(own, cross, strict=True))
    return (attend(q, keys.permute(0, 2, 1), values, bias, scale, softcap),)


def merged_bias(own: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """float32 [S, filled + T] of a causal bias [S, filled] and a source mask bool [1, 1, 1, T]."""
    source = _bias(mask.view(1, -1)) + torch.zeros_like(own.narrow(1, 0, 1))
    return torch.cat((own, source), 1)


def shared_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, start: int, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """ExecuTorch's kernel over a cache that this call has already written; bias [S, filled] says what each query sees."""
    keys, values = (cache.narrow(1, 0, bias.shape[1]) for cache in (k_cache, v_cache))
    out = torch.ops.llama.custom_sdpa(q, keys, values, start, bias, 0.0, False, scale)
    merged: torch.Tensor = out.reshape(1, -1, q.shape[2] * q.shape[3])
    return merged


def new_positions(past_length: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 [seq]: the positions of the tokens ids [1, seq]."""
    return past_length + torch.arange(ids.shape[1])


def table(packed: torch.Tensor, bits: int, wide: int, columns: int) -> torch.Tensor:
    """An embedding table as its kernel reads it: int8; 4 bits, first code in the high half; or 2 bits, first code lowest."""
    codes = repack(packed, bits, wide, columns)
    if wide == 8:
        return (codes ^ 0x80).view(torch.int8)  # the top bit: from 0..255 to two's complement
    return swap_nibbles(codes) if wide == 4 else codes.clone()


def rotation(half: int, width: int) -> torch.Tensor:
    """[width, width]: `linear(x, rotation)` is (-x2, x1) for the halves x1, x2 of the rotated dimensions of x, 0 behind them."""
    turned, identity = torch.zeros(width, width), torch.eye(half)
    turned[:half, half : 2 * half] = -identity
    turned[half : 2 * half, :half] = identity
    return turned
