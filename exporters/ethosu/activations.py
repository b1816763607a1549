"""Fixed-point activations for the Ethos-U: ranges from a few runs, then quantize and dequantize around every op.

Weights do not change: their codes and scales are constants of the graph by now. Activations have 16 bits, and their scales are
powers of two. So the factor of a linear's integer product (input scale times weight scale over output scale) is the weight's own
scale with another exponent, which TOSA's fixed point holds exactly. Where the NPU multiplies two activations in 8 bits only (U55
and U65), they are split into bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .internals import register_quantized_ops

register_quantized_ops()
ATEN = torch.ops.aten
QD = torch.ops.quantized_decomposed
MARGIN = 1.5
"""How many times the largest value of the calibration an activation may reach before it saturates."""

ENTRY = ATEN.clone.default
_COMPUTED = {"_arm_annotation_info": {"quantized": True}}
"""The mark by which ExecuTorch's Arm backend knows a node whose quantization it may fold."""

_TOP = (1 << 15) - 1
_SHAPES = {
    ATEN.view.default,
    ATEN.reshape.default,
    ATEN.permute.default,
    ATEN.squeeze.dim,
    ATEN.unsqueeze.default,
    ATEN.slice.Tensor,
    ATEN.cat.default,
}
"""Ops that move values: their inputs and their output are one range."""

_ONE_RANGE = _SHAPES | {ATEN.amax.default, ATEN.relu.default}
_BOUNDED = {ATEN.tanh.default: 1.0, ATEN.exp.default: 1.0, ATEN.sigmoid.default: 1.0}
"""The largest output for any input; the input of exp is at most 0 here."""

_INVERSES = {ATEN.reciprocal.default, ATEN.rsqrt.default}


def fixed_point(
    module: fx.GraphModule, calibration: Sequence[tuple[torch.Tensor, ...]], narrow_matmul: bool
) -> tuple[fx.GraphModule, list[float]]:
    """(`module` with every value between its entries and its output in fixed point, steps of its linears).

    calibration: inputs to take the ranges from. narrow_matmul: whether products of activations go byte by byte. A step is the
    output scale over the input scale, a power of two, for each linear in the order of the graph.
    """
    conversion = _FixedPoint(module, _largest(module, calibration), narrow_matmul)
    return conversion.run(), conversion.steps


def _largest(module: fx.GraphModule, calibration: Sequence[tuple[torch.Tensor, ...]]) -> dict[str, float]:
    """Node name -> the largest magnitude of its value."""
    largest: dict[str, float] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if n.target in _INVERSES:
                out = out.masked_fill(torch.isinf(out), 0.0)  # for a row of zeros, which stays zero in fixed point
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                largest[n.name] = max(largest.get(n.name, 0.0), float(out.abs().max()))
            return out

    with torch.no_grad():
        for inputs in calibration:
            Watch(module).run(*inputs)
    return largest


class _FixedPoint:
    """One module during its conversion to fixed point. largest: see `_largest`."""

    def __init__(self, module: fx.GraphModule, largest: dict[str, float], narrow_matmul: bool) -> None:
        self.module, self.graph, self.largest, self.narrow = module, module.graph, largest, narrow_matmul
        self.inside = self._inside()
        self.reach = self._ranges()
        self.fixed: dict[fx.Node, fx.Node] = {}  # value -> the node that stands for it in fixed point
        self.bytes: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self.steps: list[float] = []
        self._count = 0

    def _inside(self) -> set[fx.Node]:
        """The calls of the NPU's part: the entries and what depends on them."""
        inside: set[fx.Node] = set()
        for node in self.graph.nodes:
            entered = node.target == ENTRY or any(n in inside for n in node.all_input_nodes)
            if node.op == "call_function" and entered:
                inside.add(node)
        return inside

    def _ranges(self) -> dict[fx.Node, float]:
        """The magnitude that each value must hold. Values that an op only moves have the same."""
        parent: dict[fx.Node, fx.Node] = {n: n for n in self.inside}

        def root(node: fx.Node) -> fx.Node:
            while parent[node] is not node:
                node = parent[node]
            return node

        reach: dict[fx.Node, float] = {}
        for node in self.graph.nodes:
            if node not in self.inside:
                continue
            if node.target in _ONE_RANGE or node.target == ATEN.clamp.default:
                for source in node.all_input_nodes:
                    parent[root(source)] = root(node)
            else:
                reach[node] = _BOUNDED.get(node.target, self.largest[node.name] * MARGIN)
        limits: dict[fx.Node, Any] = {root(n): n.args[2] for n in self.inside if n.target == ATEN.clamp.default}
        shared: dict[fx.Node, float] = {}
        for node, value in reach.items():
            shared[root(node)] = max(shared.get(root(node), 0.0), value)
        return {n: limits.get(root(n), shared[root(n)]) for n in self.inside}

    def run(self) -> fx.GraphModule:
        for node in list(self.graph.nodes):
            if node.op == "output":
                node.args = fx.map_arg(node.args, lambda n: self.fixed.get(n, n))
            if node not in self.inside:
                continue
            if node.target == ATEN.clamp.default:  # its input saturates there already
                self.fixed[node] = self.fixed[node.all_input_nodes[0]]
                continue
            if self.narrow and node.target == ATEN.bmm.default:
                with self.graph.inserting_before(node):
                    self.fixed[node] = self._product(node)
                continue
            source = node
            if node.target == ENTRY:
                source = node.args[0]
            else:
                with self.graph.inserting_before(node):
                    self._operands(node)
                node.meta["custom"] = dict(_COMPUTED)
            scale = power_of_two(self.reach[node])
            with self.graph.inserting_after(node):
                value = self._through(source, scale, torch.int16)
            if node.target == ATEN.linear.default:
                self.steps.append(scale / float(node.args[0].args[1]))  # its input is dequantized by now
            self.fixed[node] = value
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return fx.GraphModule(self.module, self.graph)

    def _through(self, value: fx.Node, scale: float, dtype: torch.dtype) -> fx.Node:
        """`value` quantized and dequantized, at the point of insertion."""
        limits = torch.iinfo(dtype)
        form = (scale, 0, limits.min, limits.max, dtype)
        codes = self.graph.call_function(QD.quantize_per_tensor.default, (value, *form))
        with self.graph.inserting_after(codes):
            return self.graph.call_function(QD.dequantize_per_tensor.default, (codes, *form))

    def _computed(self, op: Any, scale: float, left: fx.Node, right: fx.Node) -> fx.Node:
        node = self.graph.call_function(op, (left, right))
        node.meta["custom"] = dict(_COMPUTED)
        return self._through(node, scale, torch.int16)

    def _product(self, node: fx.Node) -> fx.Node:
        """A product of two activations where the NPU multiplies 8 bits: each is the exact sum of a high and a low byte.

        The product of the two low bytes, 2**-16 of the result, is left out.
        """
        (high, low), (other_high, other_low) = (self._bytes(self.fixed[n]) for n in node.all_input_nodes)
        reach = self.reach[node]
        scale, fine = power_of_two(reach), power_of_two(reach / 8)
        crossed = [self._computed(node.target, fine, a, b) for a, b in ((high, other_low), (low, other_high))]
        main = self._computed(node.target, scale, high, other_high)
        return self._computed(ATEN.add.Tensor, scale, main, self._computed(ATEN.add.Tensor, fine, *crossed))

    def _bytes(self, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        """(256 times the high byte, the low byte) of a value in 16 bits, each in 8."""
        if value not in self.bytes:
            scale = float(value.args[1])  # type: ignore[arg-type]
            high = self._through(value, 256 * scale, torch.int8)
            again = self._through(high, scale, torch.int16)
            low = self._computed(ATEN.sub.Tensor, scale, value, again)
            self.bytes[value] = high, self._through(low, scale, torch.int8)
        return self.bytes[value]

    def _operands(self, node: fx.Node) -> None:
        """Each operand of a node in fixed point; float constants and numbers become fixed-point constants."""

        def fixed(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(fixed(v) for v in value)
            if not isinstance(value, fx.Node):
                return value
            if value in self.fixed:
                return self.fixed[value]
            constant = self._constant(value)
            return value if constant is None else self._stored(constant)

        node.args = tuple(fixed(a) for a in node.args)
        if node.target in (ATEN.mul.Tensor, ATEN.add.Tensor, ATEN.sub.Tensor):
            rank = node.meta["val"].dim()
            node.args = tuple(
                self._stored(torch.full([1] * rank, float(a))) if isinstance(a, int | float) else a for a in node.args
            )

    def _constant(self, node: fx.Node) -> torch.Tensor | None:
        """A float constant; None for anything else (weights are dequantized from their codes, and stay)."""
        if node.op != "get_attr":
            return None
        tensor = getattr(self.module, str(node.target))
        return tensor if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else None

    def _stored(self, values: torch.Tensor) -> fx.Node:
        scale = power_of_two(float(values.abs().max()))
        name = f"fixed_{self._count}"
        self._count += 1
        self.module.register_buffer(name, torch.round(values / scale).clamp(-_TOP - 1, _TOP).to(torch.int16))
        form = (scale, 0, -_TOP - 1, _TOP, torch.int16)
        return self.graph.call_function(QD.dequantize_per_tensor.default, (self.graph.get_attr(name), *form))


def power_of_two(reach: float) -> float:
    """The smallest power of two with which, as their scale, 16-bit codes reach `reach`."""
    return 2.0 ** math.ceil(math.log2(max(reach, 2.0**-30) / _TOP))
