"""BART (arXiv 1910.13461) and its kin: mBART (2001.08210), Marian, M2M100 (2010.11125) and NLLB, Pegasus (1912.08777).

M2M100 counts positions from behind the padding token's number, and skips padding; padding is behind the text here, and masked, so
a plain count is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...checkpoints.names import Names, rename
from ..config import ConfigReader
from ..encoder_decoder import DescribedEncoderDecoder, EncoderDecoderSpec, StackSpec
from ..layers.attention import AttentionSpec
from ..layers.norm import NormSpec
from ..layers.sinusoids import SinusoidSpec
from ..rope import Rope

START = {"bart": 2, "marian": 58100, "m2m_100": 2, "pegasus": 0}
"""transformers' defaults of the token that the decoder starts from; mBART starts from `bos_token_id`."""


def describe(section: ConfigReader) -> EncoderDecoderSpec:
    """A BART, or one of its kin, by its config.json."""
    kind = section.text("model_type")
    hidden, learned = section.integer("d_model", 1024), kind in ("bart", "mbart")
    vocab = section.integer("vocab_size")
    shared = kind != "marian" or section.flag("share_encoder_decoder_embeddings", True)

    def stack(name: str, vocab: int) -> StackSpec:
        heads = section.divisor(f"{name}_attention_heads", hidden, 16)
        if hidden // heads % 8:
            raise section.error(f"{name}_attention_heads", heads, f"heads of a multiple of 8 of {hidden} dimensions")
        width = hidden // heads
        attention = AttentionSpec(
            hidden, heads, heads, width, scale=width**-0.5, rope=Rope(), bias=True, out_bias=True, rotated=0
        )
        layers = section.integer(f"{name}_layers", 12, most=1024)
        return StackSpec(vocab, layers, section.integer(f"{name}_ffn_dim", 4096), attention)

    padding = section.token("pad_token_id", 1)
    first = 1 + (padding or 0) if kind == "m2m_100" else 0
    return EncoderDecoderSpec(
        encoder=stack("encoder", vocab),
        decoder=stack("decoder", vocab if shared else section.integer("decoder_vocab_size", vocab)),
        hidden=hidden,
        positions=section.integer("max_position_embeddings", 1024),
        norm=NormSpec(1e-5, "layer", bias=True),
        placement="post" if kind in ("bart", "marian") else "pre",
        act=section.text("activation_function", "relu" if kind == "m2m_100" else "gelu"),
        mlp_bias=True,
        embedding_scale=hidden**0.5 if section.flag("scale_embedding", kind == "m2m_100") else 1.0,
        embedding_norm=learned,
        learned=2 if learned else None,
        sinusoids=None if learned else SinusoidSpec(first, whole=kind == "m2m_100"),
        shared=shared,
        tied=section.flag("tie_word_embeddings", True),
        logits_bias=kind != "m2m_100" and section.flag("final_logits_bias", True),
    )


class Model(DescribedEncoderDecoder):
    """The modules of a checkpoint of BART or its kin."""

    describe = staticmethod(describe)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        default = START.get(self.section.text("model_type"), self.section.token("bos_token_id", 0))
        self.decoder_start = self.section.token("decoder_start_token_id", default)

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        return config | {key: min(layers, config.get(key, 12)) for key in ("encoder_layers", "decoder_layers")}

    def matched(self, config: dict[str, Any], has: Callable[[str], bool]) -> dict[str, Any]:
        """`final_logits_bias` is a key of ours: a file without that tensor has zeros there."""
        return (
            config if not self.spec.logits_bias or has("logits_bias.weight") else config | {"final_logits_bias": False}
        )

    @property
    def names(self) -> Names:
        layer = "model.*.layers.{}."
        return Names(
            rename(f"{layer}self_attn.out_proj", f"{layer}self_attn.o_proj"),
            rename(f"{layer}encoder_attn.out_proj", f"{layer}cross_attn.o_proj"),
            rename("model.*.encoder_attn_layer_norm", "model.*.cross_attn_norm"),
            rename("model.*.encoder_attn.*", "model.*.cross_attn.*"),
            rename("model.*.fc1", "model.*.mlp.up_proj"),
            rename("model.*.fc2", "model.*.mlp.down_proj"),
            rename("model.*.self_attn_layer_norm", "model.*.self_attn_norm"),
            rename("model.*.final_layer_norm", "model.*.mlp_norm"),
            rename("model.*.layernorm_embedding", "model.*.embedding_norm"),
            rename("model.*.layer_norm", "model.*.norm"),
            rename("final_logits_bias", "logits_bias.weight"),
            ignored=(
                *(() if not self.spec.shared else ("model.*coder.embed_tokens.weight", "*coder.embed_tokens.weight")),
                *("model.*coder.embed_positions.weights", "model.*coder.embed_positions.weight", "*coder.version"),
            ),
        )
