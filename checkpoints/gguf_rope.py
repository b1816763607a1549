"""RoPE of a GGUF file, as llama.cpp reads it: a `rope_parameters` block of config.json."""

from __future__ import annotations

import math
from typing import Any

from .gguf_keys import Keys

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def rope(keys: Keys, dims: int, tensors: tuple[str, ...] = ()) -> dict[str, Any]:
    """The block for `dims` rotated dimensions of a head.

    Without a type the factor is linear, and its old key is read too. `tensors` are those with factors of the frequencies that
    the architecture reads: of Llama 3.1 and later one for all lengths, of Phi-3 a short and a long one.
    """
    theta = keys.real("rope.freq_base", 10000.0)
    kind = keys.get("rope.scaling.type")
    kind = "linear" if kind is None else kind
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise keys.error("rope.scaling.type", kind)
    factor = 1.0 if kind == "none" else keys.factor("rope.scaling.factor", "rope.scale_linear")
    attention = keys.factor("rope.scaling.attn_factor")
    vectors = (keys.vector(name, dims // 2) if name in tensors else None for name in (FREQUENCIES, LONG, SHORT))
    frequencies, long, short = vectors
    if frequencies is not None and all(value == 1.0 for value in frequencies):
        frequencies = None
    if kind == "yarn" and factor != 1.0:
        if frequencies or long or short:
            raise keys.error("rope.scaling.type", "yarn beside factors of the frequencies")
        return _yarn(keys, theta, factor, attention)
    if frequencies is None and long is not None and short is not None:
        if factor != 1.0:
            raise keys.error("rope.scaling.factor", f"{factor} beside factors of the frequencies")
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": original(keys),
            "attention_factor": attention,
        }
    if frequencies is None and attention == 1.0:
        scaled = {} if factor == 1.0 else {"factor": factor}
        return {"rope_type": "linear" if scaled else "default", "rope_theta": theta, **scaled}
    return {
        "rope_type": "factors",
        "rope_theta": theta,
        "factors": frequencies or [1.0] * (dims // 2),
        "factor": factor,
        "attention_factor": attention,
    }


def original(keys: Keys) -> int:
    """Positions of the training before the context was stretched."""
    return keys.size("rope.scaling.original_context_length", keys.size("context_length"))


def _yarn(keys: Keys, theta: float, factor: float, attention: float) -> dict[str, Any]:
    for key, plain in (("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if (value := keys.get(f"rope.scaling.{key}")) not in (None, plain):
            raise keys.error(f"rope.scaling.{key}", value)
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original(keys),
        "beta_fast": keys.real("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.real("rope.scaling.yarn_beta_slow", 1.0),
        "attention_factor": keys.real("rope.scaling.yarn_attn_factor", usual) * attention,
    }
