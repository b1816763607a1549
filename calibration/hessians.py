"""What GPTQ works with at each linear: the Hessian of its inputs, factored.

An error in a key or value counts for all tokens that read it: most of all one that is the same for many of them, or at the
first token, on which attention rests (arXiv 2309.17453). So for these weights the means of the tokens up to each, and the
first tokens, are added to the Hessian as if they were inputs. A table that rows are looked up in has the matrix that
`embedding_hessians` gives: alone, or added to the Hessian of the head that it also is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import UserError
from ..models.language_model import LanguageModel
from ..quant.hessian import Factor, damping_for, factor
from .forward import CalibrationForward

KEY_VALUE_SHARE = 0.04
"""What means of tokens and first tokens add to the Hessian of keys and values, each, as a share of its trace."""

EMBEDDING_SHARE = 0.2
"""What the lookups of a tied table add to the Hessian of the head's inputs, as a share of its trace."""


class InputHessians:
    """The factor of each weight's inputs. Linears that share inputs (k and v; gate and up) share it: the last one is kept.

    embeddings: as `embedding_hessians` gives.
    """

    def __init__(
        self,
        forward: CalibrationForward,
        model: LanguageModel,
        embeddings: Mapping[str, tuple[torch.Tensor, int]],
    ) -> None:
        self._forward, self._keys_values, self._embeddings = forward, model.key_value_weights(), embeddings
        self._inputs: Sequence[torch.Tensor] = ()
        self._kind: str | bool = False
        self._last: Factor | None = None

    def of(self, name: str, inputs: Sequence[torch.Tensor]) -> Factor:
        """The factor for the weight `name` on `inputs`, as a visit gets them. Raises UserError if they are not finite."""
        kind = name if name in self._embeddings else name in self._keys_values
        if self._last is None or self._kind != kind or not _same(self._inputs, inputs):
            self._last = None  # before the next one is made: each takes several K x K matrices
            matrix, tokens = (key_value_hessian if kind is True else hessian)(self._forward, inputs)
            if name in self._embeddings:
                matrix.add_(self._embeddings[name][0], alpha=EMBEDDING_SHARE * float(matrix.trace()))
            if not bool(torch.isfinite(matrix.diagonal()).all()):
                raise UserError(f"{name}: its inputs are not finite on the calibration data; use --quantizer rtn")
            self._last = factor(matrix, damping_for(len(matrix), tokens))
            self._inputs, self._kind = inputs, kind
        return self._last

    def of_embedding(self, name: str) -> Factor | None:
        """The factor for a table that no linear multiplies; None for one that no sample reaches."""
        if name not in self._embeddings:
            return None
        self._last, self._inputs = None, ()
        matrix, draws = self._embeddings[name]
        return factor(matrix, damping_for(len(matrix), draws))


def hessian(forward: CalibrationForward, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """X^T X / T, fp32 [K, K], of a linear's inputs X over all parts of the forward, and T."""
    width, count = inputs[0].shape[-1], 0
    total = torch.zeros(width, width)
    for rows in forward.all_rows(inputs):
        total.addmm_(rows.T, rows)
        count += len(rows)
    return total.div_(max(1, count)), count


def key_value_hessian(forward: CalibrationForward, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """`hessian`, to which means and first tokens of sequences are added with KEY_VALUE_SHARE of its trace each."""
    plain, count = hessian(forward, inputs)
    means, firsts = torch.zeros_like(plain), torch.zeros_like(plain)
    for x, real in forward.sequences(inputs):
        so_far = real.cumsum(1)
        mean = x.mul(real.unsqueeze(2)).cumsum(1).div_(so_far.clamp(min=1).unsqueeze(2))[real]
        first = x[real & (so_far == 1)]
        means.addmm_(mean.T, mean)
        firsts.addmm_(first.T, first)
    plain_trace = float(plain.trace())
    for added in (means, firsts):
        trace = float(added.trace())
        plain.add_(added, alpha=KEY_VALUE_SHARE * plain_trace / trace if trace > 0.0 else 0.0)
    return plain, count


def _same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
