"""Activation-aware scaling (arXiv 2306.00978), folded into the modules before: a checkpoint in, one of the same function out.

`channel_folds` finds what can be folded. A module that reads a norm and is no linear would notice the change: such folds are found
afterwards, by comparing logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..bundle import Generation
from ..calibration.forward import CalibrationForward
from ..calibration.samples import Sample, read_samples
from ..calibration.source import Source
from ..checkpoints.checkpoint import Checkpoint, check_finite
from ..checkpoints.opening import open_checkpoint
from ..checkpoints.safetensors_writer import StreamingWriter
from ..errors import UserError
from ..models.language_model import LanguageModel
from ..models.registry import build, stored_name
from ..pipeline.generation import generation_of
from ..runtimes.session import Array
from ..system.dtypes import SAFETENSORS_NAMES
from ..system.reading import one_line
from .channel_folds import ALPHAS, Fold, search_folds
from .write_checkpoint import new_checkpoint, write_side_files

TOLERANCE = 1e-4
"""How far the logits may move, relative to the largest: powers of two move nothing, but a gain stored less 1 is rounded."""

_CHECKED = 2, 48  # samples that the logits are compared on, and tokens of each


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
    model: LanguageModel = build(checkpoint.config)
    if model.task in ("module", "embed"):
        raise UserError(f"{checkpoint.source}: a {kind} has no logits to compare by; --smooth is for language models")
    generation = generation_of(model, checkpoint, checkpoint.config)
    samples = _samples(calibration, model, checkpoint, generation)
    source = Source(checkpoint, checkpoint.config, generation, samples)
    progress(f"smooth: {source.tokens} tokens of calibration, for {bits} bits and groups of {group_size or 'a row'}")
    folds, reasons = search_folds(source, bits, group_size)
    if not folds:
        why = "".join(f"; {reason}" for reason in list(reasons.values())[:1])
        raise UserError(
            f"{checkpoint.source}: nothing can be folded in this {kind}: no norm's output goes to linears alone{why}"
        )
    useful = [fold for fold in folds if fold.best > 0]
    reasons |= {fold.source: "no exponent lowers the error" for fold in folds if fold.best == 0}
    progress(f"smooth: {len(useful)} of {len(folds)} sets of channels gain; comparing logits")
    kept, broken = _checked(source, useful)
    reasons |= {fold.source: "the logits change: something besides these linears reads it" for fold in broken}
    if not kept:
        path, reason = next(iter(reasons.items()))
        raise UserError(f"{checkpoint.source}: no folding in this {kind} is of use, such as {path}: {reason}")
    before = sum(path.stat().st_size for path in checkpoint.files)
    after, widened = _write(checkpoint, changes(model, kept), output_dir)
    folded = tuple(Folded(f.source, f.readers, ALPHAS[f.best], f.ratio) for f in kept)
    return SmoothReport(output_dir, folded, reasons, widened, source.tokens, bits, group_size, (before, after))


def _samples(
    calibration: Path | Sequence[Sample], model: LanguageModel, checkpoint: Checkpoint, generation: Generation
) -> list[Sample]:
    if not isinstance(calibration, Path):
        return list(calibration)
    decoder = next(g for g in model.graphs() if g.name == "decoder")
    longest = min(decoder.bounds["sequence"][1], generation.max_context)
    return read_samples(calibration, checkpoint, generation, longest)


@dataclass(frozen=True)
class Change:
    """How one stored tensor changes: columns multiplied, or rows divided, [N] or [K]; a gain is stored less `offset`."""

    columns: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    offset: float = 0.0

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        """The new value, in the dtype of `value` where that holds it exactly, else in float32."""
        changed = value if value.dtype == torch.float64 else value.to(torch.float32)
        if self.columns is not None:
            changed = changed * self.columns
        if self.rows is not None:
            changed = (changed + self.offset) / self.rows.view(-1, *[1] * (value.ndim - 1)) - self.offset
        narrow = changed.to(value.dtype)
        return narrow if torch.equal(narrow.to(changed.dtype), changed) else changed


def changes(model: LanguageModel, folds: Sequence[Fold]) -> dict[str, Change]:
    """Stored name -> how that tensor changes."""
    by_name: dict[str, Change] = {}
    for fold in folds:
        scale = fold.scale()
        for leaf, _ in model.get_submodule(fold.source).named_parameters(recurse=False):
            offset = fold.offset if leaf == "weight" else 0.0
            name = stored_name(model, f"{fold.source}.{leaf}")
            by_name[name] = replace(by_name.get(name, Change()), rows=scale, offset=offset)
        for reader in fold.readers:
            name = f"{reader}.weight"
            by_name[name] = replace(by_name.get(name, Change()), columns=scale)
    return by_name


def _checked(source: Source, folds: list[Fold]) -> tuple[list[Fold], list[Fold]]:
    """The folds that leave the logits as they are, and those that alone do not."""
    count, most = _CHECKED
    few = source.over(
        [
            replace(s, tokens=s.tokens[:most], decoded=s.decoded[:most], context=s.context[:most])
            for s in source.samples[:count]
        ]
    )
    before, real = _logits(few, {})

    def same(some: list[Fold]) -> bool:
        after, _ = _logits(few, changes(few.build(), some))
        return bool(np.abs(after - before)[real].max() <= TOLERANCE * np.abs(before[real]).max())

    def split(some: list[Fold]) -> tuple[list[Fold], list[Fold]]:
        if not some or same(some):
            return some, []
        if len(some) == 1:
            return [], some
        half = len(some) // 2
        (kept, broken), (also_kept, also_broken) = split(some[:half]), split(some[half:])
        return kept + also_kept, broken + also_broken

    kept, broken = split(folds)
    if broken and kept and not same(kept):
        raise UserError(
            f"{source.checkpoint.source}: the folds change the logits together though none does alone; not written"
        )
    return kept, broken


def _logits(source: Source, by_name: Mapping[str, Change]) -> tuple[Array, Array]:
    """Of every position of every sample, with the tensors changed."""

    def transform(name: str, _: nn.Module, value: torch.Tensor) -> torch.Tensor:
        return by_name[name].apply(value) if name in by_name else value

    with torch.no_grad():
        forward = CalibrationForward(source.build(), source, transform=transform)
        return forward.logits(source.tokens * len(source.samples))


def _write(checkpoint: Checkpoint, by_name: Mapping[str, Change], output: Path) -> tuple[int, tuple[str, ...]]:
    """The new checkpoint directory, which appears when whole: the bytes of its weights, and the tensors that are float32 now."""
    with new_checkpoint(output) as folder:
        written = _write_weights(checkpoint, by_name, folder / "model.safetensors")
        write_side_files(checkpoint, checkpoint.config, folder)
    return written


def _write_weights(checkpoint: Checkpoint, by_name: Mapping[str, Change], file: Path) -> tuple[int, tuple[str, ...]]:
    """Tensor by tensor from the mapped file. A changed tensor is computed twice, as the header needs its dtype first."""
    names = checkpoint.names()
    dtypes = {
        n: by_name[n].apply(checkpoint.tensor(n)).dtype if n in by_name else checkpoint.info(n).dtype for n in names
    }
    entries = [(n, SAFETENSORS_NAMES[dtypes[n]], checkpoint.info(n).shape) for n in names]
    with StreamingWriter(file, entries, {"format": "pt"}) as writer:
        for name in names:
            value = checkpoint.tensor(name)
            if name in by_name:
                value = by_name[name].apply(value)
                check_finite(name, value)
            writer.write(name, value)
    return writer.file_bytes, tuple(n for n in names if dtypes[n] != checkpoint.info(n).dtype)
