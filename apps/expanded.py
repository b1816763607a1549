"""The form of ONNX graphs for runtimes that expand a quantized matrix at every call, as WebAssembly does.

The file on the wire stays as it is, with codes and scales; each MatMulNBits becomes a MatMul over a float32 matrix in a file that
is not stored: a client makes it of codes and scales when it loads (`contract.Expanded`). Tables of embeddings stay quantized. A
weight has the same value as before, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from ..errors import UserError
from ..system.reading import one_line
from .contract import Expanded, Matrix

FILE = "expanded.bin"
_ALIGNMENT = 64
_FLOAT = 4
_BITS = (2, 4, 8)
_Place = tuple[int, int]


def write_expanded(folder: Path, names: Sequence[str], weights: str, into: Path) -> Expanded:
    """Write the graphs `<name>.onnx` of `folder` in this form to `into`. weights: the file that holds codes and scales.

    Raises UserError for a quantized matrix that no exporter here writes.
    """
    found = _Matrices(weights)
    for name in names:
        model = onnx.load(str(folder / f"{name}.onnx"), load_external_data=False)
        found.rewrite(model, name)
        (into / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
    return Expanded(file=FILE, of=weights, bytes=found.size, matrices=tuple(found.made.values()))


class _Matrices:
    """The matrices of all graphs: one that several share is expanded once.

    made: (codes, scales) -> matrix. size: bytes of the file.
    """

    def __init__(self, weights: str) -> None:
        self.made: dict[tuple[_Place, _Place], Matrix] = {}
        self.size = 0
        self._weights = weights

    def rewrite(self, model: onnx.ModelProto, name: str) -> None:
        """Replace the MatMulNBits of a graph, and drop what only they read."""
        graph = model.graph
        stored = {t.name: t for t in graph.initializer}
        nodes: list[onnx.NodeProto] = []
        added: dict[str, TensorProto] = {}
        for node in graph.node:
            if node.op_type != "MatMulNBits":
                nodes.append(node)
                continue
            matrix = self._matrix(node, stored, name)
            weight = f"{node.input[1]}.expanded"
            added[weight] = _external(weight, matrix)
            bias = node.input[5] if len(node.input) > 5 else ""
            product = f"{node.output[0]}.product" if bias else node.output[0]
            nodes.append(helper.make_node("MatMul", [node.input[0], weight], [product], name=node.name))
            if bias:
                nodes.append(helper.make_node("Add", [product, bias], [node.output[0]], name=f"{node.name}.bias"))
        read = {value for node in nodes for value in node.input}
        kept = [t for t in graph.initializer if t.name in read]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend([*kept, *added.values()])

    def _matrix(self, node: onnx.NodeProto, stored: dict[str, TensorProto], graph: str) -> Matrix:
        sizes = {a.name: a.i for a in node.attribute}
        rows, columns, bits, block = (sizes.get(key, 0) for key in ("N", "K", "bits", "block_size"))
        whole = bits in _BITS and min(rows, columns, block) > 0 and columns % block == 0
        plain = not any(node.input[3:5]) and all(name in stored for name in node.input[1:3])
        if not whole or not plain:
            raise UserError(
                f"{graph}.onnx: {one_line(node.name, 60)} is no matrix that an export has; export the bundle again"
            )
        codes, scales = (self._place(stored[name], graph) for name in node.input[1:3])
        if codes[1] != rows * columns * bits // 8 or scales[1] != rows * (columns // block) * _FLOAT:
            raise UserError(
                f"{graph}.onnx: {one_line(node.name, 60)} has other sizes than its weights; export the bundle again"
            )
        if (codes, scales) not in self.made:
            offset = self.size + -self.size % _ALIGNMENT
            self.size = offset + rows * columns * _FLOAT
            self.made[codes, scales] = Matrix(
                offset=offset, rows=rows, columns=columns, bits=bits, block=block, codes=codes, scales=scales
            )
        return self.made[codes, scales]

    def _place(self, tensor: TensorProto, graph: str) -> _Place:
        """Where a tensor lies in the weights' file."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.get("location") != self._weights:
            raise UserError(
                f"{graph}.onnx: {one_line(tensor.name, 60)} is not in {self._weights}; export the bundle again"
            )
        return int(entries["offset"]), int(entries["length"])


def _external(name: str, matrix: Matrix) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[matrix.columns, matrix.rows])
    tensor.data_location = TensorProto.EXTERNAL
    length = matrix.rows * matrix.columns * _FLOAT
    for key, value in (("location", FILE), ("offset", str(matrix.offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor
