"""The pass over ops: the table from op to rewrite. What has no row here and none in a delegate is decomposed before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ....ops import DECOMPOSITIONS
from . import attention, attention_int8, forms, recurrence
from .rewriting import Rewriting

EW = torch.ops.edgewright
ATEN = torch.ops.aten

DELEGATED = frozenset({EW.quantized_linear.default, EW.rms_norm.default, EW.gelu_tanh.default})
"""The private ops that stay: `xnnpack` writes them into delegates."""

REWRITES: dict[Any, Callable[[Rewriting, fx.Node], None]] = {
    EW.quantized_embedding.default: attention.embedding,
    EW.rope.default: attention.rope,
    EW.bidirectional_attention.default: attention.bidirectional,
    EW.cross_attention.default: attention.cross,
    EW.cached_attention.default: attention.cached,
    EW.biased_attention.default: attention.biased,
    EW.merged_attention.default: attention.merged,
    EW.shared_attention.default: attention.shared,
    EW.quantize_kv.default: attention_int8.quantize,
    EW.append_kv.default: attention_int8.append,
    EW.quantized_attention.default: attention_int8.cross,
    EW.quantized_causal_attention.default: attention_int8.causal,
    EW.quantized_biased_attention.default: attention_int8.biased,
    EW.quantized_merged_attention.default: attention_int8.merged,
    EW.causal_conv.default: recurrence.causal_conv,
    EW.gated_delta_rule.default: recurrence.gated_delta_rule,
    EW.linear_attention.default: recurrence.linear_attention,
    EW.selective_scan.default: recurrence.selective_scan,
    EW.diagonal_scan.default: recurrence.diagonal_scan,
    EW.generalized_delta_rule.default: recurrence.generalized_delta_rule,
    ATEN.erf.default: forms.exact_gelu,
    ATEN.matmul.default: forms.linear,
    ATEN.zeros_like.default: forms.filled,
    ATEN.ones_like.default: forms.filled,
    ATEN.full_like.default: forms.filled,
}
"""Each changes one node in place, or replaces it; what it adds goes in front of the node."""


def decompose(program: ExportedProgram) -> ExportedProgram:
    """The program without those of our ops that have neither a row in `REWRITES` nor a place in a delegate."""
    others = {op: fn for op, fn in DECOMPOSITIONS.items() if op not in REWRITES and op not in DELEGATED}
    if not any(node.target in others for node in program.graph.nodes):
        return program
    plain: ExportedProgram = program.run_decompositions(others)
    return plain


def lower_ops(rewriting: Rewriting) -> None:
    """Requires: equal constants and equal calls are one node. Ensures: no private op is left but `DELEGATED` ones."""
    for node in rewriting.calls():
        if node.target in REWRITES:
            with rewriting.graph.inserting_before(node):
                REWRITES[node.target](rewriting, node)
