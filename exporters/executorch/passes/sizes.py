"""The pass over reshapes: sizes that are known at run time only."""

from __future__ import annotations

import torch
from torch import fx

from .rewriting import Rewriting

_VIEWS = {torch.ops.aten.view.default, torch.ops.aten.reshape.default}


def infer_sizes(rewriting: Rewriting) -> None:
    """Requires: nothing. Ensures: a reshape with one symbolic size infers it. XNNPACK refuses sizes that are computed."""
    for node in rewriting.calls():
        if node.target not in _VIEWS:
            continue
        sizes = list(node.args[1])  # type: ignore[arg-type]
        dynamic = [i for i, size in enumerate(sizes) if isinstance(size, fx.Node)]
        if len(dynamic) == 1 and -1 not in sizes:
            sizes[dynamic[0]] = -1
            node.args = (node.args[0], sizes)
