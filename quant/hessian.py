"""The Hessian of a linear's inputs, factored once for every linear that shares them.

With H = X^T X / T, the squared output error a token of a row that goes from w to q is (w - q) H (w - q)^T. Factored as
H = L L^T it is a sum over inputs of squares, each of one input's error and those of the inputs after it. In this form one input
after the other can be rounded, with the errors fed back (arXiv 2210.17323; in this form arXiv 2507.18553).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DAMPING = 0.01
"""The least that is added to the diagonal, as a share of its mean, so that the matrix can be factored in fp32."""

MOST_DAMPING = 0.8
"""The most that `damping_for` gives. With more, real correlations count too little."""

DAMPING_TOKENS = 1.5
"""Damping times tokens an input, with which the error on unseen text is least."""

LARGEST = 1e20
"""The largest mean square of an input that is accepted; below it nothing computed from H overflows."""

SMALLEST = 1e-24
"""A matrix of smaller mean squares counts as zero."""


@dataclass(frozen=True, eq=False)
class Factor:
    """What `factor` makes of a Hessian over K inputs; read only.

    hessian: the matrix it was made from, [K, K] fp32, undamped and not copied: it must not change while this is used.
    damping: what the factorisation added to each entry of its diagonal.
    order: int64 [K], the inputs by ascending diagonal. They are rounded from the last to the first, so that those that
    matter most come first and have the most inputs left to correct them.
    feedback: fp32 [K, K], lower triangular with a diagonal of ones, in that order: entry (k, j) is how much of an error
    in input k moves the best value of input j.
    weights: fp32 [K], in that order: what a squared error of each input costs once all later ones are corrected for.
    """

    hessian: torch.Tensor
    damping: float
    order: torch.Tensor
    feedback: torch.Tensor
    weights: torch.Tensor


def damping_for(inputs: int, tokens: int) -> float:
    """The damping for a Hessian over `inputs` inputs that is the mean over `tokens` tokens, for `factor`.

    The fewer tokens there are for each input, the more of what H holds is chance.
    """
    return min(MOST_DAMPING, max(DAMPING, DAMPING_TOKENS * inputs / max(1, tokens)))


def factor(hessian: torch.Tensor, damping: float = DAMPING) -> Factor:
    """Factor `hessian`, fp32 [K, K], symmetric, H = X^T X / T: K^3/3 multiplications and, beside it, K^2 floats.

    damping: what is added to the diagonal, as a share of its mean; raised tenfold until the matrix is numerically
    positive definite. Inputs that are always zero have only the damping on their diagonal and are rounded to nearest;
    so are all, when the whole matrix is zero. Raises ValueError when the matrix is not square fp32, not finite, or has
    a diagonal below zero or above LARGEST.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or hessian.dtype != torch.float32:
        raise ValueError(f"a Hessian must be square and float32, not {tuple(hessian.shape)} {hessian.dtype}")
    diagonal = hessian.diagonal()
    smallest, largest = float(diagonal.min()), float(diagonal.max())
    if not (smallest >= 0.0 and largest <= LARGEST):
        raise ValueError(f"the diagonal of the Hessian goes from {smallest} to {largest}, beyond 0 to {LARGEST}")
    if not bool(torch.isfinite(hessian.sum(dim=1)).all()):
        raise ValueError("the Hessian is not finite")
    mean = float(diagonal.double().mean())
    added = damping * mean if mean > SMALLEST else 1.0
    order = torch.argsort(diagonal, stable=True)
    while True:
        # in place: a symmetric matrix is its own transpose, and LAPACK wants columns contiguous
        lower = hessian[order[:, None], order].T
        lower.diagonal().add_(added)
        flawed = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(lower, out=(lower, flawed))
        if not int(flawed):
            break
        added *= 10.0
    scale = lower.diagonal().clone()
    return Factor(hessian, added, order, lower.div_(scale), scale.square_())
