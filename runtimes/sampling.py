"""How the next token is chosen of logits: penalties, then the best one, or a draw of those that the cuts leave. No torch.

The order is transformers': repetition penalty, n-grams, further penalties, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ..errors import UserError
from .session import Array

_NONE = -np.inf


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        temperature: what logits are divided by; 0 is greedy: the best token, none drawn.
        top_k: only the best so many tokens; 0: all.
        top_p: the smallest set of tokens with that probability.
        min_p: only tokens at least so probable, relative to the best one.
        repetition_penalty: divides what is above 0 of tokens that the decoder has read or written, multiplies what is below
            (arXiv 1909.05858).
        presence_penalty, frequency_penalty: taken from the logits of written tokens, once and for each time.
        no_repeat_ngram: no sequence of so many tokens comes twice; 0: it may.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for a number that means nothing."""
        bounds = {
            "temperature": (0, 1e3),
            "top_p": (0, 1),
            "top_k": (0, 1 << 24),
            "min_p": (0, 1),
            "repetition_penalty": (1e-2, 1e2),
            "presence_penalty": (-1e2, 1e2),
            "frequency_penalty": (-1e2, 1e2),
            "no_repeat_ngram": (0, 1 << 10),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not least <= value <= most:  # also where it is no number
                raise UserError(f"{_flag(name)} {value:g}: give {least:g} to {most:g}")
        if 0 < self.temperature < 1e-3:
            raise UserError(f"--temperature {self.temperature:g}: give 0, or 0.001 to 1000")
        if self.top_p == 0:
            raise UserError("--top-p 0 leaves no token; give more than 0, up to 1")

    @property
    def idle(self) -> list[str]:
        """Flags of what is set and changes nothing: those of a draw, where none is made."""
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        return [_flag(name) for name in changed if name in ("top_k", "top_p", "min_p", "seed")] if self.greedy else []

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken, and none drawn."""
        return self.temperature == 0

    def penalized(self, logits: Array, read: Sequence[int], written: Sequence[int]) -> Array:
        """Logits [vocab] in float64 after the penalties.

        read: tokens that the decoder has read before its answer, written: those of the answer.
        """
        changed = logits.astype(np.float64)
        vocab = len(changed)
        if self.repetition_penalty != 1.0:
            seen = np.unique([t for t in (*read, *written) if t < vocab]).astype(np.int64)
            of_seen = changed[seen]
            changed[seen] = np.where(of_seen < 0, of_seen * self.repetition_penalty, of_seen / self.repetition_penalty)
        if self.no_repeat_ngram:
            changed[[t for t in _ending_ngrams([*read, *written], self.no_repeat_ngram) if t < vocab]] = _NONE
        if self.presence_penalty or self.frequency_penalty:
            for token, times in Counter(written).items():
                changed[token] -= self.presence_penalty + self.frequency_penalty * times
        return changed

    def probabilities(self, logits: Array) -> Array:
        """What each token [vocab] is drawn with, of logits [vocab] after the penalties; the cuts leave 0."""
        scaled = logits.astype(np.float64) / self.temperature
        if 0 < self.top_k < len(scaled):
            scaled[scaled < np.partition(scaled, -self.top_k)[-self.top_k]] = _NONE
        if self.top_p < 1:
            order = np.argsort(-scaled, kind="stable")
            before = np.cumsum(_softmax(scaled)[order])
            scaled[order[1:][before[:-1] >= self.top_p]] = _NONE
        if self.min_p > 0:
            chances = _softmax(scaled)
            scaled[chances < self.min_p * chances.max()] = _NONE
        return _softmax(scaled)

    def pick(
        self, logits: Array, rng: np.random.Generator, read: Sequence[int] = (), written: Sequence[int] = ()
    ) -> int:
        """A token from logits [vocab]; `read` and `written` as of `penalized`."""
        if self._penalizes:
            logits = self.penalized(logits, read, written)
        if self.greedy:
            return int(logits.argmax())
        chances = self.probabilities(logits)
        order = np.argsort(-chances, kind="stable")
        chosen = order[: np.count_nonzero(chances)]
        return int(rng.choice(chosen, p=chances[chosen] / chances[chosen].sum()))

    @property
    def _penalizes(self) -> bool:
        plain = self.repetition_penalty == 1 and not self.no_repeat_ngram
        return not plain or self.presence_penalty != 0 or self.frequency_penalty != 0


GREEDY = Sampling()


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max())
    chances: Array = powers / powers.sum()
    return chances


def _ending_ngrams(tokens: Sequence[int], size: int) -> set[int]:
    """The tokens that would complete an n-gram of `size` that is among `tokens` already."""
    if len(tokens) + 1 < size:
        return set()
    start = list(tokens[len(tokens) - size + 1 :])
    return {tokens[i + size - 1] for i in range(len(tokens) - size + 1) if list(tokens[i : i + size - 1]) == start}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
