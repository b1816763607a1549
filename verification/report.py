"""What `verify` found of each artefact, and whether that passes. What may enter: `runtimes.session`, `errors`."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..errors import VerificationFailure
from ..runtimes.session import Placement

TOLERANCE = 1e-3
"""Largest error of any logit of an artefact with float32 activations, relative to the reference's largest logit."""

AGREEMENT = 0.99
"""Least top-1 agreement of an artefact whose runtime has no float32 activations, where its arithmetic leaves that much."""

NEAR_TIE = 1e-3
"""Largest mean KL with which one position may differ though that is more than 1 % of them: two tokens as good as even."""

SLACK = 0.03
"""By how much its top-1 agreement may stay below that of the reference with the same int8 activations, or by two standard
errors of the difference, at most 0.1, where that is more: of few positions a share tells little. Its mean KL may be twice
that one's. Two runs that round alike drift apart at the first code that falls to the other side."""

_MOST_SLACK = 0.1


MODULE_ERROR = 0.02
"""Largest root mean square error of a module's outputs with reduced activations, relative to theirs; or twice that of the
reference with the same int8 activations."""


@dataclass
class Agreement:
    """One session against another over teacher-forced positions and free-running greedy tokens.

    rms: of a module, which has no tokens: the outputs' root mean square error relative to theirs. Its prompts are the examples
    it is run on, identical those within TOLERANCE.
    """

    max_relative_error: float
    mean_kl: float
    top1: float
    prompts: int
    prompts_identical: int
    positions: int
    rms: float | None = None


def _agrees(found: Agreement) -> bool:
    """At most one position in a hundred has another best token; of fewer positions one, if the two were nearly even."""
    others = round((1 - found.top1) * found.positions)
    return found.top1 >= AGREEMENT or (others <= 1 and found.mean_kl <= NEAR_TIE)


@dataclass
class TextScore:
    """A session on the scored positions of a text: its perplexity, and how near its next-token distributions are to another's.

    mean_kl: KL(other || this) in nats a position. top1: the share of positions with the same most likely token.
    """

    perplexity: float
    mean_kl: float
    top1: float


@dataclass
class TargetReport:
    """What was found for one artefact. `shipped` is the artefact as it is; `lowering` has `activations`.

    Where the runtime can compute with float32 activations, the lowering must be exact (TOLERANCE, same tokens); where it
    cannot, both are the same run and top-1 agreement decides, beside that of `arithmetic`: the reference with the same int8
    activations. So it does where KV caches are int8: last bits that differ round a code to the other side, and what follows
    reads it; `arithmetic` is then the reference with float caches. on_device: `shipped` ran on the target's own device and
    `lowering` in something else's place, so both are judged. how: what computed here. weights: those read back from the
    artefact's files that are bit for bit the checkpoint's; wrong: what is said of the first that is not.
    """

    format: str
    activations: str
    lowering: Agreement
    shipped: Agreement
    placement: Placement
    stored_bytes: int
    ideal_bytes: int
    how: str = ""
    weights: int = 0
    file_bytes: int = 0
    wrong: str | None = None
    arithmetic: Agreement | None = None
    on_device: bool = False
    task_accuracy: float | None = None
    text: TextScore | None = None

    @property
    def passed(self) -> bool:
        if self.wrong is not None or self.shipped.max_relative_error == sys.float_info.max:
            return False
        if self.on_device and not self._near(self.shipped):
            return False
        if self.activations == "float32" and self.arithmetic is None:
            same = self.lowering.prompts_identical == self.lowering.prompts
            return same and self.lowering.max_relative_error <= TOLERANCE
        if self.lowering.rms is not None:
            return self.lowering.rms <= self._module_limit
        if self.arithmetic is None or _agrees(self.lowering):
            return _agrees(self.lowering)
        return self.lowering.top1 >= self._least_top1 and self.lowering.mean_kl <= 2 * self.arithmetic.mean_kl

    @property
    def _least_top1(self) -> float:
        """The least top-1 agreement beside that of `arithmetic`."""
        assert self.arithmetic is not None
        share = self.arithmetic.top1
        error = math.sqrt(2 * share * (1 - share) / max(1, self.arithmetic.positions))
        return share - max(SLACK, min(_MOST_SLACK, 2 * error))

    @property
    def _module_limit(self) -> float:
        rounded = self.arithmetic.rms if self.arithmetic is not None else None
        return max(MODULE_ERROR, 2 * (rounded or 0.0))

    def _near(self, found: Agreement) -> bool:
        """Whether a run with reduced activations on the device is near enough, by itself."""
        return _agrees(found) and (found.rms is None or found.rms <= self._module_limit)

    @property
    def allowed(self) -> str:
        """What `passed` asks of the lowering, in words."""
        if self.activations == "float32" and self.arithmetic is None:
            return f"<= {TOLERANCE:g}"
        if self.lowering.rms is not None:
            return f"rms <= {self._module_limit:.2g}"
        if self.arithmetic is None or _agrees(self.lowering):
            few = self.lowering.positions < 1 / (1 - AGREEMENT)
            return "top-1: one position at most" if few else f"top-1 >= {AGREEMENT:.0%}"
        return f"top-1 >= {self._least_top1:.2%}, KL <= {2 * self.arithmetic.mean_kl:.2g}: what int8 costs"


@dataclass
class Report:
    """The result of `verify`.

    text_against: whose distributions the text scores are compared with: the "original" weights' where they were given, else
    the "dequantized" ones'. text_positions: scored tokens, of text_windows windows.
    """

    targets: list[TargetReport]
    quantization: Agreement | None = None
    original_task_accuracy: float | None = None
    task_size: int = 0
    original_text: TextScore | None = None
    dequantized_text: TextScore | None = None
    text_against: Literal["original", "dequantized"] | None = None
    text_windows: int = 0
    text_positions: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(t.passed for t in self.targets)

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        for target, entry in zip(self.targets, values["targets"], strict=True):
            entry["passed"] = target.passed
        return values | {"passed": self.passed, "tolerance": TOLERANCE}


def require_placement(report: Report) -> None:
    """Raise VerificationFailure naming what fell back, or the target whose placement nothing here can tell."""
    for target in report.targets:
        placed = target.placement
        if not placed.known:
            raise VerificationFailure(f"{target.format}: the placement is not known here ({placed.source})")
        for graph, ops in placed.fallback.items():
            names = ", ".join(f"{op} x{n}" for op, n in sorted(ops.items()))
            raise VerificationFailure(f"{target.format}: {graph}: not on {placed.accelerator}: {names}")


def require(report: Report) -> None:
    """Raise VerificationFailure naming the first target whose lowering does not match its reference."""
    for target in report.targets:
        if target.wrong is not None:
            raise VerificationFailure(target.wrong)
        if not target.passed:
            a = target.lowering
            if target.shipped.max_relative_error == sys.float_info.max:
                raise VerificationFailure(f"{target.format}: as shipped its logits are not finite: it overflows")
            if target.on_device and not target._near(target.shipped):
                a = target.shipped
            if a.rms is not None:
                raise VerificationFailure(
                    f"{target.format}: outputs differ from the reference by up to {a.max_relative_error:.2g} of the "
                    f"largest, rms {a.rms:.2g} (allowed: {target.allowed})"
                )
            raise VerificationFailure(
                f"{target.format}: logits differ from the reference by up to {a.max_relative_error:.2g} of the largest, "
                f"top-1 agreement {a.top1:.2%} (allowed: {target.allowed}); "
                f"{a.prompts_identical} of {a.prompts} prompts give the same tokens"
            )
