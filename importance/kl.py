"""How far a model's predictions move when weights are rounded: the divergence of its logits. Top-level: calibration enters.

Weights are read when their module runs, so this works for models larger than memory; the logits at a bounded number of
positions are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..bundle import Generation
from ..calibration.forward import CalibrationForward
from ..calibration.samples import Sample
from ..calibration.streamed_weights import WeightTransform
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from ..models.layers.linear import Embedding
from ..models.registry import build
from ..models.user_module.checkpoint import open_model
from ..quant.plan import UNQUANTIZED, BitPlan
from ..quant.rtn import effective_group, quantize_rtn
from ..runtimes.logits import torch_divergence, torch_log_softmax
from ..runtimes.session import Array
from ..system.workers import ONE, Workers

POSITIONS = 1024
"""The most positions compared, unless the vocabulary asks for fewer."""

_LOGIT_BYTES = 256 << 20
_ROWS = 64
Progress = Callable[[str], None]
Width = tuple[int, int, bool]
"""Bits, effective group size, and whether scales may be negative."""


def measured_kl(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    plans: Sequence[BitPlan | WeightTransform],
    spec: Generation,
    samples: Sequence[Sample],
) -> list[float]:
    """Mean Kullback-Leibler divergence, nats a token, of the original model from itself under each plan.

    Of a plan every weight is rounded to nearest; in its place may stand what gives a weight's values by its stored name, such
    as those of finished codes. Raises UserError for a model without logits.
    """
    reference = _logits(checkpoint, config, spec, samples, None)
    used = _tokens(spec, samples)
    found = []
    for plan in plans:
        if isinstance(plan, BitPlan):
            plan = rounding({n: (e.bits, e.group_size, e.signed) for n, e in plan.entries.items()}, used)
        found.append(_divergence(reference, _logits(checkpoint, config, spec, samples, plan)))
    return found


def kl_of_each(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    parts: Sequence[Mapping[str, Width]],
    spec: Generation,
    samples: Sequence[Sample],
    workers: Workers = ONE,
    progress: Progress = lambda _: None,
) -> list[float]:
    """The divergence when the weights of one part alone are rounded, for each part: stored name -> bits and group.

    workers: each opens the checkpoint itself, under the same name, and computes with one thread, so that their number changes
    no result. Called within their `running`.
    """
    reference = _single(checkpoint.source, config, spec, samples, None)
    path = Path(checkpoint.source).expanduser()
    # A worker may be in another folder. Links stay as they are: what a GGUF's leads to need not be called .gguf.
    source = str(path.absolute()) if path.exists() else checkpoint.source
    step = max(workers.count, -(-len(parts) // 10))  # between two, progress is said
    found: list[float] = []
    for start in range(0, len(parts), step):
        pieces = [(source, config, spec, samples, reference, part) for part in parts[start : start + step]]
        found += workers.over(_kl_of_part, pieces)
        progress(f"divergence: {len(found)} of {len(parts)} parts")
    return found


def _kl_of_part(
    source: str,
    config: dict[str, Any],
    spec: Generation,
    samples: Sequence[Sample],
    reference: tuple[Array, Array],
    part: Mapping[str, Width],
) -> float:
    made = _single(source, config, spec, samples, rounding(part, _tokens(spec, samples)))
    return _divergence(reference, made)


def _single(
    source: str, config: dict[str, Any], spec: Generation, samples: Sequence[Sample], transform: WeightTransform | None
) -> tuple[Array, Array]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _logits(open_model(source), config, spec, samples, transform)
    finally:
        torch.set_num_threads(threads)


def rounding(widths: Mapping[str, Width], used: torch.Tensor) -> WeightTransform:
    """Weights rounded to nearest where `widths` has them; of a table, only the rows of `used` ids, int64 [n], are filled in."""

    def transform(name: str, module: nn.Module, value: torch.Tensor) -> torch.Tensor:
        bits, group, signed = widths.get(name, (0, 0, False))
        if not bits or name.rpartition(".")[2] != "weight":
            return value
        if isinstance(module, Embedding):
            made = torch.empty(value.shape)  # untouched pages take no memory
            made[used] = _rounded(value[used], bits, group, signed)
            return made
        return _rounded(value, bits, group, signed)

    return transform


def _rounded(value: torch.Tensor, bits: int, group: int, signed: bool) -> torch.Tensor:
    if bits == UNQUANTIZED:
        return value.to(torch.bfloat16).to(torch.float32)
    return quantize_rtn(value, bits, effective_group(int(value.shape[1]), group), signed).dequantize()


def _tokens(spec: Generation, samples: Sequence[Sample]) -> torch.Tensor:
    """All ids that the samples hold."""
    ids = {0, spec.pad_id, *(t for s in samples for part in (s.tokens, s.decoded, s.context) for t in part)}
    if spec.context is not None:
        ids |= {*spec.context.tokens, *spec.context.prefix}
    return torch.tensor(sorted(ids))


def _logits(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    spec: Generation,
    samples: Sequence[Sample],
    transform: WeightTransform | None,
) -> tuple[Array, Array]:
    if not samples or spec.task == "module":
        raise UserError("the divergence of logits needs calibration text and a model that has logits")
    most = max(len(samples), min(POSITIONS, _LOGIT_BYTES // (4 * spec.vocab)))
    return CalibrationForward(build(config), checkpoint, spec, samples, transform=transform).logits(most)


def _divergence(reference: tuple[Array, Array], made: tuple[Array, Array]) -> float:
    logits, real = reference
    ours, theirs = logits[real], made[0][real]
    total = 0.0
    for start in range(0, len(ours), _ROWS):
        p, q = (
            torch_log_softmax(torch.from_numpy(np.array(x[start : start + _ROWS])).double()) for x in (ours, theirs)
        )
        total += float(torch_divergence(p, q))
    return max(0.0, total / max(1, len(ours)))
