"""Norms tuned to the codes: gains that bring a model's predictions back to the original's.

GPTQ corrects each linear for its own inputs, but not what the errors of all of them together do to the predictions. The gains of
norms are a few numbers a layer that no target quantizes, so they can correct some of that: steps of Adam (arXiv 1412.6980) on the
divergence of the logits from the original's. Tuning norms to a quantized model is of arXiv 2309.02784, there layer by layer. The
result is measured on data that no step was made on; where nothing is won there, nothing changes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..calibration.backward import GradientRecorder, GradientSession, backward_bytes
from ..calibration.forward import CalibrationForward
from ..calibration.samples import Sample, evenly
from ..calibration.source import Source
from ..checkpoints.checkpoint import Checkpoint
from ..importance.divergence import measure_of
from ..models.language_model import LanguageModel
from ..models.registry import stored_name
from ..runtimes.eager import EagerSession

APART = 8
"""Of so many parts one is kept apart, to measure what was won."""

FEWEST_PARTS, MOST_PARTS = 4, 16
"""Parts of the data that are used; of more, some are chosen evenly."""

SAMPLE_POSITIONS = 16
"""Logits of a sample, unless it is shorter: the first tokens of all samples alone would say little of the others."""

BASE_BYTES = 160 << 20
"""Of everything small that is not counted, measured on tiny models and rounded up."""

_BETAS = (0.9, 0.95)
_SEED = 7
Progress = Callable[[str], None]


@dataclass(frozen=True)
class TuningOptions:
    """How norms are tuned.

    rate: the largest step of a gain, as a share of it; the steps rise to it in `warm_up` steps and then fall to nothing. logits: of
    a step at most, unless that were fewer than `fewest_positions` positions.
    """

    rate: float = 1e-2
    warm_up: int = 4
    epochs: int = 2
    logits: int = 1 << 25
    fewest_positions: int = 128

    def positions(self, source: Source) -> int:
        """At which a step computes logits, at most."""
        return max(self.fewest_positions, min(source.part_tokens, self.logits // source.generation.vocab))


@dataclass(frozen=True)
class Tuned:
    """What tuning gave. values: stored name -> the tuned vector in its file's dtype; none where nothing was won.

    before, after: the divergence from the original on the parts kept apart, in nats a token or 1 - cosine a text; GPTQ has
    seen these too. tokens: of the samples that the gains were tuned on.
    """

    values: dict[str, torch.Tensor]
    before: float
    after: float
    tokens: int

    def facts(self) -> dict[str, float]:
        """What a manifest says of it; nothing where nothing was won."""
        return {"before": self.before, "after": self.after, "tokens": self.tokens} if self.values else {}


def tune_norms(
    model: LanguageModel,
    source: Source,
    progress: Progress = lambda _: None,
    options: TuningOptions = TuningOptions(),
) -> Tuned | None:
    """Tune the norms of `model`, filled with the values of its codes in fp32, to the original of `source`.

    Returns None where the data are too few or the model has no logits or no norms. The model is left with the tuned values, or
    with those that it had.
    """
    if not source.has_logits or not enough(source):
        return None
    norms = _vectors(model, source.checkpoint)
    if not norms:
        return None
    apart, learnt = _split(source, options)
    divergence = _Divergence(model, source, options.positions(source))
    before = best = divergence.mean(apart)
    if not math.isfinite(before):
        progress("norms: kept, as the logits on the calibration data are not finite or of no sample's tokens")
        return None
    kept = {norm.name: norm.value() for norm in norms}
    tokens = sum(s.size for part in learnt for s in part)
    progress(f"norms: tuning {len(norms)} on {tokens} tokens")
    recorder = GradientRecorder()
    for norm in norms:
        recorder.watch_parameter(norm.parameter, norm.take_gradient)
    optimizer = torch.optim.Adam([norm.change for norm in norms], lr=options.rate, betas=_BETAS)
    order, steps, step = random.Random(_SEED), options.epochs * len(learnt), 0
    for _ in range(options.epochs):
        order.shuffle(learnt)
        for part in learnt:
            for group in optimizer.param_groups:
                group["lr"] = options.rate * min(1.0, (step + 1) / options.warm_up) * (1.0 - step / steps)
            optimizer.zero_grad()
            if divergence.differentiate(part):
                optimizer.step()
                for norm in norms:
                    norm.apply()
            step += 1
        for norm in norms:
            norm.set(norm.value())
        now = divergence.mean(apart)
        if not math.isfinite(now):
            break
        if now < best:
            best, kept = now, {norm.name: norm.value() for norm in norms}
        progress(f"norms: {100 * step // steps}%")
    for norm in norms:
        norm.set(kept[norm.name])
    unit = measure_of(source.generation.task).unit
    if best < before:
        progress(f"norms: tuned, from {before:.4g} to {best:.4g} {unit} from the original on data apart")
    else:
        progress(f"norms: kept, as no tuning helped on data apart ({before:.4g} {unit} from the original)")
    return Tuned(kept if best < before else {}, before, best, tokens)


def enough(source: Source) -> bool:
    """Whether there are data to tune on."""
    return len(source.parts()) >= FEWEST_PARTS


def tuning_bytes(model: LanguageModel, source: Source, options: TuningOptions = TuningOptions()) -> int:
    """About the memory that `tune_norms` takes: weights in fp32, the original's largest, activations and logits of a part."""
    sizes = [p.numel() for n, p in model.named_parameters(remove_duplicate=False) if n not in model.tied]
    longest = source.longest
    activations = backward_bytes(model, max(source.part_tokens, longest), longest, 2 * options.positions(source))
    return BASE_BYTES + int(4 * (sum(sizes) + max(sizes, default=0))) + activations


def _split(source: Source, options: TuningOptions) -> tuple[list[list[Sample]], list[list[Sample]]]:
    """Parts of the data that are kept apart, and those that are learnt from."""
    every = source.parts()
    count = min(MOST_PARTS, len(every))
    chosen = [[source.samples[i] for i in every[at * len(every) // count]] for at in range(count)]
    parts = [evenly(part, max(1, options.positions(source) // SAMPLE_POSITIONS)) for part in chosen]
    held = set(range(APART // 2, count, APART)) or {count - 1}
    apart, learnt = ([part for i, part in enumerate(parts) if (i in held) == kept] for kept in (True, False))
    return apart, learnt


class _Divergence:
    """The divergence of `model` from the original, in nats a token or 1 - cosine a text, at `most` positions of a part."""

    def __init__(self, model: LanguageModel, source: Source, most: int) -> None:
        self._model, self._source, self._most = model, source, most
        self._measure = measure_of(source.generation.task)
        self._learning, self._plain = GradientSession(model.graphs()), EagerSession(model.graphs())

    def mean(self, parts: Sequence[list[Sample]]) -> float:
        """Over all parts; nan where their positions are of no sample's tokens."""
        total, count = 0.0, 0
        for part in parts:
            wanted = self._original(part)
            total += float(self._of(part, wanted, self._plain)) * len(wanted)
            count += len(wanted)
        return total / count if count else math.nan

    def differentiate(self, part: list[Sample]) -> bool:
        """The gradients of one part, to the recorder's hooks; False where its positions are of no sample's tokens."""
        wanted = self._original(part)
        if len(wanted):
            self._of(part, wanted, self._learning).backward()  # type: ignore[no-untyped-call]
        return len(wanted) > 0

    def _original(self, part: list[Sample]) -> torch.Tensor:
        """What the original says, [P, V], log-probabilities or vectors; its weights are read when their module runs."""
        original = self._source.build()
        forward = CalibrationForward(original, self._source.over(part), session=EagerSession(original.graphs()))
        return self._predictions(forward)

    def _of(self, part: list[Sample], wanted: torch.Tensor, session: EagerSession) -> torch.Tensor:
        forward = CalibrationForward(self._model, self._source.over(part), session=session)
        return self._measure.divergence(wanted, self._predictions(forward)) / len(wanted)

    def _predictions(self, forward: CalibrationForward) -> torch.Tensor:
        logits, real = forward.logits(self._most)
        return self._measure.predictions(torch.as_tensor(logits)[torch.as_tensor(real)])


@dataclass(frozen=True, eq=False)
class _Vector:
    """A gain or a bias of a norm, by its stored name, and the share by which it is changed, which is learnt.

    parameter: of the model. offset: what the parameter holds less than the gain. gain: the gain at first, fp32. dtype: of its
    file.
    """

    name: str
    parameter: nn.Parameter
    offset: float
    gain: torch.Tensor
    change: nn.Parameter
    dtype: torch.dtype

    def take_gradient(self, gradient: torch.Tensor) -> None:
        """The parameter's gradient as one of the change."""
        self.change.grad = gradient * self.gain

    def apply(self) -> None:
        """The change to the parameter."""
        self.set(self.gain * (1.0 + self.change.detach()) - self.offset)

    def set(self, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.parameter.copy_(value)

    def value(self) -> torch.Tensor:
        """As the file's dtype holds it."""
        return self.parameter.detach().to(self.dtype, copy=True)


def _vectors(model: LanguageModel, checkpoint: Checkpoint) -> list[_Vector]:
    """Gains and biases of all norms, a norm being a module whose weight is a vector."""
    vectors: dict[str, _Vector] = {}
    for path, module in model.named_modules():
        if getattr(getattr(module, "weight", None), "ndim", 0) != 1:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            name = stored_name(model, f"{path}.{leaf}")
            if parameter.ndim != 1 or name in vectors:
                continue
            offset = float(getattr(module, "offset", 0.0)) if leaf == "weight" else 0.0
            parameter.data = parameter.detach().clone()  # it may be a view of the checkpoint's file
            gain, change = parameter.detach() + offset, nn.Parameter(torch.zeros_like(parameter))
            dtype = checkpoint.info(name).dtype
            vectors[name] = _Vector(name, parameter.requires_grad_(), offset, gain, change, dtype)
    return list(vectors.values())
