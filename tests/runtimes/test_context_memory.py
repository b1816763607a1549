"""A decoder-decoder reads a context into memory: the loop's splice, kept memories, and the commands around them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from helpers import tiny
from helpers.requests import asking
from helpers.tiny_families import FAMILIES

from edgewright import compiler
from edgewright.bundle import Bundle, ContextSpec, Generation
from edgewright.calibration.prompts import read_task
from edgewright.cli import main
from edgewright.errors import UserError
from edgewright.runtimes.generate import Stream, generate, read_context
from edgewright.runtimes.registry import open_session
from edgewright.runtimes.session import Array, StateBuffers
from edgewright.runtimes.text_generation import open_bundle
from edgewright.verification.scores import task_accuracy

pytestmark = pytest.mark.exports


EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "dolphin-packages"
HIDDEN = 3


def spec(**changes: Any) -> Generation:
    context = {"window": 4, "hidden": HIDDEN, "rows": 6, "vocab": 40, "tokens": (38, 39), "prefix": (7, 8)}
    context |= changes.pop("context", {})
    return Generation(
        task="memory", vocab=40, max_context=64, max_new_tokens=5, context=ContextSpec(**context), **changes
    )


class Recorder:
    """Memory is the context's tokens so far, summed; what the decoder is fed is kept."""

    def __init__(self) -> None:
        self.fed: list[tuple[list[int], list[int]]] = []
        self.contexts: list[list[int]] = []

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        return {"graph": graph, "tokens": [], "capacity": capacity}

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        ids = inputs["input_ids"]
        if graph == "context":
            if state:
                assert state["graph"] == "context"
                assert list(inputs["past_length"]) == [len(state["tokens"])]
                state["tokens"] += ids[0].tolist()
                assert len(state["tokens"]) <= state["capacity"]
                at = len(state["tokens"]) - ids.shape[1] + inputs["logit_positions"]
                rows = [[sum(state["tokens"][: p + 1])] * HIDDEN for p in at]
            else:
                rows = [[int(ids.sum())] * HIDDEN]
            self.contexts.append(ids[0].tolist())
            return {"memory": np.array([rows], np.float32)}
        assert inputs["slots"].shape == ids.shape[1:]
        assert inputs["memory"].dtype == np.float32
        self.fed.append((ids[0].tolist(), inputs["slots"].tolist()))
        return {"logits": np.eye(40, dtype=np.float32)[None, [5] * len(inputs["logit_positions"])]}


@pytest.mark.parametrize("chunk", [1, 2, 3, 128])
def test_a_context_is_read_in_parts_and_in_chunks(chunk: int) -> None:
    session = Recorder()
    memory = read_context(session, spec(prefill_chunk=chunk), [1, 2, 3, 4, 5, 6])
    assert memory[0, :, 0].tolist() == [1 + 2 + 3 + 4 + 38, 1 + 2 + 3 + 4 + 38 + 39, 5 + 6 + 38, 5 + 6 + 38 + 39]
    assert max(map(len, session.contexts)) <= chunk


def test_without_memory_tokens_a_part_is_read_whole() -> None:
    session = Recorder()
    memory = read_context(session, spec(context={"tokens": ()}, prefill_chunk=1), [1, 2, 3, 4, 5])
    assert session.contexts == [[1, 2, 3, 4], [5]]
    assert memory[0, :, 0].tolist() == [10, 5]


def fed(generation: Generation, memory: Array | None, prompt: list[int]) -> tuple[list[int], list[int]]:
    session = Recorder()
    list(generate(session, generation, prompt, 3, memory=memory))
    (ids, slots), *steps = session.fed
    assert all(step == ([5], [-1]) for step in steps)
    return ids, slots


def test_the_splice() -> None:
    memory = np.zeros((1, 3, HIDDEN), np.float32)
    assert fed(spec(), memory, [9]) == ([7, 8, 0, 0, 0, 9], [-1, -1, 0, 1, 2, -1])
    early = spec(context={"splice": "released"})
    assert fed(early, memory, [9]) == ([7, 0, 0, 0, 0, 9], [-1, 0, 1, 2, -1, -1])
    single = spec(context={"splice": "released", "prefix": (7,)})  # as Dolphin is released: memory on positions 0 …
    assert fed(single, memory, [9]) == ([0, 0, 0, 0, 9], [0, 1, 2, -1, -1])
    for generation in (spec(), early):
        assert fed(generation, None, [9]) == ([7, 8, 9], [-1, -1, -1])


def test_refusals() -> None:
    with pytest.raises(UserError, match="context has no tokens"):
        read_context(Recorder(), spec(), [])
    with pytest.raises(UserError, match="reads no context"):
        read_context(Recorder(), Generation(task="causal", vocab=9, max_context=9, max_new_tokens=1), [1])
    with pytest.raises(UserError, match="7 rows of memory, the model takes 6"):
        Stream(Recorder(), spec(), [[1]], 1, np.zeros((1, 7, HIDDEN), np.float32))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dolphin") / "bundle"
    report = compiler.export(asking(str(EXAMPLE), bits=6.0), path).report
    assert report is not None
    assert report.passed
    return path


def edgewright(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.slow
def test_run_answers_from_a_context_and_from_its_kept_memory(bundle: Path, tmp_path: Path) -> None:
    task = read_task(EXAMPLE / "task.tsv", 1, contexts=True)
    text, memory = tmp_path / "context.txt", tmp_path / "memory"
    text.write_text(task.contexts[0])
    first = edgewright("run", bundle, "--context", text, "--save-memory", memory, "--prompt", task.prompts[0])
    assert first.exit_code == 0, first.stderr
    assert "reading a context of" in first.stderr
    again = edgewright("run", bundle, "--memory", memory, "--prompt", task.prompts[0])
    assert again.exit_code == 0
    assert "reading" not in again.stderr
    assert again.stdout == first.stdout
    assert first.stdout.strip()

    other = tmp_path / "other"
    stored = safetensors.numpy.load_file(memory)
    safetensors.numpy.save_file(stored, other, {"edgewright.memory": "another", "plan": "one"})
    refused = edgewright("run", bundle, "--memory", other, "--prompt", "Which version?")
    assert refused.exit_code == 2
    assert "made by another model" in refused.stderr
    (tmp_path / "broken").write_bytes(memory.read_bytes()[:100])
    refused = edgewright("run", bundle, "--memory", tmp_path / "broken", "--prompt", "Which version?")
    assert refused.exit_code == 2
    assert "is no memory of a context" in refused.stderr
    for extra in (["--context", text, "--memory", memory], ["--save-memory", memory], ["--context", tmp_path / "none"]):
        assert edgewright("run", bundle, "--prompt", "Which version?", *extra).exit_code == 2


@pytest.mark.slow
def test_an_open_bundle_reads_a_context_once_for_many_prompts(bundle: Path, tmp_path: Path) -> None:
    task = read_task(EXAMPLE / "task.tsv", 1, contexts=True)
    opened = open_bundle(bundle, "onnx", threads=1)
    memory = opened.read_context(task.contexts[0])
    opened.save_memory(tmp_path / "memory", memory)
    np.testing.assert_array_equal(opened.load_memory(tmp_path / "memory"), memory)
    pieces = list(opened.generate(task.prompts[0], memory=memory))
    assert "".join(pieces).strip()
    assert list(opened.generate(task.prompts[0], context=task.contexts[0])) == pieces
    assert list(opened.generate(opened.read_prompt(task.prompts[0]).ids, memory=memory)) == pieces
    assert len(list(opened.generate(task.prompts[0], memory=memory, max_new_tokens=1))) <= 1
    with pytest.raises(UserError, match="pass one of them"):
        opened.generate("a", context="b", memory=memory)
    with pytest.raises(UserError, match="no chat template"):
        opened.generate("a", chat=True)
    with pytest.raises(UserError, match="empty"):
        opened.generate(" ")


@pytest.mark.slow
def test_other_models_keep_no_memory(tmp_path: Path) -> None:
    model = tiny.write_tiny_t5gemma(tmp_path / "model")
    compiler.export(asking(str(model), bits=6.0, verify=False), tmp_path / "bundle")
    (tmp_path / "text").write_text("text")
    result = edgewright("run", tmp_path / "bundle", "--prompt", "k n", "--context", tmp_path / "text")
    assert result.exit_code == 2
    assert "keeps no memory of a context" in result.stderr


@pytest.mark.slow
def test_the_examples_task_is_answered_through_the_memory(bundle: Path) -> None:
    """Right more often with its own context than with another's."""
    opened = Bundle.open(bundle)
    session = open_session(opened, "onnx", 1)
    task = read_task(EXAMPLE / "task.tsv", 60, contexts=True)
    own = task_accuracy(session, opened, task)
    task.contexts[:] = task.contexts[1:] + task.contexts[:1]
    assert own > task_accuracy(session, opened, task) + 0.1


@pytest.mark.slow
def test_profile_measures_reading(bundle: Path) -> None:
    result = edgewright("profile", bundle, "-p", "64", "-n", "4", "-r", "1")
    assert result.exit_code == 0, result.stderr
    assert "pp64" in result.stdout


@pytest.mark.slow
def test_a_manifest_whose_contexts_do_not_fit_is_refused(bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(bundle).manifest.model_dump(mode="json")
    assert len(manifest["contexts"]) == len(manifest["prompts"])
    from pydantic import ValidationError

    from edgewright.bundle import Manifest

    for change, words in (
        ({"contexts": manifest["contexts"][1:]}, "do not fit"),
        ({"generation": manifest["generation"] | {"context": None}}, "needs generation.context"),
        ({"contexts": [[10**6], *manifest["contexts"][1:]]}, "vocabulary"),
        ({"graphs": [g for g in manifest["graphs"] if g["name"] != "context"]}, "needs the graph context"),
    ):
        with pytest.raises(ValidationError, match=words):
            Manifest.model_validate(manifest | change)


def test_more_context_than_the_prompt_holds_is_refused(tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "model", FAMILIES["dolphin"])
    with pytest.raises(UserError, match="leaves no room for a context"):
        compiler.plan(asking(str(model), max_context=4))
