"""What the codes cost: the quantized checkpoint's predictions against the original's, on a few windows of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..bundle import CHECKPOINT
from ..calibration.samples import Sample, evenly
from ..calibration.streamed_weights import WeightTransform
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.opening import open_checkpoint
from ..errors import UserError
from ..importance.kl import agreement_under, ids_of
from ..models.layers.linear import Embedding
from ..models.loading import CODES, quantized_parts
from ..ops.quantized import dequantize
from ..system.memory import anonymous_bytes
from ..system.resumable import ResumableExport
from .calibration_data import most_tokens
from .planned import Planned
from .request import Progress, Request
from .shipped_text import held_out_samples

_SAMPLES = 4
_MUCH = 0.1
"""Nats a token that are worth a warning: the answers of a small model then begin to differ."""

_MUCH_TURNED = 0.02
"""1 - cosine of a text's vector that is worth one: the order of what is found then begins to differ."""

_HEADROOM = 512 << 20
"""Bytes that the logits of both and a layer in float32 may take; under a tighter --memory-limit nothing is measured."""


@dataclass(frozen=True)
class RoundingLoss:
    """The quantized checkpoint against the original, weights in float32 on both sides.

    kl: mean Kullback-Leibler divergence, nats a token. top1: share of positions with the same most likely token. positions: how
    many. data: what they are of. calibrated: whether codes were found on data. vectors: of a model of embeddings, kl is the mean of
    1 - cosine, top1 the least cosine, and positions are texts.
    """

    kl: float
    top1: float
    positions: int
    data: str
    calibrated: bool
    vectors: bool = False

    @property
    def text(self) -> str:
        """One line for a person."""
        figures = f"KL {self.kl:.4f} nats, top-1 {self.top1:.1%} against the original"
        line = f"quality: {figures}, on {self.positions} positions of {self.data}"
        if self.vectors:
            figures = f"cosine {1 - self.kl:.5f} to the original's vectors, least {self.top1:.5f}"
            line = f"quality: {figures}, on {self.positions} texts of {self.data}"
        return line if self.calibrated else f"{line}; rounded without data, --calibration FILE (a text) loses less"


def rounding_loss(planned: Planned, request: Request, run: ResumableExport, progress: Progress) -> RoundingLoss | None:
    """Measure the quantized checkpoint in the run's folder; None for a model without logits, or where memory is short."""
    source, generation = planned.source, planned.generation
    if generation.task == "module":
        return None
    limit = request.memory_limit
    if limit is not None and limit - anonymous_bytes() < _HEADROOM:
        progress(f"quality: not measured under a --memory-limit of {limit / 2**30:.2f} GiB")
        return None
    longest = min(most_tokens(planned.model), generation.max_context)
    samples: Sequence[Sample]
    samples, data = held_out_samples(planned.checkpoint, generation, longest), "held-out text"
    if not samples:
        samples, data = (
            (evenly(planned.samples, _SAMPLES), "the calibration data")
            if planned.samples
            else (_of_prompts(planned), "the bundle's prompts")
        )
    if not samples:
        return None
    progress(f"quality: {len(samples)} pieces of {data} through the original and the quantized weights")
    quantized = open_checkpoint(str(run.path / CHECKPOINT))
    try:
        kl, top1, positions = agreement_under(source.over(samples), _values_of(quantized, ids_of(generation, samples)))
    except UserError as error:
        progress(f"quality: not measured ({error})")
        return None
    loss = RoundingLoss(kl, top1, positions, data, planned.plan.calibration is not None, generation.task == "embed")
    if loss.vectors:
        if not loss.calibrated and not kl < _MUCH_TURNED:
            progress(
                f"warning: rounding without data turns this model's vectors to a cosine of {1 - kl:.4f}; give "
                "--calibration FILE, a text like what it will read, or more --bits"
            )
        return loss
    if not loss.calibrated and not kl < _MUCH:
        progress(
            f"warning: rounding without data costs this model {kl:.2f} nats a token, and {1 - top1:.0%} of its best tokens change; "
            "give --calibration FILE, a text like what it will read, or more --bits"
        )
    return loss


def _of_prompts(planned: Planned) -> list[Sample]:
    """A few of the bundle's prompts: of an encoder-decoder the first decoded position alone is compared."""
    generation = planned.generation
    start = () if generation.decoder_start is None else (generation.decoder_start, *generation.forced)
    contexts = planned.contexts or [[]] * len(planned.prompts)
    samples = [Sample(tuple(p), start, tuple(c)) for p, c in zip(planned.prompts, contexts, strict=True)]
    return evenly(samples, _SAMPLES)


def _values_of(quantized: Checkpoint, used: torch.Tensor) -> WeightTransform:
    """The values of a quantized checkpoint in place of the original's; of a table only the rows of the ids `used`."""

    def transform(name: str, module: nn.Module, value: torch.Tensor) -> torch.Tensor:
        if not quantized.has(name + CODES):
            return quantized.tensor(name) if quantized.has(name) else value
        rows, columns = value.shape
        codes, scales, bits, group = quantized_parts(quantized, name, (rows, columns))
        if not isinstance(module, Embedding):
            return dequantize(codes, scales, bits, group)
        table = torch.empty(value.shape)  # untouched pages take no memory
        table[used] = dequantize(codes[used], scales[used], bits, group)
        return table

    return transform
