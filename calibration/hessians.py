"""What GPTQ works with at each linear that a walk visits: the Hessian of its inputs, factored. Top-level: `walk`, `quant` enter.

An error in a key or value counts for all tokens that read it: most of all one that is the same for many of them, or at the
first token, on which attention rests (arXiv 2309.17453). So for these weights the means of the tokens up to each, and the
first tokens, are added to the Hessian as if they were inputs. A table that rows are looked up in has what `lookups` gives: alone,
or added to the Hessian of the head that it also is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import UserError
from ..models.language_model import LanguageModel
from ..quant.hessian import Factor, damping_for, factor
from .forward import CalibrationForward

KEY_VALUE_SHARE = 0.04
"""What means of tokens and first tokens add to the Hessian of keys and values, each, as a share of its trace. On SmolLM2 their
loss, as the Fisher information of other text sees it, falls to 0.37 (4 bits) and 0.68 (2 bits) of that without; shares from
0.015 to 0.075 give 0.36 to 0.39. Of the examples, trained on single words or short records, no layer's moves by more than 15 %
at 2 bits and their sum by 1 %; at 2.5 bits two of the three answer a little less as the original does (benchmarks/RESULTS.md)."""

EMBEDDING_SHARE = 0.2
"""What the lookups of a tied table add to the Hessian of the head's inputs, as a share of its trace. With 0.15 and 0.3 the table
alone costs Gemma 3 270M 0.63 and 0.64 nats at 2 bits (0.93 without), SmolLM2 0.48 and 0.47 (0.53)."""


class InputHessians:
    """The factor of each weight's inputs. Linears that share inputs (k, v; gate, up) share it: the last one is kept.

    embeddings: as `embedding_hessians` gives.
    """

    def __init__(
        self, forward: CalibrationForward, model: LanguageModel, embeddings: Mapping[str, tuple[torch.Tensor, int]]
    ) -> None:
        self._forward, self._keys_values, self._embeddings = forward, model.key_value_weights(), embeddings
        self._inputs: Sequence[torch.Tensor] = ()
        self._added: object = None
        self._last: Factor | None = None

    def of(self, name: str, inputs: Sequence[torch.Tensor]) -> Factor:
        """The factor for the weight `name` on `inputs`, which a visit of the walk gave. Raises UserError if they are not finite."""
        added = name if name in self._embeddings else name in self._keys_values
        if self._last is None or self._added != added or not _same(self._inputs, inputs):
            self._last = None  # before the next one is made: each takes several K x K matrices
            made, tokens = (key_value_hessian if added is True else hessian)(self._forward, inputs)
            if name in self._embeddings:
                made.add_(self._embeddings[name][0], alpha=EMBEDDING_SHARE * float(made.trace()))
            if not bool(torch.isfinite(made.diagonal()).all()):
                raise UserError(f"{name}: its inputs are not finite on the calibration data; use --quantizer rtn")
            self._last = factor(made, damping_for(len(made), tokens))
            self._inputs, self._added = inputs, added
        return self._last

    def of_embedding(self, name: str) -> Factor | None:
        """The factor for a table that no linear multiplies; None for one that no sample reaches."""
        if name not in self._embeddings:
            return None
        self._last, self._inputs = None, ()
        made, draws = self._embeddings[name]
        return factor(made, damping_for(len(made), draws))


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
    whole = float(plain.trace())
    for more in (means, firsts):
        trace = float(more.trace())
        plain.add_(more, alpha=KEY_VALUE_SHARE * whole / trace if trace > 0.0 else 0.0)
    return plain, count


def _same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
