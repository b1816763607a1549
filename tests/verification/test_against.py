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
from helpers.sentence_models import describe, linear
from helpers.tiny_families import FAMILIES

from edgewright.errors import UserError, VerificationFailure
from edgewright.system.subprocesses import ChildFailed
from edgewright.verification import transformers_model, transformers_vectors
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


def sentence_model(folder: Path) -> Path:
    sizes = SIZES | {"num_attention_heads": 4, "max_position_embeddings": 64, "num_hidden_layers": 2}
    randomise(hf.BertModel(hf.BertConfig(**sizes)), 1).save_pretrained(folder)
    return describe(folder, ("mean", "max"), [linear(128, 32, "linear.Identity")])


def test_a_model_of_embeddings_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    found = compare(str(sentence_model(tmp_path)), lambda _: None)
    assert found["version"].startswith(("transformers 5", "sentence-transformers"))
    assert found["max_relative_error"] < 1e-5
    assert found["cosine"] > 0.99999
    assert (found["positions"], found["differs"]) == (8, None)
    other = compare(str(tmp_path), lambda _: None, ("last", "cls"))
    assert other["version"] == f"transformers {hf.__version__}"
    assert other["max_relative_error"] < 1e-5


@pytest.mark.parametrize(
    ("parameter", "part"),
    [
        ("model.layers.1.mlp.up_proj.weight", "layer 1 of the encoder"),
        ("model.embed_types.weight", "the encoder's embedding"),
        ("dense.0.weight", "what stands behind the last layer (norm, head or pooling)"),
    ],
)
def test_a_misreading_of_a_model_of_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameter: str, part: str
) -> None:
    load = transformers_vectors.load_original

    def misread(model: torch.nn.Module, checkpoint: object) -> None:
        load(model, checkpoint)  # type: ignore[arg-type]
        model.get_parameter(parameter).data.mul_(1.5)

    monkeypatch.setattr(transformers_vectors, "load_original", misread)
    found = compare(str(sentence_model(tmp_path)), lambda _: None)
    assert found["differs"] == part
    monkeypatch.setattr("edgewright.verification.against.run_child", lambda *_: found)
    with pytest.raises(VerificationFailure, match=r"vectors differ by up to .* least cosine .*; the first output"):
        compare_reading(str(tmp_path), None, 1000, "auto", lambda _: None)


@pytest.mark.parametrize(
    ("parameter", "part"),
    [
        ("model.layers.1.mlp.up_proj.weight", "layer 1 of the decoder"),
        ("model.embed_tokens.weight", "the decoder's embedding"),
        ("model.norm.weight", "what stands behind the last layer (norm, head or pooling)"),
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


def test_a_fault_of_ours_is_told_apart(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What breaks in our model is no line about transformers; what breaks in theirs is no fault of ours."""

    def broken(*_: object) -> None:
        raise TypeError("no such layer")

    with monkeypatch.context() as patched:
        patched.setattr(transformers_model, "load_original", broken)
        result = transformers_model._job({"model": str(llama)}, lambda _: None)
    assert result == {"fault": "TypeError: no such layer"}
    with monkeypatch.context() as patched:
        patched.setattr(transformers_model._Causal, "theirs", broken)
        result = transformers_model._job({"model": str(llama)}, lambda _: None)
    assert result == {"reason": "it cannot compute the model (TypeError: no such layer)"}
    monkeypatch.setattr("edgewright.verification.against.run_child", lambda *_: {"fault": "TypeError: no such layer"})
    for against in ("auto", "transformers"):
        with pytest.raises(
            VerificationFailure, match=r"failed on this side, not on theirs: TypeError.*a fault of this"
        ):
            compare_reading(str(llama), None, 1000, against, lambda _: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("failure", "ours"),
    [
        (ChildFailed("ended with signal 11, SIGSEGV (it said nothing)"), True),
        (ChildFailed("ended with status 1 (Error)", "computing the checkpoint's model"), True),
        (ChildFailed("ended with signal 11, SIGSEGV (it said nothing)", "transformers: load the checkpoint"), False),
        (ChildFailed("took more memory", killed=True), False),
    ],
)
def test_a_child_that_dies_says_whose_work_it_did(
    failure: ChildFailed, ours: bool, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def died(*_: object) -> None:
        raise failure

    monkeypatch.setattr("edgewright.verification.against.run_child", died)
    if ours:
        with pytest.raises(VerificationFailure, match="a fault of this program"):
            said(llama)
    else:
        assert said(llama) == [f"not compared with transformers: {failure}"]


def test_gemma_3n_and_the_layer_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hidden states lie another way in transformers."""
    sizes = SIZES | HEADS | {"head_dim": 16, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 80}
    sizes |= {"laurel_rank": 16, "num_kv_shared_layers": 1, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = hf.Gemma3nTextConfig(**sizes | {"num_hidden_layers": 4, "tie_word_embeddings": True})
    oracle = randomise(hf.Gemma3nForCausalLM(config), seed=1)
    oracle.tie_weights()
    oracle.save_pretrained(tmp_path)
    found = compare(str(tmp_path), lambda _: None)
    assert found["max_relative_error"] < 1e-5
    load = transformers_model.load_original

    def misread(model: torch.nn.Module, checkpoint: object) -> None:
        load(model, checkpoint)  # type: ignore[arg-type]
        model.get_parameter("model.layers.2.altup.prediction_coefs.weight").data.mul_(1.1)

    monkeypatch.setattr(transformers_model, "load_original", misread)
    assert compare(str(tmp_path), lambda _: None)["differs"] == "layer 2 of the decoder"


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
