"""A session that computes a formula instead of a model: whatever a test expects of it can be written in plain loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edgewright.runtimes.session import Array, StateBuffers

VOCAB = 19
TABLE = np.random.default_rng(7).standard_normal((VOCAB, VOCAB))
Change = Callable[[Array, int, int], Array]
"""logits [batch, vocab] of one position, the past before this call, the tokens in this call -> logits"""


class Formula:
    """Logits are a sum over the prefix and the source, each token (or row of memory) weighed by its distance.

    A context's memory is two rows: the sum of its first half, and of all of it.
    """

    def __init__(
        self,
        change: Change = lambda logits, past, new: logits,
        reads_padding: bool = False,
        table: Array = TABLE,
    ) -> None:
        self.change, self.reads_padding, self.table = change, reads_padding, table

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        return {"seen": np.zeros((batch, capacity, self.table.shape[1]))}

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        if graph == "encoder":
            read = np.ones_like(inputs["encoder_mask"]) if self.reads_padding else inputs["encoder_mask"]
            return {"encoder_hidden": self.table[inputs["input_ids"]] * read[..., None]}
        if graph == "cross_kv":
            state["source"] = inputs["encoder_hidden"].sum(1)
            return {}
        ids = inputs["input_ids"]
        if graph == "context":
            half = self.table[ids[:, : ids.shape[1] // 2]].sum(1)
            return {"memory": np.stack([half, self.table[ids].sum(1)], 1).astype(np.float32)}
        past, new = int(inputs["past_length"][0]), ids.shape[1]
        read = self.table[ids]
        for at, slot in enumerate(inputs.get("slots", ())):
            if slot >= 0:
                read[:, at] = inputs["memory"][:, slot]
        state["seen"][:, past : past + new] = read
        rows = []
        for at in inputs["logit_positions"]:
            prefix = state["seen"][:, : past + int(at) + 1]
            weights = 0.7 ** np.arange(prefix.shape[1])[::-1]
            logits = (prefix * weights[:, None]).sum(1) + 0.1 * state.get("source", 0.0)
            rows.append(self.change(logits, past + int(at), new))
        return {"logits": np.stack(rows, 1).astype(np.float32)}


def logits_after(rows: Array, source: Array | float = 0.0) -> Array:
    """What Formula predicts behind rows [n, vocab] of its table or of memory."""
    after: Array = sum(0.7 ** (len(rows) - 1 - i) * row for i, row in enumerate(rows)) + 0.1 * source
    return after


def log_softmax(logits: Array) -> Array:
    shifted: Array = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return shifted
