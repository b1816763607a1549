"""Small checkpoints in the layouts that people report: each is read as transformers reads it, or refused with the reason.

Skipped where the folder of cases is not beside the checkout.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.oracle import causal_logits, run_step, seq2seq_start
from helpers.requests import asking
from safetensors.torch import load_file

from edgewright.commands.inspect import inspect
from edgewright.errors import UserError
from edgewright.models.loading import load_original
from edgewright.models.opening import open_model
from edgewright.models.registry import build
from edgewright.pipeline.original import open_original

CASES = Path(__file__).parents[3] / "shared" / "cases" / "checkpoints"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the folder of cases is not here")

EQUAL = (
    *("baseline_llama", "arch_missing/gemma2", "arch_missing/granite", "arch_missing/phi3", "arch_missing/qwen3"),
    *("arch_missing/smollm3", "base_model_no_prefix", "falcon_h1_published", "gemma3_final_softcap"),
    *("gemma3_mlx_lm_head", "gemma3_old_style", "gemma3_pattern_underscore", "gemma3_wrapper", "inv_freq_buffers"),
    *("lfm2_published", "llama32_rope", "mistral_type", "odd_vocab_hidden", "olmo_hybrid_fresh"),
    *("qwen2_layer_types_window_off", "qwen35_text_prefixed", "qwen35_wrapper", "rope_dynamic"),
    *("rope_linear_deepseek", "rope_v5_linear_no_theta", "rope_v5_only", "rope_yarn_qwen2", "sharded_fp16"),
    *("stories_group", "t5gemma2_published", "t5gemma2_text_model_names", "t5gemma_published"),
    "untied_but_config_ties",
)
"""Read as transformers reads them."""

CHANGED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], Callable[[str], str]]] = {
    "attention_bias_null": (lambda config: {k: v for k, v in config.items() if v is not None}, str),
    "gemma3_text_prefixed": (dict, lambda name: name.replace("language_model.", "", 1)),
}
"""Read as transformers reads what they mean: a change of config.json and of the names, as transformers cannot open them."""

REFUSED = {
    "head_dim_100": "head_dim is 20, expected a multiple of 8",
    "rope_scaling_over_params": "rope_scaling is .* the two differ",
    "seq_cls_tied": "Qwen2ForSequenceClassification.*cannot generate",
}


def made(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the script of a case writes."""
    script, _, part = name.partition("/")
    monkeypatch.setattr(sys, "argv", [str(CASES / f"{script}.py"), str(folder), *([part] if part else [])])
    runpy.run_path(sys.argv[0], run_name="__main__")
    return folder / part


def ours(folder: Path) -> Any:
    checkpoint = open_model(str(folder))
    open_original(asking(str(folder)), checkpoint, lambda _: None)
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    return model


def theirs(folder: Path, weights: dict[str, torch.Tensor] | None = None) -> Any:
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    auto = hf.AutoModelForCausalLM if name in ("Qwen2Model",) else getattr(hf, name)
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if weights is None:
        return auto.from_pretrained(folder, **options).eval()
    config = hf.AutoConfig.from_pretrained(folder)
    return auto.from_pretrained(None, config=config, state_dict=weights, **options).eval()


def assert_equal(model: Any, oracle: Any) -> None:
    ids = torch.randint(0, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if model.task == "seq2seq":
            mask, target = torch.ones_like(ids), ids[:, :6]
            want = oracle(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
            graph, states = seq2seq_start(model, ids, mask.bool(), 12)
            inputs = {"input_ids": target, "past_length": torch.tensor([0]), "encoder_mask": mask.bool()}
            got = run_step(graph, inputs | {"logit_positions": torch.arange(6)}, states)
        else:
            want, got = oracle(ids).logits, causal_logits(model, ids, [20])
    torch.testing.assert_close(got / want.abs().max(), want / want.abs().max(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", EQUAL)
def test_read_as_transformers_reads_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(name, tmp_path, monkeypatch)
    assert_equal(ours(folder), theirs(folder))


@pytest.mark.parametrize("name", CHANGED)
def test_read_as_it_is_meant(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(name, tmp_path, monkeypatch)
    model, (config, rename) = ours(folder), CHANGED[name]
    values = config(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(values))
    weights = {rename(key): value for key, value in load_file(folder / "model.safetensors").items()}
    assert_equal(model, theirs(folder, weights))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(name, tmp_path, monkeypatch)
    with pytest.raises(UserError, match=REFUSED[name]) as caught:
        ours(folder)
    with pytest.raises(UserError) as inspected:
        inspect(str(folder))
    assert str(inspected.value) == str(caught.value)


def test_heads_that_no_hidden_size_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5 refuses kanana's sizes as Llama; the file is read by its own head_dim."""
    model = ours(made("kanana_head_dim", tmp_path, monkeypatch))
    assert model.spec.attention[0].head_dim * model.spec.attention[0].heads != model.spec.hidden
