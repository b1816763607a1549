"""The matrices G that a feed-forward block's EUGen projects on, random or taken from the block.

The paper draws G at random, which needs many features: a random product of two projections of a wide input says little of one
particular block. The products of a gated block are its own neurons' act(gate x) * (up x), whose series begins with
(gate x)(up x) and (gate x)^2 (up x). With the rows of the most active neurons as G, a layer of the same size is much nearer to
the block (docs/eugens.md has the measurements).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...models.eugen import EUGen, EUGenSize
from ...models.layers.linear import Linear
from ...models.layers.mlp import GatedMLP
from .features import fill, gaussian_orthogonal
from .least_squares import CHUNK, solve

KINDS = ("block", "random")


def directions(
    kind: str, block: GatedMLP, size: EUGenSize, x: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """The stacked G for `block`, float64 [factors * m, hidden + 2], every projection of mean square 1 on the rows x.

    kind: "random", Gaussian-orthogonal blocks, or "block". x: [N, hidden], inputs of the block. The scale of G is free, as least
    squares correct it; with this one products of three stay within half precision and few 8-bit steps.
    """
    columns = x.shape[1] + 2
    drawn = [gaussian_orthogonal(size.m, columns, columns**-0.5, generator) for _ in range(size.factors)]
    if kind == "block":
        own = _of_block(block, size, x)
        drawn = [torch.cat([rows, rest[len(rows) :]]) for rows, rest in zip(own, drawn, strict=True)]
    return _normalised(torch.cat(drawn), size, x)


def _of_block(block: GatedMLP, size: EUGenSize, x: torch.Tensor) -> list[torch.Tensor]:
    """For each factor at most m rows [·, hidden + 2]: linear directions, then gate (once an order more) and up rows."""
    hidden, outputs = x.shape[1], block.down_proj.weight.shape[0]
    energy = torch.zeros(block.gate_proj.weight.shape[0], dtype=torch.float64)
    xx = torch.zeros(hidden + 1, hidden + 1, dtype=torch.float64)
    xy = torch.zeros(hidden + 1, outputs, dtype=torch.float64)
    for rows in _chunks(len(x)):
        neurons = block.act(block.gate_proj(x[rows])) * block.up_proj(x[rows])
        y, inputs = block.down_proj(neurons), torch.cat([x.new_ones(len(x[rows]), 1), x[rows]], 1)
        energy += neurons.double().square().sum(0)
        xx += inputs.T @ inputs
        xy += inputs.T @ y
    active = (energy * block.down_proj.weight.double().square().sum(0)).argsort(descending=True)[: size.m]
    gate, up = _rows(block.gate_proj, active), _rows(block.up_proj, active)
    first = _linear(xx, xy, size.m)
    factors = [first]
    for order in range(2, size.k + 1):
        factors += [gate] * (order - 1) + [up]
    return factors


def _linear(xx: torch.Tensor, xy: torch.Tensor, m: int) -> torch.Tensor:
    """The m directions that hold most of the best linear fit (reduced-rank regression): [<= m, hidden + 2]."""
    map_ = solve(xx, xy, 1e-3)[1:]
    centred = xx[1:, 1:] - torch.outer(xx[0, 1:], xx[0, 1:]) / xx[0, 0]
    _, vectors = torch.linalg.eigh(map_.T @ centred @ map_)
    rows = (map_ @ vectors[:, -m:]).T.flip(0)
    return torch.cat([rows, rows.new_zeros(len(rows), 2)], 1)


def _rows(linear: Linear, chosen: torch.Tensor) -> torch.Tensor:
    weight = linear.weight[chosen].double()
    bias = weight.new_zeros(len(chosen)) if linear.bias is None else linear.bias[chosen].double()
    return torch.cat([weight, bias.unsqueeze(1), weight.new_zeros(len(chosen), 1)], 1)


def _normalised(matrices: torch.Tensor, size: EUGenSize, x: torch.Tensor) -> torch.Tensor:
    layer = EUGen(x.shape[1], size)
    fill(layer, matrices.float(), torch.zeros(x.shape[1], size.k * size.m), torch.zeros(x.shape[1]))
    squares = torch.zeros(len(matrices), dtype=torch.float64)
    for rows in _chunks(len(x)):
        squares += layer.projections(x[rows]).double().square().sum(0)
    return matrices * (squares / max(1, len(x))).clamp(min=1e-12).rsqrt().unsqueeze(1)


def _chunks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, CHUNK):
        yield slice(start, start + CHUNK)
