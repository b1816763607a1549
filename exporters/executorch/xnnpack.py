"""One XNNPACK delegate written straight from its part of the graph, op by op. What may enter: `ops`.

The table `OPS` at the end says how each op is computed: plain ATen, and the private linear, norm and GELU. Codes go from the
mapped checkpoint into the program in their own packing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import serialize_xnnpack_binary
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.sym_util import eval_shape_upper_bound
from torch import fx
from torch.export import ExportedProgram

from ...ops.packing import repack
from .lowerings import container

ATEN, EW = torch.ops.aten, torch.ops.edgewright
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
    """Writes XNNPACK's graph of one part of a program."""

    def __init__(self, part: ExportedProgram, constants: Constants) -> None:
        self.part, self.constants = part, constants
        self.graph = xnn.XNNGraph("0", [], [], 0, [], [], [xnn.ConstantDataOffset(0, 0)])
        self._store = NamedDataStore()
        self._ids: dict[Any, int] = {}
        signature = part.graph_signature
        self._stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._stored |= signature.inputs_to_lifted_tensor_constants
        nodes = list(part.graph.nodes)
        given = [n for n in nodes if n.op == "placeholder" and n.name not in self._stored]
        self._results = {n: i for i, n in enumerate(nodes[-1].args[0], len(given))}
        for i, node in enumerate(given):
            self._ids[node] = self._tensor(_dims(node), external=i, flags=_INPUT)
            self.graph.input_ids.append(self._ids[node])
        self.graph.num_externs = len(given) + len(self._results)

    def finish(self) -> tuple[bytes, Any]:
        """The delegate as the runtime reads it, and its named data."""
        for node in self.part.graph.nodes:
            if node.op == "call_function":
                OPS[node.target](self, node)
        return serialize_xnnpack_binary(self.graph, bytearray()), self._store.get_named_data_store_output()

    # -- values

    def _tensor(
        self,
        dims: Sequence[int],
        kind: xnn.XNNDatatype = xnn.XNNDatatype.xnn_datatype_fp32,
        buffer: int = 0,
        external: int = NONE,
        flags: int = 0,
        quantized: Any = None,
    ) -> int:
        number = len(self.graph.xvalues)
        value = xnn.XNNTensorValue(kind, len(dims), list(dims), buffer, external, flags, number)
        self.graph.xvalues.append(
            xnn.XValue(value if quantized is None else xnn.XNNQuantizedTensorValue(value, quantized))
        )
        return number

    def _buffer(self, tensor: torch.Tensor) -> int:
        """Index of a constant's bytes."""
        key, raw = self.constants.add(tensor)
        self._store.add_named_data(key, raw, _ALIGNMENT)
        self.graph.constant_data.append(xnn.ConstantDataOffset(_ELSEWHERE, len(raw), key))
        return len(self.graph.constant_data) - 1

    def _constant(self, tensor: torch.Tensor) -> int:
        """A small float32 constant, one value for equal contents."""
        key = (tuple(tensor.shape), tensor.numpy().tobytes())
        if key not in self._ids:
            self._ids[key] = self._tensor(list(tensor.shape) or [1], buffer=self._buffer(tensor))
        return self._ids[key]

    def held(self, node: Any) -> torch.Tensor:
        """The tensor behind a constant's placeholder."""
        target = self._stored[node.name]
        tensor: torch.Tensor = (
            self.part.state_dict[target] if target in self.part.state_dict else self.part.constants[target]
        )
        return tensor.detach()

    def value(self, argument: Any) -> int:
        """Id of an argument: a result, a constant, or a number."""
        if not isinstance(argument, fx.Node):
            return self._constant(torch.tensor([float(argument)]))
        if argument not in self._ids:
            tensor = self.held(argument)
            buffer = self._buffer(tensor.to(torch.float32))
            self._ids[argument] = self._tensor(list(tensor.shape) or [1], buffer=buffer)
        return self._ids[argument]

    def result(self, node: fx.Node) -> int:
        """A new value for what the node computes."""
        external = self._results.get(node)
        if external is None:
            self._ids[node] = self._tensor(_dims(node))
        else:
            self._ids[node] = self._tensor(_dims(node), external=external, flags=_OUTPUT)
            self.graph.output_ids.append(self._ids[node])
        return self._ids[node]

    def _emit(self, node: Any, limits: Any = None) -> None:
        self.graph.xnodes.append(xnn.XNode(node, 0, limits))

    def one(self, kind: Any, x: int, dims: Sequence[int]) -> int:
        out = self._tensor(dims)
        self._emit(kind(x, out, 0))
        return out

    def two(self, kind: Any, a: int, b: int, dims: Sequence[int]) -> int:
        out = self._tensor(dims)
        self._emit(kind(a, b, out, 0))
        return out

    # -- ops of one node

    def unary(self, node: fx.Node) -> None:
        x = self.value(node.args[0])
        self._emit(_UNARY[node.target](x, self.result(node), 0))

    def binary(self, node: fx.Node) -> None:
        if node.kwargs.get("alpha", 1) != 1:
            raise ValueError(f"{node.target} with alpha has no XNNPACK lowering")
        a, b = (self.value(x) for x in node.args)
        self._emit(_BINARY[node.target](a, b, self.result(node), 0))

    def relu(self, node: fx.Node) -> None:
        """Not XNNPACK's clamp: its infinite bound cannot be read back."""
        x = self.value(node.args[0])
        self._emit(xnn.XNNMaximum(x, self.value(0.0), self.result(node), 0))

    def softmax(self, node: fx.Node) -> None:
        dims = node.meta["val"].dim()
        if node.args[1] not in (-1, dims - 1):
            raise ValueError("XNNPACK's softmax is over the last dimension")
        x = self.value(node.args[0])
        self._emit(xnn.XNNSoftmax(x, self.result(node), 0))

    def reshape(self, node: fx.Node) -> None:
        x = self.value(node.args[0])
        shape = [d if isinstance(d, int) else 0 for d in node.meta["val"].shape]  # 0: inferred
        self._emit(xnn.XNNStaticReshape(len(shape), shape, x, self.result(node), 0))

    def permute(self, node: fx.Node) -> None:
        x, order = self.value(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
        self._emit(xnn.XNNStaticTranspose(len(order), [int(d) % len(order) for d in order], x, self.result(node), 0))

    def slice(self, node: fx.Node) -> None:
        """Of a dimension whose size is known; the others may be dynamic."""
        offsets, sizes = [0] * node.meta["val"].dim(), [d if isinstance(d, int) else 0 for d in node.meta["val"].shape]
        offsets[int(node.args[1]) % len(offsets)] = int(node.args[2] or 0)  # type: ignore[arg-type]
        x = self.value(node.args[0])
        self._emit(xnn.XNNStaticSlice(len(sizes), offsets, sizes, x, self.result(node), 0))  # size 0: all there is

    def total(self, node: fx.Node) -> None:
        """A sum or mean over some dimensions, which are put last and become one for it."""
        x, axes, given = self.value(node.args[0]), _axes(node), node.args[0].meta["val"].shape  # type: ignore[union-attr]
        dims, last = _dims(node.args[0]), len(given) - 1
        if axes != [last]:
            others = [i for i in range(len(given)) if i not in axes]
            turned = self._tensor([dims[i] for i in (*others, *axes)])
            self._emit(xnn.XNNStaticTranspose(len(given), [*others, *axes], x, turned, 0))
            count = math.prod(dims[i] for i in axes)
            x, dims = self._tensor([*(dims[i] for i in others), count]), [*(dims[i] for i in others), count]
            flat = [*(given[i] if isinstance(given[i], int) else 0 for i in others), count]
            self._emit(xnn.XNNStaticReshape(len(flat), flat, turned, x, 0))
        kept = self._over_last(x, dims, 1.0 if node.target in _SUMS else 1.0 / dims[-1])
        if axes == [last] and node.meta["val"].dim() == len(dims):
            self._emit(xnn.XNNCopy(kept, self.result(node), 0))
            return
        shape = [d if isinstance(d, int) else 0 for d in node.meta["val"].shape]
        self._emit(xnn.XNNStaticReshape(len(shape), shape, kept, self.result(node), 0))

    def _over_last(self, x: int, dims: Sequence[int], factor: float) -> int:
        """The sum over the last dimension, times `factor`, as a linear with one output: XNNPACK has none of its own."""
        out = self._tensor([*dims[:-1], 1])
        self._emit(xnn.XNNFullyConnected(x, self._constant(torch.full((1, dims[-1]), factor)), NONE, out, 0))
        return out

    def expand(self, node: fx.Node) -> None:
        """A sum with zeros of the new shape."""
        x, zeros = self.value(node.args[0]), torch.zeros(expanded(node))
        self._emit(xnn.XNNAdd(x, self._constant(zeros), self.result(node), 0))

    def pad(self, node: fx.Node) -> None:
        x, rank = self.value(node.args[0]), node.meta["val"].dim()
        given: Any = node.args[1]
        both = [*given, *[0] * (2 * rank - len(given))]  # before and after, of the last dimension first
        number: Any = node.args[2] if len(node.args) > 2 else 0
        self._emit(xnn.XNNStaticConstantPad(both[-2::-2], both[::-2], float(number), x, self.result(node), 0))

    def reciprocal(self, node: fx.Node) -> None:
        x = self.value(node.args[0])
        self._emit(xnn.XNNDiv(self.value(1.0), x, self.result(node), 0))

    def concatenate(self, node: fx.Node) -> None:
        parts = [self.value(x) for x in node.args[0]]  # type: ignore[union-attr]
        axis = int(node.args[1] if len(node.args) > 1 else 0) % node.meta["val"].dim()  # type: ignore[arg-type]
        dims = _dims(node)
        while len(parts) > 1:  # two at a time
            first, second, *parts = parts
            dims[axis] = sum(self.graph.xvalues[p].xvalue_union.dims[axis] for p in (first, second))
            out = self._tensor(dims) if parts else self.result(node)
            self._emit(xnn.XNNConcatenate2(axis, first, second, NONE, NONE, out, 0, NONE))
            parts = [out, *parts] if parts else []

    def linear(self, node: fx.Node) -> None:
        """A float32 matrix: 16-bit weights, and the rotation of halves."""
        x, weight = self.value(node.args[0]), self.value(node.args[1])
        bias = NONE if len(node.args) < 3 or node.args[2] is None else self.value(node.args[2])
        self._emit(xnn.XNNFullyConnected(x, weight, bias, self.result(node), 0))

    # -- private ops

    def quantized_linear(self, node: fx.Node) -> None:
        """x through int8, one scale and zero point a row (XNNPACK's dynamic quantization), times our codes."""
        x, codes, scales, bias, bits, group = node.args
        weight = self._weight(self.held(codes), self.held(scales), int(bits), int(group))  # type: ignore[arg-type]
        added = NONE if bias is None else self.value(bias)
        self._emit(xnn.XNNFullyConnected(self._dynamic(x), weight, added, self.result(node), 0))

    def _dynamic(self, x: Any) -> int:
        key = ("int8", x)
        if key not in self._ids:
            given = self.value(x)
            kind = xnn.XNNDatatype.xnn_datatype_qdint8
            self._ids[key] = self._tensor(_dims(x), kind, quantized=xnn.PerTokenDynamicQuant(1))
            self._emit(xnn.XNNConvert(given, self._ids[key], 0))
        return self._ids[key]

    def _weight(self, codes: torch.Tensor, scales: torch.Tensor, bits: int, group: int) -> int:
        """Codes [N, K*bits/8] and scales [N, K/group] in XNNPACK's form: unsigned nibbles, or signed bytes."""
        (rows, groups), columns = scales.shape, scales.shape[1] * group
        held = container(bits, group, columns)
        packed = repack(codes, bits, held, columns)
        buffer = self._buffer(packed ^ 0x80 if held == 8 else packed)  # the top bit: from 0..255 to two's complement
        factors = self._buffer(_exact(scales, torch.bfloat16 if held == 4 else torch.float32))
        quantized: Any
        if held == 4:
            kind = xnn.XNNDatatype.xnn_datatype_qbint4
            quantized = xnn.PerChannelGroupQuant([], 0, group, scale_buffer_idx=factors, num_scales=rows * groups)
        else:
            kind = xnn.XNNDatatype.xnn_datatype_qcint8
            quantized = xnn.PerChannelQuant([], 0, factors, rows)
        return self._tensor((rows, columns), kind, buffer, quantized=quantized)

    def rms_norm(self, node: fx.Node) -> None:
        x, weight, eps, offset = node.args
        dims, given = _dims(node), self.value(x)
        square = self.two(xnn.XNNMultiply, given, given, dims)
        mean = self._over_last(square, dims, 1.0 / dims[-1])
        kept = self.two(xnn.XNNAdd, mean, self.value(eps), [*dims[:-1], 1])
        factor = self.one(xnn.XNNReciprocalSquareRoot, kept, [*dims[:-1], 1])
        normed = self.two(xnn.XNNMultiply, given, factor, dims)
        gamma = self._constant(self.held(weight).to(torch.float32) + float(offset))  # type: ignore[arg-type]
        self._emit(xnn.XNNMultiply(normed, gamma, self.result(node), 0))

    def gelu_tanh(self, node: fx.Node) -> None:
        """Written out: XNNPACK's own GELU is not the tanh formula."""
        x, dims = self.value(node.args[0]), _dims(node)

        def times(a: int, b: int) -> int:
            return self.two(xnn.XNNMultiply, a, b, dims)

        cubic = times(times(times(x, x), x), self.value(0.044715))
        inner = times(self.two(xnn.XNNAdd, x, cubic, dims), self.value(0.7978845608028654))
        gate = self.two(xnn.XNNAdd, self.one(xnn.XNNTanh, inner, dims), self.value(1.0), dims)
        self._emit(xnn.XNNMultiply(times(x, self.value(0.5)), gate, self.result(node), 0))


def _dims(node: Any) -> list[int]:
    """The largest shape that a node's value takes."""
    return [int(d) for d in eval_shape_upper_bound(node.meta["val"].shape)] or [1]


def _axes(node: fx.Node) -> list[int]:
    """Those that a sum or mean is over, from the front; none if it is over all."""
    rank, given = node.args[0].meta["val"].dim(), node.args[1] if len(node.args) > 1 else None  # type: ignore[union-attr]
    return sorted(int(a) % rank for a in given) if isinstance(given, list | tuple) else []


def expanded(node: fx.Node) -> list[Any]:
    """The new size of each dimension that an expansion widens, 1 for the others."""
    made, given = node.meta["val"].shape, node.args[0].meta["val"].shape  # type: ignore[union-attr]
    before = [1] * (len(made) - len(given)) + list(given)
    return [1 if str(a) == str(b) else a for a, b in zip(made, before, strict=True)]


def _exact(scales: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Scales in XNNPACK's type. Raises ValueError if one is not canonical, so that no value changes."""
    cast = scales.to(wide)
    if not torch.equal(cast.to(torch.float32), scales.to(torch.float32)):
        raise ValueError(f"a scale is not exact in {wide}")
    return cast


_UNARY: dict[Any, Any] = {
    ATEN.tanh.default: xnn.XNNTanh,
    ATEN.sigmoid.default: xnn.XNNSigmoid,
    ATEN.cos.default: xnn.XNNCos,
    ATEN.sin.default: xnn.XNNSin,
    ATEN.rsqrt.default: xnn.XNNReciprocalSquareRoot,
    ATEN.sqrt.default: xnn.XNNSquareRoot,
    ATEN.exp.default: xnn.XNNExp,
    ATEN.log.default: xnn.XNNLog,
    ATEN.neg.default: xnn.XNNNegate,
    ATEN.abs.default: xnn.XNNAbs,
    ATEN.gelu.default: xnn.XNNGelu,  # the exact one
}
_BINARY: dict[Any, Any] = {
    ATEN.add.Tensor: xnn.XNNAdd,
    ATEN.sub.Tensor: xnn.XNNSubtract,
    ATEN.mul.Tensor: xnn.XNNMultiply,
    ATEN.div.Tensor: xnn.XNNDiv,
    ATEN.bmm.default: xnn.XNNBatchMatrixMultiply,
    ATEN.maximum.default: xnn.XNNMaximum,
    ATEN.minimum.default: xnn.XNNMinimum,
}
_SUMS = {ATEN.sum.dim_IntList}
_MEANS = {ATEN.mean.dim}
OPS: dict[Any, Callable[[Delegate, fx.Node], None]] = {
    **dict.fromkeys(_UNARY, Delegate.unary),
    **dict.fromkeys(_BINARY, Delegate.binary),
    ATEN.relu.default: Delegate.relu,
    ATEN._softmax.default: Delegate.softmax,
    ATEN.view_copy.default: Delegate.reshape,
    ATEN.unsqueeze_copy.default: Delegate.reshape,
    ATEN.squeeze_copy.dims: Delegate.reshape,
    ATEN.permute_copy.default: Delegate.permute,
    ATEN.cat.default: Delegate.concatenate,
    ATEN.slice_copy.Tensor: Delegate.slice,
    ATEN.reciprocal.default: Delegate.reciprocal,
    ATEN.constant_pad_nd.default: Delegate.pad,
    ATEN.expand_copy.default: Delegate.expand,
    **dict.fromkeys(_SUMS | _MEANS, Delegate.total),
    ATEN.linear.default: Delegate.linear,
    EW.quantized_linear.default: Delegate.quantized_linear,
    EW.rms_norm.default: Delegate.rms_norm,
    EW.gelu_tanh.default: Delegate.gelu_tanh,
}


def takes(node: fx.Node) -> bool:
    """Whether the form of the call, of an op in `OPS`, is one that is written here."""
    value, args, write = node.meta["val"], list[Any]([*node.args, None, None]), OPS[node.target]
    given: Any = args[0].meta["val"] if isinstance(args[0], fx.Node) else None
    if node.target is ATEN.gelu.default:
        return bool(node.kwargs.get("approximate", "none") == "none")
    if write is Delegate.reshape:
        return sum(not isinstance(d, int) for d in value.shape) < 2
    if write is Delegate.slice:
        axis, start = int(args[1]) % value.dim(), args[2] or 0
        sizes = (value.shape[axis], given.shape[axis])
        one_by_one = len(node.args) < 5 or bool(node.args[4] == 1)
        known = isinstance(start, int) and start >= 0 and all(isinstance(n, int) for n in sizes)
        return one_by_one and known
    if write is Delegate.total:
        axes = _axes(node)
        others = [d for i, d in enumerate(given.shape) if i not in axes]
        known = all(isinstance(given.shape[a], int) for a in axes) and sum(not isinstance(d, int) for d in others) < 2
        return bool(axes) and bool(others) and known and bool(given.dtype == torch.float32)
    if write is Delegate.expand:
        return all(isinstance(d, int) for d in expanded(node)) and math.prod(expanded(node)) <= 4096
    if write is Delegate.pad:
        # Of a state it stays with ExecuTorch, whose slice comes next; XNNPACK's JSON has no infinite numbers.
        sized = all(isinstance(p, int) and p >= 0 for p in args[1])
        return bool(args[0].op == "call_function") and sized and math.isfinite(float(args[2] or 0))
    return True
