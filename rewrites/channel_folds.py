"""Which channels of a model can be scaled, and by how much: activation-aware scaling (arXiv 2306.00978).

Input channels of linears are multiplied by powers of two, larger where the activations are, and the module that computes those
channels is divided: the gain of a norm, or the rows of a linear. Which linears read a norm is observed while calibration data
go through the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..calibration.forward import CalibrationForward
from ..calibration.source import Source
from ..checkpoints.checkpoint import Checkpoint
from ..models.language_model import LanguageModel
from ..models.layers.linear import Linear
from ..models.layers.mlp import GatedMLP
from ..models.registry import stored_name
from ..quant.rtn import effective_group, quantize_rtn

ALPHAS = tuple(i / 10 for i in range(11))
"""Exponents tried; 0 leaves the weights as they are."""

ROWS = 128
"""Rows of each linear, evenly spread, that the error of an exponent is measured on."""

_FURTHEST = 10.0  # no channel is scaled by more than 2 to this


@dataclass
class Fold:
    """One set of channels that can be scaled. source: the path of what computes them; readers: the linears that take them.

    errors: reader -> its output error at each of ALPHAS, tr(dW C dW^T) over the rows measured, C the covariance of its inputs over
    the tokens. What a channel adds to every token alike is not counted: otherwise channels of large constant activations would
    decide. mean: the mean |x| of each channel, fp32 [K].
    """

    source: str
    offset: float = 0.0
    mean: torch.Tensor | None = None
    errors: dict[str, list[float]] = field(default_factory=dict)

    @property
    def readers(self) -> tuple[str, ...]:
        return tuple(self.errors)

    @property
    def best(self) -> int:
        """Which of ALPHAS: the least sum over the readers of the error relative to the unscaled one."""
        sums = [sum(e[i] / max(e[0], 1e-30) for e in self.errors.values()) for i in range(len(ALPHAS))]
        return min(range(len(ALPHAS)), key=sums.__getitem__)

    @property
    def ratio(self) -> float:
        """The error with the best exponent over the one without, the mean of the readers."""
        return sum(e[self.best] / max(e[0], 1e-30) for e in self.errors.values()) / max(1, len(self.errors))

    def scale(self) -> torch.Tensor:
        assert self.mean is not None
        return scales(self.mean, ALPHAS[self.best])


def scales(mean: torch.Tensor, alpha: float) -> torch.Tensor:
    """mean^alpha, fp32 [K], over its geometric mean, as powers of two: multiplying by them rounds nothing."""
    logs = torch.log2(mean.clamp_min(mean.mean().clamp_min(1e-30) * 2.0**-_FURTHEST))
    return torch.exp2((alpha * (logs - logs.mean())).round_().clamp_(-_FURTHEST, _FURTHEST))


def scaled_errors(
    weight: torch.Tensor, covariance: torch.Tensor, mean: torch.Tensor, bits: int, group_size: int
) -> list[float]:
    """tr(dW C dW^T) of weight [N, K] rounded to nearest, for each of ALPHAS. covariance: fp32 [K, K]; mean: fp32 [K]."""
    errors = []
    for alpha in ALPHAS:
        scale = scales(mean, alpha)
        rounded = quantize_rtn(weight * scale, bits, group_size).dequantize().div_(scale).sub_(weight)
        errors.append(float((rounded @ covariance).mul_(rounded).sum()))
    return errors


def search_folds(source: Source, bits: int, group_size: int) -> tuple[list[Fold], dict[str, str]]:
    """The folds whose readers take nothing else, and why other sources have none. group_size 0: one scale a row."""
    model = source.build()
    readers = _Readers(model, source.checkpoint, bits, group_size)

    def visit(name: str, linear: Linear, inputs: list[torch.Tensor]) -> None:
        readers.measure(name, linear, inputs[0], torch.cat(list(forward.all_rows(inputs))))

    forward = CalibrationForward(model, source, visit=visit)
    with torch.no_grad():
        forward.to_head()
    uses = Counter(stored_name(model, f"{path}.weight") for path, m in model.named_modules() if hasattr(m, "weight"))
    reasons: dict[str, str] = {}
    for origin, fold in readers.folds.items():
        for path in (origin, *fold.readers):
            if uses[stored_name(model, f"{path}.weight")] > 1:
                reasons[origin] = f"{path} shares its weight with another module"
            elif path != origin and readers.sources[path] != {origin}:
                reasons[origin] = f"{path} reads something else, too"
    return [fold for origin, fold in readers.folds.items() if origin not in reasons], reasons


class _Readers:
    """Follows each norm's output to the linears that take it, and measures them when they are visited."""

    def __init__(self, model: LanguageModel, checkpoint: Checkpoint, bits: int, group_size: int) -> None:
        self._checkpoint, self._bits, self._group = checkpoint, bits, group_size
        self._norms = {m: path for path, m in model.named_modules() if _is_norm(m)}
        self._linears = {m: path for path, m in model.named_modules() if isinstance(m, Linear)}
        self._products = {m.down_proj: f"{p}.up_proj" for p, m in model.named_modules() if isinstance(m, GatedMLP)}
        # A norm's output -> the norm, and an input -> its covariance: both only while the tensor exists.
        self._outputs: MutableMapping[torch.Tensor, nn.Module] = WeakTensorKeyDictionary()
        self._covariances: MutableMapping[torch.Tensor, torch.Tensor] = WeakTensorKeyDictionary()
        self.sources: dict[str, set[str | None]] = {path: set() for path in self._linears.values()}
        self.folds: dict[str, Fold] = {}
        for norm in self._norms:
            norm.register_forward_hook(self._mark)
        for linear in self._linears:
            linear.register_forward_pre_hook(self._read)

    def _mark(self, norm: nn.Module, _: Any, output: torch.Tensor) -> None:
        self._outputs[output] = norm

    def _read(self, linear: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(linear, Linear)
        self.sources[self._linears[linear]].add(self._source(linear, args[0]))

    def _source(self, linear: Linear, x: torch.Tensor) -> str | None:
        """The path of what computed the channels of x, if they can be scaled there."""
        norm = self._outputs.get(x)
        return self._norms[norm] if norm is not None else self._products.get(linear)

    def measure(self, name: str, linear: Linear, x: torch.Tensor, rows: torch.Tensor) -> None:
        """name: of the stored weight. x: a part's input of the linear; rows: those of all parts that are no padding, [T, K]."""
        source = self._source(linear, x)
        if source is None:
            return
        fold = self.folds.setdefault(source, Fold(source, float(getattr(self._outputs.get(x), "offset", 0.0))))
        if fold.mean is None:
            fold.mean = rows.abs().mean(dim=0)
        covariance = self._covariances.get(x)
        if covariance is None:
            centred = rows - rows.mean(dim=0)
            self._covariances[x] = covariance = centred.T @ centred / max(1, len(rows))
        stored = self._checkpoint.tensor(name)
        weight = stored[:: -(-len(stored) // ROWS)].to(torch.float32)
        group = effective_group(weight.shape[1], self._group)
        fold.errors[self._linears[linear]] = scaled_errors(weight, covariance, fold.mean, self._bits, group)


def _is_norm(module: nn.Module) -> bool:
    """Whether its parameters are a gain [K], and perhaps a bias [K]."""
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and own.keys() <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values())
