"""Norms tuned to the codes: gains that bring a model's predictions back to the original's. Top-level: forward, models enter.

GPTQ makes each linear right for its own inputs; what the errors of all of them together do to the predictions nobody looks
at. The gains of norms are a few numbers a layer that no target quantizes, so they are free to make up for some of
that: steps of Adam (arXiv 1412.6980) on the divergence of the logits from the original's. Tuning norms to a quantized model is
of arXiv 2309.02784, there layer by layer. What is won is measured on data that no step was made on; without it nothing changes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..bundle import Generation
from ..calibration.backward import GradientSession, backward_bytes
from ..calibration.forward import PART_TOKENS, CalibrationForward, parted
from ..calibration.samples import Sample, evenly
from ..checkpoints.checkpoint import Checkpoint
from ..models.language_model import LanguageModel
from ..models.layers.norm import RMSNorm
from ..models.registry import build, stored_name
from ..runtimes.eager import EagerSession
from ..runtimes.logits import torch_divergence, torch_log_softmax

RATE = 1e-2
"""The largest step of a gain, as a share of it; the steps rise to it at first and fall to nothing."""

WARM_UP = 4
EPOCHS = 2
APART = 8
"""Each so-manieth part of the data is kept apart, to see what was won."""

FEWEST_PARTS, MOST_PARTS = 4, 16
"""Parts of the data, of PART_TOKENS each, that are used; more are evenly thinned out."""

LOGITS = 1 << 25
"""Logits of a step at most, unless that were fewer than FEWEST_POSITIONS."""

FEWEST_POSITIONS = 128
SAMPLE_POSITIONS = 16
"""Logits of a sample, unless it is shorter: the first tokens of all samples alone would say little of the others."""

BASE_BYTES = 160 << 20
"""Of all that is small: what tiny models take beside what is counted (70 to 150 MiB measured)."""

_SEED = 7
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Tuned:
    """What tuning gave. values: stored name -> the tuned vector, as its file's dtype holds it; none where nothing was won.

    before, after: the divergence from the original on the parts kept apart, in nats a token; GPTQ has seen these too. tokens: of
    the samples learnt from.
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
    checkpoint: Checkpoint,
    config: dict[str, Any],
    spec: Generation,
    samples: Sequence[Sample],
    progress: Progress = lambda _: None,
) -> Tuned | None:
    """Tune the norms of `model`, filled with the values of its codes in fp32, to the original of `checkpoint`.

    samples: calibration data. Returns None where they are too few or the model has no logits or no norms. The model is left
    with the tuned values, or those that it had.
    """
    if spec.task == "module" or not enough(samples):
        return None
    norms = _vectors(model, checkpoint)
    if not norms:
        return None
    most = _positions(spec)
    every = parted(samples)
    count = min(MOST_PARTS, len(every))
    chosen = [[samples[i] for i in every[at * len(every) // count]] for at in range(count)]
    parts = [evenly(part, max(1, most // SAMPLE_POSITIONS)) for part in chosen]
    held = set(range(APART // 2, count, APART)) or {count - 1}
    apart, learnt = ([part for i, part in enumerate(parts) if (i in held) == kept] for kept in (True, False))
    learning, plain = GradientSession(model.graphs()), EagerSession(model.graphs())

    def original(part: list[Sample]) -> torch.Tensor:
        """Log-probabilities [P, V] of the original, its weights read when their module runs."""
        fresh = build(config)
        found, real = CalibrationForward(fresh, checkpoint, spec, part, session=EagerSession(fresh.graphs())).logits(
            most
        )
        return torch_log_softmax(torch.as_tensor(found)[torch.as_tensor(real)])

    def divergence(part: list[Sample], wanted: torch.Tensor, session: EagerSession) -> torch.Tensor:
        found, real = CalibrationForward(model, checkpoint, spec, part, session=session).logits(most)
        logits = torch_log_softmax(torch.as_tensor(found)[torch.as_tensor(real)])
        return torch_divergence(wanted, logits) / len(wanted)

    def lost() -> float:
        total, count = 0.0, 0
        for part in apart:
            wanted = original(part)
            total += float(divergence(part, wanted, plain)) * len(wanted)
            count += len(wanted)
        return total / count if count else math.nan

    before = best = lost()
    if not math.isfinite(before):
        progress("norms: kept, as the logits on the calibration data are not finite or of no sample's tokens")
        return None
    kept = {norm.name: norm.held() for norm in norms}
    tokens = sum(s.size for part in learnt for s in part)
    progress(f"norms: tuning {len(norms)} on {tokens} tokens")
    optimizer = torch.optim.Adam([norm.change for norm in norms], lr=RATE, betas=(0.9, 0.95))
    order, steps, step = random.Random(_SEED), EPOCHS * len(learnt), 0
    for _ in range(EPOCHS):
        order.shuffle(learnt)
        for part in learnt:
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * (1.0 - step / steps)
            wanted = original(part)
            if len(wanted):  # none where the logits looked at are of no sample's tokens
                divergence(part, wanted, learning).backward()  # type: ignore[no-untyped-call]
                for norm in norms:
                    norm.take_gradient()
                optimizer.step()
                for norm in norms:
                    norm.apply()
            step += 1
        for norm in norms:
            norm.set(norm.held())
        now = lost()
        if not math.isfinite(now):
            break
        if now < best:
            best, kept = now, {norm.name: norm.held() for norm in norms}
        progress(f"norms: {100 * step // steps}%")
    for norm in norms:
        norm.set(kept[norm.name])
    if best < before:
        progress(f"norms: tuned, from {before:.4f} to {best:.4f} nats a token from the original on data apart")
    else:
        progress(f"norms: kept, as no tuning helped on data apart ({before:.4f} nats a token from the original)")
    return Tuned(kept if best < before else {}, before, best, tokens)


def enough(samples: Sequence[Sample]) -> bool:
    """Whether there are data to tune on."""
    return len(parted(samples)) >= FEWEST_PARTS


def tuning_bytes(model: LanguageModel, spec: Generation, samples: Sequence[Sample]) -> int:
    """About the memory that `tune_norms` takes: weights in fp32, the original's largest, activations and logits of a part."""
    sizes = [p.numel() for n, p in model.named_parameters(remove_duplicate=False) if n not in model.tied]
    longest = max((s.size for s in samples), default=0)
    activations = backward_bytes(model, max(PART_TOKENS, longest), longest, 2 * _positions(spec))
    return BASE_BYTES + int(4 * (sum(sizes) + max(sizes, default=0))) + activations


def _positions(spec: Generation) -> int:
    return max(FEWEST_POSITIONS, min(PART_TOKENS, LOGITS // spec.vocab))


@dataclass(frozen=True, eq=False)
class _Vector:
    """A gain or a bias of a norm, by its stored name, and the share by which it is changed, to be learnt.

    parameter: of the model. offset: what it is held less by. gain: what multiplied at first, fp32. dtype: of its file.
    """

    name: str
    parameter: nn.Parameter
    offset: float
    gain: torch.Tensor
    change: nn.Parameter
    dtype: torch.dtype

    def take_gradient(self) -> None:
        """From the parameter to the change."""
        self.change.grad = None if self.parameter.grad is None else self.parameter.grad * self.gain
        self.parameter.grad = None

    def apply(self) -> None:
        """The change to the parameter."""
        self.set(self.gain * (1.0 + self.change.detach()) - self.offset)

    def set(self, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.parameter.copy_(value)

    def held(self) -> torch.Tensor:
        """The value as the file's dtype holds it."""
        return self.parameter.detach().to(self.dtype, copy=True)


def _vectors(model: LanguageModel, checkpoint: Checkpoint) -> list[_Vector]:
    """Gains and biases of all norms, a norm being a module whose weight is a vector."""
    found: dict[str, _Vector] = {}
    for path, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or weight.ndim != 1:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            name = stored_name(model, f"{path}.{leaf}")
            if parameter.ndim != 1 or name in found:
                continue
            offset = module.offset if isinstance(module, RMSNorm) and leaf == "weight" else 0.0
            parameter.data = parameter.detach().clone()  # it may be a view of the checkpoint's file
            gain, change = parameter.detach() + offset, nn.Parameter(torch.zeros_like(parameter))
            dtype = checkpoint.info(name).dtype
            found[name] = _Vector(name, parameter.requires_grad_(), offset, gain, change, dtype)
    return list(found.values())
