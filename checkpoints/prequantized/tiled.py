"""Weights of a byte a value that are multiplied by scales: one for all, for each row, for groups of columns, or for blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .bits import scaled
from .block import MOST_GROUP, Block
from .parts import FLOAT8, FLOATS, Parts, Weight

_SCALES = (*FLOATS, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Tiling:
    """What each scale covers: so many rows and columns; 0 for all of them."""

    rows: int
    columns: int

    def shape(self, out: int, width: int) -> tuple[int, int]:
        """Scales of a weight [out, width]."""
        return (-(-out // (self.rows or out)), -(-width // (self.columns or width)))


def block_sizes(block: Block, key: str) -> Tiling | None:
    """Two sizes of a block; None where there are none."""
    sizes = block.values.get(key)
    if sizes is None:
        return None
    whole = isinstance(sizes, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in sizes)
    if not whole or len(sizes) != 2 or not all(0 < n <= MOST_GROUP for n in sizes):
        raise block.error(key, f"expected two sizes of 1 to {MOST_GROUP}")
    return Tiling(*sizes)


def times_scales(
    parts: Parts,
    leaf: str,
    dtypes: Sequence[torch.dtype],
    tilings: Sequence[Tiling],
    zero_points: bool = False,
) -> Weight:
    """`weight` times the scales in `leaf`, of which one of the tilings fits. zero_points: `weight_zero_point` is subtracted."""
    scales = _Scales.of(parts, leaf, dtypes, tilings, zero_points)

    def rows(start: int, stop: int) -> torch.Tensor:
        return scaled(parts.read("weight")[start:stop], *scales.of_rows(start, stop), scales.columns)

    return parts.weight(scales.shape, f"scaled {scales.height} {scales.columns}", rows)


def to_be_rounded(parts: Parts, kind: str, bits: int, tilings: Sequence[Tiling], zero_points: bool) -> Weight:
    """A float `weight` rounded to `weight_scale`, in its own dtype as compressed-tensors does whenever it computes.

    kind: "int" for codes of `bits` bits, or "float" for FP8.
    """
    scales = _Scales.of(parts, "weight_scale", FLOATS, tilings, zero_points)

    def rows(start: int, stop: int) -> torch.Tensor:
        weight = parts.read("weight")[start:stop]
        own, zeros = scales.of_rows(start, stop)
        columns = torch.arange(weight.shape[1]) // scales.columns
        codes = weight / own.to(weight.dtype)[:, columns]
        if zeros is not None:
            codes += zeros.to(weight.dtype)[:, columns]
        if kind == "float":
            codes = codes.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        else:
            codes = codes.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1).round().to(torch.int16)
        return scaled(codes, own, zeros, scales.columns)

    return parts.weight(scales.shape, f"rounded {kind} {bits} {scales.height} {scales.columns}", rows)


@dataclass(frozen=True)
class _Scales:
    """Where a weight's scales and zero points are. height, columns: what each covers. grid: how many there are."""

    parts: Parts
    leaves: tuple[str, ...]
    shape: tuple[int, int]
    grid: tuple[int, int]
    height: int
    columns: int

    @staticmethod
    def of(
        parts: Parts, leaf: str, dtypes: Sequence[torch.dtype], tilings: Sequence[Tiling], zero_points: bool
    ) -> _Scales:
        out, width = parts.take("weight", dtypes, (None, None)).shape
        allowed: dict[tuple[int, ...], Tiling] = {}
        for tiling in tilings:
            for shape in written(tiling.shape(out, width)):
                allowed.setdefault(shape, tiling)
        shape = parts.take(leaf, _SCALES, *allowed).shape
        if zero_points:
            parts.take("weight_zero_point", (torch.int8, *FLOAT8, *FLOATS), shape)
        tiling = allowed[shape]
        leaves = (leaf, "weight_zero_point") if zero_points else (leaf,)
        height, columns = min(tiling.rows or out, out), min(tiling.columns or width, width)
        return _Scales(parts, leaves, (out, width), tiling.shape(out, width), height, columns)

    def of_rows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zero points of rows start..stop, float32 [stop - start, groups]."""
        row = torch.arange(start, stop) // self.height
        values = [self.parts.read(leaf).reshape(self.grid)[row].float() for leaf in self.leaves]
        return values[0], values[1] if len(values) > 1 else None


def written(grid: tuple[int, int]) -> list[tuple[int, ...]]:
    """The shapes that scales of a grid are stored in."""
    if grid == (1, 1):
        return [(), (1,), (1, 1)]
    return [grid, grid[:1]] if grid[1] == 1 else [grid]
