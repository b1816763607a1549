"""Gemma 3n and 4 beyond their logits: files of the multimodal model, shortened models, and configs that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers import tiny
from helpers.oracle import causal_logits, randomise
from helpers.tiny_families import FAMILIES
from safetensors.torch import load_file, save_file

from edgewright import compiler
from edgewright.errors import UserError
from edgewright.models.families import gemma3n
from edgewright.models.loading import load_original
from edgewright.models.opening import open_model
from edgewright.models.registry import build, shorten
from edgewright.pipeline.request import Request

GEMMA3N = FAMILIES["gemma3n_text"]


def oracle_of(config: dict[str, Any]) -> Any:
    kept = {k: v for k, v in config.items() if k != "model_type"} | {"bos_token_id": None, "pad_token_id": None}
    model = randomise(hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**kept)), seed=1)
    model.tie_weights()
    return model


def test_the_text_model_of_a_multimodal_file(tmp_path: Path) -> None:
    """Names and config of `Gemma3nForConditionalGeneration`, with keys and values of the layers that read those of others."""
    oracle = oracle_of(GEMMA3N)
    oracle.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    wrapped = {f"model.language_model.{name.removeprefix('model.')}": value for name, value in weights.items()}
    wrapped |= {f"model.{tower}.layer.weight": torch.ones(2, 2) for tower in ("vision_tower", "audio_tower")}
    wrapped |= {f"model.{name}.embedding.weight": torch.ones(2, 2) for name in ("embed_vision", "embed_audio")}
    for name, rows in (("k_proj", 32), ("v_proj", 32)):
        wrapped[f"model.language_model.layers.2.self_attn.{name}.weight"] = torch.randn(rows, 64)
    wrapped["model.language_model.layers.2.self_attn.k_norm.weight"] = torch.randn(16)
    save_file(wrapped, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    wrapper = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], "text_config": config}
    (tmp_path / "config.json").write_text(json.dumps(wrapper | {"vision_config": {}, "audio_config": {}}))
    checkpoint = open_model(str(tmp_path))
    assert checkpoint.config["model_type"] == "gemma3n_text"
    assert any("the text model of gemma3n is taken; images and sound are left out" in note for note in checkpoint.notes)
    assert any("left out, as no graph here uses them: 7 tensors" in note for note in checkpoint.notes)
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    ids = torch.randint(2, 80, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = oracle(ids).logits
    largest = want.abs().max()
    torch.testing.assert_close(causal_logits(model, ids, [20]) / largest, want / largest, atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_a_shortened_model_reads_the_whole_table(family: str, tmp_path: Path) -> None:
    """A rehearsal of the first layers: the table of per-layer inputs stays, its other columns are not read."""
    folder = tiny.write(tmp_path / "model", FAMILIES[family])
    planned = compiler.plan(Request(str(folder), num_layers=2))
    assert planned.config["num_hidden_layers"] == 2
    whole = open_model(str(folder))
    model = build(planned.config)
    load_original(model, whole)
    full = build(whole.config)
    load_original(full, whole)
    ids = torch.tensor([[3, 4, 5, 6]])
    h = model.model.embed(ids)
    short, long = (m.model.inputs(ids, h) for m in (model, full))
    assert len(short) == 2
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=False))
    assert torch.isfinite(causal_logits(model, ids, [3, 1])).all()
    assert shorten(shorten(whole.config, 2), 2) == shorten(whole.config, 2)


def test_the_published_shape() -> None:
    """The defaults of Gemma 3n are those of E4B: sizes by transformers' class."""
    sizes = {"vocab_size": 262400, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 35}
    model = build(sizes | {"model_type": "gemma3n_text", "num_attention_heads": 8})
    with torch.device("meta"):
        oracle = hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig())
    theirs = {name: tuple(p.shape) for name, p in oracle.named_parameters()}
    ours = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in model.tied}
    assert ours == theirs
    assert isinstance(model, gemma3n.Model)
    assert sum(bool(share) for share in model.config.sparsity) == 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"intermediate_size": [96, 64]}, r"intermediate_size is \[96, 64\], expected a size, or a list of 3"),
        ({"intermediate_size": [96, 64, 0]}, "intermediate_size is 0"),
        ({"activation_sparsity_pattern": [0.5]}, "activation_sparsity_pattern is .*expected 3 shares"),
        ({"activation_sparsity_pattern": [0.5, 1.0, 0]}, "expected 3 shares from 0 to below 1"),
        ({"activation_sparsity_pattern": 0.95}, "expected 3 shares"),
        ({"altup_num_inputs": 1}, "altup_num_inputs is 1, expected an integer from 2 to 16"),
        ({"altup_active_idx": 3}, "altup_active_idx is 3"),
        ({"altup_correct_scale": "yes"}, "altup_correct_scale is 'yes'"),
        ({"laurel_rank": 0}, "laurel_rank is 0"),
        ({"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input is 0, expected at least 1"),
        ({"vocab_size_per_layer_input": -1}, "vocab_size_per_layer_input is -1"),
        ({"num_kv_shared_layers": 2}, "no layer before computes keys for a full_attention"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"edgewright": {"per_layer_inputs": 2}}, "per_layer_inputs is 2, expected an integer from 3"),
    ],
)
def test_a_bad_config_is_one_line(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(GEMMA3N | change)
