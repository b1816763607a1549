"""How much a layer matters: LIM and ZD of "Layer-wise quantization" (arXiv 2406.17415).

LIM reads what a layer does to its input, for which it needs calibration text; ZD reads the layer's weights alone. Both give an
order of the layers, and the paper lowers the least important first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction

import torch

from ..errors import UserError

METHODS = ("lim", "zd")

CHUNK_WEIGHTS = 1 << 17
"""Weights that `zd` converts to fp64 at once, 1 MiB: large pieces leave holes in the heap."""

WEIGHT_RANGE = 16.0
"""The most important layer's error counts this many times the least important one's: two bits (4x in error each)."""


class LimAccumulator:
    """LIM of one layer over many batches: minus the mean over tokens of cos(x_in, x_out). Higher = more important."""

    def __init__(self) -> None:
        self._total = 0.0
        self._tokens = 0

    def update(self, x_in: torch.Tensor, x_out: torch.Tensor) -> None:
        """Add the tokens of a batch; x_in, x_out: the layer's input and output, [tokens, hidden] (or [..., hidden]).

        Padding must have been removed. Raises ValueError when the shapes differ.
        """
        if x_in.shape != x_out.shape:
            raise ValueError(f"layer input {tuple(x_in.shape)} and output {tuple(x_out.shape)} differ in shape")
        before = x_in.detach().reshape(-1, x_in.shape[-1]).double()
        after = x_out.detach().reshape(-1, x_out.shape[-1]).double()
        self._total += float(torch.nn.functional.cosine_similarity(before, after, dim=1).sum())
        self._tokens += len(before)

    def value(self) -> float:
        """LIM in [-1, 1]. Raises UserError before any token was seen or when activations were not finite."""
        if not self._tokens:
            raise UserError("LIM needs calibration tokens, and the calibration text gave none; give a longer text")
        if not math.isfinite(self._total):
            raise UserError("LIM: the model's activations are not finite on the calibration text; try --importance zd")
        return -self._total / self._tokens


def lim(x_in: torch.Tensor, x_out: torch.Tensor) -> float:
    """LIM of a layer from one batch: -cos(x_in, x_out) averaged over tokens, [tokens, hidden] each."""
    accumulator = LimAccumulator()
    accumulator.update(x_in, x_out)
    return accumulator.value()


def zd(weights: Iterable[torch.Tensor], two_sided: bool = False) -> float:
    """ZD of a layer: the fraction of all its weights with a z-score above 1. LOWER = more important.

    weights: all the layer's matrices (any shapes and float dtypes, best memory-mapped views: they are read twice, in
    chunks); mean and standard deviation are over all of them together, in fp64. two_sided: count |z| > 1, as public
    re-implementations do; the paper's abstract reads one-sided. Raises ValueError when there are no weights.
    """
    matrices = [weight.detach() for weight in weights]
    count, mean, spread = 0, 0.0, 0.0  # spread: sum of squared deviations, merged chunk by chunk (Chan et al.)
    for chunk in _chunks(matrices):
        size = chunk.numel()
        chunk_mean = float(chunk.mean())
        shift = chunk_mean - mean
        spread += float((chunk - chunk_mean).square_().sum()) + shift * shift * count * size / (count + size)
        count += size
        mean += shift * size / count
    if not count:
        raise ValueError("ZD of a layer without weights")
    deviation = math.sqrt(spread / count)
    if deviation == 0.0:
        return 0.0
    beyond = 0
    for chunk in _chunks(matrices):
        distance = chunk.sub_(mean)
        beyond += int(((distance.abs_() if two_sided else distance) > deviation).sum())
    return beyond / count


def order_by_importance(scores: Mapping[int, float], method: str) -> list[int]:
    """The layers of `scores` (layer index -> LIM or ZD), most important first; ties keep the earlier layer first.

    Raises UserError for an unknown method or a score that is not finite.
    """
    if method not in METHODS:
        raise UserError(f"unknown importance method {method!r}; choose from {', '.join(METHODS)}")
    for layer, score in scores.items():
        if not math.isfinite(score):
            raise UserError(f"layer {layer} has {method} score {score}; its weights or activations are not finite")
    sign = -1.0 if method == "lim" else 1.0
    return sorted(scores, key=lambda layer: (sign * scores[layer], layer))


def importance_weights(scores: Mapping[int, float], method: str) -> dict[int, float]:
    """Positive weights for the allocator from LIM or ZD scores: log-linear in rank, 1 (least) to 16 (most important).

    Only the order of the scores counts, as in the paper: with two widths and layers of equal size, the allocator's
    exact optimum is the paper's split. A lone layer gets the middle, 4. Raises UserError as `order_by_importance` does.
    """
    order = order_by_importance(scores, method)
    if len(order) == 1:
        return {order[0]: math.sqrt(WEIGHT_RANGE)}
    return {layer: WEIGHT_RANGE ** (1.0 - rank / (len(order) - 1)) for rank, layer in enumerate(order)}


def paper_split(n_layers: int, m_high: float, m_low: float, m: float) -> int:
    """N_high, the number of layers that keep `m_high` bits for an average of `m`: floor((m-m_low)/(m_high-m_low)*N).

    Averages are counted over layers, and decimals are taken as written (4.1 is 41/10). Raises UserError unless
    m_low < m_high and m_low <= m <= m_high.
    """
    high, low, average = (Fraction(str(value)) for value in (m_high, m_low, m))
    if not low < high or not low <= average <= high:
        raise UserError(f"an average of {m} bits is not between the low {m_low} and the high {m_high}")
    return math.floor((average - low) / (high - low) * n_layers)


def _chunks(matrices: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    for matrix in matrices:
        flat = matrix.reshape(-1)
        for start in range(0, flat.numel(), CHUNK_WEIGHTS):
            # copy: a weight that is fp64 already must not be changed in place by whoever takes the chunk
            yield flat[start : start + CHUNK_WEIGHTS].to(torch.float64, copy=True)
