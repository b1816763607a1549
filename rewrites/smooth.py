"""Activation-aware scaling (arXiv 2306.00978), folded into what comes before: a checkpoint in, one of the same function out.

Input channels of linears are multiplied by powers of two, larger where the activations are, and what computes those
channels is divided: the gain of a norm, or the rows of a linear. Which linears read a norm is seen while calibration data
go through the model; whatever else reads it is caught afterwards, by comparing logits. What may enter: calibration, models,
the round-to-nearest quantizer, the readers, the writer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..bundle import Generation
from ..calibration.forward import CalibrationForward
from ..calibration.samples import Sample, read_samples
from ..checkpoints.checkpoint import Checkpoint, check_finite
from ..checkpoints.opening import open_checkpoint
from ..checkpoints.safetensors_writer import StreamingWriter
from ..errors import UserError
from ..models.language_model import LanguageModel
from ..models.layers.linear import Linear
from ..models.layers.mlp import GatedMLP
from ..models.layers.norm import RMSNorm
from ..models.registry import build, stored_name
from ..pipeline.generation import generation_of
from ..quant.rtn import effective_group, quantize_rtn
from ..system.dtypes import SAFETENSORS_NAMES
from ..system.reading import one_line
from .write_checkpoint import new_checkpoint, write_side_files

ALPHAS = tuple(i / 10 for i in range(11))
"""Exponents tried; 0 leaves the weights as they are."""

ROWS = 128
"""Rows of each linear, evenly spread, that the error of an exponent is measured on."""

TOLERANCE = 1e-4
"""How far the logits may move, relative to the largest: powers of two move nothing, but a gain stored less 1 is rounded."""

_CHECKED = 2, 48  # samples that the logits are compared on, and tokens of each
_FURTHEST = 10.0  # no channel is scaled by more than 2 to this


@dataclass
class Fold:
    """One set of channels that can be scaled. source: the path of what computes them; readers: the linears that take them.

    errors: reader -> its output error at each of ALPHAS, tr(dW C dW^T) over the rows measured, C the covariance of its
    inputs over the tokens. What a channel adds to every token alike is left out: counted, channels of large constant
    activations decide, and at 3 bits the predictions get worse. mean: the mean |x| of each channel, fp32 [K].
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


@dataclass(frozen=True)
class Folded:
    """A fold as reported. ratio: the readers' round-to-nearest output error on the calibration data, after over before."""

    source: str
    readers: tuple[str, ...]
    alpha: float
    ratio: float


@dataclass(frozen=True)
class SmoothReport:
    """A finished rewrite. left: source -> why it is as it was. widened: tensors now float32. bytes: before and after."""

    path: Path
    folds: tuple[Folded, ...]
    left: dict[str, str]
    widened: tuple[str, ...]
    tokens: int
    bits: int
    group_size: int
    bytes: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


def rewrite_smooth(
    model_dir: str,
    calibration: Path | Sequence[Sample],
    output_dir: Path,
    bits: int = 4,
    group_size: int = 64,
    progress: Callable[[str], None] = lambda _: None,
) -> SmoothReport:
    """Write the model with its channels scaled for `bits` and `group_size` to `output_dir`, which must not exist.

    model_dir: directory, .gguf file or hub id. calibration: a text, a task file (.tsv), or samples. group_size 0 means one
    scale a row. Every logit is as before within TOLERANCE. Raises UserError for a model where nothing can be folded, too
    little text, a model without logits, or a disk that refuses.
    """
    if output_dir.exists() or output_dir.is_symlink():
        raise UserError(f"{output_dir} exists already; remove it or choose another -o")
    checkpoint = open_checkpoint(model_dir)
    kind = one_line(str(checkpoint.config.get("model_type")), 40)
    model = build(checkpoint.config)
    if model.task == "module":
        raise UserError(f"{checkpoint.source}: a {kind} has no logits to compare by; --smooth is for language models")
    spec = generation_of(model, checkpoint, checkpoint.config)
    if isinstance(calibration, Path):
        decoder = next(g for g in model.graphs() if g.name == "decoder")
        samples = read_samples(calibration, checkpoint, spec, min(decoder.bounds["sequence"][1], spec.max_context))
    else:
        samples = list(calibration)
    tokens = sum(s.size for s in samples)
    progress(f"smooth: {tokens} tokens of calibration, for {bits} bits and groups of {group_size or 'a row'}")
    found, left = _search(model, checkpoint, spec, samples, bits, group_size)
    if not found:
        why = "".join(f"; {reason}" for reason in list(left.values())[:1])
        raise UserError(
            f"{checkpoint.source}: nothing can be folded in this {kind}: no norm's output goes to linears alone{why}"
        )
    useful = [fold for fold in found if fold.best > 0]
    left |= {fold.source: "no exponent lowers the error" for fold in found if fold.best == 0}
    progress(f"smooth: {len(useful)} of {len(found)} sets of channels gain; comparing logits")
    kept, broken = _checked(checkpoint, spec, samples, useful)
    left |= {fold.source: "the logits change: something besides these linears reads it" for fold in broken}
    if not kept:
        source, reason = next(iter(left.items()))
        raise UserError(f"{checkpoint.source}: no folding in this {kind} is of use, such as {source}: {reason}")
    before = sum(path.stat().st_size for path in checkpoint.files)
    after, widened = _write(checkpoint, changes(model, kept), output_dir)
    folds = tuple(Folded(f.source, f.readers, ALPHAS[f.best], f.ratio) for f in kept)
    return SmoothReport(output_dir, folds, left, widened, tokens, bits, group_size, (before, after))


def scales(mean: torch.Tensor, alpha: float) -> torch.Tensor:
    """mean^alpha, fp32 [K], over its geometric mean, as powers of two: multiplying by them rounds nothing."""
    logs = torch.log2(mean.clamp_min(mean.mean().clamp_min(1e-30) * 2.0**-_FURTHEST))
    return torch.exp2((alpha * (logs - logs.mean())).round_().clamp_(-_FURTHEST, _FURTHEST))


def scaled_errors(
    weight: torch.Tensor, covariance: torch.Tensor, mean: torch.Tensor, bits: int, group_size: int
) -> list[float]:
    """tr(dW C dW^T) of weight [N, K] rounded to nearest, for each of ALPHAS. covariance: fp32 [K, K]; mean: fp32 [K]."""
    found = []
    for alpha in ALPHAS:
        scale = scales(mean, alpha)
        rounded = quantize_rtn(weight * scale, bits, group_size).dequantize().div_(scale).sub_(weight)
        found.append(float((rounded @ covariance).mul_(rounded).sum()))
    return found


class _Watch:
    """Follows each norm's output to the linears that take it, and measures them when the walk visits them."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, bits: int, group_size: int) -> None:
        self._checkpoint, self._bits, self._group = checkpoint, bits, group_size
        self._norms = {m: path for path, m in model.named_modules() if _is_norm(m)}
        self._linears = {m: path for path, m in model.named_modules() if isinstance(m, Linear)}
        self._products = {m.down_proj: f"{p}.up_proj" for p, m in model.named_modules() if isinstance(m, GatedMLP)}
        # A norm's output -> the norm, and an input -> its covariance: both only while the tensor is there.
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
        norm = self._outputs.get(x)
        fold = self.folds.setdefault(source, Fold(source, norm.offset if isinstance(norm, RMSNorm) else 0.0))
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


def _search(
    model: LanguageModel,
    checkpoint: Checkpoint,
    spec: Generation,
    samples: Sequence[Sample],
    bits: int,
    group_size: int,
) -> tuple[list[Fold], dict[str, str]]:
    """The folds whose readers take nothing else, and why others are none. `model` is of no use afterwards."""
    watch = _Watch(model, checkpoint, bits, group_size)

    def visit(name: str, linear: Linear, inputs: list[torch.Tensor]) -> None:
        watch.measure(name, linear, inputs[0], torch.cat(list(forward.all_rows(inputs))))

    forward = CalibrationForward(model, checkpoint, spec, samples, visit=visit)
    with torch.no_grad():
        forward.to_head()
    weighted = (path for path, m in model.named_modules() if "weight" in dict(m.named_parameters(recurse=False)))
    uses = Counter(stored_name(model, f"{path}.weight") for path in weighted)
    left: dict[str, str] = {}
    for source, fold in watch.folds.items():
        for path in (source, *fold.readers):
            if uses[stored_name(model, f"{path}.weight")] > 1:
                left[source] = f"{path} shares its weight with another module"
            elif path != source and watch.sources[path] != {source}:
                left[source] = f"{path} reads something else, too"
    return [fold for source, fold in watch.folds.items() if source not in left], left


@dataclass(frozen=True)
class Change:
    """What becomes of one stored tensor: columns multiplied, or rows divided, [N] or [K]; a gain held less `offset`."""

    columns: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    offset: float = 0.0

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        """The new value, in the dtype of `value` where that holds it exactly, else in float32."""
        made = value if value.dtype == torch.float64 else value.to(torch.float32)
        if self.columns is not None:
            made = made * self.columns
        if self.rows is not None:
            made = (made + self.offset) / self.rows.view(-1, *[1] * (value.ndim - 1)) - self.offset
        narrow = made.to(value.dtype)
        return narrow if torch.equal(narrow.to(made.dtype), made) else made


def changes(model: LanguageModel, folds: Sequence[Fold]) -> dict[str, Change]:
    """Stored name -> what becomes of it."""
    found: dict[str, Change] = {}
    for fold in folds:
        scale = fold.scale()
        for leaf, _ in model.get_submodule(fold.source).named_parameters(recurse=False):
            offset = fold.offset if leaf == "weight" else 0.0
            name = stored_name(model, f"{fold.source}.{leaf}")
            found[name] = replace(found.get(name, Change()), rows=scale, offset=offset)
        for reader in fold.readers:
            found[f"{reader}.weight"] = replace(found.get(f"{reader}.weight", Change()), columns=scale)
    return found


def _checked(
    checkpoint: Checkpoint, spec: Generation, samples: Sequence[Sample], folds: list[Fold]
) -> tuple[list[Fold], list[Fold]]:
    """The folds that leave the logits as they are, and those that alone do not."""
    count, most = _CHECKED
    few = [
        replace(s, tokens=s.tokens[:most], decoded=s.decoded[:most], context=s.context[:most]) for s in samples[:count]
    ]
    before, real = _logits(checkpoint, spec, few, {})

    def same(some: list[Fold]) -> bool:
        after, _ = _logits(checkpoint, spec, few, changes(build(checkpoint.config), some))
        return bool(np.abs(after - before)[real].max() <= TOLERANCE * np.abs(before[real]).max())

    def parted(some: list[Fold]) -> tuple[list[Fold], list[Fold]]:
        if not some or same(some):
            return some, []
        if len(some) == 1:
            return [], some
        half = len(some) // 2
        (kept, broken), (also, beside) = parted(some[:half]), parted(some[half:])
        return kept + also, broken + beside

    kept, broken = parted(folds)
    if broken and kept and not same(kept):
        raise UserError(
            f"{checkpoint.source}: the folds change the logits together though none does alone; not written"
        )
    return kept, broken


def _logits(
    checkpoint: Checkpoint, spec: Generation, samples: Sequence[Sample], made: Mapping[str, Change]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    def transform(name: str, _: nn.Module, value: torch.Tensor) -> torch.Tensor:
        return made[name].apply(value) if name in made else value

    with torch.no_grad():
        forward = CalibrationForward(build(checkpoint.config), checkpoint, spec, samples, transform=transform)
        return forward.logits(sum(s.size for s in samples) * len(samples))


def _write(checkpoint: Checkpoint, made: Mapping[str, Change], output: Path) -> tuple[int, tuple[str, ...]]:
    """The new checkpoint directory, which appears when whole: the bytes of its weights, and what is float32 now."""
    with new_checkpoint(output) as folder:
        written = _write_weights(checkpoint, made, folder / "model.safetensors")
        write_side_files(checkpoint, checkpoint.config, folder)
    return written


def _write_weights(checkpoint: Checkpoint, made: Mapping[str, Change], file: Path) -> tuple[int, tuple[str, ...]]:
    """Tensor by tensor from the mapped file; what is changed is computed twice, as the header needs its dtype first."""
    names = checkpoint.names()
    dtypes = {n: made[n].apply(checkpoint.tensor(n)).dtype if n in made else checkpoint.info(n).dtype for n in names}
    entries = [(n, SAFETENSORS_NAMES[dtypes[n]], checkpoint.info(n).shape) for n in names]
    with StreamingWriter(file, entries, {"format": "pt"}) as writer:
        for name in names:
            value = checkpoint.tensor(name)
            if name in made:
                value = made[name].apply(value)
                check_finite(name, value)
            writer.write(name, value)
    return writer.file_bytes, tuple(n for n in names if dtypes[n] != checkpoint.info(n).dtype)
