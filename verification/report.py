"""The results of `verify`, and what passes."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

from ..errors import VerificationFailure
from ..runtimes.session import Placement
from .similarity import Similarity

TOLERANCE = 1e-3
"""Largest error of any logit of an artefact with float32 activations, relative to the reference's largest logit."""

AGREEMENT = 0.99
"""Top-1 agreement that is enough for an artefact whose runtime has no float32 activations."""

NEAR_TIE = 1e-3
"""Of fewer than 100 positions one may have another best token, if the mean KL is no larger: two tokens were nearly even."""

SLACK = 0.03
"""How far the top-1 agreement of such an artefact may lie below that of the reference with the same int8 activations.

Of few positions a share says little, so two standard errors of the difference are allowed where they are more, up to
_MOST_SLACK. The mean KL may be twice the reference's. Two runs that round alike drift apart at the first code that differs.
"""

_MOST_SLACK = 0.1

_T = TypeVar("_T")

MODULE_ERROR = 0.02
"""Largest root mean square error of a module's outputs with reduced activations, relative to the outputs.

Twice the error of the reference with the same int8 activations is allowed too.
"""


EMBEDDING_COSINE, WORST_COSINE = 0.999, 0.99
"""Least mean and least single cosine of a text's vectors with reduced activations, to those of the reference.

Twice as far from 1 as the reference with the same int8 activations is allowed too.
"""


@dataclass(frozen=True)
class Agreement:
    """One session compared with another: the logits where both are fed the same tokens, and the tokens that each generates.

    max_relative_error: of any logit, relative to the reference's largest. mean_kl: KL(reference || session), nats a position.
    top1: the share of positions with the same best token. rms: for a module, which has no tokens, the outputs' root mean square
    error relative to the outputs; its prompts are then the examples, identical are those within TOLERANCE. similarity: of a model
    of embeddings; its prompts are texts, the error is of any number of a text's vector relative to its largest.
    """

    max_relative_error: float
    mean_kl: float
    top1: float
    prompts: int
    prompts_identical: int
    positions: int
    rms: float | None = None
    similarity: Similarity | None = None

    @staticmethod
    def from_json(values: Mapping[str, Any] | None) -> Agreement | None:
        """What `asdict` gave, or None."""
        if values is None:
            return None
        return Agreement(**{**values, "similarity": _made(Similarity, values["similarity"])})


def _agrees(agreement: Agreement) -> bool:
    """Whether at most one position in a hundred has another best token; of fewer positions one, at a near tie."""
    others = round((1 - agreement.top1) * agreement.positions)
    return agreement.top1 >= AGREEMENT or (others <= 1 and agreement.mean_kl <= NEAR_TIE)


@dataclass(frozen=True)
class Independent:
    """The original weights as read here, compared with transformers on the same tokens.

    version: of transformers, or for a model of embeddings what was compared with. max_relative_error: of any logit, relative to
    the largest. top1: share of positions with the same best token. positions: compared. tokens: greedy tokens among them, the
    same from both. differs: the first part whose output differs, None if the logits agree. cosine: of a model of embeddings,
    the least of a text's vectors; positions are then texts, and there are no tokens.
    """

    version: str
    max_relative_error: float
    top1: float
    positions: int
    tokens: int
    differs: str | None
    cosine: float | None = None

    @property
    def text(self) -> str:
        """One line about it."""
        if self.cosine is not None:
            return (
                f"read as {self.version} reads it: vectors of {self.positions} texts differ by at most "
                f"{self.max_relative_error:.1e} of the largest number, least cosine {self.cosine:.6f}"
            )
        return (
            f"read as transformers {self.version} reads it: logits differ by at most {self.max_relative_error:.1e} of the "
            f"largest over {self.positions} positions, {self.tokens} greedy tokens the same"
        )


@dataclass(frozen=True)
class TextScore:
    """A session on the scored positions of a text: its perplexity, and its next-token distributions beside the base's.

    mean_kl: KL(base || session), nats a position. top1: the share of positions with the same most likely token.
    """

    perplexity: float
    mean_kl: float
    top1: float


@dataclass(frozen=True)
class TargetReport:
    """The check of one artefact.

    Where the runtime can compute with float32 activations, `lowering` must be exact: within TOLERANCE, the same tokens. Where
    it cannot, `lowering` and `shipped` are one run, and its top-1 agreement is judged, beside that of `arithmetic`. With int8
    KV caches it is judged so too: a last bit that differs can change a code, which all later tokens read.

    activations: of the run `lowering`.
    lowering: the artefact with float32 activations where its runtime has them, against the reference.
    shipped: the artefact as it ships, against the reference.
    how: what computed it on this machine.
    weights: how many were read back from its files and are the checkpoint's bit for bit. wrong: the fault of the first other.
    arithmetic: the reference with the same int8 activations, or with float KV caches where they are int8.
    on_device: `shipped` ran on the target's own device and `lowering` did not, so both are judged.
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
    word_error_rate: float | None = None
    text: TextScore | Similarity | None = None

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
        if self.lowering.similarity is not None:
            return self._similar(self.lowering.similarity)
        if self.arithmetic is None or _agrees(self.lowering):
            return _agrees(self.lowering)
        return self.lowering.top1 >= self._least_top1 and self.lowering.mean_kl <= 2 * self.arithmetic.mean_kl

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> TargetReport:
        """The entry of a target in `Report.to_json`."""
        own = {f.name: values[f.name] for f in fields(TargetReport)}
        own |= {key: Agreement.from_json(values[key]) for key in ("lowering", "shipped", "arithmetic")}
        return TargetReport(
            **own | {"placement": _made(Placement, values["placement"]), "text": _score(values["text"])}
        )

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

    @property
    def _least_cosines(self) -> tuple[float, float]:
        """The least mean and the least single cosine beside those of `arithmetic`."""
        rounded = self.arithmetic.similarity if self.arithmetic is not None else None
        if rounded is None:
            return EMBEDDING_COSINE, WORST_COSINE
        return min(EMBEDDING_COSINE, 2 * rounded.cosine - 1), min(WORST_COSINE, 2 * rounded.worst - 1)

    def _similar(self, found: Similarity) -> bool:
        mean, worst = self._least_cosines
        return found.cosine >= mean and found.worst >= worst

    def _near(self, agreement: Agreement) -> bool:
        """Whether a run with reduced activations on the device agrees with the reference."""
        if agreement.similarity is not None:
            return self._similar(agreement.similarity)
        return _agrees(agreement) and (agreement.rms is None or agreement.rms <= self._module_limit)

    @property
    def allowed(self) -> str:
        """What `passed` requires of the lowering, in words."""
        if self.activations == "float32" and self.arithmetic is None:
            return f"<= {TOLERANCE:g}"
        if self.lowering.similarity is not None:
            mean, worst = self._least_cosines
            return f"cosine >= {mean:.4g}, of any text >= {worst:.4g}"
        if self.lowering.rms is not None:
            return f"rms <= {self._module_limit:.2g}"
        if self.arithmetic is None or _agrees(self.lowering):
            few = self.lowering.positions < 1 / (1 - AGREEMENT)
            return "top-1: one position at most" if few else f"top-1 >= {AGREEMENT:.0%}"
        return f"top-1 >= {self._least_top1:.2%}, KL <= {2 * self.arithmetic.mean_kl:.2g}: what int8 costs"


def _score(values: Mapping[str, Any] | None) -> TextScore | Similarity | None:
    if values is not None and "cosine" in values:
        return Similarity(**values)
    return _made(TextScore, values)


def _made(kind: type[_T], values: Mapping[str, Any] | None) -> _T | None:
    return None if values is None else kind(**values)


@dataclass(frozen=True)
class Report:
    """The result of `verify`.

    quantization: the dequantized against the original weights. text_against: the weights whose distributions the text scores
    are compared with. text_positions: scored tokens, in text_windows windows (of embeddings: tokens, in so many texts). notes:
    targets and measurements left out. independent: the original's reading compared with transformers.
    """

    targets: Sequence[TargetReport]
    quantization: Agreement | None = None
    original_task_accuracy: float | None = None
    original_word_error_rate: float | None = None
    task_size: int = 0
    original_text: TextScore | None = None
    dequantized_text: TextScore | Similarity | None = None
    text_against: Literal["original", "dequantized"] | None = None
    text_windows: int = 0
    text_positions: int = 0
    notes: Sequence[str] = ()
    independent: Independent | None = None

    @property
    def passed(self) -> bool:
        return all(t.passed for t in self.targets)

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        for target, entry in zip(self.targets, values["targets"], strict=True):
            entry["passed"] = target.passed
        return values | {"passed": self.passed, "tolerance": TOLERANCE}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Report:
        """What `to_json` gave."""
        own = {f.name: values[f.name] for f in fields(Report)}
        own["targets"] = [TargetReport.from_json(target) for target in values["targets"]]
        own["quantization"] = Agreement.from_json(values["quantization"])
        own["independent"] = _made(Independent, values["independent"])
        own |= {key: _score(values[key]) for key in ("original_text", "dequantized_text")}
        return Report(**own)


def require_placement(report: Report) -> None:
    """Raise VerificationFailure naming the ops that fell back, or the target whose placement is not known on this machine."""
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
            agreement = target.lowering
            if target.shipped.max_relative_error == sys.float_info.max:
                what = "logits" if target.shipped.similarity is None else "vectors"
                raise VerificationFailure(f"{target.format}: as shipped its {what} are not finite: it overflows")
            if target.on_device and not target._near(target.shipped):
                agreement = target.shipped
            if agreement.similarity is not None:
                found = agreement.similarity
                raise VerificationFailure(
                    f"{target.format}: vectors differ from the reference's by up to {agreement.max_relative_error:.2g} of the "
                    f"largest number, cosine {found.cosine:.5f}, of one text {found.worst:.5f} (allowed: {target.allowed})"
                )
            if agreement.rms is not None:
                raise VerificationFailure(
                    f"{target.format}: outputs differ from the reference by up to {agreement.max_relative_error:.2g} of the "
                    f"largest, rms {agreement.rms:.2g} (allowed: {target.allowed})"
                )
            raise VerificationFailure(
                f"{target.format}: logits differ from the reference by up to {agreement.max_relative_error:.2g} of the largest, "
                f"top-1 agreement {agreement.top1:.2%} (allowed: {target.allowed}); "
                f"{agreement.prompts_identical} of {agreement.prompts} prompts give the same tokens"
            )
