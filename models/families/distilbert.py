"""DistilBERT (arXiv 1910.01108): BERT's layers without token types."""

from __future__ import annotations

from typing import Any

from ...checkpoints.names import Names, rename
from ..config import ConfigReader
from ..encoder import DescribedEncoder, EncoderSpec, heads_of

_PATHS = {
    "embeddings.word_embeddings": "embed_tokens",
    "embeddings.position_embeddings": "embed_positions",
    "embeddings.LayerNorm": "embedding_norm",
    "transformer.layer.{}.attention.q_lin": "layers.{}.self_attn.q_proj",
    "transformer.layer.{}.attention.k_lin": "layers.{}.self_attn.k_proj",
    "transformer.layer.{}.attention.v_lin": "layers.{}.self_attn.v_proj",
    "transformer.layer.{}.attention.out_lin": "layers.{}.self_attn.o_proj",
    "transformer.layer.{}.sa_layer_norm": "layers.{}.self_attn_norm",
    "transformer.layer.{}.ffn.lin1": "layers.{}.mlp.up_proj",
    "transformer.layer.{}.ffn.lin2": "layers.{}.mlp.down_proj",
    "transformer.layer.{}.output_layer_norm": "layers.{}.mlp_norm",
}


def describe(section: ConfigReader) -> EncoderSpec:
    """A DistilBERT by its config.json. The file holds the positions, also where they were made of sines."""
    hidden = section.integer("dim", 768)
    return EncoderSpec(
        vocab=section.integer("vocab_size"),
        hidden=hidden,
        intermediate=section.integer("hidden_dim", 4 * hidden),
        layers=section.integer("n_layers", 6, most=1024),
        heads=heads_of(section, "n_heads", hidden),
        positions=section.integer("max_position_embeddings", 512),
        act=section.text("activation", "gelu"),
    )


def _names() -> Names:
    rules = [rename(f"{root}{old}", f"model.{new}") for old, new in _PATHS.items() for root in ("", "distilbert.")]
    return Names(*rules, ignored=("vocab_transform.*", "vocab_layer_norm.*", "vocab_projector.*"))


class Model(DescribedEncoder):
    """The checkpoint's modules."""

    describe = staticmethod(describe)
    table = staticmethod(_names)

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        return config | {"n_layers": min(layers, config.get("n_layers", 6))}
