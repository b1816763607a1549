"""XNNPACK's graph of one delegate: its values, constants and nodes. `xnnpack` says which nodes an op becomes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import serialize_xnnpack_binary
from executorch.exir.sym_util import eval_shape_upper_bound
from torch import fx
from torch.export import ExportedProgram

from .internals import NamedDataStore

NONE = 2**32 - 1
"""XNNPACK's "no such value"."""
_ELSEWHERE = 2**64 - 1  # the offset of a constant that lies in the program's named data
_ALIGNMENT = 16
_INPUT, _OUTPUT = 1, 2


class Constants:
    """Bytes of the delegates' constants under their SHA-256: the same ones, of whatever method, are one object."""

    def __init__(self) -> None:
        self._bytes: dict[str, bytes] = {}

    def add(self, tensor: torch.Tensor) -> tuple[str, bytes]:
        """Key and bytes of a tensor. By content alone: an address may come again once its tensor is gone."""
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        key = hashlib.sha256(raw).hexdigest()
        return key, self._bytes.setdefault(key, raw)


class Delegate:
    """XNNPACK's graph of one part of a program, as it is written. Values are numbered.

    graph: XNNPACK's own form. ids: node, constant or other key -> its value.
    """

    def __init__(self, part: ExportedProgram, constants: Constants) -> None:
        self.part, self.constants = part, constants
        self.graph = xnn.XNNGraph("0", [], [], 0, [], [], [xnn.ConstantDataOffset(0, 0)])
        self._store = NamedDataStore()
        self.ids: dict[Any, int] = {}
        signature = part.graph_signature
        self._stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._stored |= signature.inputs_to_lifted_tensor_constants
        nodes = list(part.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder" and n.name not in self._stored]
        self._results = {n: i for i, n in enumerate(nodes[-1].args[0], len(inputs))}
        for i, node in enumerate(inputs):
            self.ids[node] = self.tensor(largest_dims(node), external=i, flags=_INPUT)
            self.graph.input_ids.append(self.ids[node])
        self.graph.num_externs = len(inputs) + len(self._results)

    def finish(self) -> tuple[bytes, Any]:
        """The delegate as the runtime reads it, and its named data."""
        return serialize_xnnpack_binary(self.graph, bytearray()), self._store.get_named_data_store_output()

    # -- values

    def tensor(
        self,
        dims: Sequence[int],
        kind: xnn.XNNDatatype = xnn.XNNDatatype.xnn_datatype_fp32,
        buffer: int = 0,
        external: int = NONE,
        flags: int = 0,
        quantized: Any = None,
    ) -> int:
        """A new value. buffer: the index of its constant; external: its place among inputs and outputs."""
        number = len(self.graph.xvalues)
        value = xnn.XNNTensorValue(kind, len(dims), list(dims), buffer, external, flags, number)
        self.graph.xvalues.append(
            xnn.XValue(value if quantized is None else xnn.XNNQuantizedTensorValue(value, quantized))
        )
        return number

    def buffer(self, tensor: torch.Tensor) -> int:
        """Index of a constant's bytes."""
        key, raw = self.constants.add(tensor)
        self._store.add_named_data(key, raw, _ALIGNMENT)
        self.graph.constant_data.append(xnn.ConstantDataOffset(_ELSEWHERE, len(raw), key))
        return len(self.graph.constant_data) - 1

    def constant(self, tensor: torch.Tensor) -> int:
        """A small float32 constant, one value for equal contents."""
        key = (tuple(tensor.shape), tensor.numpy().tobytes())
        if key not in self.ids:
            self.ids[key] = self.tensor(list(tensor.shape) or [1], buffer=self.buffer(tensor))
        return self.ids[key]

    def stored(self, node: Any) -> torch.Tensor:
        """The tensor behind a constant's placeholder."""
        target = self._stored[node.name]
        tensor: torch.Tensor = (
            self.part.state_dict[target] if target in self.part.state_dict else self.part.constants[target]
        )
        return tensor.detach()

    def value(self, argument: Any) -> int:
        """Id of an argument: a result, a constant, or a number."""
        if not isinstance(argument, fx.Node):
            return self.constant(torch.tensor([float(argument)]))
        if argument not in self.ids:
            tensor = self.stored(argument)
            index = self.buffer(tensor.to(torch.float32))
            self.ids[argument] = self.tensor(list(tensor.shape) or [1], buffer=index)
        return self.ids[argument]

    def result(self, node: fx.Node) -> int:
        """A new value for what the node computes."""
        external = self._results.get(node)
        if external is None:
            self.ids[node] = self.tensor(largest_dims(node))
        else:
            self.ids[node] = self.tensor(largest_dims(node), external=external, flags=_OUTPUT)
            self.graph.output_ids.append(self.ids[node])
        return self.ids[node]

    def emit(self, node: Any) -> None:
        self.graph.xnodes.append(xnn.XNode(node, 0, None))

    def one(self, kind: Any, x: int, dims: Sequence[int]) -> int:
        """The new value of an op of one operand."""
        out = self.tensor(dims)
        self.emit(kind(x, out, 0))
        return out

    def two(self, kind: Any, a: int, b: int, dims: Sequence[int]) -> int:
        """The new value of an op of two operands."""
        out = self.tensor(dims)
        self.emit(kind(a, b, out, 0))
        return out


def largest_dims(node: Any) -> list[int]:
    """The largest shape that a node's value has."""
    return [int(d) for d in eval_shape_upper_bound(node.meta["val"].shape)] or [1]
