"""A model opened and its plan made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..bundle import Generation
from ..calibration.samples import Call, Sample
from ..calibration.source import Source
from ..checkpoints.checkpoint import Checkpoint
from ..models.language_model import LanguageModel
from ..quant.allocator import Problem
from ..quant.plan import BitPlan, Unit, WeightSpec, weight_bytes
from ..targets.registry import TARGETS
from ..targets.storage import stored_bytes
from .allocate import Allocation
from .baseline import Baseline, SingleTargetPlan


@dataclass(frozen=True, eq=False)
class Planned:
    """The model opened and the plan made; nothing has been written yet.

    source: the original and the data that GPTQ calibrates on. model: on the meta device. units: the planned weights; other: names
    of all other tensors. prompts: token ids, with a context each in `contexts` where the model reads one. examples: what a model
    is compared on that has no generate loop, or reads sound. allocation: what the plan was chosen from; None where the user gave
    the plan.
    """

    source: Source
    model: LanguageModel
    units: list[Unit]
    other: list[str]
    prompts: list[list[int]]
    contexts: list[list[int]]
    examples: Sequence[Call]
    formats: tuple[str, ...]
    plan: BitPlan
    allocation: Allocation | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        return self.source.checkpoint

    @property
    def config(self) -> dict[str, Any]:
        """Of the model as it is planned: a rehearsal's has fewer layers than the checkpoint's."""
        return self.source.config

    @property
    def generation(self) -> Generation:
        return self.source.generation

    @property
    def samples(self) -> Sequence[Sample]:
        return self.source.samples

    @property
    def scores(self) -> dict[tuple[str, int], float]:
        """Of each layer, (stack, index); none where the user gave the plan."""
        return {} if self.allocation is None else self.allocation.scores.layers

    @property
    def alone(self) -> dict[str, SingleTargetPlan]:
        """For each of several targets the plan it could have alone."""
        return {} if self.allocation is None else self.allocation.alone

    @property
    def problem(self) -> Problem | None:
        return None if self.allocation is None else self.allocation.problem

    @property
    def baseline(self) -> Baseline | None:
        return None if self.allocation is None else self.allocation.baseline

    @cached_property
    def fingerprint(self) -> str:
        """Of the source checkpoint."""
        return self.checkpoint.fingerprint()

    @property
    def weights(self) -> int:
        """How many numbers the plan covers."""
        return sum(u.numel for u in self.units)

    def held_by(self, target: str) -> list[WeightSpec]:
        """The planned weights that an artefact of `target` holds: all, except where it takes some graphs alone."""
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
