"""How much each part of a model matters, by any method.

ZD reads each weight once from the mapped file and LIM runs the original model; these two order layers. The Fisher information
and the measured divergence give, for each unit and choice of bits, what it costs in nats a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..calibration.prompts import NO_PROMPTS, Prompts
from ..calibration.samples import evenly
from ..calibration.source import Source
from ..errors import UserError
from ..quant.plan import Choice, Unit
from ..system.memory import available_bytes
from ..system.workers import ONE, Workers
from .candidates import Candidates, Losses, expected_of, extrapolated, relative_error
from .fisher import REFERENCE, WINDOWS, PredictedLosses, fisher, fisher_bytes, predicted_losses
from .kl import kl_of_each
from .layer_scores import Layer, lim_streamed, score_layers, unit_weights

METHODS = ("auto", "fisher", "kl", "lim", "zd", "zd-two-sided", "uniform")
MEASURED = ("fisher", "kl")
"""Methods that give a loss for every unit and choice."""

KL_CHOICE = Choice(3, 64)
"""The low width of `kl`: low enough to stand out of the arithmetic's noise, high enough that the loss is still quadratic."""

CHECKED_SHARE = 0.1
"""Units with more than this share of the predicted loss are measured too."""

_MOST_SCALED = 4.0
_KL_WINDOWS = 4
Progress = Callable[[str], None]


@dataclass(frozen=True)
class ScoreOptions:
    """How importance is computed. memory: bytes it may take, None for what the system has. workers: of `kl`.

    windows: samples that Fisher's backward pass reads at most. checked_share: see CHECKED_SHARE.
    """

    method: str = "auto"
    memory: int | None = None
    workers: Workers = ONE
    windows: int = WINDOWS
    checked_share: float = CHECKED_SHARE

    @property
    def available(self) -> int:
        """Bytes of memory that may be taken."""
        return available_bytes() if self.memory is None else self.memory


@dataclass(frozen=True)
class Scores:
    """Importance by one method, the one that was asked for or that `auto` chose.

    layers: LIM or ZD of each layer; of a measured method the layer's loss at `REFERENCE` in nats a token. weights: unit name ->
    the allocator's positive weight. losses: of each unit at each choice, of the measured methods alone. units: unit name -> loss
    at `REFERENCE`; linears: the same of each weight by its stored name, of `fisher` alone.
    """

    method: str
    layers: dict[Layer, float]
    weights: dict[str, float]
    losses: Losses | None = None
    units: dict[str, float] = field(default_factory=dict)
    linears: dict[str, float] = field(default_factory=dict)


def score(
    options: ScoreOptions,
    source: Source,
    candidates: Candidates,
    prompts: Prompts = NO_PROMPTS,
    progress: Progress = lambda _: None,
) -> Scores:
    """Importance of all units by `options.method`; models are built as needed.

    prompts: what LIM runs on where the model fits the memory. All other methods run on the source's samples. Raises UserError
    for an unknown method, or one whose data are not there.
    """
    units = candidates.units
    method = choose(options, source, progress)
    if method not in MEASURED:
        fits = 4 * sum(u.numel for u in units) <= options.available
        if method == "lim" and source.samples and not fits:
            layers = lim_streamed(source, progress)
        else:
            layers = score_layers(method, source, units, prompts, progress)
        return Scores(method, layers, unit_weights(units, layers, method))
    if not source.has_logits:
        raise UserError(f"--importance {method} needs --calibration TEXT or --task FILE, and a model that has logits")
    candidates = Candidates(units, list(dict.fromkeys([REFERENCE, *candidates.choices])), candidates.signed)
    if method == "fisher":
        predicted = _by_fisher(options, source, candidates, progress)
        losses, linears = _checked(predicted.units, options, source, candidates, progress), predicted.linears
        layers = _by_layer(units, losses)
    else:
        losses, layers = _by_divergence(options, source, candidates, progress)
        linears = {}
    reference = {name: of[REFERENCE] for name, of in losses.items()}
    weights = {u.name: max(reference[u.name] / expected_of(u, REFERENCE, candidates.signed), 1e-300) for u in units}
    return Scores(method, layers, weights, losses, reference, linears)


def choose(options: ScoreOptions, source: Source, progress: Progress = lambda _: None) -> str:
    """The method that `auto` stands for with these data and this memory; any other as it is. Says what it chose and why.

    Raises UserError for an unknown method, and for fisher by name where it does not fit.
    """
    method = options.method
    if method not in METHODS:
        raise UserError(f"--importance {method} is not known; choose from {', '.join(METHODS)}")
    if method not in ("auto", "fisher"):
        return method
    if not source.has_logits:
        if method == "fisher":  # refused by `score`, as for `kl`
            return method
        progress("importance: zd, from the weights alone, as there are no calibration data for it")
        return "zd"
    needed, available = fisher_bytes(source.build(), source.longest), options.available
    if needed > available:
        reason = f"fisher would take about {needed / 2**30:.1f} GiB of the {available / 2**30:.1f} there are"
        if method == "fisher":
            raise UserError(f"--importance {reason}; give --importance lim, or more memory")
        progress(f"importance: lim, as {reason}")
        return "lim"
    if method == "fisher":
        return method
    progress(f"importance: fisher, as there are calibration data and its {needed / 2**30:.1f} GiB fit")
    return "fisher"


def _by_fisher(options: ScoreOptions, source: Source, candidates: Candidates, progress: Progress) -> PredictedLosses:
    """The curvatures are as large as the model: they are freed when this returns."""
    return predicted_losses(fisher(source, options.windows, progress), source, candidates, progress)


def _by_layer(units: Sequence[Unit], losses: Mapping[str, Mapping[Choice, float]]) -> dict[Layer, float]:
    layers: dict[Layer, float] = {}
    for unit in units:
        first = unit.weights[0]
        if first.layer is not None:
            key = (first.stack, first.layer)
            layers[key] = layers.get(key, 0.0) + losses[unit.name][REFERENCE]
    return layers


def _checked(
    losses: Losses, options: ScoreOptions, source: Source, candidates: Candidates, progress: Progress
) -> Losses:
    """`losses` with RTN's of the costliest units scaled to what they measure at `REFERENCE`.

    A large error is outside of the quadratic form's reach: it says two or three times too much of a tied embedding, and a unit
    that holds most of the total misleads the allocator most. GPTQ leaves little of such an error: its losses stay.
    """
    total = sum(of[REFERENCE] for of in losses.values())
    costly = [u for u in candidates.units if losses[u.name][REFERENCE] > options.checked_share * total > 0.0]
    if not costly:
        return losses
    progress(f"importance (fisher): {len(costly)} of the costliest units are measured alone")
    width = (REFERENCE.bits, REFERENCE.group_size, candidates.signed)
    parts = [{w.name: width for w in u.weights} for u in costly]
    measured = kl_of_each(source.over(evenly(source.samples, _KL_WINDOWS)), parts)
    checked = dict(losses)
    for unit, kl in zip(costly, measured, strict=True):
        ratio = min(_MOST_SCALED, max(1.0 / _MOST_SCALED, kl / losses[unit.name][REFERENCE]))
        checked[unit.name] = {c: v * (ratio if c.quantizer == "rtn" else 1.0) for c, v in losses[unit.name].items()}
    return checked


def _by_divergence(
    options: ScoreOptions, source: Source, candidates: Candidates, progress: Progress
) -> tuple[Losses, dict[Layer, float]]:
    """Measured losses of units and layers, each lowered alone; other choices in the ratio of expected errors."""
    units, signed = candidates.units, candidates.signed
    by_layer: dict[Layer, list[Unit]] = {}
    for unit in units:
        first = unit.weights[0]
        if first.layer is not None:
            by_layer.setdefault((first.stack, first.layer), []).append(unit)
    low = (KL_CHOICE.bits, KL_CHOICE.group_size, signed)
    parts = [{w.name: low for w in unit.weights} for unit in units]
    parts += [{w.name: low for unit in of for w in unit.weights} for of in by_layer.values()]
    few = source.over(evenly(source.samples, _KL_WINDOWS))
    progress(f"importance (kl): {len(parts)} times {few.tokens} tokens through the model")
    measured = kl_of_each(few, parts, options.workers, progress)
    by_rtn = [c for c in candidates.choices if c.quantizer == "rtn"]
    losses = {
        u.name: extrapolated(u, by_rtn, KL_CHOICE, loss, signed)
        for u, loss in zip(units, measured[: len(units)], strict=True)
    }
    ratio = relative_error(REFERENCE, 1024, signed) / relative_error(KL_CHOICE, 1024, signed)
    layers = {key: loss * ratio for key, loss in zip(by_layer, measured[len(units) :], strict=True)}
    return losses, layers
