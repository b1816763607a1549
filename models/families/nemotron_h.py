"""Nemotron-H (arXiv 2504.03624): each layer is one Mamba-2 mixer, one attention without positions, or one feed-forward.

Layers of experts are refused by name. The time step is at least `time_step_min`, as transformers computes a prompt; its own decode
step leaves that limit out, ours does not.
"""

from __future__ import annotations

import math
from typing import Any

from ...checkpoints.names import Names
from ..config import ConfigReader
from ..hybrid import FULL, LINEAR, OLDER, BlockSpec, DescribedHybrid, HybridSpec, layer_kinds, one_mixer_names
from ..layers.attention import AttentionSpec
from ..layers.mamba2 import Mamba2Spec, read_groups
from ..layers.mlp import MLPSpec
from ..layers.norm import NormSpec
from ..rope import Rope

PATTERN, KEYS = "hybrid_override_pattern", ("layers_block_type", "layer_types")
LETTERS = {"M": LINEAR, "*": FULL, "-": "mlp", "E": "moe"}
KINDS = {kind: kind for kind in LETTERS.values()} | OLDER
OLDER_KEYS = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_min": "time_step_min",
    "attention_head_dim": "head_dim",
}
"""What older files call some keys."""


def describe(section: ConfigReader) -> HybridSpec:
    """A Nemotron-H by its config.json."""
    section = _named(section)
    section.absent("attention_bias", "sliding_window", "tie_word_embeddings")
    kinds = read_kinds(section)
    if "moe" in kinds:
        raise section.error(_key(section), "moe", f"no layers of experts, as layer {kinds.index('moe')} is one")
    if section.integer("num_hidden_layers", len(kinds), most=1024) != len(kinds):
        raise section.error(
            "num_hidden_layers", section.values["num_hidden_layers"], f"{len(kinds)}, as {_key(section)}"
        )
    hidden, eps = section.integer("hidden_size", 4096), section.number("layer_norm_epsilon", 1e-5)
    heads, head_dim = section.integer("num_attention_heads", 32, most=4096), section.head_dim(128)
    absent = "num_key_value_heads" not in section.values
    kv_heads = section.kv_heads(heads, 8 if absent else None)
    blocks: dict[str, BlockSpec] = {
        LINEAR: _mixer(section, hidden, eps),
        FULL: AttentionSpec(hidden, heads, kv_heads, head_dim, head_dim**-0.5, Rope(), rotated=0),
        "mlp": MLPSpec(
            hidden,
            section.integer("intermediate_size", 21504),
            section.text("mlp_hidden_act", "relu2"),
            gated=False,
            bias=section.boolean("mlp_bias", False),
        ),
    }
    return HybridSpec(
        vocab=section.integer("vocab_size", 131072),
        hidden=hidden,
        positions=section.integer("max_position_embeddings", 4096),
        layers=tuple((blocks[kind],) for kind in kinds),
        norm=NormSpec(eps),
    )


def _named(section: ConfigReader) -> ConfigReader:
    """The section under the newer keys. Raises UserError where an older key says another thing."""
    values = dict(section.values)
    for old, new in OLDER_KEYS.items():
        if old in values and values.setdefault(new, values[old]) != values[old]:
            raise section.error(old, values[old], f"what {new} says, {values[new]}")
    return ConfigReader(values, section.where)


def _mixer(section: ConfigReader, hidden: int, eps: float) -> Mamba2Spec:
    heads, bias = section.integer("mamba_num_heads", 128, most=4096), section.boolean("use_bias", False)
    return Mamba2Spec(
        hidden,
        heads,
        section.integer("mamba_head_dim", 64, most=4096),
        read_groups(section, "n_groups", heads, 8),
        section.integer("ssm_state_size", 128, most=65536),
        section.integer("conv_kernel", 4, least=2, most=64),
        section.text("mamba_hidden_act", "silu"),
        eps,
        conv_bias=section.boolean("use_conv_bias", True),
        in_bias=bias,
        out_bias=bias,
        limits=(section.number("time_step_min", 0.001), math.inf),
    )


def _key(section: ConfigReader) -> str:
    return next((k for k in KEYS if section.values.get(k) is not None), PATTERN)


def read_kinds(section: ConfigReader) -> list[str]:
    """The kind of each layer, by a list of names or a pattern of letters."""
    key = _key(section)
    value = section.values.get(key)
    if key == PATTERN:
        if not isinstance(value, str) or not 0 < len(value) <= 1024 or not set(value) <= LETTERS.keys():
            raise section.error(PATTERN, value, f"1 to 1024 letters of {' '.join(LETTERS)}")
        return [LETTERS[letter] for letter in value]
    length = len(value) if isinstance(value, list) else 0
    if not 0 < length <= 1024:
        raise section.error(key, value, "a list of 1 to 1024 layers")
    return layer_kinds(section, length, [key], KINDS) or []


class Model(DescribedHybrid):
    """A Nemotron-H checkpoint's modules."""

    describe = staticmethod(describe)

    @property
    def names(self) -> Names:
        return one_mixer_names(self.spec)

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        """The first layers, at least up to one that attends or recurs, as a feed-forward alone carries nothing."""
        kinds = read_kinds(ConfigReader(config, ""))
        kept = max(layers, next((i + 1 for i, kind in enumerate(kinds) if kind != "mlp"), 1))
        return config | {"layers_block_type": kinds[:kept], "num_hidden_layers": len(kinds[:kept])}
