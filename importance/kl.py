"""How far a model's predictions move when weights are rounded: the divergence of its logits, or of the vectors of texts.

Weights are read when their module runs, so this works for models larger than memory. In memory are the logits of a bounded
number of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..bundle import Generation
from ..calibration.forward import CalibrationForward
from ..calibration.samples import Sample
from ..calibration.source import Source
from ..calibration.streamed_weights import WeightTransform
from ..errors import UserError
from ..models.embedding import poolings
from ..models.layers.linear import Embedding
from ..models.opening import open_model
from ..quant.plan import UNQUANTIZED, BitPlan
from ..quant.rtn import effective_group, quantize_rtn
from ..runtimes.logits import same_top1
from ..runtimes.session import Array
from ..system.workers import ONE, Workers
from .divergence import measure_of

POSITIONS = 1024
"""The most positions compared, unless the vocabulary asks for fewer."""

_LOGIT_BYTES = 256 << 20
_ROWS = 64
Progress = Callable[[str], None]
Width = tuple[int, int, bool]
"""Bits, effective group size, and whether scales may be negative."""


def measured_kl(source: Source, plans: Sequence[BitPlan | WeightTransform]) -> list[float]:
    """Mean divergence (`divergence.Measure`: nats a token, or 1 - cosine a text) of the original model from itself under each plan.

    Of a plan every weight is rounded to nearest. A transform may be given in its place, such as one that returns the values of
    finished codes. Raises UserError for a model without logits.
    """
    reference = _logits(source, None)
    used = ids_of(source.generation, source.samples)
    divergences = []
    for plan in plans:
        if isinstance(plan, BitPlan):
            plan = rounding({n: (e.bits, e.group_size, e.signed) for n, e in plan.entries.items()}, used)
        divergences.append(_divergence(source.generation.task, reference, _logits(source, plan)))
    return divergences


def agreement_under(source: Source, transform: WeightTransform) -> tuple[float, float, int]:
    """(mean divergence, share of positions with the same best token, how many positions) under other weights.

    Of a model of embeddings: 1 - cosine a text, the least cosine, how many texts. Raises UserError for a model without logits.
    """
    reference, made = _logits(source, None), _logits(source, transform)
    logits, real = reference
    ours, theirs = logits[real], made[0][real]
    divergence = _divergence(source.generation.task, reference, made)
    if source.generation.task == "embed":
        cosines = torch.cosine_similarity(torch.as_tensor(ours), torch.as_tensor(theirs))
        return divergence, float(cosines.min()), len(ours)
    same = sum(same_top1(ours[i : i + _ROWS], theirs[i : i + _ROWS]) for i in range(0, len(ours), _ROWS))
    return divergence, same / max(1, len(ours)), len(ours)


def kl_of_each(
    source: Source,
    parts: Sequence[Mapping[str, Width]],
    workers: Workers = ONE,
    progress: Progress = lambda _: None,
) -> list[float]:
    """The divergence when the weights of one part alone are rounded, for each part: stored name -> bits and group.

    workers: each opens the checkpoint itself, under the same name, and computes with one thread, so that their number changes
    no result. Called within their `running`.
    """
    name = source.checkpoint.source
    merged = source.checkpoint.adapter
    adapter = None if merged is None else str(Path(merged).expanduser().absolute())
    data = _WorkerSource(name, adapter, source.config, source.generation, source.samples, source.part_tokens)
    reference = _single(data, None)
    path = Path(name).expanduser()
    # A worker may be in another folder. A link stays a link: the file that it leads to need not be called .gguf.
    data = replace(data, checkpoint=str(path.absolute()) if path.exists() else name)
    step = max(workers.count, -(-len(parts) // 10))  # progress is reported after each step
    divergences: list[float] = []
    for start in range(0, len(parts), step):
        divergences += workers.over(_kl_of_part, [(data, reference, part) for part in parts[start : start + step]])
        progress(f"divergence: {len(divergences)} of {len(parts)} parts")
    return divergences


@dataclass(frozen=True, eq=False)
class _WorkerSource:
    """A source as a worker is sent it: with the checkpoint's name, which it opens itself."""

    checkpoint: str
    adapter: str | None
    config: dict[str, Any]
    generation: Generation
    samples: Sequence[Sample]
    part_tokens: int

    def open(self) -> Source:
        checkpoint = open_model(self.checkpoint, self.adapter, poolings(self.config))
        return Source(checkpoint, self.config, self.generation, self.samples, (), self.part_tokens)


def _kl_of_part(data: _WorkerSource, reference: tuple[Array, Array], part: Mapping[str, Width]) -> float:
    rounded = rounding(part, ids_of(data.generation, data.samples))
    return _divergence(data.generation.task, reference, _single(data, rounded))


def _single(data: _WorkerSource, transform: WeightTransform | None) -> tuple[Array, Array]:
    """`_logits` by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _logits(data.open(), transform)
    finally:
        torch.set_num_threads(threads)


def rounding(widths: Mapping[str, Width], used: torch.Tensor) -> WeightTransform:
    """Rounds weights to nearest where `widths` has them. Of a table only the rows of the ids `used`, int64 [n], are filled in."""

    def transform(name: str, module: nn.Module, value: torch.Tensor) -> torch.Tensor:
        bits, group, signed = widths.get(name, (0, 0, False))
        if not bits or name.rpartition(".")[2] != "weight":
            return value
        if isinstance(module, Embedding):
            table = torch.empty(value.shape)  # untouched pages take no memory
            table[used] = _rounded(value[used], bits, group, signed)
            return table
        return _rounded(value, bits, group, signed)

    return transform


def _rounded(value: torch.Tensor, bits: int, group: int, signed: bool) -> torch.Tensor:
    if bits == UNQUANTIZED:
        return value.to(torch.bfloat16).to(torch.float32)
    return quantize_rtn(value, bits, effective_group(int(value.shape[1]), group), signed).dequantize()


def ids_of(generation: Generation, samples: Sequence[Sample]) -> torch.Tensor:
    """All ids that the samples hold."""
    ids = {0, generation.pad_id, *(t for s in samples for part in (s.tokens, s.decoded, s.context) for t in part)}
    if generation.context is not None:
        ids |= {*generation.context.tokens, *generation.context.prefix}
    return torch.tensor(sorted(ids))


def _logits(source: Source, transform: WeightTransform | None) -> tuple[Array, Array]:
    if not source.has_logits:
        raise UserError("the divergence of logits needs calibration text and a model that has logits")
    most = max(len(source.samples), min(POSITIONS, _LOGIT_BYTES // (4 * source.generation.vocab)))
    return CalibrationForward(source.build(), source, transform=transform).logits(most)


def _divergence(task: str, reference: tuple[Array, Array], made: tuple[Array, Array]) -> float:
    measure = measure_of(task)
    logits, real = reference
    ours, theirs = logits[real], made[0][real]
    total = 0.0
    for start in range(0, len(ours), _ROWS):
        p, q = (
            measure.predictions(torch.from_numpy(np.array(x[start : start + _ROWS])).double()) for x in (ours, theirs)
        )
        total += float(measure.divergence(p, q))
    return max(0.0, total / max(1, len(ours)))
