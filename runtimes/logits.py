"""What logits say: log-probabilities, Kullback-Leibler divergence and agreement on the best token.

The same formulas for arrays, in float64, and for torch's tensors, in their own dtype, where gradients or threads are wanted.
"""

from __future__ import annotations

import numpy as np
import torch

from .session import Array


def log_softmax(logits: Array) -> Array:
    """Log-probabilities of logits [..., vocab], float64."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def torch_log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """`log_softmax` of a tensor [..., vocab], in its dtype."""
    return torch.log_softmax(logits, -1)


def divergence(p: Array, q: Array) -> float:
    """KL(p || q) in nats, summed over positions; p, q: log-probabilities [n, vocab]."""
    return float((np.exp(p) * (p - q)).sum())


def torch_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`divergence` of tensors [n, vocab]: a tensor of no dimension, differentiable."""
    return (p.exp() * (p - q)).sum()


def same_top1(first: Array, second: Array) -> int:
    """At how many positions both have the same most likely token; logits or log-probabilities [n, vocab]."""
    return int((first.argmax(-1) == second.argmax(-1)).sum())
