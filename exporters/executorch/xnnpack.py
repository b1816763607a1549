"""What XNNPACK computes, as a table from op to XNNPACK's nodes: plain ATen, and the private linear, norm and GELU.

Codes go from the mapped checkpoint into the program in their own packing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn
from torch import fx
from torch.export import ExportedProgram

from ...ops.packing import repack
from .delegate import NONE, Constants, Delegate, largest_dims
from .lowerings import container
from .passes.edge import expanded_sizes

ATEN, EW = torch.ops.aten, torch.ops.edgewright


def write(part: ExportedProgram, constants: Constants) -> tuple[bytes, Any]:
    """A part of a program, whose calls are all in `OPS`, as a delegate: its bytes and its named data."""
    delegate = Delegate(part, constants)
    for node in part.graph.nodes:
        if node.op == "call_function":
            OPS[node.target](delegate, node)
    return delegate.finish()


def unary(low: Delegate, node: fx.Node) -> None:
    x = low.value(node.args[0])
    low.emit(_UNARY[node.target](x, low.result(node), 0))


def binary(low: Delegate, node: fx.Node) -> None:
    if node.kwargs.get("alpha", 1) != 1:
        raise ValueError(f"{node.target} with alpha has no XNNPACK lowering")
    a, b = (low.value(x) for x in node.args)
    low.emit(_BINARY[node.target](a, b, low.result(node), 0))


def relu(low: Delegate, node: fx.Node) -> None:
    """Not XNNPACK's clamp: its infinite bound cannot be read back."""
    x = low.value(node.args[0])
    low.emit(xnn.XNNMaximum(x, low.value(0.0), low.result(node), 0))


def softmax(low: Delegate, node: fx.Node) -> None:
    dims = node.meta["val"].dim()
    if node.args[1] not in (-1, dims - 1):
        raise ValueError("XNNPACK's softmax is over the last dimension")
    x = low.value(node.args[0])
    low.emit(xnn.XNNSoftmax(x, low.result(node), 0))


def reshape(low: Delegate, node: fx.Node) -> None:
    x = low.value(node.args[0])
    shape = [d if isinstance(d, int) else 0 for d in node.meta["val"].shape]  # 0: inferred
    low.emit(xnn.XNNStaticReshape(len(shape), shape, x, low.result(node), 0))


def permute(low: Delegate, node: fx.Node) -> None:
    x, order = low.value(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    low.emit(xnn.XNNStaticTranspose(len(order), [int(d) % len(order) for d in order], x, low.result(node), 0))


def cut(low: Delegate, node: fx.Node) -> None:
    """Of a dimension whose size is known; the others may be dynamic."""
    offsets, sizes = [0] * node.meta["val"].dim(), [d if isinstance(d, int) else 0 for d in node.meta["val"].shape]
    offsets[int(node.args[1]) % len(offsets)] = int(node.args[2] or 0)  # type: ignore[arg-type]
    x = low.value(node.args[0])
    low.emit(xnn.XNNStaticSlice(len(sizes), offsets, sizes, x, low.result(node), 0))  # size 0: all there is


def total(low: Delegate, node: fx.Node) -> None:
    """A sum or mean over some dimensions: they are moved to the end and joined into one."""
    x, axes, before = low.value(node.args[0]), _axes(node), node.args[0].meta["val"].shape  # type: ignore[union-attr]
    dims, last = largest_dims(node.args[0]), len(before) - 1
    if axes != [last]:
        others = [i for i in range(len(before)) if i not in axes]
        turned = low.tensor([dims[i] for i in (*others, *axes)])
        low.emit(xnn.XNNStaticTranspose(len(before), [*others, *axes], x, turned, 0))
        count = math.prod(dims[i] for i in axes)
        x, dims = low.tensor([*(dims[i] for i in others), count]), [*(dims[i] for i in others), count]
        flat = [*(before[i] if isinstance(before[i], int) else 0 for i in others), count]
        low.emit(xnn.XNNStaticReshape(len(flat), flat, turned, x, 0))
    kept = _over_last(low, x, dims, 1.0 if node.target in _SUMS else 1.0 / dims[-1])
    if axes == [last] and node.meta["val"].dim() == len(dims):
        low.emit(xnn.XNNCopy(kept, low.result(node), 0))
        return
    shape = [d if isinstance(d, int) else 0 for d in node.meta["val"].shape]
    low.emit(xnn.XNNStaticReshape(len(shape), shape, kept, low.result(node), 0))


def _over_last(low: Delegate, x: int, dims: Sequence[int], factor: float) -> int:
    """The sum over the last dimension, times `factor`, as a linear with one output: XNNPACK has none of its own."""
    out = low.tensor([*dims[:-1], 1])
    low.emit(xnn.XNNFullyConnected(x, low.constant(torch.full((1, dims[-1]), factor)), NONE, out, 0))
    return out


def expand(low: Delegate, node: fx.Node) -> None:
    """A sum with zeros of the new shape."""
    x, zeros = low.value(node.args[0]), torch.zeros(expanded_sizes(node))
    low.emit(xnn.XNNAdd(x, low.constant(zeros), low.result(node), 0))


def pad(low: Delegate, node: fx.Node) -> None:
    x, rank = low.value(node.args[0]), node.meta["val"].dim()
    widths: Any = node.args[1]
    both = [*widths, *[0] * (2 * rank - len(widths))]  # before and after, of the last dimension first
    number: Any = node.args[2] if len(node.args) > 2 else 0
    low.emit(xnn.XNNStaticConstantPad(both[-2::-2], both[::-2], float(number), x, low.result(node), 0))


def reciprocal(low: Delegate, node: fx.Node) -> None:
    x = low.value(node.args[0])
    low.emit(xnn.XNNDiv(low.value(1.0), x, low.result(node), 0))


def concatenate(low: Delegate, node: fx.Node) -> None:
    parts = [low.value(x) for x in node.args[0]]  # type: ignore[union-attr]
    axis = int(node.args[1] if len(node.args) > 1 else 0) % node.meta["val"].dim()  # type: ignore[arg-type]
    dims = largest_dims(node)
    while len(parts) > 1:  # two at a time
        first, second, *parts = parts
        dims[axis] = sum(low.graph.xvalues[p].xvalue_union.dims[axis] for p in (first, second))
        out = low.tensor(dims) if parts else low.result(node)
        low.emit(xnn.XNNConcatenate2(axis, first, second, NONE, NONE, out, 0, NONE))
        parts = [out, *parts] if parts else []


def linear(low: Delegate, node: fx.Node) -> None:
    """A float32 matrix: 16-bit weights, and the rotation of halves."""
    x, weight = low.value(node.args[0]), low.value(node.args[1])
    bias = NONE if len(node.args) < 3 or node.args[2] is None else low.value(node.args[2])
    low.emit(xnn.XNNFullyConnected(x, weight, bias, low.result(node), 0))


# ---- private ops ----------------------------------------------------------------------------------------------------


def quantized_linear(low: Delegate, node: fx.Node) -> None:
    """x through int8, one scale and zero point a row (XNNPACK's dynamic quantization), times our codes."""
    x, codes, scales, bias, bits, group = node.args
    weight = _weight(low, low.stored(codes), low.stored(scales), int(bits), int(group))  # type: ignore[arg-type]
    added = NONE if bias is None else low.value(bias)
    low.emit(xnn.XNNFullyConnected(_dynamic(low, x), weight, added, low.result(node), 0))


def _dynamic(low: Delegate, x: Any) -> int:
    """A value in int8, with one scale and zero point a row that the runtime computes."""
    key = ("int8", x)
    if key not in low.ids:
        value = low.value(x)
        kind = xnn.XNNDatatype.xnn_datatype_qdint8
        low.ids[key] = low.tensor(largest_dims(x), kind, quantized=xnn.PerTokenDynamicQuant(1))
        low.emit(xnn.XNNConvert(value, low.ids[key], 0))
    return low.ids[key]


def _weight(low: Delegate, codes: torch.Tensor, scales: torch.Tensor, bits: int, group: int) -> int:
    """Codes [N, K*bits/8] and scales [N, K/group] in XNNPACK's form: unsigned nibbles, or signed bytes."""
    (rows, groups), columns = scales.shape, scales.shape[1] * group
    wide = container(bits, group, columns)
    packed = repack(codes, bits, wide, columns)
    buffer = low.buffer(packed ^ 0x80 if wide == 8 else packed)  # the top bit: from 0..255 to two's complement
    factors = low.buffer(_exact(scales, torch.bfloat16 if wide == 4 else torch.float32))
    quantized: Any
    if wide == 4:
        kind = xnn.XNNDatatype.xnn_datatype_qbint4
        quantized = xnn.PerChannelGroupQuant([], 0, group, scale_buffer_idx=factors, num_scales=rows * groups)
    else:
        kind = xnn.XNNDatatype.xnn_datatype_qcint8
        quantized = xnn.PerChannelQuant([], 0, factors, rows)
    return low.tensor((rows, columns), kind, buffer, quantized=quantized)


def rms_norm(low: Delegate, node: fx.Node) -> None:
    x, weight, eps, offset = node.args
    dims, value = largest_dims(node), low.value(x)
    square = low.two(xnn.XNNMultiply, value, value, dims)
    mean = _over_last(low, square, dims, 1.0 / dims[-1])
    kept = low.two(xnn.XNNAdd, mean, low.value(eps), [*dims[:-1], 1])
    factor = low.one(xnn.XNNReciprocalSquareRoot, kept, [*dims[:-1], 1])
    normed = low.two(xnn.XNNMultiply, value, factor, dims)
    gamma = low.constant(low.stored(weight).to(torch.float32) + float(offset))  # type: ignore[arg-type]
    low.emit(xnn.XNNMultiply(normed, gamma, low.result(node), 0))


def gelu_tanh(low: Delegate, node: fx.Node) -> None:
    """Written out: XNNPACK's own GELU is not the tanh formula."""
    x, dims = low.value(node.args[0]), largest_dims(node)

    def times(a: int, b: int) -> int:
        return low.two(xnn.XNNMultiply, a, b, dims)

    cubic = times(times(times(x, x), x), low.value(0.044715))
    inner = times(low.two(xnn.XNNAdd, x, cubic, dims), low.value(0.7978845608028654))
    gate = low.two(xnn.XNNAdd, low.one(xnn.XNNTanh, inner, dims), low.value(1.0), dims)
    low.emit(xnn.XNNMultiply(times(x, low.value(0.5)), gate, low.result(node), 0))


def _axes(node: fx.Node) -> list[int]:
    """The dimensions that a sum or mean is over, in order; none if it is over all."""
    rank, axes = node.args[0].meta["val"].dim(), node.args[1] if len(node.args) > 1 else None  # type: ignore[union-attr]
    return sorted(int(a) % rank for a in axes) if isinstance(axes, list | tuple) else []


def _exact(scales: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Scales in XNNPACK's type. Raises ValueError if one is not canonical, so that no value changes."""
    cast = scales.to(wide)
    if not torch.equal(cast.to(torch.float32), scales.to(torch.float32)):
        raise ValueError(f"a scale is not exact in {wide}")
    return cast


# ---- the tables -----------------------------------------------------------------------------------------------------

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
    **dict.fromkeys(_UNARY, unary),
    **dict.fromkeys(_BINARY, binary),
    ATEN.relu.default: relu,
    ATEN._softmax.default: softmax,
    ATEN.view_copy.default: reshape,
    ATEN.unsqueeze_copy.default: reshape,
    ATEN.squeeze_copy.dims: reshape,
    ATEN.permute_copy.default: permute,
    ATEN.cat.default: concatenate,
    ATEN.slice_copy.Tensor: cut,
    ATEN.reciprocal.default: reciprocal,
    ATEN.constant_pad_nd.default: pad,
    ATEN.expand_copy.default: expand,
    **dict.fromkeys(_SUMS | _MEANS, total),
    ATEN.linear.default: linear,
    EW.quantized_linear.default: quantized_linear,
    EW.rms_norm.default: rms_norm,
    EW.gelu_tanh.default: gelu_tanh,
}
"""Op -> what writes its nodes. Ops that are not here stay with ExecuTorch."""


def takes(node: fx.Node) -> bool:
    """Whether XNNPACK takes this call of an op in `OPS`: not every form of an op is written here."""
    value, args, lower = node.meta["val"], list[Any]([*node.args, None, None]), OPS[node.target]
    operand: Any = args[0].meta["val"] if isinstance(args[0], fx.Node) else None
    if node.target is ATEN.gelu.default:
        return bool(node.kwargs.get("approximate", "none") == "none")
    if lower is reshape:
        return sum(not isinstance(d, int) for d in value.shape) < 2
    if lower is cut:
        axis, start = int(args[1]) % value.dim(), args[2] or 0
        sizes = (value.shape[axis], operand.shape[axis])
        one_by_one = len(node.args) < 5 or bool(node.args[4] == 1)
        known = isinstance(start, int) and start >= 0 and all(isinstance(n, int) for n in sizes)
        return one_by_one and known
    if lower is total:
        axes = _axes(node)
        others = [d for i, d in enumerate(operand.shape) if i not in axes]
        known = all(isinstance(operand.shape[a], int) for a in axes) and sum(not isinstance(d, int) for d in others) < 2
        return bool(axes) and bool(others) and known and bool(operand.dtype == torch.float32)
    if lower is expand:
        return all(isinstance(d, int) for d in expanded_sizes(node)) and math.prod(expanded_sizes(node)) <= 4096
    if lower is pad:
        # Padding of a state stays with ExecuTorch, whose slice comes next; XNNPACK's JSON has no infinite numbers.
        sized = all(isinstance(p, int) and p >= 0 for p in args[1])
        return bool(args[0].op == "call_function") and sized and math.isfinite(float(args[2] or 0))
    return True
