"""GPTQ: rounding that knows the inputs, from a weight and the Hessian of its inputs.

There are three steps, each on many rows at once. Scales are searched group by group. Inputs are rounded one after the other, and
each corrects the errors of those before it (arXiv 2210.17323). Scales of contiguous groups are fixed before, so the order of
rounding does not depend on the stored layout. Then sweeps over the groups change a scale, and a code, wherever that lowers the
output error while everything else stays (codes: arXiv 2309.01885).
"""

from __future__ import annotations

import torch

from ..ops.packing import pack, packed_bytes
from .hessian import Factor, damping_for, factor
from .tensor import LARGEST_SCALE, QuantizedTensor, canonical, sides

__all__ = ["Factor", "damping_for", "factor", "hessian_error", "quantize_gptq", "row_block"]

FEWEST_ROWS, MOST_ROWS = 256, 1024
"""Rows worked on at once, about. With few rows the calls take more time than their work."""

BLOCK_WEIGHTS = 3 << 20
"""Weights worked on at once, unless that is fewer than FEWEST_ROWS: about 100 MB of scratch memory."""

COLUMN_BLOCK = 128
"""Inputs rounded between two matrix products that carry their errors on."""

SWEEPS = 2
"""Sweeps over scales and codes; more of them win little for their time."""

GRID_STEPS = 16
"""Candidate scales per group, spaced geometrically; the sweeps find the last few percent."""

_SMALLEST_FRACTION = {2: 0.2, 3: 0.3, 4: 0.45, 5: 0.6, 6: 0.75, 8: 0.9}
"""Where the grid begins, as a fraction of the scale that clips nothing."""

_LARGEST_FRACTION = 1.25
_REFINEMENTS = 2


def row_block(rows: int, columns: int) -> int:
    """How many rows of a weight [rows, columns] are worked on at once, a multiple of 32.

    A weight of more than FEWEST_ROWS is in two blocks at least, so that threads can share it.
    """
    most = max(FEWEST_ROWS, min(MOST_ROWS, BLOCK_WEIGHTS // columns))
    blocks = 1 if rows <= FEWEST_ROWS else 2 * -(-rows // (2 * most))
    return -(-rows // (32 * blocks)) * 32


def quantize_gptq(
    weight: torch.Tensor, factor: Factor, bits: int, group_size: int, signed: bool = False, block: int | None = None
) -> QuantizedTensor:
    """Quantize `weight`, [N, K] of any float dtype, to codes of `bits` bits with one scale per `group_size` inputs.

    factor: of the Hessian of the weight's inputs. `group_size` divides K (K itself: one scale per output channel). signed:
    scales may be negative. block: rows worked on at once, always as many (padded with zeros): a matrix product may differ in
    its last bits with the number of rows. With the same block a row's result depends on that row and the factor alone, so a
    matrix may be given in row chunks; multiples of `block` waste nothing. Scratch memory is about 8 * block * K floats. The
    caller has refused NaN and infinities. Raises ValueError when the group does not divide K, a row of codes does not fill
    whole bytes, or the factor is of another number of inputs.
    """
    rows, columns = weight.shape
    if group_size < 1 or columns % group_size:
        raise ValueError(f"group size {group_size} does not divide the {columns} inputs")
    if len(factor.order) != columns:
        raise ValueError(f"the factor is of {len(factor.order)} inputs, the weight has {columns}")
    block = block or row_block(rows, columns)
    packed = torch.empty((rows, packed_bytes(columns, bits)), dtype=torch.uint8)
    scales = torch.empty((rows, columns // group_size), dtype=torch.bfloat16)
    # no scale reaches larger weights: they are clipped either way, and so every product below is finite
    reach = LARGEST_SCALE * (1 << (bits - 1))
    held = torch.empty((columns, block))
    with torch.no_grad():
        for start in range(0, rows, block):
            stop = min(start + block, rows)
            held.zero_()[:, : stop - start] = weight[start:stop].T
            codes, steps = _quantize_block(held.clamp_(-reach, reach), factor, bits, group_size, signed)
            unsigned = codes[:, : stop - start].add(1 << (bits - 1)).to(torch.uint8)
            packed[start:stop] = pack(unsigned.T.contiguous(), bits)
            scales[start:stop] = steps[:, : stop - start].T
    return QuantizedTensor(packed, scales, bits, group_size, (rows, columns))


def hessian_error(weight: torch.Tensor, quantized: QuantizedTensor, hessian: torch.Tensor) -> torch.Tensor:
    """The mean squared output error a token of each row, fp32 [N]: (w - q) H (w - q)^T with H fp32 [K, K].

    weight: [N, K] of any float dtype, the original of `quantized`. Raises ValueError when the shapes differ.
    """
    if tuple(weight.shape) != quantized.shape:
        raise ValueError(f"the weight has shape {tuple(weight.shape)}, its codes {quantized.shape}")
    errors = weight.to(torch.float32) - quantized.dequantize()
    return (errors @ hessian).mul_(errors).sum(dim=1).clamp_min_(0.0)


def _quantize_block(
    weight: torch.Tensor, factor: Factor, bits: int, group_size: int, signed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, fp32 [K, R], and scales, fp32 [G, R], of `weight`, fp32 [K, R]: a row's values lie in a column here."""
    columns, rows = weight.shape
    importance = torch.empty(columns)
    importance[factor.order] = factor.weights
    groups, shares = weight.view(-1, group_size, rows), importance.view(-1, group_size, 1)
    if signed:
        side = sides(groups, bits, 1)
        scales = _search_scales(groups * side, shares, bits).mul_(side.squeeze(1))
    else:
        scales = _search_scales(groups, shares, bits)
    codes = _round_in_order(weight, scales, factor, bits)
    errors = weight - (codes.view(-1, group_size, rows) * scales[:, None]).view(columns, rows)
    for _ in range(SWEEPS):
        _sweep(codes, scales, errors, factor, bits)
    return codes, scales


def _search_scales(groups: torch.Tensor, importance: torch.Tensor, bits: int) -> torch.Tensor:
    """The best of a grid of canonical scales, fp32 [G, R], of `groups` [G, group, R].

    Best is the least sum of squared errors times `importance`, [G, group, 1]. An input's error costs what no later
    input can correct, so its importance is that of the factor, not the diagonal of H.
    """
    reach = float((1 << (bits - 1)) - 1)
    absmax = groups.abs().amax(dim=1, keepdim=True)
    low = _SMALLEST_FRACTION[bits]
    best = canonical(absmax / reach)
    codes = _nearest(groups / best, bits)
    error = (codes * best).sub_(groups).square_().mul_(importance).sum(dim=1, keepdim=True)
    for i in range(GRID_STEPS + _REFINEMENTS):
        if i < GRID_STEPS:
            candidate = canonical(absmax * (low * (_LARGEST_FRACTION / low) ** (i / (GRID_STEPS - 1)) / reach))
        else:  # least squares for the codes that the best scale gives
            codes = _nearest(torch.div(groups, best, out=codes), bits)
            weighted = codes * importance
            energy = codes.mul_(weighted).sum(dim=1, keepdim=True)
            fit = weighted.mul_(groups).sum(dim=1, keepdim=True)
            candidate = canonical(torch.where(energy > 0.0, fit / energy, best))
        codes = _nearest(torch.div(groups, candidate, out=codes), bits)
        tried = codes.mul_(candidate).sub_(groups).square_().mul_(importance).sum(dim=1, keepdim=True)
        wins = tried < error
        best, error = torch.where(wins, candidate, best), torch.where(wins, tried, error)
    return best.squeeze(1)


def _round_in_order(weight: torch.Tensor, scales: torch.Tensor, factor: Factor, bits: int) -> torch.Tensor:
    """The codes, fp32 [K, R], of `weight` [K, R] under `scales` [G, R], errors fed back in the factor's order."""
    columns = len(weight)
    group = columns // len(scales)
    codes = torch.empty_like(weight)
    errors = torch.empty_like(weight)  # in the factor's order
    order = factor.order.tolist()
    inverse = scales.reciprocal()
    for stop in range(columns, 0, -COLUMN_BLOCK):
        start = max(0, stop - COLUMN_BLOCK)
        original = weight[factor.order[start:stop]]
        target = original.clone()
        if stop < columns:
            target.addmm_(factor.feedback[stop:, start:stop].T, errors[stop:])
        for i in range(stop - start - 1, -1, -1):
            column = order[start + i]
            code = _nearest(torch.mul(target[i], inverse[column // group], out=codes[column]), bits)
            error = torch.addcmul(original[i], code, scales[column // group], value=-1.0, out=errors[start + i])
            target[:i].addr_(factor.feedback[start + i, start : start + i], error)
    return codes


def _sweep(codes: torch.Tensor, scales: torch.Tensor, errors: torch.Tensor, factor: Factor, bits: int) -> None:
    """Lower e H e^T (H damped) of every row, in place: group by group its scale, then its codes one by one.

    codes, errors (weight - codes * scales): fp32 [K, R]. scales: fp32 [G, R].
    """
    size = len(codes) // len(scales)
    for g in range(len(scales)):
        inputs = slice(g * size, (g + 1) * size)
        code, error = codes[inputs], errors[inputs]
        hessian = factor.hessian[inputs, inputs]
        slope = torch.mm(factor.hessian[inputs], errors).add_(error, alpha=factor.damping)  # half the gradient
        scales[g] = _move_scale(code, scales[g], error, slope, hessian, factor.damping)
        for start in range(0, size, COLUMN_BLOCK):
            part = slice(start, min(start + COLUMN_BLOCK, size))
            before = error[part].clone()
            _move_codes(code[part], scales[g], error[part], slope[part], hessian[part, part], factor.damping, bits)
            if part.stop < size:
                slope[part.stop :].addmm_(hessian[part.stop :, part], error[part] - before)


def _move_scale(
    code: torch.Tensor,
    scale: torch.Tensor,
    error: torch.Tensor,
    slope: torch.Tensor,
    hessian: torch.Tensor,
    damping: float,
) -> torch.Tensor:
    """The best canonical scale [R], of the same sign, of a group for its codes [group, R]; `error` and `slope` follow in place."""
    turn = torch.mm(hessian, code).add_(code, alpha=damping)
    curvature = (code * turn).sum(dim=0)
    descent = (code * slope).sum(dim=0)
    sign = scale.sign()
    moved = canonical(torch.where(curvature > 0.0, scale + descent / curvature, scale).mul_(sign)).mul_(sign)
    change = moved - scale
    moved = torch.where(change * (2.0 * descent - change * curvature) > 0.0, moved, scale)
    change = moved - scale
    error.addcmul_(code, change, value=-1.0)
    slope.addcmul_(turn, change, value=-1.0)
    return moved


def _move_codes(
    code: torch.Tensor,
    scale: torch.Tensor,
    error: torch.Tensor,
    slope: torch.Tensor,
    hessian: torch.Tensor,
    damping: float,
    bits: int,
) -> None:
    """Each code in turn to its best integer, all others fixed: code, error, slope [block, R] change in place."""
    inverse = scale.reciprocal()
    for i, curvature in enumerate(hessian.diagonal().add(damping).tolist()):
        best = _nearest(torch.addcmul(code[i], slope[i], inverse, value=1.0 / curvature), bits)
        change = (code[i] - best).mul_(scale)
        code[i] = best
        error[i] += change
        slope[i + 1 :].addr_(hessian[i + 1 :, i], change)


def _nearest(steps: torch.Tensor, bits: int) -> torch.Tensor:
    """`steps`, in place, to the nearest codes."""
    limit = 1 << (bits - 1)
    return steps.round_().clamp_(-limit, limit - 1)
