"""`--against`: a checkpoint's reading beside transformers'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from helpers import tiny
from helpers.cli_runner import edgewright, passed, process, refused
from helpers.oracle import randomise
from helpers.tiny_families import FAMILIES

from edgewright.errors import UserError, VerificationFailure
from edgewright.verification import transformers_model
from edgewright.verification.against import compare_reading
from edgewright.verification.transformers_model import compare

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    randomise(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **HEADS)), seed=1).save_pretrained(folder)
    return folder


def said(model: Path | str, against: str = "auto") -> list[str]:
    lines: list[str] = []
    assert compare_reading(str(model), None, 1000, against, lines.append) is None  # type: ignore[arg-type]
    return lines


def test_a_checkpoint_is_read_as_transformers_reads_it(llama: Path) -> None:
    found = compare_reading(str(llama), None, 1000, "transformers", lambda _: None)
    assert found is not None
    assert found.version == hf.__version__
    assert found.max_relative_error < 1e-5
    assert (found.top1, found.positions, found.tokens, found.differs) == (1.0, 56, 16, None)


def test_an_encoder_decoder(tmp_path: Path) -> None:
    model = tiny.write_tiny_t5gemma(tmp_path / "model")
    found = compare(str(model), lambda _: None)
    assert found["max_relative_error"] < 1e-5
    assert (found["positions"], found["differs"]) == (18, None)


@pytest.mark.parametrize(
    ("parameter", "part"),
    [
        ("model.layers.1.mlp.up_proj.weight", "layer 1 of the decoder"),
        ("model.embed_tokens.weight", "the decoder's embedding"),
        ("model.norm.weight", "what stands behind the last layer (norm or head)"),
    ],
)
def test_a_misreading_names_the_first_output_that_differs(
    llama: Path, monkeypatch: pytest.MonkeyPatch, parameter: str, part: str
) -> None:
    load = transformers_model.load_original

    def misread(model: torch.nn.Module, checkpoint: object) -> None:
        load(model, checkpoint)  # type: ignore[arg-type]
        model.get_parameter(parameter).data.mul_(1.1)

    monkeypatch.setattr(transformers_model, "load_original", misread)
    found = compare(str(llama), lambda _: None)
    assert found["differs"] == part
    assert found["max_relative_error"] > 1e-3


def test_a_difference_fails(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "version": "5",
        "max_relative_error": 0.5,
        "top1": 0.25,
        "positions": 56,
        "tokens": 3,
        "differs": "layer 2 of the decoder",
    }
    monkeypatch.setattr("edgewright.verification.against.run_child", lambda *_: values)
    with pytest.raises(VerificationFailure, match=r"by up to 0\.5 of the largest .*25\.0%.*layer 2 of the decoder"):
        compare_reading(str(llama), None, 1000, "auto", lambda _: None)


def test_what_cannot_be_compared_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said("helpers.user_modules:unet") == [
        "not compared with transformers: it is compared where the model is a directory"
    ]
    (line,) = said(tiny.write(tmp_path / "unknown", FAMILIES["mu"]))
    assert line.startswith("not compared with transformers: it cannot load the checkpoint (ValueError")
    monkeypatch.setattr("edgewright.verification.against.available_bytes", lambda: 1 << 28)
    assert "take about 1.0 GiB, of which 0.2 GiB are available" in said(tmp_path)[0]
    with pytest.raises(UserError, match="--against transformers: two models in float32"):
        compare_reading(str(tmp_path), None, 1000, "transformers", lambda _: None)


def test_what_transformers_may_compute_in_another_way_is_not_compared(llama: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    assert compare_reading(str(llama), "adapter", 1000, "auto", lines.append) is None
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert compare_reading(str(tmp_path), None, 1000, "auto", lines.append) is None
    assert [line.split(": ")[1] for line in lines] == [
        "an adapter is merged into the checkpoint",
        "the checkpoint is quantized already, and transformers may compute it in other arithmetic",
    ]


def test_without_transformers(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert said(llama) == ["not compared with transformers: it is not installed (pip install transformers)"]


@pytest.mark.slow
def test_export_says_it(llama: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export = ("export", "-m", llama, "--bits", 8, "--max-context", 64, "--against", "transformers", "-o", bundle)
    assert "read as transformers" in passed(edgewright(*export))
    again = ("export", "-m", llama, "--num-layers", 1, "--against", "transformers", "-o", tmp_path / "short")
    assert "leave it or --num-layers out" in refused(edgewright(*again))


def test_it_is_the_default() -> None:
    done = process("-m", "edgewright.cli", "export", "--help")
    assert re.search(r"--against \[auto\|transformers\|none\].*?\[default: auto\]", done.stdout, re.DOTALL)


@pytest.mark.slow
def test_verify_says_it(llama: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    passed(edgewright("export", "-m", llama, "--bits", 8, "--max-context", 64, "-o", bundle))
    assert "read as transformers" in passed(edgewright("verify", bundle, "-m", llama, "--against", "auto"))
