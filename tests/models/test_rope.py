"""RoPE from config.json against transformers: frequencies and attention factor, for every type, old keys and new."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from edgewright.errors import UserError
from edgewright.models.config import ConfigReader
from edgewright.models.rope import KINDS, Rope, read_rope

SIZES: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 4096}
LONG = {"short_factor": [1.0 + i / 10 for i in range(16)], "long_factor": [2.0 + i for i in range(16)]}

BLOCKS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "llama3 without its length": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn, all keys": {
        "rope_type": "yarn",
        "factor": 40.0,
        "beta_fast": 24,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
        "original_max_position_embeddings": 256,
    },
    "yarn, its own attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 1024,
    },
    "yarn by lengths": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 512} | LONG,
    "longrope, all keys": {
        "rope_type": "longrope",
        "factor": 8.0,
        "attention_factor": 1.1,
        "original_max_position_embeddings": 512,
    }
    | LONG,
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "proportional, stretched": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
}


def read(**values: Any) -> Rope:
    return read_rope(ConfigReader(SIZES | values, ""), 10000.0)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_frequencies_are_those_of_transformers(name: str, theta: float) -> None:
    block = BLOCKS[name] | {"rope_theta": theta}
    config = hf.LlamaConfig(**SIZES, rope_parameters=dict(block))
    want, attention = ROPE_INIT_FUNCTIONS[block["rope_type"]](config, "cpu")
    rope = read(rope_parameters=block)
    assert torch.equal(rope.frequencies(32), want)
    assert rope.attention == pytest.approx(attention, rel=1e-12)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_older_keys_say_the_same(name: str) -> None:
    new = BLOCKS[name]
    old = {("type" if key == "rope_type" else key): value for key, value in new.items()}
    assert read(rope_scaling=old, rope_theta=20000.0) == read(rope_parameters=new | {"rope_theta": 20000.0})
    both = {"rope_scaling": old, "rope_parameters": new | {"rope_theta": 20000.0}, "rope_theta": 20000.0}
    assert read(**both) == read(rope_scaling=old, rope_theta=20000.0)


def test_every_kind_is_tried() -> None:
    assert {block["rope_type"] for block in BLOCKS.values()} | {"default", "factors"} == set(KINDS)
    plain = read(rope_theta=5e5).frequencies(32)
    assert torch.equal(plain, 1.0 / (5e5 ** (torch.arange(0, 32, 2, dtype=torch.float) / 32)))


def test_each_kind_of_layer_has_its_own() -> None:
    nested = {
        "full_attention": BLOCKS["linear"] | {"rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    section = ConfigReader(SIZES | {"rope_parameters": nested}, "")
    assert read_rope(section, 1.0, "full_attention") == Rope(1e6, "linear", 2.5)
    assert read_rope(section, 1.0, "sliding_attention") == Rope(1e4)
    older = ConfigReader(SIZES | {"rope_theta": 1e6, "rope_scaling": BLOCKS["linear"], "rope_local_base_freq": 2e4}, "")
    assert read_rope(older, 1.0, "full_attention") == Rope(1e6, "linear", 2.5)
    assert read_rope(older, 1.0, "sliding_attention") == Rope(2e4)


def test_a_context_ends_where_the_short_factors_do() -> None:
    assert read(rope_parameters=BLOCKS["longrope"]).within(4096) == 512
    assert read(rope_parameters=BLOCKS["yarn"]).within(4096) == 4096


def test_long_factors_are_those_of_transformers_for_long_texts() -> None:
    block = BLOCKS["longrope"] | {"rope_theta": 10000.0}
    config = hf.LlamaConfig(**SIZES, rope_parameters=dict(block))
    want, attention = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=513)
    rope = read(rope_parameters=block, edgewright={"long_factors": True})
    assert torch.equal(rope.frequencies(32), want)
    assert not torch.equal(want, read(rope_parameters=block).frequencies(32))
    assert rope.attention == pytest.approx(attention, rel=1e-12)
    assert rope.within(4096) == 4096
    with pytest.raises(UserError, match=r"edgewright\.long_factors is 'yes', expected true or false"):
        read(rope_parameters=block, edgewright={"long_factors": "yes"})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope_type is 'ntk', expected one of default, linear"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type is"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor is None"),
        ({"rope_parameters": BLOCKS["llama3"] | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0, expected more"),
        ({"rope_parameters": BLOCKS["longrope"] | {"short_factor": [1.0, -1.0]}}, "short_factor is"),
        ({"rope_parameters": BLOCKS["longrope"] | {"long_factor": "x"}}, "long_factor is 'x'"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan"),
        ({"rope_scaling": BLOCKS["linear"], "rope_parameters": BLOCKS["yarn"]}, "the two differ"),
        ({"rope_scaling": 3}, "rope_scaling is 3, expected an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1 or nothing"),
    ],
)
def test_a_bad_block_is_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(**values)


def test_factors_for_another_head_are_refused() -> None:
    with pytest.raises(UserError, match="16 factors of longrope for 8 frequencies of a head"):
        read(rope_parameters=BLOCKS["longrope"]).frequencies(16)
