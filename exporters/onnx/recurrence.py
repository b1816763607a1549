"""The recurrences on ONNX Runtime's CPU kernels: CausalConvWithState, LinearAttention, and a Scan where there is no kernel.

The kernels go token by token in float32, for any number of tokens. What they compute is tested in
tests/exporters/onnx/test_onnx_facts.py.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from ...targets.onnx.nodes import attr
from .attention_cached import flat
from .lowering import MS, Lowering, dims, parameter


def lower_causal_conv(low: Lowering, node: ir.Node) -> None:
    """CausalConvWithState with channels first: its other layout is slower for several tokens."""
    x, weight, bias, state = node.inputs[:4]
    name, taps = parameter(weight)
    kernel = low.float_tensor(f"{name}.f32", taps.to(torch.float32).reshape(taps.shape[0], 1, -1))
    shift = None
    if bias is not None:
        name, values = parameter(bias)
        shift = low.float_tensor(f"{name}.f32", values)
    turned = low.one(node, "Transpose", [x], perm=[0, 2, 1])
    out, new = low.emit(
        node, "CausalConvWithState", [turned, kernel, shift, state], outputs=2, domain=MS, activation="none"
    )
    low.replace(node, [low.one(node, "Transpose", [out], perm=[0, 2, 1]), new])


def lower_gated_delta_rule(low: Lowering, node: ir.Node) -> None:
    q, k, v, g, beta, state = node.inputs[:6]
    _linear_attention(low, node, (q, k, v), [state, g, beta], "gated_delta")


def lower_linear_attention(low: Lowering, node: ir.Node) -> None:
    q, k, v, g, state = node.inputs[:5]
    _linear_attention(low, node, (q, k, v), [state, flat(low, g, node)], "gated")


def _linear_attention(
    low: Lowering,
    node: ir.Node,
    operands: tuple[ir.Value | None, ir.Value | None, ir.Value | None],
    others: list[ir.Value | None],
    rule: str,
) -> None:
    """LinearAttention. Where there are more value heads than query heads, each query and key serves a group of value heads."""
    groups, _ = dims(operands[0])
    heads, width = dims(operands[2])
    out, new = low.emit(
        node,
        "LinearAttention",
        [*(flat(low, x, node) for x in operands), *others],
        outputs=2,
        domain=MS,
        q_num_heads=groups,
        kv_num_heads=heads,
        scale=float(attr(node, "scale")),
        update_rule=rule,
    )
    low.replace(node, [low.one(node, "Reshape", [out, low.ints(0, 0, heads, width)]), new])


def lower_selective_scan(low: Lowering, node: ir.Node) -> None:
    """A Scan over the tokens, all channels of a token at once: faster than the chunk form, and than LinearAttention."""
    x, dt, a, b, c, state = node.inputs[:6]
    assert a is not None
    scaled = low.one(node, "Mul", [x, dt])  # [B, T, C]
    last, channel = low.ints(-1), low.ints(1)
    before, step, dt_x, key, query = (ir.val(f"scan.{n}", ir.DataType.FLOAT) for n in ("h", "dt", "x", "b", "c"))
    body: list[ir.Node] = []

    def one(op: str, *inputs: ir.Value) -> ir.Value:
        body.append(ir.node(op, [*inputs]))
        return body[-1].outputs[0]

    decay = one("Exp", one("Mul", one("Unsqueeze", step, last), a))  # [B, C, N]
    added = one("Mul", one("Unsqueeze", dt_x, last), one("Unsqueeze", key, channel))
    after = one("Add", one("Mul", before, decay), added)
    read = one("Squeeze", one("MatMul", after, one("Unsqueeze", query, last)), last)  # [B, C]
    for i, value in enumerate(n.outputs[0] for n in body):
        value.name, value.type = f"scan.{i}", ir.TensorType(ir.DataType.FLOAT)
    loop = ir.Graph([before, step, dt_x, key, query], [after, read], nodes=body, name="selective_scan")
    new, out = low.emit(
        node,
        "Scan",
        [state, dt, scaled, b, c],
        outputs=2,
        body=ir.AttrGraph("body", loop),
        num_scan_inputs=4,
        scan_input_axes=[1] * 4,
        scan_output_axes=[1],
    )
    low.replace(node, [out, new])


def lower_diagonal_scan(low: Lowering, node: ir.Node) -> None:
    """A Scan over the tokens."""
    decay, value, state = node.inputs[:3]
    before, rate, added = (ir.val(f"scan.{n}", ir.DataType.FLOAT) for n in ("h", "decay", "value"))
    product = ir.node("Mul", [before, rate])
    after = ir.node("Add", [product.outputs[0], added])
    read = ir.node("Identity", [after.outputs[0]])
    body = [product, after, read]
    for i, made in enumerate(n.outputs[0] for n in body):
        made.name, made.type = f"scan.{i}", ir.TensorType(ir.DataType.FLOAT)
    outputs = [after.outputs[0], read.outputs[0]]
    loop = ir.Graph([before, rate, added], outputs, nodes=body, name="diagonal_scan")
    new, out = low.emit(
        node,
        "Scan",
        [state, decay, value],
        outputs=2,
        body=ir.AttrGraph("body", loop),
        num_scan_inputs=2,
        scan_input_axes=[1] * 2,
        scan_output_axes=[1],
    )
    low.replace(node, [out, new])


def lower_generalized_delta_rule(low: Lowering, node: ir.Node) -> None:
    """A Scan over the tokens: no kernel has a decay for each key dimension beside a delta rule."""
    *tokens, state = node.inputs[:7]
    row, column = low.ints(2), low.ints(3)
    before, q, k, v, g, a, b = (ir.val(f"scan.{n}", ir.DataType.FLOAT) for n in ("s", "q", "k", "v", "g", "a", "b"))
    body: list[ir.Node] = []

    def one(op: str, *inputs: ir.Value) -> ir.Value:
        body.append(ir.node(op, [*inputs]))
        return body[-1].outputs[0]

    faded = one("Mul", before, one("Exp", one("Unsqueeze", g, column)))  # [B, H, Dk, Dv]
    read = one("MatMul", one("Unsqueeze", a, row), before)  # [B, H, 1, Dv]
    written = one("Mul", one("Unsqueeze", b, column), read)
    added = one("Mul", one("Unsqueeze", k, column), one("Unsqueeze", v, row))
    after = one("Add", one("Add", faded, written), added)
    out_t = one("Squeeze", one("MatMul", one("Unsqueeze", q, row), after), row)  # [B, H, Dv]
    for i, value in enumerate(n.outputs[0] for n in body):
        value.name, value.type = f"scan.{i}", ir.TensorType(ir.DataType.FLOAT)
    loop = ir.Graph([before, q, k, v, g, a, b], [after, out_t], nodes=body, name="generalized_delta_rule")
    new, out = low.emit(
        node,
        "Scan",
        [state, *tokens],
        outputs=2,
        body=ir.AttrGraph("body", loop),
        num_scan_inputs=6,
        scan_input_axes=[1] * 6,
        scan_output_axes=[1],
    )
    low.replace(node, [out, new])
