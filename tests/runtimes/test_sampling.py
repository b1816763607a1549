"""Penalties, temperature and cuts against transformers' processors, on the same logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from edgewright.errors import UserError
from edgewright.runtimes.sampling import GREEDY, Sampling

VOCAB = 29
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=14)
SEEDS = st.integers(0, 2**31)


def logits(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(scale=3, size=VOCAB).astype(np.float32)


def processed(rules: list[Any], ids: list[int], scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    result = torch.from_numpy(scores.astype(np.float64))[None]
    for rule in rules:
        result = rule(torch.tensor([ids]), result)
    return result[0].numpy()


@settings(deadline=None, max_examples=200)
@given(seed=SEEDS, read=TOKENS, written=TOKENS, penalty=st.floats(0.5, 3), size=st.integers(0, 4))
def test_penalties(seed: int, read: list[int], written: list[int], penalty: float, size: int) -> None:
    rules: list[Any] = [theirs.RepetitionPenaltyLogitsProcessor(penalty)] if read + written else []
    if size:
        rules.append(theirs.NoRepeatNGramLogitsProcessor(size))
    ours = Sampling(repetition_penalty=penalty, no_repeat_ngram=size).penalized(logits(seed), read, written)
    np.testing.assert_allclose(ours, processed(rules, read + written, logits(seed)), rtol=1e-6)


@settings(deadline=None, max_examples=300)
@given(
    seed=SEEDS,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_cuts(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    rules: list[Any] = [theirs.TemperatureLogitsWarper(temperature)]
    rules += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    rules += [theirs.TopPLogitsWarper(top_p)] if top_p < 1 else []
    rules += [theirs.MinPLogitsWarper(min_p)] if min_p > 0 else []
    wanted = torch.from_numpy(processed(rules, [0], logits(seed))).softmax(-1).numpy()
    ours = Sampling(temperature, top_p, top_k=top_k, min_p=min_p).probabilities(logits(seed))
    np.testing.assert_allclose(ours, wanted, atol=1e-9)


def test_presence_and_frequency_are_taken_from_what_was_written() -> None:
    flat = np.zeros(4, np.float32)
    changed = Sampling(presence_penalty=0.5, frequency_penalty=0.25).penalized(flat, [3, 3], [1, 1, 2])
    assert changed.tolist() == [0, -1.0, -0.75, 0]


def test_greedy_heeds_penalties() -> None:
    scores = np.array([0.0, 3.0, 2.9], np.float32)
    rng = np.random.default_rng(0)
    assert GREEDY.pick(scores, rng, [1], []) == 1
    assert replace(GREEDY, repetition_penalty=1.3).pick(scores, rng, [1], []) == 2


def test_draws_follow_the_probabilities() -> None:
    sampling = Sampling(0.8, top_k=5)
    wanted = sampling.probabilities(logits(1))
    rng = np.random.default_rng(2)
    drawn = np.bincount([sampling.pick(logits(1), rng) for _ in range(20000)], minlength=VOCAB) / 20000
    np.testing.assert_allclose(drawn, wanted, atol=0.015)
    assert (drawn[wanted == 0] == 0).all()


def test_what_changes_nothing_is_known() -> None:
    assert Sampling(0, 0.5, seed=3, top_k=4, repetition_penalty=2).idle == ["--top-p", "--seed", "--top-k"]
    assert Sampling(1, 0.5).idle == []


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"temperature": -1.0}, "--temperature -1: give 0 to 1000"),
        ({"temperature": 1e-9}, "--temperature 1e-09: give 0, or 0.001"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_p": 0.0}, "--top-p 0 leaves no token"),
        ({"top_p": float("nan")}, "--top-p nan"),
        ({"min_p": 2.0}, "--min-p 2"),
        ({"top_k": -1}, "--top-k -1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0"),
        ({"no_repeat_ngram": -2}, "--no-repeat-ngram -2"),
    ],
)
def test_numbers_that_mean_nothing(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        Sampling(**values)
