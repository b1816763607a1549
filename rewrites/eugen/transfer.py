"""One feed-forward block into an EUGen by least squares on its inputs, no backpropagation.

The paper's layer-wise transfer: W* = (Z'Z + eps I)^-1 Z'Y with Z = f(X), Y = block(X). For a gated block the features
stand for the whole map from x to its output, gate, product and down projection together, so W* is the merged `out`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import UserError
from ...models.eugen import EUGen
from ...models.layers.mlp import GatedMLP
from .directions import directions
from .features import fill
from .least_squares import CHUNK, RIDGES, Sums, solve

TRAIN, TUNE, HELD = 0, 1, 2


@dataclass(frozen=True)
class Fit:
    """error: |Y - Y'| / |Y| over the held-out rows (Frobenius). ridge: the chosen multiple. rows: fitted on."""

    error: float
    ridge: float
    rows: int


def transfer(
    block: GatedMLP, x: torch.Tensor, part: torch.Tensor, layer: EUGen, g: str, seed: int, dtype: torch.dtype
) -> Fit:
    """Choose the G of `layer`, fit its `out` to `block` on the rows x [N, hidden], and fill it with float32 parameters.

    part: [N], TRAIN, TUNE (to choose the ridge) or HELD for each row. g: "block" or "random". The values are those of `dtype`; G is
    rounded before the fit, which so corrects the stored values. Raises UserError if activations are not finite, or a part has no
    rows.
    """
    generator = torch.Generator().manual_seed(seed)
    size, outputs = layer.size, layer.out.weight.shape[0]
    matrices = directions(g, block, size, x[part == TRAIN], generator).float()
    fill(layer, matrices, torch.zeros(outputs, size.k * size.m), torch.zeros(outputs))
    layer.to(dtype).to(torch.float32)  # in place
    parts = tuple(Sums(1 + size.k * size.m, outputs) for _ in (TRAIN, TUNE, HELD))
    for rows, labels in zip(torch.split(x, CHUNK), torch.split(part, CHUNK), strict=True):
        z, y = layer.expand(rows), block(rows)
        if not (bool(torch.isfinite(z).all()) and bool(torch.isfinite(y).all())):
            raise UserError("the model's activations are not finite on the calibration text; is the checkpoint whole?")
        z = torch.cat([z.new_ones(len(z), 1), z], 1)
        for which, sums in enumerate(parts):
            chosen = labels == which
            sums.add(z[chosen], y[chosen])
    train, tune, held = parts
    if not all(sums.rows for sums in parts):
        raise UserError("too little calibration text for a rewrite; give more")
    ridge, weights = min(((r, solve(train.zz, train.zy, r)) for r in RIDGES), key=lambda pair: tune.error(pair[1]))
    fill(layer, matrices, weights[1:].T.float(), weights[0].float())
    layer.to(dtype).to(torch.float32)
    return Fit(held.error(weights.to(dtype).double()), ridge, train.rows)
