"""The mathematics of EUGens (arXiv 2601.22563): random features of a dense layer.

With x+ = [x; 1; |x|] and independent random matrices G_ij shared by both sides,

    f(x) = concat over orders i = 0..k of the product over j = 1..i of G_ij x+,   g(W) the same of W's rows w+,

the estimate g(W) f(x) of act(W+ x+) is unbiased for a polynomial act(z) = sum a_i z^i when the entries of G_ij have mean
zero and standard deviation (|a_i| / m)^(1/2i); the sign of a_i goes to the side of g. (This scaling is our own derivation; a Monte
Carlo test checks it.) Other activations are first fitted by a Bernstein polynomial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...models.eugen import EUGen, EUGenSize

Scalar = Callable[[torch.Tensor], torch.Tensor]


def augment(x: torch.Tensor, one: torch.Tensor | float = 1.0, norm: bool = True) -> torch.Tensor:
    """x+ = [x; 1; |x|]: [N, d] -> [N, d + 2]. For weight rows `one` may hold the layer's bias [N].

    norm False puts 0 in the last column, on both sides for an ordinary dense layer: then x+ . w+ = x . w + bias.
    """
    column = torch.as_tensor(one, dtype=x.dtype).expand(len(x)).unsqueeze(1)
    last = x.norm(dim=1, keepdim=True) if norm else torch.zeros_like(column)
    return torch.cat([x, column, last], 1)


def gaussian(rows: int, columns: int, std: float, generator: torch.Generator) -> torch.Tensor:
    """Independent normal entries, float64 [rows, columns]."""
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * std


def gaussian_orthogonal(rows: int, columns: int, std: float, generator: torch.Generator) -> torch.Tensor:
    """Blocks of `columns` rows that are orthogonal to each other, each row distributed as `gaussian`'s: float64 [rows, columns].

    Every estimate has the same mean as with `gaussian`, and less variance.
    """
    blocks = []
    for start in range(0, rows, columns):
        q, r = torch.linalg.qr(gaussian(columns, columns, 1.0, generator))
        q = q * torch.sign(torch.diagonal(r))  # so that Q is uniform over the rotations
        length = gaussian(columns, columns, 1.0, generator).norm(dim=1, keepdim=True)
        blocks.append((q * length)[: rows - start])
    return torch.cat(blocks) * std


@dataclass(frozen=True)
class RandomFeatures:
    """f and g of one draw. factors[i - 1]: the i matrices of order i, each [m, d + 2]; coefficients: a_0 … a_k."""

    coefficients: tuple[float, ...]
    factors: tuple[tuple[torch.Tensor, ...], ...]

    def f(self, x_plus: torch.Tensor) -> torch.Tensor:
        """[N, d + 2] -> [N, 1 + k m]: the constant of order 0, then the orders in turn."""
        constant = x_plus.new_full((len(x_plus), 1), abs(self.coefficients[0]) ** 0.5)
        return torch.cat([constant, *(_product(x_plus, matrices) for matrices in self.factors)], 1)

    def g(self, w_plus: torch.Tensor) -> torch.Tensor:
        """Weight rows [L, d + 2] -> [L, 1 + k m]; g(W) f(x)^T estimates act(W+ x+)."""
        signs = [w_plus.new_full((1,), math.copysign(1.0, self.coefficients[0]))]
        for a, matrices in zip(self.coefficients[1:], self.factors, strict=True):
            signs.append(w_plus.new_full((len(matrices[0]),), math.copysign(1.0, a)))
        return self.f(w_plus) * torch.cat(signs)


def draw(
    coefficients: Sequence[float],
    m: int,
    columns: int,
    generator: torch.Generator,
    matrix: Callable[[int, int, float, torch.Generator], torch.Tensor] = gaussian_orthogonal,
) -> RandomFeatures:
    """Features for the polynomial with `coefficients` a_0 … a_k on x+ of `columns` numbers, m an order."""
    factors = []
    for order, a in enumerate(coefficients[1:], 1):
        std = (abs(a) / m) ** (0.5 / order)
        factors.append(tuple(matrix(m, columns, std, generator) for _ in range(order)))
    return RandomFeatures(tuple(coefficients), tuple(factors))


def bernstein(act: Scalar, degree: int, low: float, high: float) -> list[float]:
    """Coefficients a_0 … a_degree in z of the Bernstein polynomial of `act` on [low, high].

    It converges for every continuous function: |error| <= L (high - low) / (2 sqrt(degree)) with L the Lipschitz
    constant. Raises ValueError for an empty interval or a degree below 1.
    """
    if degree < 1 or not low < high:
        raise ValueError(f"degree {degree} on [{low}, {high}]; at least 1 on a non-empty interval")
    nodes = low + (high - low) * torch.arange(degree + 1, dtype=torch.float64) / degree
    values = act(nodes).tolist()
    total = torch.zeros(degree + 1, dtype=torch.float64)
    rising = torch.tensor([-low, 1.0], dtype=torch.float64) / (high - low)  # t as a polynomial in z
    falling = torch.tensor([high, -1.0], dtype=torch.float64) / (high - low)  # 1 - t
    for v, value in enumerate(values):
        term = torch.ones(1, dtype=torch.float64)
        for factor in [rising] * v + [falling] * (degree - v):
            term = _times(term, factor)
        total += math.comb(degree, v) * value * term
    return [float(a) for a in total]


def closed_form(
    features: RandomFeatures, w_plus: torch.Tensor, following: torch.Tensor, bias: torch.Tensor | None = None
) -> EUGen:
    """The deployed layer of x -> following @ act(W+ x+) + bias, without data: only the G and following @ g(W) are kept.

    w_plus: [L, d + 2]; following: [outputs, L], the linear map after the activation; bias: [outputs].
    """
    merged = following @ features.g(w_plus)
    offset = merged[:, 0] * abs(features.coefficients[0]) ** 0.5
    matrices = torch.cat([matrix for matrices in features.factors for matrix in matrices])
    size = EUGenSize(len(features.factors[0][0]), len(features.factors))
    layer = EUGen(matrices.shape[1] - 2, size, len(following))
    fill(layer, matrices, merged[:, 1:], offset if bias is None else offset + bias)
    return layer


def fill(layer: EUGen, matrices: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Give `layer` its parameters: the stacked G [factors * m, d + 2], and `out` [outputs, k * m] with bias [outputs]."""
    hidden = matrices.shape[1] - 2
    layer.features.weight.data = matrices[:, :hidden].clone()
    layer.features.bias = torch.nn.Parameter(matrices[:, hidden].clone(), requires_grad=False)
    layer.norm_column.data = matrices[:, hidden + 1] * hidden**0.5  # the layer multiplies it with |x| / sqrt(hidden)
    layer.out.weight.data = weight.clone()
    layer.out.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)


def _product(x_plus: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    out = x_plus @ matrices[0].to(x_plus.dtype).T
    for matrix in matrices[1:]:
        out = out * (x_plus @ matrix.to(x_plus.dtype).T)
    return out


def _times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of two polynomials by their coefficients."""
    out = torch.zeros(len(a) + len(b) - 1, dtype=torch.float64)
    for i, value in enumerate(b):
        out[i : i + len(a)] += value * a
    return out
