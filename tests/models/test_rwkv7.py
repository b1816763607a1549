"""RWKV-7, which transformers lacks, against its formulas in float64: a file of flash-linear-attention's names, opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import reference_formulas, tiny
from helpers.oracle import causal_logits
from safetensors.torch import save_file

from edgewright.errors import UserError
from edgewright.models.loading import load_original
from edgewright.models.opening import open_model
from edgewright.models.registry import build

LENGTH = 70  # more than a chunk of the recurrences
TINY: dict[str, Any] = {
    "model_type": "rwkv7",
    "a_low_rank_dim": 8,
    "attn": None,
    "attn_mode": "chunk",
    "decay_low_rank_dim": 8,
    "fuse_norm": True,
    "gate_low_rank_dim": 12,
    "head_dim": 16,
    "hidden_act": "sqrelu",
    "hidden_ratio": 4.0,
    "hidden_size": 48,
    "intermediate_size": None,
    "max_position_embeddings": 128,
    "norm_bias": True,
    "norm_eps": 1e-5,
    "norm_first": True,
    "num_heads": None,
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,
    "v_low_rank_dim": 8,
    "value_dim": [48, 48, 48],
    "vocab_size": 37,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied, without bias, without the first norm": {
        "norm_bias": False,
        "norm_first": False,
        "tie_word_embeddings": True,
    },
    "heads by number, ranks by width, a width of its own": {
        "a_low_rank_dim": None,
        "decay_low_rank_dim": None,
        "gate_low_rank_dim": None,
        "head_dim": None,
        "intermediate_size": 100,
        "num_heads": 6,
        "v_low_rank_dim": None,
        "value_dim": None,
    },
}


def published(name: str) -> str:
    """The library's name of a tensor of ours."""
    for part, place in (("_down.", "_lora.lora.0."), ("_up.", "_lora.lora.2.")):
        name = name.replace(part, place)
    return name


def written(folder: Path, change: dict[str, Any]) -> dict[str, np.ndarray]:
    """Writes config.json and the file's tensors, and returns those in float64."""
    config = TINY | change
    weights = {published(n): t for n, t in tiny.weights(config, 3, torch.float32).items()}
    weights = {name: 2 * tensor if "embed" in name else tensor for name, tensor in weights.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return {name: tensor.double().numpy() for name, tensor in weights.items()}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_formulas_whatever_the_chunks(case: str, tmp_path: Path) -> None:
    weights = written(tmp_path, CASES[case])
    checkpoint = open_model(str(tmp_path))
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    ids = torch.randint(0, 37, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    heads = (TINY | CASES[case])["num_heads"] or 3
    want = torch.tensor(np.array([reference_formulas.rwkv7(weights, heads, 1e-5, row) for row in ids.tolist()]))
    for chunks in ([LENGTH], [64, LENGTH - 64], [3] * 23 + [1], [1] * LENGTH):
        got = causal_logits(model, ids, chunks).double()
        torch.testing.assert_close(got / want.abs().max(), want / want.abs().max(), atol=1e-5, rtol=0)


def test_what_steers_the_state_keeps_16_bits() -> None:
    kept = {name.split(".")[-2] for name in build(TINY).protected_weights()}
    assert kept == {f"{n}_{part}" for n in "wav" for part in ("down", "up")}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"attn": {"layers": [0]}}, "attn"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"head_dim": 7}, "head_dim"),
    ({"value_dim": [48, 96, 48]}, "value_dim"),
    ({"decay_low_rank_dim": -1}, "decay_low_rank_dim"),
    ({"hidden_ratio": "wide"}, "hidden_ratio"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
]


@pytest.mark.parametrize(("change", "word"), BAD)
def test_a_bad_config_is_one_line_naming_the_value(change: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        build(TINY | change)
    assert "\n" not in str(caught.value)
