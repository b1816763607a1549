"""What lowers private nodes: the graph at work, and ONNX Runtime's kernels for linears, embeddings, norms, activations.

What may enter: `ops`, onnx_ir, `onnx_weights`. Each lowering rewrites one private node in place; attention is in
`onnx_attention`, the recurrences in `onnx_recurrence`, the table in `onnx`. Facts of kernels that the lowerings rely on are
pinned in tests/test_onnx_facts.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...targets.onnx.nodes import LABEL, attr
from ...targets.storage import container, scale_block
from .translate import DOMAIN
from .weight_file import WeightFile, codes_chunks, content_key, scales_chunks

MS = "com.microsoft"


@dataclass
class Lowering:
    """One graph being lowered: the IR graph, where weights go, and what was already emitted."""

    graph: ir.Graph
    weights: WeightFile
    max_positions: int
    shared: dict[Any, ir.Value] = field(default_factory=dict)

    def emit(
        self, before: ir.Node, op: str, inputs: list[ir.Value | None], outputs: int = 1, domain: str = "", **attrs: Any
    ) -> tuple[ir.Value, ...]:
        """Insert a node before `before`; returns its outputs."""
        while inputs and inputs[-1] is None:
            inputs.pop()
        node = ir.node(op, inputs, attrs, domain=domain, num_outputs=outputs)
        self.graph.insert_before(before, node)
        return tuple(node.outputs)

    def one(self, before: ir.Node, op: str, inputs: list[ir.Value | None], domain: str = "", **attrs: Any) -> ir.Value:
        """`emit` of a node with one output."""
        return self.emit(before, op, inputs, domain=domain, **attrs)[0]

    def ints(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def built(self, key: Any, build: Callable[[], ir.Value]) -> ir.Value:
        """`build()`, once for each key."""
        if key not in self.shared:
            self.shared[key] = build()
        made: ir.Value = self.shared[key]
        return made

    def replace(self, node: ir.Node, values: list[ir.Value]) -> None:
        """Give `values` the uses, names and places among the graph outputs of the outputs of `node`, and remove it."""
        for old, new in zip(node.outputs, values, strict=True):
            new.shape, new.type = old.shape, old.type
            if old.is_graph_output():
                new.name = old.name
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def constant(self, array: np.ndarray) -> ir.Value:
        """A small initializer, one for each distinct value."""
        key = ("const", array.dtype.str, array.shape, array.tobytes())
        if key not in self.shared:
            tensor = ir.tensor(array, name=f"const_{len(self.shared)}")
            value = ir.Value(
                name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.graph.register_initializer(value)
            self.shared[key] = value
        return self.shared[key]

    def weight(self, name: str, key: str, chunks: Any, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        """An initializer in the weight file, one for each (key, shape)."""
        if (key, shape) not in self.shared:
            if name in self.graph.initializers:
                name = f"{name}.{len(self.shared)}"
            value = self.weights.add(name, key, chunks, dtype, shape)
            self.graph.register_initializer(value)
            self.shared[key, shape] = value
        return self.shared[key, shape]

    def float_tensor(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """A float32 initializer holding `tensor`."""
        data = tensor.detach().to(torch.float32).contiguous()
        key = f"f32:{tuple(data.shape)}:{content_key(data)}"
        return self.weight(name, key, [data.numpy()], ir.DataType.FLOAT, tuple(data.shape))


def torch_tensor(value: ir.Value | None) -> torch.Tensor:
    """The mapped torch tensor behind an initializer that torch.onnx made, or the array where it folded a small one.

    A folded bfloat16, which numpy lacks, comes as float32.
    """
    assert value is not None
    assert value.const_value is not None
    raw = getattr(value.const_value, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.detach()
    array = value.const_value.numpy()
    wide = array.astype(np.float32) if value.const_value.dtype == ir.DataType.BFLOAT16 else array.copy()
    return torch.from_numpy(wide)


def parameter(value: ir.Value | None) -> tuple[str, torch.Tensor]:
    """Name and values of an initializer, through the Cast of a 16-bit one and a change of its shape. Raises ValueError."""
    assert value is not None
    made = value.producer()
    if made is None and value.const_value is not None:
        return str(value.name), torch_tensor(value)
    if made is None or made.domain or made.op_type not in ("Cast", "Squeeze", "Unsqueeze", "Reshape"):
        raise ValueError(f"{value.name} is computed where a parameter is expected")
    return parameter(made.inputs[0])


def weight_name(codes: ir.Value | None) -> str:
    """The quantized module's name in the checkpoint, from that of its codes."""
    return str(codes.name).removesuffix(".codes")  # type: ignore[union-attr]


def nodes(graph: ir.Graph, op: str) -> list[ir.Node]:
    return [n for n in graph if n.domain == DOMAIN and n.op_type == op]


@dataclass
class Stack:
    """The weights of linears that share an input, as one matrix: rows of one after the rows of the other.

    names: of the linears in the checkpoint, in this order.
    """

    names: list[str]
    codes: list[torch.Tensor]
    scales: list[torch.Tensor]
    bits: int
    columns: int

    @property
    def name(self) -> str:
        first = self.names[0]
        if len(self.names) == 1:
            return first
        return first.rpartition(".")[0] + "." + "+".join(n.rpartition(".")[2] for n in self.names)

    @property
    def rows(self) -> int:
        return sum(c.shape[0] for c in self.codes)

    def label(self, value: ir.Value) -> None:
        """Write on the node of `value` which weights it holds and how many rows each has, for `onnx_reading`."""
        node = value.producer()
        assert node is not None
        rows = [[f"{n}.weight", c.shape[0]] for n, c in zip(self.names, self.codes, strict=True)]
        node.metadata_props[LABEL] = json.dumps(rows)

    @property
    def block(self) -> int:
        groups = self.scales[0].shape[1]
        return scale_block(self.columns) if groups == 1 else self.columns // groups

    def initializers(self, low: Lowering, embedding: bool) -> tuple[ir.Value, ir.Value, int]:
        """(codes, float32 scales, container bits) in the layout of MatMulNBits or of GatherBlockQuantized."""
        wide = container("onnx", self.bits)
        repeat = self.columns // self.block // self.scales[0].shape[1]
        blocks = self.columns // self.block
        if blocks * self.block != self.columns:
            raise ValueError(f"{self.name}: {self.columns} inputs are no multiple of 16")
        shape: tuple[int, ...] = (self.rows, blocks, self.block * wide // 8)
        if embedding:
            shape = (self.rows, self.columns * wide // 8)
        key = "+".join(content_key(c) for c in self.codes)
        codes = low.weight(
            f"{self.name}.q{wide}{'.rows' if embedding else ''}",
            f"codes:{self.bits}>{wide}:{key}",
            codes_chunks(self.codes, self.bits, wide, self.columns),
            ir.DataType.UINT8,
            shape,
        )
        key = "+".join(content_key(s) for s in self.scales)
        scales = low.weight(
            f"{self.name}.q{wide}.scales",
            f"scales:{repeat}:{key}",
            scales_chunks(self.scales, repeat),
            ir.DataType.FLOAT,
            (self.rows, blocks),
        )
        return codes, scales, wide


def _stack(linears: list[ir.Node]) -> Stack:
    codes = [torch_tensor(n.inputs[1]) for n in linears]
    names = [weight_name(n.inputs[1]) for n in linears]
    bits = int(attr(linears[0], "bits"))
    return Stack(names, codes, [torch_tensor(n.inputs[2]) for n in linears], bits, codes[0].shape[1] * 8 // bits)


def lower_linear(low: Lowering, node: ir.Node) -> None:
    low.replace(node, [matmul(low, [node], before=node)])


def matmul(low: Lowering, family: list[ir.Node], before: ir.Node) -> ir.Value:
    """One MatMulNBits for linears that share input, bits and group size: their outputs side by side."""
    stack = _stack(family)
    codes, scales, wide = stack.initializers(low, embedding=False)
    bias = None
    if has_bias(family[0]):
        bias = low.float_tensor(f"{stack.name}.bias.f32", torch.cat([_bias(n.inputs[3]) for n in family]))
    (out,) = low.emit(
        before,
        "MatMulNBits",
        [family[0].inputs[0], codes, scales, None, None, bias],
        domain=MS,
        K=stack.columns,
        N=stack.rows,
        bits=wide,
        block_size=stack.block,
        accuracy_level=4,
    )
    stack.label(out)
    out.name = f"{stack.name}.out"
    return out


def has_bias(node: ir.Node) -> bool:
    return len(node.inputs) > 3 and node.inputs[3] is not None


def _bias(value: ir.Value | None) -> torch.Tensor:
    _, stored = parameter(value)
    return stored.to(torch.float32)


def lower_embedding(low: Lowering, node: ir.Node) -> None:
    ids, codes_in, scales_in = node.inputs[:3]
    codes = torch_tensor(codes_in)
    bits = int(attr(node, "bits"))
    stack = Stack([weight_name(codes_in)], [codes], [torch_tensor(scales_in)], bits, codes.shape[1] * 8 // bits)
    data, scales, wide = stack.initializers(low, embedding=True)
    (out,) = low.emit(
        node,
        "GatherBlockQuantized",
        [data, ids, scales],
        domain=MS,
        bits=wide,
        block_size=stack.block,
        gather_axis=0,
        quantize_axis=1,
    )
    stack.label(out)
    low.replace(node, [out])


def lower_rms_norm(low: Lowering, node: ir.Node) -> None:
    """SimplifiedLayerNormalization; with the residual Add before it, SkipSimplifiedLayerNormalization."""
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
