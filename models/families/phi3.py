"""Phi-3 to Phi-4-mini (arXiv 2404.14219, 2503.01743): Llama with longrope, on a part of each head in the last."""

from __future__ import annotations

from ...checkpoints.names import Names, split
from ..config import ConfigReader, StackKeys
from ..decoder import DecoderSpec, DescribedDecoder, attentions, plain
from ..rope import read_rope


def describe(section: ConfigReader) -> DecoderSpec:
    """A Phi-3 by its config.json."""
    keys = StackKeys(section, positions=4096, eps=1e-5)
    params = section.values.get("rope_scaling") or section.values.get("rope_parameters") or {}
    if isinstance(params, dict) and params.get("type", params.get("rope_type")) == "yarn":
        raise section.error("rope_scaling.type", "yarn", "longrope; early files call it so, and are not read")
    window = 0 if section.values.get("sliding_window") is None else section.integer("sliding_window")
    attention = attentions(
        keys,
        read_rope(section, 10000.0, partial=True, positions=4096),
        [window] * keys.layers,
        rotated=section.rotated(keys.head_dim),
    )
    return plain(keys, section, attention)


class Model(DescribedDecoder):
    """A Phi-3 checkpoint's modules. Its files hold q, k and v as one weight, and gate and up as another."""

    describe = staticmethod(describe)

    @property
    def names(self) -> Names:
        a, wide = self.spec.attention[0], self.spec.intermediate
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        attn, mlp = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
        return Names(
            split(f"{attn}qkv_proj", {f"{attn}q_proj": q, f"{attn}k_proj": kv, f"{attn}v_proj": kv}),
            split(f"{mlp}gate_up_proj", {f"{mlp}gate_proj": wide, f"{mlp}up_proj": wide}),
        )
