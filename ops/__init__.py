"""The `edgewright::` torch ops, each with its eager reference. What may enter: torch.

An op's reference is its decomposition: `DECOMPOSITIONS` goes to `ExportedProgram.run_decompositions` for a backend whose
table lacks the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import attention, pointwise, quantized, quantized_cache, recurrence

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.edgewright.quantized_linear.default: quantized.quantized_linear_reference,
    torch.ops.edgewright.quantized_embedding.default: quantized.quantized_embedding_reference,
    torch.ops.edgewright.rms_norm.default: pointwise.rms_norm_reference,
    torch.ops.edgewright.gelu_tanh.default: pointwise.gelu_tanh_reference,
    torch.ops.edgewright.rope.default: attention.rope_reference,
    torch.ops.edgewright.bidirectional_attention.default: attention.bidirectional_attention_reference,
    torch.ops.edgewright.cross_attention.default: attention.cross_attention_reference,
    torch.ops.edgewright.cached_attention.default: attention.cached_attention_reference,
    torch.ops.edgewright.merged_attention.default: attention.merged_attention_reference,
    torch.ops.edgewright.shared_attention.default: attention.shared_attention_reference,
    torch.ops.edgewright.quantize_kv.default: quantized_cache.quantize_kv_reference,
    torch.ops.edgewright.append_kv.default: quantized_cache.append_kv_reference,
    torch.ops.edgewright.quantized_attention.default: quantized_cache.quantized_attention_reference,
    torch.ops.edgewright.quantized_causal_attention.default: quantized_cache.quantized_causal_attention_reference,
    torch.ops.edgewright.quantized_merged_attention.default: quantized_cache.quantized_merged_attention_reference,
    torch.ops.edgewright.causal_conv.default: recurrence.causal_conv_reference,
    torch.ops.edgewright.gated_delta_rule.default: recurrence.gated_delta_rule_reference,
    torch.ops.edgewright.linear_attention.default: recurrence.linear_attention_reference,
    torch.ops.edgewright.selective_scan.default: recurrence.selective_scan_reference,
}

__all__ = ["DECOMPOSITIONS", "attention", "pointwise", "quantized", "quantized_cache", "recurrence"]
