"""A second table from `edgewright::` op to ONNX: the standard's own ops, for compilers that know no ONNX Runtime kernels.

TensorRT and QNN share it; a `Dialect` says in what they differ. Ops without a row here, the recurrences, are decomposed.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from ...errors import UserError
from ...targets.onnx.nodes import attr
from .dialect import Dialect, Lower, StandardLowering
from .lowering import dims, nodes, operands, torch_tensor
from .standard_attention import (
    lower_biased_attention,
    lower_bidirectional_attention,
    lower_cached_attention,
    lower_cross_attention,
    lower_merged_attention,
    lower_rope,
    lower_shared_attention,
)
from .translate import DOMAIN


def _table(dialect: Dialect) -> dict[str, Lower]:
    return {
        "CachedAttention": lower_cached_attention,
        "BiasedAttention": lower_biased_attention,
        "MergedAttention": lower_merged_attention,
        "SharedAttention": lower_shared_attention,
        "BidirectionalAttention": lower_bidirectional_attention,
        "CrossAttention": lower_cross_attention,
        "Rope": lower_rope,
        "QuantizedLinear": dialect.linear,
        "QuantizedEmbedding": dialect.embedding,
        "RmsNorm": _rms_norm,
        "GeluTanh": _gelu_tanh,
    }


def rows(dialect: Dialect) -> frozenset[str]:
    """The private nodes that `lower_standard` lowers; `translate` decomposes the others."""
    return frozenset(_table(dialect))


def lower_standard(model: ir.Model, low: StandardLowering) -> dict[str, int]:
    """Rewrite every private node of `model`, float weights last; returns op -> nodes. Raises ValueError for one without a row."""
    table = _table(low.dialect)
    for op, lowering in table.items():
        for node in nodes(model.graph, op):
            lowering(low, node)
    _float_weights(low)
    if low.dialect.all_half:
        _narrow_everything(low)
    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)
    remaining = sorted({n.op_type for n in model.graph if n.domain == DOMAIN})
    if remaining:
        raise ValueError(f"no standard lowering for {', '.join(remaining)}")
    model.opset_imports.pop(DOMAIN, None)
    model.producer_name = "edgewright"
    return dict(Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph))


# ---- pointwise and float weights ------------------------------------------------------------------------------------


def _rms_norm(low: StandardLowering, node: ir.Node) -> None:
    x, weight = operands(node, 0, 2)
    gamma = torch_tensor(weight).to(torch.float32) + float(attr(node, "offset"))
    scale = low.float_tensor(f"{weight.name}.gamma", gamma)
    eps = float(attr(node, "eps"))
    if not low.dialect.all_half or x.shape is None or len(x.shape) != 4:
        return low.replace(node, [low.one(node, "RMSNormalization", [x, scale], axis=-1, epsilon=eps)])
    heads, dim = dims(x)  # HTP computes the norm of a rank of 4 wrongly
    flat = low.one(node, "Reshape", [x, low.ints(0, -1, dim)])
    normed = low.one(node, "RMSNormalization", [flat, scale], axis=-1, epsilon=eps)
    return low.replace(node, [low.one(node, "Reshape", [normed, low.ints(0, -1, heads, dim)])])


def _gelu_tanh(low: StandardLowering, node: ir.Node) -> None:
    low.replace(node, [low.one(node, "Gelu", [node.inputs[0]], approximate="tanh")])


def _float_weights(low: StandardLowering) -> None:
    """Matrices that the plan left at 16 bits go to the file as bfloat16, as in the checkpoint, and are cast in the graph.

    torch.onnx may have folded the cast and the transposition of a small one into a float32 constant.
    """
    if not low.dialect.half:
        return
    for node in [n for n in low.graph if n.domain == "" and n.op_type in ("MatMul", "Gemm")]:
        weight = node.inputs[1]
        if weight is None or weight.const_value is None or weight.dtype != ir.DataType.FLOAT:
            continue
        data = torch.from_numpy(weight.const_value.numpy().copy())
        short = data.to(torch.bfloat16)
        if not torch.equal(short.to(torch.float32), data) or node.op_type == "Gemm" or data.dim() != 2:
            continue
        raw = short.view(torch.uint8).reshape(-1).numpy()
        shape = tuple(data.shape)
        key = f"bf16:{hash_of(raw)}"
        stored = low.weight(f"{weight.name}.bf16", key, [raw], ir.DataType.BFLOAT16, shape)
        cast = low.built(("cast", stored), lambda n=node, s=stored: low.one(n, "Cast", [s], to=ir.DataType.FLOAT16))  # type: ignore[misc]
        product = low.one(node, "MatMul", [low.narrow(node, node.inputs[0]), cast])  # type: ignore[arg-type]
        low.replace(node, [low.widen(node, product)])


def _narrow_everything(low: StandardLowering) -> None:
    """Float32 and bfloat16 constants, types and casts become float16. Raises UserError for a constant beyond its range."""
    half = ir.TensorType(ir.DataType.FLOAT16)
    for value in [*low.graph.initializers.values(), *low.graph.inputs, *(o for n in low.graph for o in n.outputs)]:
        if value.dtype not in (ir.DataType.FLOAT, ir.DataType.BFLOAT16):
            continue
        value.type = half
        if value.const_value is not None:
            data = torch.from_numpy(value.const_value.numpy().astype(np.float32)).to(torch.float16)
            if data.isinf().any():
                raise UserError(f"{value.name} has values beyond float16, in which this target computes; leave it out")
            value.const_value = ir.tensor(data.numpy(), name=value.name)
    for node in low.graph:
        if node.op_type == "Cast" and attr(node, "to") in (ir.DataType.FLOAT, ir.DataType.BFLOAT16):
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)


def hash_of(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
