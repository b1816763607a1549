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


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def rwkv7(w: dict[str, np.ndarray], heads: int, eps: float, ids: list[int]) -> np.ndarray:
    """Logits [T, vocab] of ids by the formulas of RWKV-7 (arXiv 2503.14456), token by token and head by head.

    w: the tensors of a file of flash-linear-attention, in float64. The state of a head is [values, keys], as in the paper.
    """
    layers = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("model.layers."))
    last: dict[tuple[int, str], np.ndarray] = {}
    states: dict[tuple[int, int], np.ndarray] = {}

    def norm(name: str, x: np.ndarray, spread: float = eps) -> np.ndarray:
        return (x - x.mean()) / np.sqrt(x.var() + spread) * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def low_rank(name: str, x: np.ndarray, middle: str = "") -> np.ndarray:
        inner = w[f"{name}.lora.0.weight"] @ x
        inner = {"tanh": np.tanh, "sigmoid": sigmoid}.get(middle, np.asarray)(inner)
        return w[f"{name}.lora.2.weight"] @ inner + w.get(f"{name}.lora.2.bias", 0.0)

    def time_mix(layer: int, x: np.ndarray, first_values: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        name = f"model.layers.{layer}.attn"
        before = last.get((layer, "attn"), np.zeros_like(x))
        last[layer, "attn"] = x
        mixed = {n: x + (before - x) * w[f"{name}.x_{n}"].reshape(-1) for n in "rwkvag"}
        r, k, v = (w[f"{name}.{n}_proj.weight"] @ mixed[n] for n in "rkv")
        decay = np.exp(-np.exp(-0.5) * sigmoid(low_rank(f"{name}.w_lora", mixed["w"], "tanh")))
        if first_values is None:
            first_values = v
        else:
            v = v + (first_values - v) * sigmoid(low_rank(f"{name}.v_lora", mixed["v"]))
        a = sigmoid(low_rank(f"{name}.a_lora", mixed["a"]))
        g = low_rank(f"{name}.g_lora", mixed["g"], "sigmoid")
        removed, k = k * w[f"{name}.k_k"], k * (1 + (a - 1) * w[f"{name}.k_a"])
        size, out = len(x) // heads, np.zeros(len(x))
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            kappa = removed[part] / np.sqrt((removed[part] ** 2).sum() + 1e-6)
            state = states.get((layer, h), np.zeros((size, size)))
            state = state @ (np.diag(decay[part]) - np.outer(kappa, a[part] * kappa)) + np.outer(v[part], k[part])
            states[layer, h] = state
            read = state @ r[part]
            read = (read - read.mean()) / np.sqrt(read.var() + size * eps)
            read = read * w[f"{name}.g_norm.weight"][part] + w[f"{name}.g_norm.bias"][part]
            out[part] = read + (r[part] * k[part] * w[f"{name}.r_k"][h]).sum() * v[part]
        return w[f"{name}.o_proj.weight"] @ (out * g), first_values

    def channel_mix(layer: int, x: np.ndarray) -> np.ndarray:
        name = f"model.layers.{layer}.ffn"
        before = last.get((layer, "ffn"), np.zeros_like(x))
        last[layer, "ffn"] = x
        inner = w[f"{name}.key.weight"] @ (x + (before - x) * w[f"{name}.x_k"])
        return w[f"{name}.value.weight"] @ np.maximum(inner, 0) ** 2

    logits = []
    for token in ids:
        h, first_values = w["model.embeddings.weight"][token], None
        for i in range(layers):
            if f"model.layers.{i}.pre_norm.weight" in w:
                h = norm(f"model.layers.{i}.pre_norm", h)
            mixed, first_values = time_mix(i, norm(f"model.layers.{i}.attn_norm", h), first_values)
            h = h + mixed
            h = h + channel_mix(i, norm(f"model.layers.{i}.ffn_norm", h))
        logits.append(w.get("lm_head.weight", w["model.embeddings.weight"]) @ norm("model.norm", h))
    return np.array(logits)


def signed_codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """int64 [N, K] of packed uint8 [N, K * bits / 8]: each row one little-endian bit stream of codes + 2**(bits-1)."""
    stream = np.unpackbits(packed, axis=-1, bitorder="little")
    digits = stream.reshape(len(packed), -1, bits).astype(np.int64)
    return (digits << np.arange(bits)).sum(-1) - (1 << (bits - 1))
