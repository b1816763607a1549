"""GPT-2 and GPT-NeoX (arXiv 2204.06745): LayerNorm and a plain feed-forward, learned positions or RoPE on a part of each head."""

from __future__ import annotations

from typing import Any

from ...checkpoints.names import Names, heads_of_three, rename, split
from ..config import ConfigReader, StackKeys
from ..decoder import DecoderSpec, DescribedDecoder, attentions, plain
from ..layers.norm import NormSpec
from ..rope import read_rope

GPT2_KEYS = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
    "layer_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}
GPT2_DEFAULTS = {"n_embd": 768, "n_positions": 1024, "n_head": 12, "n_layer": 12, "vocab_size": 50257}


def describe(section: ConfigReader) -> DecoderSpec:
    """A GPT-2 or GPT-NeoX by its config.json."""
    return _gpt2(section) if section.text("model_type") == "gpt2" else _neox(section)


def _gpt2(section: ConfigReader) -> DecoderSpec:
    section.absent("add_cross_attention", "scale_attn_by_inverse_layer_idx")
    values = GPT2_DEFAULTS | dict(section.values)
    values |= {ours: values[theirs] for ours, theirs in GPT2_KEYS.items() if values.get(theirs) is not None}
    values.setdefault("intermediate_size", 4 * values["n_embd"] if isinstance(values["n_embd"], int) else None)
    named = ConfigReader(values, section.where)
    keys = StackKeys(named, positions=1024)
    scale = keys.head_dim**-0.5 if section.flag("scale_attn_weights", True) else 1.0
    return plain(
        keys,
        named,
        attentions(keys, read_rope(ConfigReader({}, ""), 10000.0), rotated=0, bias=True, out_bias=True, scale=scale),
        norm=NormSpec(named.number("layer_norm_eps", 1e-5), "layer", bias=True),
        act=named.text("hidden_act", "gelu_new"),
        gated=False,
        mlp_bias=True,
        table=keys.max_positions,
        tied=section.flag("tie_word_embeddings", True),
    )


def _neox(section: ConfigReader) -> DecoderSpec:
    older = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    known = {new: section.values[old] for new, old in older.items() if section.values.get(old) is not None}
    named = ConfigReader(known | dict(section.values), section.where)
    keys = StackKeys(named, positions=2048)
    bias = section.flag("attention_bias", True)
    attention = attentions(
        keys,
        read_rope(named, 10000.0, partial=True),
        rotated=named.rotated(keys.head_dim, 0.25),
        bias=bias,
        out_bias=bias,
    )
    return plain(
        keys,
        named,
        attention,
        norm=NormSpec(named.number("layer_norm_eps", 1e-5), "layer", bias=True),
        placement="parallel" if section.flag("use_parallel_residual", True) else "pre",
        act=named.text("hidden_act", "gelu"),
        gated=False,
        mlp_bias=True,
    )


class Model(DescribedDecoder):
    """The modules of a GPT-2 or GPT-NeoX checkpoint."""

    describe = staticmethod(describe)

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        key = "n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers"
        return config | {key: min(layers, config.get(key, 12))}

    @property
    def names(self) -> Names:
        a, layer, attn = self.spec.attention[0], "model.layers.{}.", "model.layers.{}.self_attn."
        if self.spec.table:
            old, hidden = "transformer.h.{}.", self.spec.hidden
            parts = dict.fromkeys((f"{attn}q_proj", f"{attn}k_proj", f"{attn}v_proj"), hidden)
            return Names(
                split(f"{old}attn.c_attn", parts, transposed=True),
                rename(f"{old}attn.c_proj", f"{attn}o_proj", transposed=True),
                rename(f"{old}mlp.c_fc", f"{layer}mlp.up_proj", transposed=True),
                rename(f"{old}mlp.c_proj", f"{layer}mlp.down_proj", transposed=True),
                rename(f"{old}ln_1", f"{layer}input_layernorm"),
                rename(f"{old}ln_2", f"{layer}post_attention_layernorm"),
                rename("transformer.wte", "model.embed_tokens"),
                rename("transformer.wpe", "model.embed_positions"),
                rename("transformer.ln_f", "model.norm"),
                root="transformer.",
                ignored=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
            )
        old = "gpt_neox.layers.{}."
        return Names(
            heads_of_three(
                f"{old}attention.query_key_value", (f"{attn}q_proj", f"{attn}k_proj", f"{attn}v_proj"), a.heads
            ),
            rename(f"{old}attention.dense", f"{attn}o_proj"),
            rename(f"{old}mlp.dense_h_to_4h", f"{layer}mlp.up_proj"),
            rename(f"{old}mlp.dense_4h_to_h", f"{layer}mlp.down_proj"),
            rename(f"{old}input_layernorm", f"{layer}input_layernorm"),
            rename(f"{old}post_attention_layernorm", f"{layer}post_attention_layernorm"),
            rename("gpt_neox.embed_in", "model.embed_tokens"),
            rename("gpt_neox.final_layer_norm", "model.norm"),
            rename("embed_out", "lm_head"),
            root="gpt_neox.",
            ignored=("gpt_neox.layers.*.attention.bias", "gpt_neox.layers.*.attention.masked_bias"),
        )
