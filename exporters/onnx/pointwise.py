"""Norms and activations on ONNX Runtime's kernels."""

from __future__ import annotations

import onnx_ir as ir
import torch

from ...targets.onnx.nodes import attr
from .lowering import MS, Lowering, torch_tensor


def lower_rms_norm(low: Lowering, node: ir.Node) -> None:
    """SimplifiedLayerNormalization; together with an Add of the residual before it, SkipSimplifiedLayerNormalization."""
    x = node.inputs[0]
    assert x is not None
    weight = node.inputs[1]
    gamma = torch_tensor(weight).to(torch.float32) + float(attr(node, "offset"))
    scale = low.float_tensor(f"{weight.name}.gamma", gamma)  # type: ignore[union-attr]
    eps = float(attr(node, "eps"))
    add = x.producer()
    residual = (
        add is not None and add.domain == "" and add.op_type == "Add" and _same_shape(add.inputs[0], add.inputs[1])
    )
    if residual and not x.is_graph_output() and x.shape is not None and len(x.shape) == 3:
        assert add is not None
        normed, _, _, total = low.emit(
            add, "SkipSimplifiedLayerNormalization", [*add.inputs, scale], outputs=4, domain=MS, epsilon=eps
        )
        total.name = f"{x.name}.sum"
        low.replace(node, [normed])
        low.replace(add, [total])
        return
    (out,) = low.emit(node, "SimplifiedLayerNormalization", [x, scale], axis=-1, epsilon=eps, stash_type=1)
    low.replace(node, [out])


def _same_shape(a: ir.Value | None, b: ir.Value | None) -> bool:
    return a is not None and b is not None and a.shape is not None and a.shape == b.shape


def lower_gelu_tanh(low: Lowering, node: ir.Node) -> None:
    (out,) = low.emit(node, "Gelu", [node.inputs[0]], approximate="tanh")
    low.replace(node, [out])


def fuse_silu(low: Lowering) -> None:
    """`x * sigmoid(x)` becomes QuickGelu with alpha 1: one kernel."""
    for node in [n for n in low.graph if n.domain == "" and n.op_type == "Sigmoid"]:
        x, gate = node.inputs[0], node.outputs[0]
        users = [u.node for u in gate.uses()]
        if len(users) != 1 or users[0].op_type != "Mul" or set(users[0].inputs) != {x, gate}:
            continue
        (out,) = low.emit(users[0], "QuickGelu", [x], domain=MS, alpha=1.0)
        low.replace(users[0], [out])
        low.graph.remove(node, safe=True)
