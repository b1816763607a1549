"""StableLM 2 (arXiv 2402.17834): LayerNorm, RoPE on a quarter of each head, the two blocks in turn or side by side."""

from __future__ import annotations

from ..config import ConfigReader, StackKeys
from ..decoder import DecoderSpec, DescribedDecoder, attentions, plain
from ..layers.norm import NormSpec
from ..rope import read_rope


def describe(section: ConfigReader) -> DecoderSpec:
    """A StableLM by its config.json."""
    keys = StackKeys(section, positions=4096)
    section.absent("qk_layernorm")
    attention = attentions(
        keys,
        read_rope(section, 10000.0, partial=True, positions=4096),
        rotated=section.rotated(keys.head_dim, 0.25),
        bias=section.flag("use_qkv_bias", False),
    )
    return plain(
        keys,
        section,
        attention,
        norm=NormSpec(section.number("layer_norm_eps", 1e-5), "layer", bias=True),
        placement="shared" if section.flag("use_parallel_residual", False) else "pre",
    )


class Model(DescribedDecoder):
    """A StableLM checkpoint's modules."""

    describe = staticmethod(describe)
