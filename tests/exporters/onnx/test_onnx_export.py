"""What ONNX Runtime computes from tiny exported models, against the eager reference of the same codes and scales."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from helpers.onnx_cases import FAST, TOLERANCE, Case, logits, prompts

from edgewright.runtimes.generate import Sampling, Stream, generate, generate_batch
from edgewright.runtimes.onnx.session import OnnxSession


@pytest.fixture(params=FAST)
def case(request: pytest.FixtureRequest, onnx_cases: Callable[[str], Case]) -> Case:
    return onnx_cases(request.param)


def test_every_width_is_in_every_plan(case: Case) -> None:
    assert {e.bits for e in case.plan.entries.values()} == {2, 3, 4, 5, 6, 8, 16}


@pytest.mark.parametrize(
    ("sources", "chunks"),
    [
        ([9], [1]),
        ([1], [7]),
        ([30], [20]),
        ([12], [9, 1, 1, 4, 1, 12]),  # later chunks of several tokens: a batch of one only
        ([5], [1] * 14),
        ([12, 5, 1, 12], [6, 1, 1, 1, 1]),  # a batch, padded where there is an encoder
        ([2, 21], [1] * 6),
    ],
    ids=str,
)
def test_logits_and_caches_equal_the_dequantized_reference(case: Case, sources: list[int], chunks: list[int]) -> None:
    given = prompts(case.generation.vocab, *sources)
    want, expected = logits(case.reference, case.generation, given, chunks)
    got, stream = logits(case.session, case.generation, given, chunks)
    assert got.shape == want.shape == (len(given), sum(chunks), case.generation.vocab)
    assert np.abs(want).max() > 0.5
    assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()
    for state in (s for spec in case.specs for s in spec.states if s.updated):
        a, b = (np.asarray(x) for x in (expected.state[state.name], stream.state[state.name].numpy()))
        a, b = a[:, :, : sum(chunks)], b[:, :, : sum(chunks)]
        assert np.abs(a - b).max() <= TOLERANCE * np.abs(a).max(), state.name


def test_padding_changes_nothing_for_the_rows_beside_it(case: Case) -> None:
    given = prompts(case.generation.vocab, 12, 5, 1)
    together, _ = logits(case.session, case.generation, given, [3, 1])
    tokens = np.random.default_rng(5).integers(3, case.generation.vocab, (3, 4))
    seq2seq = case.generation.task == "seq2seq"
    for row, prompt in enumerate(given):
        stream = Stream(case.session, case.generation, [prompt if seq2seq else prompt[:1]], 4)
        alone = stream.feed(tokens[row : row + 1], every=True)
        assert np.abs(alone[0] - together[row]).max() <= TOLERANCE * np.abs(alone).max()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generated_tokens_are_identical(case: Case, temperature: float) -> None:
    """Far past the windows, nearly to the end of the context."""
    sampling = Sampling(temperature, seed=3)
    seen: set[int] = set()
    for prompt in prompts(case.generation.vocab, 1, 6, 23):
        want, got = (list(generate(s, case.generation, prompt, 40, sampling)) for s in (case.reference, case.session))
        assert got == want
        assert len(want) == 40
        seen |= set(want)
    assert len(seen) > (10 if temperature else 1)


def test_generated_batches_are_identical(case: Case) -> None:
    given = prompts(case.generation.vocab, 7, 2, 19)
    want = generate_batch(case.reference, case.generation, given, 12)
    assert generate_batch(case.session, case.generation, given, 12) == want
    assert [list(generate(case.session, case.generation, p, 12)) for p in given] == want


def test_quantized_activations_stay_near(case: Case) -> None:
    """As shipped: level 4 rounds each input to 8 bits and no more."""
    given = prompts(case.generation.vocab, 12)
    shipped = OnnxSession(case.folder, case.specs, threads=1)
    got, want = (logits(s, case.generation, given, [10, 1])[0] for s in (shipped, case.reference))
    assert TOLERANCE < np.abs(got - want).max() / np.abs(want).max() < 0.1
