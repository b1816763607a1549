"""The rewrites of one exported module for ExecuTorch, in the order in which they run.

Attention, rotary embedding, embeddings and recurrences become functions of `lowerings`, with their tables stored as the constants
that those want. Linears, norms and GELU stay private nodes, which `xnnpack` writes. Lowering takes time by the number of
nodes, so equal constants and equal results are shared first.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from .constants import fold_casts, fold_constants, share_constants, share_results
from .ops import decompose, lower_ops
from .rewriting import Rewriting
from .sizes import infer_sizes

PASSES: tuple[Callable[[Rewriting], None], ...] = (
    fold_casts,
    fold_constants,
    share_constants,
    share_results,
    lower_ops,
    infer_sizes,
)
"""Each changes the module in place; its docstring says what it requires and what it ensures."""

__all__ = ["PASSES", "decompose", "rewrite"]


def rewrite(module: fx.GraphModule, capacity: int) -> fx.GraphModule:
    """The module after all `PASSES`, with those parameters alone that it still reads.

    module: as `decompose` left it. capacity: tokens of a KV cache.
    """
    rewriting = Rewriting(module, capacity)
    for each in PASSES:
        each(rewriting)
    rewriting.graph.eliminate_dead_code()
    rewriting.graph.lint()
    return fx.GraphModule(rewriting.module, rewriting.graph)  # without unread parameters: export would store them
