"""How far what a model says of data moves: of a distribution over tokens in nats, of a vector of a text as 1 - cosine.

Both are a Kullback-Leibler divergence: that of two normal distributions of variance 1 around vectors u and v of length 1 is
|u - v|^2 / 2, which is 1 - cos(u, v). So one measure serves KL, Fisher and the tuning of norms, whatever the model is for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..runtimes.logits import torch_divergence, torch_log_softmax


@dataclass(frozen=True)
class Measure:
    """How outputs of one kind are compared.

    Attributes:
        name: of the divergence. unit: what it is counted in.
        predictions: outputs [n, V] -> what is compared, [n, V].
        divergence: predictions [n, V] of the original and of another -> their divergence, summed over rows.
        drawn: predictions [n, V], a generator -> the log-likelihood of a draw from them, summed over rows. The mean square of
            its gradient is the Fisher information.
    """

    name: str
    unit: str
    predictions: Callable[[torch.Tensor], torch.Tensor]
    divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    drawn: Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def measure_of(task: str) -> Measure:
    """The measure of a model of this task."""
    return _VECTORS if task == "embed" else _TOKENS


def _drawn_tokens(likelihood: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.multinomial(likelihood.detach().exp(), 1, generator=generator)
    return likelihood.gather(1, drawn).sum()


def _unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _half_square(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return 0.5 * (u - v).square().sum()


def _drawn_vectors(u: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Of a draw u + noise the log-likelihood -|u + noise - u'|^2 / 2 has, at u' = u, the gradient of noise * u'."""
    return (u * torch.randn(u.shape, generator=generator)).sum()


_TOKENS = Measure("KL", "nats a token", torch_log_softmax, torch_divergence, _drawn_tokens)
_VECTORS = Measure("distance", "1 - cosine a text", _unit, _half_square, _drawn_vectors)
