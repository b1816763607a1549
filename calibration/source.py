"""What a calibration starts from: the original model and the data that go through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..bundle import Generation
from ..checkpoints.checkpoint import Checkpoint
from ..models.language_model import LanguageModel
from ..models.registry import build
from .batches import parted
from .samples import Call, Sample

PART_TOKENS = 1024
"""Tokens that go through a model together: enough for matrix products to be fast."""


@dataclass(frozen=True, eq=False)
class Source:
    """An original model with its calibration data.

    checkpoint: the original weights. config: what `build` takes; of a rehearsal it has fewer layers than the checkpoint's.
    generation: how the model is run. samples: the data; calls: graphs and inputs of a model without a generate loop, which has
    no samples. part_tokens: tokens that go through the model together, padding counted.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    generation: Generation
    samples: Sequence[Sample] = ()
    calls: Sequence[Call] = ()
    part_tokens: int = PART_TOKENS

    def build(self) -> LanguageModel:
        """A new model on the meta device. Raises UserError for a bad config."""
        model: LanguageModel = build(self.config)
        return model

    def over(self, samples: Sequence[Sample]) -> Source:
        """The same model with other data."""
        return replace(self, samples=samples)

    def parts(self) -> list[list[int]]:
        """The places of the samples that go through the model together."""
        return parted(self.samples, self.part_tokens)

    @property
    def tokens(self) -> int:
        """Of all samples together."""
        return sum(s.size for s in self.samples)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample; 0 without samples."""
        return max((s.size for s in self.samples), default=0)

    @property
    def has_logits(self) -> bool:
        """Whether there are samples, and logits that the model predicts their tokens by, or vectors that it makes of them."""
        return bool(self.samples) and self.generation.task != "module"
