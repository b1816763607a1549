"""A tokenizer that gives ids the model does not have, or no tokens at all: one line wherever texts become tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.formula_session import Formula
from helpers.generations import CAUSAL, SEQ2SEQ
from helpers.vocabularies import changed, letters

from edgewright.bundle import ContextSpec, Generation, require_tokens
from edgewright.calibration.prompts import text_passages
from edgewright.calibration.samples import read_samples
from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.errors import UserError
from edgewright.pipeline import prompts
from edgewright.pipeline.request import CalibrationOptions, Request
from edgewright.rewrites import activations
from edgewright.runtimes.generate import Stream, generate_batch, read_context

MEMORY = CAUSAL.model_copy(update={"task": "memory", "context": ContextSpec(window=8, hidden=19, rows=8, vocab=19)})
WRONG = r"gives token 99, the model has 19"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "k": 4, "n": 99}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    return Tokenizer.from_dir(changed(letters(tmp_path / "tokenizer"), model=model))


@pytest.fixture
def checkpoint(tokenizer: Tokenizer) -> Any:
    return SimpleNamespace(tokenizer=tokenizer, source="model")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "task.tsv").write_text("k k k\tk\nk n\tk\n")
    return tmp_path / "task.tsv"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("k n " * 200)
    return tmp_path / "text.txt"


def test_tokens_are_the_models() -> None:
    require_tokens([0, 18], 19, "it")
    with pytest.raises(UserError, match=r"^it: the tokenizer gives token 19, the model has 19"):
        require_tokens([0, 19], 19, "it")
    with pytest.raises(UserError, match="token -1"):
        require_tokens([-1, 3], 19, "it")
    with pytest.raises(UserError, match="it has no tokens"):
        require_tokens([], 19, "it")


@pytest.mark.parametrize("generation", [CAUSAL, SEQ2SEQ])
def test_a_session_is_fed_no_other_tokens(generation: Generation) -> None:
    with pytest.raises(UserError, match=WRONG):
        Stream(Formula(), generation, [[4, 99]], 4)
    with pytest.raises(UserError, match=WRONG):
        generate_batch(Formula(), generation, [[4], [99]], 4)
    with pytest.raises(UserError, match=WRONG):
        read_context(Formula(), MEMORY, [4, 99])


@pytest.mark.parametrize("generation", [CAUSAL, SEQ2SEQ])
@pytest.mark.parametrize("read", [read_samples, activations.read_prompts])
def test_calibration_data(
    checkpoint: Any, task: Path, text: Path, generation: Generation, read: Callable[..., Sequence[Any]]
) -> None:
    extra = (32,) if read is read_samples else ()
    for path in (task, text):
        arguments = (path, checkpoint, generation, *extra)
        with pytest.raises(UserError, match=WRONG):
            read(*arguments)


def test_prompts_of_a_bundle(checkpoint: Any, task: Path, text: Path) -> None:
    for options in (CalibrationOptions(task=task), CalibrationOptions(text=text)):
        with pytest.raises(UserError, match=WRONG):
            prompts.read_prompts(Request("model", calibration=options), checkpoint, CAUSAL)


def test_text_that_is_scored(tokenizer: Tokenizer, text: Path) -> None:
    for generation in (CAUSAL, SEQ2SEQ):
        with pytest.raises(UserError, match=WRONG):
            text_passages(text, tokenizer, generation, 3)


def test_prompts_without_tokens(tmp_path: Path, task: Path) -> None:
    nothing = {"type": "Replace", "pattern": {"String": "k"}, "content": ""}
    tokenizer = Tokenizer.from_dir(changed(letters(tmp_path / "nothing"), normalizer=nothing))
    checkpoint: Any = SimpleNamespace(tokenizer=tokenizer, source="model")
    task.write_text("k\tk\n")
    with pytest.raises(UserError, match="a sample has no tokens"):
        read_samples(task, checkpoint, CAUSAL, 32)
    with pytest.raises(UserError, match="a prompt has no tokens"):
        prompts.read_prompts(Request("model", calibration=CalibrationOptions(task=task)), checkpoint, CAUSAL)
