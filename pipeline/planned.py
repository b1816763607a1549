"""A model opened and its plan made."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..bundle import Generation
from ..calibration.samples import Sample
from ..checkpoints.checkpoint import Checkpoint
from ..importance.score import Scores
from ..models.language_model import LanguageModel
from ..quant.allocator import Problem
from ..quant.plan import BitPlan, Unit, WeightSpec, weight_bytes
from ..targets.registry import TARGETS
from ..targets.storage import stored_bytes
from .baseline import Baseline, SingleTargetPlan


@dataclass(frozen=True)
class Planned:
    """The model opened and the plan made; nothing has been written yet. alone: for each target of several.

    checkpoint: the source. contexts: of a model that reads one, a context for
    each of `prompts`. examples: (graph, inputs) of a model without a generate loop. samples: what GPTQ calibrates on.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    model: LanguageModel
    units: list[Unit]
    plan: BitPlan
    other: list[str]
    scores: dict[tuple[str, int], float]
    generation: Generation
    prompts: list[list[int]]
    formats: tuple[str, ...]
    alone: dict[str, SingleTargetPlan] = field(default_factory=dict)
    contexts: list[list[int]] = field(default_factory=list)
    examples: list[tuple[str, dict[str, torch.Tensor]]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    problem: Problem | None = None
    baseline: Baseline | None = None
    importance: Scores | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of the source checkpoint."""
        return self.checkpoint.fingerprint()

    @property
    def weights(self) -> int:
        return sum(u.numel for u in self.units)

    def held_by(self, target: str) -> list[WeightSpec]:
        """The planned weights that an artefact of `target` holds: all, but for a target of some graphs."""
        part = TARGETS[target].graphs
        names = {n for g in self.model.graphs() if g.name in part for n in g.parameters()}
        return [w for u in self.units for w in u.weights if not part or w.name in names]

    def true_bytes(self, target: str) -> int:
        """Bytes the planned weights take in an artefact of `target`, containers and scale types counted."""
        entries = self.plan.entries
        twice = set(self.model.tied.values()) if TARGETS[target].tied_twice else set()
        return sum(
            stored_bytes(target, entries[w.name].bits, entries[w.name].group_size, *w.shape)
            * (2 if w.name in twice else 1)
            for w in self.held_by(target)
        )

    def ideal_bytes(self, target: str) -> int:
        """Bytes of codes and scales of the same weights in the quantized checkpoint."""
        entries = self.plan.entries
        return sum(weight_bytes(w, entries[w.name].bits, entries[w.name].group_size) for w in self.held_by(target))
