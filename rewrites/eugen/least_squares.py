"""Ridge regression from sums over rows, so that no features are kept."""

from __future__ import annotations

import torch

CHUNK = 4096
"""Rows of activations worked on at once."""

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Multiples of the mean square of a feature."""


class Sums:
    """Z'Z, Z'Y and |Y|^2 over rows, in float64; Z has the constant 1 as its first column."""

    def __init__(self, features: int, outputs: int) -> None:
        self.zz = torch.zeros(features, features, dtype=torch.float64)
        self.zy = torch.zeros(features, outputs, dtype=torch.float64)
        self.yy, self.rows = 0.0, 0

    def add(self, z: torch.Tensor, y: torch.Tensor) -> None:
        """Rows z [N, features] and y [N, outputs]: a chunk is summed in float32, the chunks in float64."""
        self.zz += z.T @ z
        self.zy += z.T @ y
        self.yy += float(y.double().square().sum())
        self.rows += len(z)

    def error(self, weights: torch.Tensor) -> float:
        """|Y - Z weights| / |Y| over the rows added (Frobenius)."""
        fitted = float((weights * self.zy).sum()), float((weights * (self.zz @ weights)).sum())
        squared = max(0.0, self.yy - 2 * fitted[0] + fitted[1])
        return float((squared / max(self.yy, 1e-300)) ** 0.5)


def solve(zz: torch.Tensor, zy: torch.Tensor, ridge: float) -> torch.Tensor:
    """(Z'Z + eps I)^-1 Z'Y in float64 on features scaled to mean square 1; the first feature, the constant, is free."""
    scale = zz.diagonal().clamp(min=1e-300).rsqrt()
    penalty = torch.full_like(scale, ridge)
    penalty[0] = 0.0
    gram = zz * scale * scale.unsqueeze(1) + torch.diag(penalty + 1e-9)  # sums in float32 are no more exact
    return torch.cholesky_solve(zy * scale.unsqueeze(1), torch.linalg.cholesky(gram)) * scale.unsqueeze(1)
