"""The generate loop over a session that is a formula: what is fed, what stops it, and what sampling picks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.token_formula import VOCAB, Formula, argmax_loop, causal, logits_after, seq2seq

from edgewright.errors import UserError
from edgewright.runtimes.generate import Sampling, Stream, generate, generate_batch


def test_greedy_is_the_argmax_loop() -> None:
    prompt = [5, 6, 7]
    session = Formula()
    assert list(generate(session, causal(), prompt, 20)) == argmax_loop(prompt, 20)
    assert session.calls == [("decoder", (1, 3))] + [("decoder", (1, 1))] * 19  # the last token is not fed


def test_an_encoder_decoder_starts_from_its_start_token() -> None:
    source = [9, 8, 7, 6]
    session = Formula()
    assert list(generate(session, seq2seq(), source, 10)) == argmax_loop([2], 10, source)
    assert [graph for graph, _ in session.calls] == ["encoder", "cross_kv"] + ["decoder"] * 10
    assert session.calls[2] == ("decoder", (1, 1))


def test_forced_tokens_follow_the_start_token_and_are_not_given() -> None:
    source, spec = [9, 8, 7, 6], seq2seq(forced=(5, 4))
    session = Formula()
    assert list(generate(session, spec, source, 10)) == argmax_loop([2, 5, 4], 10, source)
    assert session.calls[2] == ("decoder", (1, 3))
    assert session.capacity == 13
    assert len(list(generate(Formula(), seq2seq(max_context=10, forced=(5, 4)), source, 100))) == 8


def test_an_end_token_stops_and_is_not_given() -> None:
    tokens = argmax_loop([5, 6, 7], 20)
    end = tokens[6]
    expected = tokens[: tokens.index(end)]
    session = Formula()
    assert list(generate(session, causal(eos_ids=(VOCAB + 5, end)), [5, 6, 7], 20)) == expected
    assert len(session.calls) == len(expected) + 1
    assert list(generate(Formula(), causal(eos_ids=(tokens[0],)), [5, 6, 7], 20)) == []


@pytest.mark.parametrize(("length", "count"), [(6, 5), (9, 2), (1, 10)])
def test_the_context_is_never_exceeded(length: int, count: int) -> None:
    """Ten places: the prompt's tokens and all new ones but the last, which is given and not fed."""
    prompt = list(range(length))
    session = Formula()
    assert list(generate(session, causal(max_context=10), prompt, 100)) == argmax_loop(prompt, count)
    assert session.capacity == 10
    assert len(list(generate(Formula(), seq2seq(max_context=10), [3, 4], 100))) == 10


def test_too_long_and_empty_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="the prompt has 10 tokens, the bundle's context is 10"):
        list(generate(Formula(), causal(max_context=10), [1] * 10, 5))
    with pytest.raises(UserError, match="the prompt has 11 tokens"):
        list(generate(Formula(), seq2seq(max_context=10), [1] * 11, 5))
    for spec in (causal(), seq2seq()):
        for prompts in ([], [[]], [[1], []]):
            with pytest.raises(UserError, match="no tokens"):
                Stream(Formula(), spec, prompts, 5)
    stream = Stream(Formula(), causal(), [[1, 2]], 1)
    with pytest.raises(UserError, match="do not fit the context of 3"):
        stream.feed(np.ones((1, 4), np.int64))


@pytest.mark.parametrize("chunk", [1, 7, 128, 299, 300, 301])
def test_chunked_prefill_equals_one_chunk(chunk: int) -> None:
    prompt = np.random.default_rng(0).integers(0, VOCAB, 300).tolist()
    session = Formula()
    stream = Stream(session, causal(prefill_chunk=chunk), [prompt], 4)
    logits = stream.prefill()
    assert logits.shape == (1, 1, VOCAB)
    np.testing.assert_array_equal(logits[0, 0], logits_after(prompt))
    assert stream.past == 300
    sizes = [shape[1] for _, shape in session.calls]
    assert sum(sizes) == 300
    assert max(sizes) == min(chunk, 300)
    assert list(generate(Formula(), causal(prefill_chunk=chunk), prompt, 4)) == argmax_loop(prompt, 4)


def test_feed_gives_the_last_logits_or_all() -> None:
    stream = Stream(Formula(), causal(), [[1, 2, 3]], 4)
    every = stream.feed(stream.pending, every=True)
    np.testing.assert_array_equal(every[0], [logits_after([1, 2, 3][: i + 1]) for i in range(3)])
    last = stream.feed(np.array([[4, 5]]))
    np.testing.assert_array_equal(last[0], [logits_after([1, 2, 3, 4, 5])])


@pytest.mark.parametrize("make", [causal, seq2seq])
def test_a_batch_gives_what_each_prompt_gives_alone(make: Any) -> None:
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    alone = [list(generate(Formula(), make(), p, 12)) for p in prompts]
    end = alone[0][4]
    spec = make(eos_ids=(end,))
    expected = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in alone]
    assert len({len(tokens) for tokens in expected}) > 1  # the rows do not all end together
    assert generate_batch(Formula(), spec, prompts, 12) == expected
    assert [list(generate(Formula(), spec, p, 12)) for p in prompts] == expected


def test_a_batch_stops_at_the_context_as_one_prompt_does() -> None:
    for make in (causal, seq2seq):
        spec = make(max_context=8)
        prompts = [[5, 6, 7], [7, 6, 5]]
        assert generate_batch(Formula(), spec, prompts, 50) == [list(generate(Formula(), spec, p, 50)) for p in prompts]


def test_prompts_of_one_decoder_only_batch_have_one_length() -> None:
    with pytest.raises(ValueError, match="one length"):
        Stream(Formula(), causal(), [[1, 2], [3]], 4)


# Sampling


def test_sampling_is_reproducible_by_seed() -> None:
    def run(seed: int) -> list[int]:
        return list(generate(Formula(), causal(), [1, 2], 30, Sampling(temperature=1.5, seed=seed)))

    assert run(3) == run(3)
    assert len({tuple(run(seed)) for seed in range(5)}) == 5


PROBABILITIES = np.array([0.05, 0.5, 0.15, 0.3])


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, {1}), (0.49, {1}), (0.6, {1, 3}), (0.79, {1, 3}), (0.9, {1, 2, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_with_that_mass(top_p: float, kept: set[int]) -> None:
    rng = np.random.default_rng(0)
    logits = np.log(PROBABILITIES).astype(np.float32)
    picked = [Sampling(1.0, top_p).pick(logits, rng) for _ in range(4000)]
    assert set(picked) == kept
    frequencies = np.bincount(picked, minlength=4) / len(picked)
    expected = np.where([i in kept for i in range(4)], PROBABILITIES, 0)
    np.testing.assert_allclose(frequencies, expected / expected.sum(), atol=0.03)


def test_temperature_flattens_and_zero_is_greedy() -> None:
    logits = np.log(PROBABILITIES).astype(np.float32)
    rng = np.random.default_rng(0)
    assert {Sampling(0.0, 1.0).pick(logits, rng) for _ in range(50)} == {1}
    assert {Sampling(0.01, 1.0).pick(logits, rng) for _ in range(50)} == {1}
    flat = np.bincount([Sampling(100.0, 1.0).pick(logits, rng) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(flat, 0.25, atol=0.04)
    huge = np.array([1e4, -1e4, 0.0, 1e4], np.float32)  # no overflow
    assert {Sampling(0.5, 1.0).pick(huge, rng) for _ in range(50)} == {0, 3}
