"""Round to nearest: a weight to codes and canonical scales, without data.

Each group's scale is searched: a grid of canonical scales is tried, the best is refined by least squares for its own codes, then
its neighbours are tried. The least squared error wins. The scale of the largest weight (absmax) is among the candidates, so no
group is worse than with it.
"""

from __future__ import annotations

from math import gcd

import torch

from ..ops.packing import pack, packed_bytes
from .tensor import QuantizedTensor, canonical, sides

CHUNK_WEIGHTS = 1 << 20
"""Weights worked on at once (or one row, if longer). With short calls, threads wait for the interpreter."""

GRID_STEPS = 10
"""Candidate scales per group in the coarse grid, spaced geometrically; more cost time and lower the error little."""

NEIGHBOURS = 2
"""Canonical scales tried on either side of the best one: with 5 to 8 bits the error is not smooth in the scale."""

_SMALLEST_FRACTION = {2: 0.1, 3: 0.2, 4: 0.4, 5: 0.6, 6: 0.8, 8: 0.9}
"""Where the grid begins, as a fraction of the absmax scale: the fewer codes, the more clipping pays."""

_LARGEST_FRACTION = 1.1
"""Where the grid ends: a scale above absmax's sometimes meets the large weights better."""

_REFINEMENTS = 2
_BFLOAT16_STEP = 2.0**-7
_TORCH_GRAIN = 32768


def quantize_rtn(weight: torch.Tensor, bits: int, group_size: int, signed: bool = False) -> QuantizedTensor:
    """Quantize `weight`, [N, K] of any float dtype, to codes of `bits` bits with one scale per `group_size` inputs.

    `group_size` divides K (K itself: one scale per output channel). signed: scales may be negative. A row's result depends
    on that row alone, so a matrix may be given in row chunks. Scratch memory is about 24 MB; the caller has refused NaN and
    infinities. With more than one torch thread the small operations mostly wait for each other: give row chunks to threads, as
    `quantize_checkpoint` does. Raises ValueError when the group does not divide K or a row of codes does not fill whole bytes.
    """
    rows, columns = weight.shape
    if group_size < 1 or columns % group_size:
        raise ValueError(f"group size {group_size} does not divide the {columns} inputs")
    codes = torch.empty((rows, packed_bytes(columns, bits)), dtype=torch.uint8)
    scales = torch.empty((rows, columns // group_size), dtype=torch.bfloat16)
    step = max(1, CHUNK_WEIGHTS // columns)
    with torch.no_grad():
        for start in range(0, rows, step):
            chunk = weight[start : start + step].to(torch.float32).contiguous()
            groups = chunk.view(-1, group_size)
            if signed:
                side = sides(groups, bits, 1)
                groups = groups * side
            scale = best_scales(groups, bits)
            unsigned = round_to_codes(groups, scale, bits).add_(1 << (bits - 1)).to(torch.uint8)
            codes[start : start + step] = pack(unsigned.view(len(chunk), columns), bits)
            scales[start : start + step] = (scale * side if signed else scale).view(len(chunk), -1).to(torch.bfloat16)
    return QuantizedTensor(codes, scales, bits, group_size, (rows, columns))


def best_scales(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """The canonical scale of least squared error for each row of `groups`: fp32 [G, group] -> fp32 [G, 1]."""
    reach = float((1 << (bits - 1)) - 1)  # the largest positive code: absmax / reach clips nothing
    absmax = groups.abs().amax(dim=1, keepdim=True)
    scratch = torch.empty_like(groups), torch.empty_like(groups)
    best = canonical(absmax / reach)
    error = _error(groups, best, bits, scratch)
    low = _SMALLEST_FRACTION[bits]
    for i in range(GRID_STEPS):
        fraction = low * (_LARGEST_FRACTION / low) ** (i / (GRID_STEPS - 1))
        best, error = _better(groups, canonical(absmax * (fraction / reach)), best, error, bits, scratch)
    for _ in range(_REFINEMENTS):
        codes = round_to_codes(groups, best, bits, out=scratch[0])
        # argmin over s of |w - s*c|**2 for fixed codes; zero codes leave the scale as it is
        fit = _row_sums(torch.mul(codes, groups, out=scratch[1]))
        energy = _row_sums(codes.square_())
        candidate = canonical(torch.where(energy > 0, fit / energy, best))
        best, error = _better(groups, candidate, best, error, bits, scratch)
    centre = best
    for i in range(1, NEIGHBOURS + 1):
        for step in (-i, i):
            candidate = canonical(centre * (1.0 + step * _BFLOAT16_STEP))
            best, error = _better(groups, candidate, best, error, bits, scratch)
    return best


def round_to_codes(
    groups: torch.Tensor, scale: torch.Tensor, bits: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The nearest signed codes, as fp32 [G, group], of fp32 `groups` [G, group] under `scale` [G, 1]."""
    limit = 1 << (bits - 1)
    out = torch.empty_like(groups) if out is None else out
    return torch.mul(groups, scale.reciprocal(), out=out).round_().clamp_(-limit, limit - 1)


def effective_group(columns: int, wanted: int) -> int:
    """The group size a row of `columns` inputs really gets when `wanted` is asked for; 0 asks for one per channel.

    The largest of (wanted, 64, 32) that is at most `wanted` and divides `columns`; `columns` itself if there is none.
    """
    if wanted < 0:
        raise ValueError(f"group size {wanted} is negative")
    fitting = [size for size in (wanted, 64, 32) if 0 < size <= wanted and columns % size == 0]
    return max(fitting, default=columns)


def _better(
    groups: torch.Tensor,
    candidate: torch.Tensor,
    best: torch.Tensor,
    error: torch.Tensor,
    bits: int,
    scratch: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep, group by group, whichever of `best` and `candidate` has the smaller error (the first on a tie)."""
    tried = _error(groups, candidate, bits, scratch)
    wins = tried < error
    return torch.where(wins, candidate, best), torch.where(wins, tried, error)


def _error(
    groups: torch.Tensor, scale: torch.Tensor, bits: int, scratch: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Squared error of each group, [G, 1], computed in steps and scaled back, so that nothing cancels."""
    steps, codes = scratch
    limit = 1 << (bits - 1)
    torch.mul(groups, scale.reciprocal(), out=steps)
    torch.round(steps, out=codes).clamp_(-limit, limit - 1)
    return _row_sums(steps.sub_(codes).square_()).mul_(scale.square())


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    """[G, group] -> [G, 1]. A row's sum does not depend on the other rows or on the number of threads."""
    if (
        values.shape[1] >= _TORCH_GRAIN
    ):  # torch would split one sum this long over its threads, but not the sums of pieces
        values = values.view(len(values), gcd(values.shape[1], 64), -1).sum(dim=2)
    return values.sum(dim=1, keepdim=True)
