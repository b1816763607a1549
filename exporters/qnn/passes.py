"""Rewrites of a graph's ONNX before it is lowered, in the order in which they run.

They keep values within float16, and keep the NPU's compiler from forms that it computes wrongly or cannot compile.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch

from ...targets.onnx.nodes import attr
from ..onnx.dialect import MASKED, StandardLowering
from ..onnx.lowering import nodes, parameter

SHRINK = 0.125
"""What the residual is multiplied by: in some models it grows beyond float16, which ends at 65,504 (docs/qnn.md)."""


def shrink_residual(low: StandardLowering) -> None:
    """Requires: nothing. Ensures: the residual is `SHRINK` of its size where only norms read it, whose results do not change.

    Everything that is added to the residual, and what it starts from, is multiplied by `SHRINK`, a power of two; a norm's
    epsilon by its square. If anything else reads the residual, the graph stays as it is.
    """
    adds: set[ir.Node] = set()
    readers: list[ir.Node] = []
    for norm in nodes(low.graph, "RmsNorm"):
        add = _residual(norm.inputs[0])
        if add is not None:
            readers.append(norm)
            while add is not None:
                adds.add(add)
                add = next((a for a in (_residual(v) for v in add.inputs) if a is not None and a not in adds), None)
    stream = {a.outputs[0] for a in adds}
    addends = {v for a in adds for v in a.inputs if v is not None and v not in stream}
    readers += [n for n in nodes(low.graph, "RmsNorm") if n.inputs[0] in addends]
    # values of some positions of the residual
    chosen = {v for v in (n.inputs[0] for n in readers) if v is not None and v not in stream | addends}
    if any(u.node not in adds | {*readers} and u.node.outputs[0] not in chosen for v in stream for u in v.uses()):
        return
    if any(v.is_graph_output() for v in stream | chosen):
        return
    for value in sorted(addends, key=lambda v: str(v.name)):
        users = [u.node for u in value.uses() if u.node in adds or u.node in readers]
        small = low.one(users[0], "Mul", [value, low.scalar(SHRINK, False)])
        small.shape, small.type = value.shape, value.type
        for user in users:
            for i, operand in enumerate(user.inputs):
                if operand is value:
                    user.replace_input_with(i, small)
    for norm in readers:
        norm.attributes["eps"] = ir.AttrFloat32("eps", float(attr(norm, "eps")) * SHRINK**2)


def _residual(value: ir.Value | None) -> ir.Node | None:
    """The Add of two activations [B, S, hidden] whose sum is `value`, or of which `value` is some positions."""
    add = value.producer() if value is not None else None
    if add is not None and add.op_type == "Gather" and add.domain == "":
        add = add.inputs[0].producer() if add.inputs[0] is not None else None
    if add is None or add.op_type != "Add" or add.domain != "":
        return None
    shapes = [v.shape for v in add.inputs if v is not None]
    alike = len(shapes) == 2 and shapes[0] == shapes[1] and shapes[0] is not None and len(shapes[0]) == 3
    return add if alike else None


def mask_before_exp(low: StandardLowering) -> None:
    """Requires: before `lay_out_factors`, which would make the masks large. Ensures: `exp(x) * mask`, with a constant mask of
    zeros and ones, is `exp(x + bias)`.
    """
    for node in [n for n in low.graph if n.domain == "" and n.op_type == "Mul"]:
        x, mask = node.inputs
        exp = x.producer() if x is not None else None
        ones = mask.const_value.numpy() if mask is not None and mask.const_value is not None else None
        if exp is None or exp.op_type != "Exp" or ones is None or not np.isin(ones, (0, 1)).all():
            continue
        bias = low.constant(np.where(ones, 0, MASKED).astype(np.float32))
        low.replace(node, [low.one(node, "Exp", [low.one(node, "Add", [exp.inputs[0], bias])])])


def lay_out_factors(low: StandardLowering) -> None:
    """Requires: static shapes. Ensures: where a product is multiplied again, its constant factor is as large as the product.

    Vectors may stay. HTP reads beyond a factor that is broadcast, and the process may die (tests/exporters/qnn/test_qnn_facts.py).
    """
    for node in [n for n in low.graph if n.domain == "" and n.op_type == "Mul"]:
        out = node.outputs[0]
        shape = [d for d in out.shape if isinstance(d, int)] if out.shape is not None else []
        again = any(u.node.domain == "" and u.node.op_type == "Mul" for u in out.uses())
        if not again or out.shape is None or len(shape) != len(out.shape):
            continue
        for i, factor in enumerate(node.inputs):
            sizes = [int(d) for d in factor.shape] if factor is not None and factor.shape is not None else []  # type: ignore[arg-type]
            if all(d == 1 for d in sizes[:-1]) or sizes == shape:
                continue
            try:
                _, values = parameter(factor)
            except ValueError:  # not a constant: HTP takes it
                continue
            spread = values.to(torch.float32).reshape(sizes).broadcast_to(shape)
            node.replace_input_with(i, low.constant(spread.contiguous().numpy()))


def part_linears(low: StandardLowering) -> None:
    """Requires: linears are private nodes. Ensures: two negations lie between a linear and a concatenation of its output.

    Without them HTP's compiler joins the linears into one product and runs out of memory (tests/exporters/qnn/test_qnn_facts.py).
    It removes the negations.
    """
    for node in [n for n in low.graph if n.domain == "" and n.op_type == "Concat"]:
        for i, value in enumerate(node.inputs):
            linear = value.producer() if value is not None else None
            if value is None or linear is None or linear.op_type != "QuantizedLinear":
                continue
            apart = low.one(node, "Neg", [low.one(node, "Neg", [value])])
            apart.shape, apart.type = value.shape, value.type
            node.replace_input_with(i, apart)


PASSES: tuple[Callable[[StandardLowering], None], ...] = (
    shrink_residual,
    mask_before_exp,
    lay_out_factors,
    part_linears,
)
"""Each changes the graph in place; its docstring says what it requires and what it ensures."""
