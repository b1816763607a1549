"""What a choice of bits costs the model, from how its likelihood curves over a weight.

Near the original the Kullback-Leibler divergence of a model is half a quadratic form of the error of its weights, the Fisher
information. Of a weight [N, K] it is kept as a Kronecker product (arXiv 1503.05671, 1802.09568): a number for each output
and a matrix over the inputs, both from the weight's gradients over whole windows. So an error that adds up from token to token,
as in keys and values, counts as it does in the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..ops.packing import period
from ..quant.gptq import quantize_gptq
from ..quant.hessian import Factor
from ..quant.plan import UNQUANTIZED, Choice
from ..quant.rtn import effective_group, quantize_rtn

SAMPLED_ROWS = 256
"""Rows of a weight that are really quantized to predict its loss."""


@dataclass(frozen=True, eq=False)
class Curvature:
    """How the likelihood of one token curves over one use of a weight [N, K].

    rows: fp32 [N]. inputs: fp32 [K, K] of trace 1. An error D of the weight costs half of
    `sum_i rows[i] * D[i] @ inputs @ D[i]` nats a token.
    """

    rows: torch.Tensor
    inputs: torch.Tensor


class Gradients:
    """The sums that a `Curvature` is made of, over the gradients of one use of a weight."""

    def __init__(self, rows: int, columns: int) -> None:
        self._rows, self._inputs = torch.zeros(rows), torch.zeros(columns, columns)

    def add(self, gradient: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Add a window's gradient of its log-likelihood, [N, K]; or only the rows [R, K] that are not zero, at `rows` [R]."""
        squares = gradient.square().sum(1)
        if rows is None:
            self._rows += squares
        else:
            self._rows.index_add_(0, rows, squares)
        self._inputs.addmm_(gradient.T, gradient)

    def curvature(self, tokens: int) -> Curvature | None:
        """The curvature a token; None where no gradient came, or it was zero or not finite. Afterwards the sums are of no use."""
        total = float(self._rows.double().sum())
        if not 0.0 < total < float("inf") or tokens < 1:
            return None
        return Curvature(self._rows.div_(tokens), self._inputs.div_(total))


def quadratic(errors: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """`D[i] @ inputs @ D[i]` of each row of `errors` [R, K], never negative: fp64 [R]."""
    return ((errors @ inputs) * errors).double().sum(1).clamp_(min=0.0)


class WeightLosses:
    """Predicted losses, in nats a token, of one weight at any choice; each is computed once.

    weight: [N, K] in any float dtype, best a mapped view: some rows are read. uses: the curvature of each use of it, such as
    lookup and head. factor: what GPTQ would work with; None where no data reached the weight. count: rows that are really
    quantized. signed: whether scales may be negative.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        uses: Sequence[Curvature],
        factor: Factor | None = None,
        count: int = SAMPLED_ROWS,
        signed: bool = False,
    ) -> None:
        self._factor, self._columns, self._signed = factor, int(weight.shape[1]), signed
        self._samples = [_sample(weight, use, count) for use in uses]
        self._known: dict[tuple[int, int, str], float] = {}

    def at(self, choice: Choice) -> float | None:
        """The loss at `choice`; None for GPTQ without a factor, and for codes that do not pack so many inputs."""
        by_gptq = choice.quantizer == "gptq"
        if by_gptq and (self._factor is None or choice.bits == UNQUANTIZED):
            return None
        if choice.bits != UNQUANTIZED and self._columns % period(choice.bits):
            return None
        group = self._columns if choice.bits == UNQUANTIZED else effective_group(self._columns, choice.group_size)
        key = (choice.bits, group, choice.quantizer)
        if key not in self._known:
            self._known[key] = sum(
                float((shares * quadratic(self._rounded(rows, *key) - rows, inputs)).sum())
                for rows, inputs, shares in self._samples
            )
        return self._known[key]

    def _rounded(self, rows: torch.Tensor, bits: int, group: int, quantizer: str) -> torch.Tensor:
        if bits == UNQUANTIZED:
            return rows.to(torch.bfloat16).to(torch.float32)
        if quantizer == "gptq":
            assert self._factor is not None
            return quantize_gptq(rows, self._factor, bits, group, self._signed).dequantize()
        return quantize_rtn(rows, bits, group, self._signed).dequantize()


def _sample(weight: torch.Tensor, use: Curvature, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [R, K], the curvature over inputs, and the share that each row's error counts with, fp64 [R].

    Rows are drawn evenly along their share of what the weight itself would cost.
    """
    size = torch.cat([part.float().square().sum(1) for part in torch.split(weight, 1 << 14)])
    mass = use.rows.double() * size.double()
    total = float(mass.sum())
    if len(mass) <= count or total <= 0.0:
        return weight.to(torch.float32), use.inputs, use.rows.double() / 2
    steps = (torch.arange(count, dtype=torch.float64) + 0.5) / count * total
    chosen = torch.searchsorted(mass.cumsum(0), steps).clamp_(max=len(mass) - 1)
    shares = total / count / size[chosen].double() / 2
    return weight[chosen].to(torch.float32), use.inputs, shares
