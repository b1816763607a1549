"""What the ops mean, restated plainly and slowly in float64 from their papers: head by head, query by query."""

from __future__ import annotations

import math

import numpy as np


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, allowed: np.ndarray, scale: float, softcap: float = 0.0
) -> np.ndarray:
    """q [B, S, H, D]; k, v [B, T, KV, D]; allowed bool [B, S, T], a true in every row. Returns [B, S, H * D]."""
    batch, queries, heads, dim = q.shape
    per_group = heads // k.shape[2]
    out = np.zeros((batch, queries, heads, dim))
    for b in range(batch):
        for s in range(queries):
            seen = np.flatnonzero(allowed[b, s])
            for h in range(heads):
                keys, values = (x[b, seen, h // per_group].astype(np.float64) for x in (k, v))
                scores = keys @ q[b, s, h].astype(np.float64) * scale
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[b, s, h] = weights @ values / weights.sum()
    return out.reshape(batch, queries, heads * dim)


def causal(batch: int, queries: int, past: int, window: int = 0) -> np.ndarray:
    """bool [B, S, past + S]: query s stands at past + s and sees the last `window` tokens up to itself (0: all)."""
    own = np.arange(queries)[:, None] + past
    slots = np.arange(past + queries)[None]
    seen = (slots <= own) & ((slots > own - window) if window else True)
    return np.broadcast_to(seen, (batch, *seen.shape))


def rope(x: np.ndarray, positions: np.ndarray, inv_freq: np.ndarray) -> np.ndarray:
    """x [B, S, H, D]: the pair (i, i + D / 2) turned by positions[s] * inv_freq[i], as a complex product."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:].astype(np.float64)) * np.exp(1j * np.outer(positions, inv_freq))[
        None, :, None
    ]
    return np.concatenate([turned.real, turned.imag], -1)


def rms_norm(x: np.ndarray, gamma: np.ndarray, eps: float) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * gamma.astype(np.float64)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))


def silu(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / (1 + np.exp(-wide))


def signed_codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """int64 [N, K] of packed uint8 [N, K * bits / 8]: each row one little-endian bit stream of codes + 2**(bits-1)."""
    stream = np.unpackbits(packed, axis=-1, bitorder="little")
    digits = stream.reshape(len(packed), -1, bits).astype(np.int64)
    return (digits << np.arange(bits)).sum(-1) - (1 << (bits - 1))
