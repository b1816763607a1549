"""The graph at work while its private nodes are lowered, and what lowerings ask of a node's inputs.

A lowering rewrites one private node in place. The tables are in `export` (ONNX Runtime's kernels) and `standard_ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...targets.onnx.releases import has
from .translate import DOMAIN
from .weight_file import WeightFile, content_key

MS = "com.microsoft"


@dataclass
class Lowering:
    """One graph being lowered.

    weights: where large tensors go. max_positions: rows of rotary tables. shared: what was emitted once for several nodes.
    runtime: the ONNX Runtime that must open the graph; None for the newest.
    """

    graph: ir.Graph
    weights: WeightFile
    max_positions: int
    shared: dict[Any, ir.Value] = field(default_factory=dict)
    runtime: str | None = None

    def has(self, op: str, attribute: str = "") -> bool:
        """Whether the runtime that must open the graph has an op, with an attribute."""
        return self.runtime is None or has(self.runtime, op, attribute)

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
        return self.shared[key]

    def replace(self, node: ir.Node, values: list[ir.Value]) -> None:
        """Put `values` in the place of the outputs of `node`, as inputs of other nodes and as graph outputs, and remove it."""
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
    """The mapped torch tensor behind an initializer of torch.onnx, or its array where torch.onnx folded a small one.

    A folded bfloat16 comes as float32: numpy has no bfloat16.
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
    """Name and values of an initializer, also behind a Cast or a change of its shape. Raises ValueError for other values."""
    assert value is not None
    node = value.producer()
    if node is None and value.const_value is not None:
        return str(value.name), torch_tensor(value)
    if node is None or node.domain or node.op_type not in ("Cast", "Squeeze", "Unsqueeze", "Reshape"):
        raise ValueError(f"{value.name} is computed where a parameter is expected")
    return parameter(node.inputs[0])


def operands(node: ir.Node, start: int, end: int) -> tuple[ir.Value, ...]:
    """The inputs from `start` up to `end` of a private node, none of which is optional."""
    values = tuple(v for v in node.inputs[start:end] if v is not None)
    assert len(values) == end - start
    return values


def dims(value: ir.Value | None) -> tuple[int, int]:
    """The last two dimensions of a value of rank 4, such as the heads and the width of [B, S, heads, D]."""
    assert value is not None
    assert value.shape is not None
    return int(value.shape[2]), int(value.shape[3])  # type: ignore[arg-type]


def kv_heads_of(cache: ir.Value | None) -> int:
    """The heads of a cache [B, KV, C, D]."""
    assert cache is not None
    assert cache.shape is not None
    return int(cache.shape[1])  # type: ignore[arg-type]


def nodes(graph: ir.Graph, op: str) -> list[ir.Node]:
    """The private nodes of an op, such as `RmsNorm`."""
    return [n for n in graph if n.domain == DOMAIN and n.op_type == op]
