"""A session that is a formula of the tokens it was fed, and the same loop written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgewright.bundle import Generation
from edgewright.runtimes.session import Array, StateBuffers

VOCAB = 23
EOS = VOCAB  # beyond the vocabulary: never picked, unless a test names another


def causal(**changes: Any) -> Generation:
    values = {"task": "causal", "eos_ids": (EOS,), "vocab": VOCAB, "max_context": 512, "max_new_tokens": 64}
    return Generation(**(values | changes))


def seq2seq(**changes: Any) -> Generation:
    return causal(**({"task": "seq2seq", "decoder_start": 2, "pad_id": 0} | changes))


def logits_after(tokens: Sequence[int], source: Sequence[int] = ()) -> Array:
    """Logits [vocab] that depend on every token so far and on its place."""
    digest = 7
    for token in (*source, -1, *tokens):
        digest = (digest * 1_000_003 + token + 1) % (1 << 61)
    return np.random.default_rng(digest).normal(size=VOCAB).astype(np.float32)


def argmax_loop(prompt: Sequence[int], steps: int, source: Sequence[int] = ()) -> list[int]:
    """The same, written out: append the best token, look again."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(logits_after(tokens, source).argmax()))
    return tokens[len(prompt) :]


class Formula:
    """A `Session` whose state is the tokens it was fed, by row; it checks every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.capacity = 0

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        self.capacity = capacity
        return {"tokens": [[] for _ in range(batch)], "source": [[] for _ in range(batch)]}

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        first = next(iter(inputs.values()))
        self.calls.append((graph, first.shape))
        if graph == "encoder":
            ids, mask = inputs["input_ids"], inputs["encoder_mask"]
            assert ids.shape == mask.shape
            assert mask.dtype == np.bool_
            assert (ids[~mask] == 0).all()
            state["source"] = [row[kept].tolist() for row, kept in zip(ids, mask)]
            return {"encoder_hidden": np.zeros((*ids.shape, 4), np.float32)}
        if graph == "cross_kv":
            assert inputs["encoder_hidden"].shape[-1] == 4
            return {}
        assert graph == "decoder"
        ids, positions = inputs["input_ids"], inputs["logit_positions"]
        assert ids.dtype == positions.dtype == inputs["past_length"].dtype == np.int64
        past = len(state["tokens"][0])
        assert inputs["past_length"].tolist() == [past]
        assert past + ids.shape[1] <= self.capacity
        for row, new in zip(state["tokens"], ids.tolist()):
            row.extend(new)
        rows = [
            [logits_after(row[: past + int(p) + 1], source) for p in positions]
            for row, source in zip(state["tokens"], state["source"])
        ]
        return {"logits": np.stack([np.stack(row) for row in rows])}
