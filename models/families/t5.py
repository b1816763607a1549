"""T5 (arXiv 1910.10683), its v1.1, Flan-T5 and UL2 (gated, a head of its own), mT5 and ByT5, and UMT5 (arXiv 2304.09151).

They have no limit of positions: `max_context` is `n_positions`, the length of the training, or 512 where the config has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...checkpoints.names import Names, Rule, rename
from ..config import ConfigReader
from ..encoder_decoder import DescribedEncoderDecoder, EncoderDecoderSpec, StackSpec
from ..layers.attention import AttentionSpec
from ..layers.norm import NormSpec
from ..layers.relative import RelativeSpec
from ..rope import Rope

ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
MLP = {"wi": "up_proj", "wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}


def describe(section: ConfigReader) -> EncoderDecoderSpec:
    """A T5 by its config.json."""
    kind = section.text("model_type")
    act, gated = section.text("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu"), False
    if act.startswith("gated-"):
        act, gated = act.removeprefix("gated-"), True
    act = "gelu_new" if gated and act == "gelu" else act
    hidden, heads = section.integer("d_model", 512), section.integer("num_heads", 8 if kind == "t5" else 6, most=4096)
    width = section.integer("d_kv", 64, most=4096)
    if width % 8:
        raise section.error("d_kv", width, "a multiple of 8")
    buckets = section.integer("relative_attention_num_buckets", 32, least=4, most=4096)
    relative = RelativeSpec(
        buckets, section.integer("relative_attention_max_distance", 128, least=buckets, most=1 << 16), kind == "umt5"
    )
    attention = AttentionSpec(hidden, heads, heads, width, scale=1.0, rope=Rope(), rotated=0)
    layers = section.integer("num_layers", 6 if kind == "t5" else 8, most=1024)
    vocab, wide = section.integer("vocab_size"), section.integer("d_ff", 2048 if kind == "t5" else 1024)
    return EncoderDecoderSpec(
        encoder=StackSpec(vocab, layers, wide, attention),
        decoder=StackSpec(vocab, section.integer("num_decoder_layers", layers, most=1024), wide, attention),
        hidden=hidden,
        positions=section.integer("n_positions", 512),
        norm=NormSpec(section.number("layer_norm_epsilon", 1e-6)),
        act=act,
        gated=gated,
        output_scale=hidden**-0.5 if section.boolean("scale_decoder_outputs", _scaled(section.values)) else 1.0,
        relative=relative,
        tied=section.flag("tie_word_embeddings", True),
    )


def _scaled(config: Any) -> bool:
    """Whether the head reads its input times hidden**-0.5: T5 v1.1 and later T5s say by `tie_word_embeddings`, which holds of
    their training, that they do not; mT5 never does, UMT5 always."""
    return {"t5": config.get("tie_word_embeddings") is not False, "umt5": True}.get(config["model_type"], False)


class Model(DescribedEncoderDecoder):
    """The modules of a T5 checkpoint."""

    describe = staticmethod(describe)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.decoder_start = self.section.token("decoder_start_token_id", self.section.token("pad_token_id", 0))

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        spec = describe(ConfigReader(config, ""))
        kept = {"num_layers": spec.encoder.layers, "num_decoder_layers": spec.decoder.layers}
        return config | {key: min(layers, most) for key, most in kept.items()}

    def matched(self, config: dict[str, Any], has: Callable[[str], bool]) -> dict[str, Any]:
        """The head is the embedding where the file has no other, whatever the config says."""
        scaled = config.get("scale_decoder_outputs", _scaled(config))
        return config | {"scale_decoder_outputs": scaled, "tie_word_embeddings": not has("lm_head.weight")}

    @property
    def names(self) -> Names:
        rules: list[Rule] = [rename("shared", "model.shared")]
        for stack, last in (("encoder", 1), ("decoder", 2)):
            old, new = f"{stack}.block.{{}}.layer", f"model.{stack}.layers.{{}}"
            rules += [rename(f"{old}.0.SelfAttention.{a}", f"{new}.self_attn.{b}") for a, b in ATTENTION.items()]
            rules += [rename(f"{old}.1.EncDecAttention.{a}", f"{new}.cross_attn.{b}") for a, b in ATTENTION.items()]
            rules += [rename(f"{old}.{last}.DenseReluDense.{a}", f"{new}.mlp.{b}") for a, b in MLP.items()]
            norms = {0: "self_attn_norm", 1: "cross_attn_norm", last: "mlp_norm"}
            rules += [rename(f"{old}.{i}.layer_norm", f"{new}.{norm}") for i, norm in norms.items()]
            each = self.spec.relative is not None and self.spec.relative.each
            bias = old if each else old.replace("{}", "0")
            target = f"{new}.relative" if each else f"model.{stack}.relative"
            rules.append(rename(f"{bias}.0.SelfAttention.relative_attention_bias", target))
            rules.append(rename(f"{stack}.final_layer_norm", f"model.{stack}.norm"))
        unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        return Names(*rules, root="", ignored=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", unused))
