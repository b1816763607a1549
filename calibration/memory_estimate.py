"""How much memory GPTQ takes, and how many tokens fit a limit, before any of the work is done."""

from __future__ import annotations

import torch

from ..errors import UserError
from ..models.language_model import LanguageModel
from ..models.layers.block import attention_heads
from ..models.layers.linear import Linear
from ..ops import recurrence
from ..quant.gptq import BLOCK_WEIGHTS
from .embedding_hessians import embedding_hessian_bytes
from .forward import CHUNK_WEIGHTS
from .samples import MOST_TOKENS, WINDOW
from .source import PART_TOKENS

FEWEST_TOKENS = 512

ATTENTION_BYTES = 48 << 10
"""Of a token: scores of a dozen heads over a window, a few times."""

PROCESS_BYTES = 700 << 20
"""Anonymous memory of the process before any of the work (measured, rounded up)."""


def gptq_bytes(model: LanguageModel, longest: int = WINDOW) -> tuple[int, int]:
    """Anonymous memory that GPTQ takes, (fixed, for each token of calibration data), estimated. longest: tokens of a sample.

    Counted: what Python and torch take, the Hessian of the widest linear's inputs and its factor, a chunk of weights; for one
    part all that a layer computes, attention over a window and a recurrence; of a token, what lives on while its part waits.
    If a backward pass through a first layer takes more, that is counted. Caches are in files.
    """
    vocab = {int(p.shape[-1]) for g in model.graphs() for p in g.outputs if p.name == "logits"}
    linears = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, Linear)]
    widest = max((k for _, k in linears), default=0)
    broadest = max((max(n, k) for n, k in linears if n not in vocab), default=0)
    # a chunk of weights in fp32; what GPTQ keeps for each block of rows
    work = 12 * widest**2 + 4 * CHUNK_WEIGHTS + 32 * BLOCK_WEIGHTS * torch.get_num_threads()
    heads = max((attention_heads(m) for m in model.modules()), default=0)
    scores = max(ATTENTION_BYTES, 12 * heads * longest)
    part = max(PART_TOKENS, longest) * (4 * (6 * broadest + 8 * widest) + scores)
    if any(s.kind == "recurrent" for g in model.graphs() for s in g.states):
        part += recurrence.WORK_BYTES
    embeddings, tables = embedding_hessian_bytes(model, longest)
    return PROCESS_BYTES + tables + max(work + part, embeddings), 10 * (broadest + widest)


def tokens_within(model: LanguageModel, limit: int, longest: int = WINDOW, most: int = MOST_TOKENS) -> int:
    """How many tokens GPTQ can calibrate on within `limit` bytes, at most `most`. Raises UserError for too few."""
    fixed, each = gptq_bytes(model, longest)
    tokens = (limit - fixed) // each
    if tokens < FEWEST_TOKENS:
        need = (fixed + FEWEST_TOKENS * each) / 2**30
        raise UserError(
            f"--memory-limit {limit / 2**30:.2f} GiB is too little for GPTQ of this model, which takes {need:.2f} GiB; "
            "give more, or --quantizer rtn"
        )
    return min(most, tokens)
