"""BERT (arXiv 1810.04805), RoBERTa (arXiv 1907.11692) and XLM-R (arXiv 1911.02116), encoders for search; MiniLM is a BERT.

RoBERTa and XLM-R number the positions of a text from behind the padding's id.
"""

from __future__ import annotations

from ...checkpoints.names import Names, rename
from ..config import ConfigReader
from ..encoder import DescribedEncoder, EncoderSpec, heads_of

_LAYER = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.o_proj",
    "attention.output.LayerNorm": "self_attn_norm",
    "intermediate.dense": "mlp.up_proj",
    "output.dense": "mlp.down_proj",
    "output.LayerNorm": "mlp_norm",
}
_EMBEDDINGS = {
    "word_embeddings": "embed_tokens",
    "position_embeddings": "embed_positions",
    "token_type_embeddings": "embed_types",
    "LayerNorm": "embedding_norm",
}
_OLDER = {"gamma": "weight", "beta": "bias"}
"""What the first files, converted from TensorFlow, call a norm's parameters."""

_HEADS = ("pooler.*", "bert.pooler.*", "roberta.pooler.*", "cls.*", "lm_head.*", "*.position_ids")


def describe(section: ConfigReader) -> EncoderSpec:
    """A BERT or a RoBERTa by its config.json."""
    if section.text("position_embedding_type", "absolute") != "absolute":
        raise section.error("position_embedding_type", section.values["position_embedding_type"], "'absolute'")
    section.absent("is_decoder", "add_cross_attention")
    hidden = section.integer("hidden_size")
    positions = section.integer("max_position_embeddings", 512)
    before = 0
    if section.text("model_type") != "bert":
        before = section.integer("pad_token_id", 1, least=0, most=positions - 2) + 1
    return EncoderSpec(
        vocab=section.integer("vocab_size"),
        hidden=hidden,
        intermediate=section.integer("intermediate_size"),
        layers=section.integer("num_hidden_layers", most=1024),
        heads=heads_of(section, "num_attention_heads", hidden),
        positions=positions,
        before=before,
        types=section.integer("type_vocab_size", 2, most=1024),
        act=section.text("hidden_act", "gelu"),
        eps=section.number("layer_norm_eps", 1e-12),
    )


def _names() -> Names:
    paths = {f"embeddings.{old}": new for old, new in _EMBEDDINGS.items()}
    paths |= {f"encoder.layer.{{}}.{old}": f"layers.{{}}.{new}" for old, new in _LAYER.items()}
    rules = [rename(f"{root}{old}", f"model.{new}") for old, new in paths.items() for root in ("", "bert.", "roberta.")]
    rules += [
        rename(f"{root}{old}.{leaf}", f"model.{new}.{name}")
        for old, new in paths.items()
        if old.endswith("LayerNorm")
        for leaf, name in _OLDER.items()
        for root in ("", "bert.")
    ]
    return Names(*rules, ignored=_HEADS)


class Model(DescribedEncoder):
    """The checkpoint's modules."""

    describe = staticmethod(describe)
    table = staticmethod(_names)
