"""The files of sentence-transformers: what they say is read; what cannot be computed, or leads out of the folder, is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers import tiny
from helpers.requests import asking
from helpers.sentence_models import describe, linear
from helpers.tiny_families import FAMILIES
from safetensors.torch import load_file, save_file

from edgewright import bundle, compiler
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.checkpoints.sentence_transformers import POOLING
from edgewright.errors import UserError
from edgewright.models.opening import open_model

PLAIN = {key: value for key, value in FAMILIES["bert"].items() if key != "edgewright"}
PROMPTS = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "document"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tiny.write(tmp_path / "model", PLAIN)
    return describe(folder, ("mean",), [linear(64, 32)], settings=PROMPTS, limits={"max_seq_length": 24})


def change(file: Path, *away: str, **values: Any) -> None:
    content = {key: value for key, value in json.loads(file.read_text()).items() if key not in away}
    file.write_text(json.dumps(content | values))


def described(model: Path) -> dict[str, Any]:
    found: dict[str, Any] = open_checkpoint(str(model)).config["edgewright"]["embedding"]
    return found


def refusal(model: Path) -> str:
    with pytest.raises(UserError) as error:
        open_model(str(model))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_poolings_of_a_manifest_are_those_of_the_files() -> None:
    assert get_args(bundle.Pooling) == tuple(POOLING.values())


def test_what_the_files_say_is_in_the_config(model: Path) -> None:
    assert described(model) == {
        "pooling": ["mean"],
        "behind": [{"kind": "dense", "in": 64, "out": 32, "bias": True, "act": "tanh"}, {"kind": "normalize"}],
        "max_length": 24,
        "prompts": {"query": "query: ", "document": ""},
        "default_prompt": "document",
        "similarity": "cosine",
    }
    checkpoint = open_model(str(model))
    want = load_file(model / "2_Dense" / "model.safetensors")
    assert torch.equal(checkpoint.tensor("dense.0.weight"), want["linear.weight"])
    assert torch.equal(checkpoint.rows("dense.0.bias", 3, 9), want["linear.bias"][3:9])
    assert {file.name for file in checkpoint.files} == {"model.safetensors"}
    assert len(checkpoint.files) == 2


def test_the_fingerprint_counts_the_linears_and_the_pooling(model: Path) -> None:
    first = open_model(str(model)).fingerprint()
    file = model / "2_Dense" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"linear.bias": tensors["linear.bias"] + 1}, file)
    second = open_model(str(model)).fingerprint()
    change(model / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    assert len({first, second, open_model(str(model)).fingerprint()}) == 3


def test_the_newer_names_of_a_pooling(model: Path) -> None:
    file = model / "1_Pooling" / "config.json"
    for name, ours in (("lasttoken", ["last"]), (["mean", "cls"], ["mean", "cls"]), (None, ["mean"])):
        file.write_text(json.dumps({"embedding_dimension": 64, "pooling_mode": name}))
        assert described(model)["pooling"] == ours


def test_a_model_in_a_folder_of_its_own(model: Path, tmp_path: Path) -> None:
    """The older layout."""
    whole = tmp_path / "whole"
    os.rename(model, whole)
    inner = whole / "0_Transformer"
    inner.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors", "sentence_bert_config.json"):
        os.rename(whole / name, inner / name)
    entries = json.loads((whole / "modules.json").read_text())
    entries[0]["path"] = "0_Transformer"
    (whole / "modules.json").write_text(json.dumps(entries))
    assert described(whole)["max_length"] == 24
    assert open_model(str(whole)).has("dense.0.weight")


def test_limits_under_the_older_names(model: Path) -> None:
    os.rename(model / "sentence_bert_config.json", model / "sentence_roberta_config.json")
    change(model / "sentence_roberta_config.json", do_lower_case=True)
    assert described(model)["max_length"] == 24
    assert described(model)["lower_case"] is True


def entries(edit: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        file = model / "modules.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps(edit(content)))

    return apply


def typed(index: int, kind: str) -> Callable[[Path], None]:
    return entries(lambda e: [*e[:index], e[index] | {"type": kind}, *e[index + 1 :]])


def pathed(path: Any) -> Callable[[Path], None]:
    return entries(lambda e: [e[0], e[1] | {"path": path}, *e[2:]])


def inside(file: str, *away: str, **values: Any) -> Callable[[Path], None]:
    return lambda model: change(model / file, *away, **values)


def replaced(file: str, text: str) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        (model / file).write_text(text)

    return apply


def pickled(model: Path) -> None:
    os.rename(model / "2_Dense" / "model.safetensors", model / "2_Dense" / "pytorch_model.bin")


POOL, DENSE, SETTINGS = "1_Pooling/config.json", "2_Dense/config.json", "config_sentence_transformers.json"
LIMITS = "sentence_bert_config.json"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (replaced("modules.json", "{}"), "holds a JSON dict, a list is needed"),
        (replaced("modules.json", "[" * 100), "not valid JSON"),
        (replaced("modules.json", json.dumps([[[]] * 3] * 40)), "40 modules; 2 to 16 are expected"),
        (replaced("modules.json", "[1, 2]"), "1 is no module; its type and path are strings"),
        (
            entries(lambda e: e[1:]),
            "the modules are Pooling, Dense, Normalize; a Transformer and a Pooling must come first",
        ),
        (entries(lambda e: [*e, e[1]]), "a second Pooling follows the first"),
        (typed(2, "sentence_transformers.models.LSTM"), "a module of type 'sentence_transformers.models.LSTM'"),
        (typed(0, "custom_st.Transformer"), "a module of type 'custom_st.Transformer' is not computed here"),
        (pathed("../1_Pooling"), "the path '../1_Pooling' leaves the folder"),
        (pathed("/etc"), "the path '/etc' leaves the folder"),
        (pathed("a\\..\\b"), "leaves the folder"),
        (pathed(["1_Pooling"]), "is no module"),
        (pathed("3_Gone"), "3_Gone/config.json: cannot be read"),
        (inside(POOL, pooling_mode_mean_tokens=False), "no pooling is switched on"),
        (inside(POOL, pooling_mode_mean_tokens="yes"), "pooling_mode_mean_tokens is 'yes', expected true or false"),
        (inside(POOL, pooling_mode_attention=True), "'pooling_mode_attention' is True, which is not computed here"),
        (inside(POOL, pooling_mode="attention"), "pooling_mode is 'attention'; known: cls"),
        (inside(POOL, include_prompt=False), "include_prompt is false, and prompts that are not pooled"),
        (inside(DENSE, in_features=0), "in_features is 0, expected an integer from 1"),
        (inside(DENSE, out_features=1 << 40), "out_features is 1099511627776"),
        (inside(DENSE, bias=1), "bias is 1, expected true or false"),
        (inside(DENSE, activation_function="os.system"), "activation_function is 'os.system'; known: Identity"),
        (inside(DENSE, activation_function="torch.nn.modules.activation.Softmax"), "activation_function is"),
        (inside(DENSE, module_input_name="token_embeddings"), "a linear of the embedding alone is computed"),
        (inside(DENSE, residual=True), "'residual' is True, which is not computed here"),
        (inside(DENSE, in_features=48), "a Dense behind the pooling takes 48 numbers, and 64 come"),
        (pickled, "weights as a pickle, which can run code when read, are refused"),
        (inside(SETTINGS, prompts={"query": 3}), "the prompt 'query' is no text"),
        (inside(SETTINGS, prompts={"query": "x" * 5000}), "the prompt 'query' is no text of at most 4096"),
        (inside(SETTINGS, prompts={str(i): "" for i in range(65)}), "expected at most 64 texts by name"),
        (inside(SETTINGS, default_prompt_name="title"), "default_prompt_name is 'title', which is none of the prompts"),
        (inside(SETTINGS, similarity_fn_name="jaccard"), "similarity_fn_name is 'jaccard'; known: cosine"),
        (inside(SETTINGS, model_type="SparseEncoder"), "model_type is 'SparseEncoder'"),
        (inside(LIMITS, max_seq_length=-1), "max_seq_length is -1, expected an integer from 1"),
        (inside(LIMITS, transformer_task="fill-mask"), "transformer_task is 'fill-mask'"),
        (inside(LIMITS, do_lower_case=2), "do_lower_case is 2"),
    ],
)
def test_what_cannot_be_computed_is_one_line(model: Path, edit: Callable[[Path], None], words: str) -> None:
    edit(model)
    assert words in refusal(model)


def test_a_pipe_in_place_of_modules_json_is_refused(model: Path) -> None:
    (model / "modules.json").unlink()
    os.mkfifo(model / "modules.json")
    assert "a pipe, a regular file is needed" in refusal(model)


def test_a_tensor_of_a_linear_that_the_model_has_not_is_named(model: Path) -> None:
    file = model / "2_Dense" / "model.safetensors"
    save_file(load_file(file) | {"linear.scale": torch.ones(32)}, file)
    with pytest.raises(UserError, match=r"1 tensors have no place in this bert \(the first: dense\.0\.scale\)"):
        compiler.plan(asking(str(model)))
