"""A session over a stranger's artefact: what its runtime raises or gives back is one line, and so are states that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgewright.bundle import Bundle, Generation, GraphSpec, Manifest, TargetEntry
from edgewright.errors import UserError, VerificationFailure
from edgewright.graph import Graph, Port, State
from edgewright.runtimes.coreml.batch import Batch
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.guarded import Guarded
from edgewright.runtimes.limits import LEAST, limits_of
from edgewright.runtimes.onnx.session import OnnxSession
from edgewright.runtimes.session import Array, Placement, StateBuffers, array_bytes
from edgewright.runtimes.tensorrt.network import NetworkSession
from edgewright.targets.coreml.package import FunctionDef

CACHE = {
    "name": "k_cache_0",
    "kind": "kv",
    "dtype": "float32",
    "shape": ["batch", 1 << 24, "capacity", 1 << 24],
    "updated": True,
}
DECODER = GraphSpec.model_validate(
    {
        "name": "decoder",
        "inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", "sequence", 5]}],
        "states": [CACHE],
    }
)
IDS = {"input_ids": np.zeros((2, 3), np.int64)}


class Native:
    """A runtime that raises or returns what it is told."""

    activations, how, stand_in = "float32", "a test", False

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return {}

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return {"logits": self.answer}

    def placement(self) -> Placement:
        return Placement("here", {})


def guarded(answer: Any, failure: Any = UserError) -> Guarded:
    return Guarded(Native(answer), "onnx", [DECODER], "the onnx artefact", failure)


def test_a_session_that_works_is_as_it_was() -> None:
    session = guarded(np.ones((2, 3, 5), np.float32))
    assert session.run("decoder", IDS, session.new_state(2, 8))["logits"].shape == (2, 3, 5)
    assert (session.activations, session.how, session.stand_in) == ("float32", "a test", False)
    assert session.placement() == Placement("here", {})


@pytest.mark.parametrize("failure", [UserError, VerificationFailure])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("[ONNXRuntimeError] : 1 : FAIL :\nbad\x1b[31m" + "x" * 5000), "FAIL : bad"),
        (MemoryError(), "MemoryError"),
        (KeyError("past_length"), "KeyError: 'past_length'"),
        (RecursionError("deep"), "deep"),
    ],
)
def test_what_a_runtime_raises_is_one_line(error: Exception, words: str, failure: Any) -> None:
    for call in (lambda s: s.run("decoder", IDS, {}), lambda s: s.new_state(1, 8)):
        with pytest.raises(failure, match=r"^the onnx artefact: decoder does not run") as caught:
            call(guarded(error, failure))
        line = str(caught.value)
        assert words in line
        assert line.isprintable()
        assert len(line) < 300


def test_what_the_user_is_told_already_stays() -> None:
    with pytest.raises(UserError, match=r"^too long$"):
        guarded(UserError("too long"), VerificationFailure).run("decoder", IDS, {})
    with pytest.raises(KeyboardInterrupt):
        guarded(KeyboardInterrupt()).run("decoder", IDS, {})


@pytest.mark.parametrize(
    "answer",
    [
        np.ones((2, 3, 4), np.float32),
        np.ones((2, 2, 5), np.float32),
        np.ones((1, 3, 5), np.float32),
        np.ones((2, 15), np.float32),
        np.ones((2, 3, 5), np.int64),
        np.full((2, 3, 5), "a"),
        np.full((2, 3, 5), None),
    ],
)
def test_an_output_of_another_form_is_not_passed_on(answer: Array) -> None:
    with pytest.raises(VerificationFailure, match=r"decoder does not run .logits comes as"):
        guarded(answer, VerificationFailure).run("decoder", IDS, {})


# States that the memory does not hold


def empty(kind: Any, **attributes: Any) -> Any:
    """A session without files."""
    session = kind.__new__(kind)
    vars(session).update(attributes)
    return session


SESSIONS = {
    "onnx": lambda: empty(OnnxSession, _graphs={"decoder": DECODER}),
    "tensorrt": lambda: empty(NetworkSession, _graphs={"decoder": DECODER}, _half=np.float32),
}


@pytest.mark.parametrize("name", SESSIONS)
@pytest.mark.parametrize("capacity", [8, 10**7, 10**12])
def test_states_that_do_not_fit_are_refused_by_the_figure(name: str, capacity: int) -> None:
    with pytest.raises(UserError, match=rf"{capacity} tokens take memory: about [0-9.]+ GiB, of which [0-9.]+ GiB are"):
        SESSIONS[name]().new_state(1, capacity)


def test_the_reference_refuses_them_too() -> None:
    port = Port("x", torch.int64, (1,))
    cache = State("k", "kv", torch.float32, ("batch", 1 << 24, "capacity", 1 << 24), updated=True)
    graph = Graph("decoder", torch.nn.Identity(), (port,), (port,), states=(cache,), example={}, bounds={})
    with pytest.raises(UserError, match="1000000000000 tokens take memory"):
        EagerSession([graph]).new_state(1, 10**12)


def test_a_package_cannot_ask_for_more_than_there_is() -> None:
    function = FunctionDef(states={"k_cache_0": ("FLOAT16", (1, 1 << 24, 64, 1 << 24))})
    package: Any = type("Package", (), {"functions": {"decoder": function}})()
    batch = empty(Batch, package=package, graphs={"decoder": DECODER}, states={"k_cache_0": DECODER.states[0]})
    with pytest.raises(UserError, match="take memory"):
        batch.check("decoder", 8, 1)


def test_products_of_sizes_do_not_overflow() -> None:
    assert array_bytes([1 << 24] * 8) == 4 << 192
    assert array_bytes([3, 5], "int8") == 15


# What a process may take


def bundle(tmp_path: Path, **changes: Any) -> Bundle:
    names = ("checkpoint/config.json", "checkpoint/model.safetensors", "onnx/decoder.onnx")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(1000))
    values = {
        "source": "model",
        "source_fingerprint": "0",
        "model_type": "llama",
        "graphs": (DECODER.model_copy(update={"states": ()}),),
        "generation": Generation(task="causal", vocab=10, max_context=32, max_new_tokens=8),
        "average_bits": 4.5,
        "weights": 100,
        "targets": (TargetEntry(format="onnx", files=("onnx/decoder.onnx",), ops={}, stored_bytes=1, ideal_bytes=1),),
        "prompts": ((1, 2, 3),),
        "files": dict.fromkeys(names, "0"),
        "tools": {},
    }
    return Bundle(tmp_path, Manifest(**(values | changes)))


def test_limits_are_of_the_files_and_not_of_what_the_manifest_claims(tmp_path: Path) -> None:
    small = bundle(tmp_path)
    honest = limits_of(small, small.manifest.targets, 1)
    claimed = bundle(tmp_path, weights=1 << 40)
    assert limits_of(claimed, claimed.manifest.targets, 1).memory - honest.memory < 1 << 20
    assert honest.memory >= LEAST
    assert honest.seconds >= 600


def test_limits_are_not_more_than_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgewright.runtimes.limits.available_bytes", lambda: 3 << 30)
    large = bundle(tmp_path, graphs=(DECODER,))
    assert limits_of(large, large.manifest.targets, 1).memory <= 3 << 30
    monkeypatch.setattr("edgewright.runtimes.limits.available_bytes", lambda: 0)
    assert limits_of(large, large.manifest.targets, 1).memory == LEAST
