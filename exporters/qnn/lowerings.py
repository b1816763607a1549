"""Linears and embeddings as the NPU takes them: codes and scales in ONNX Runtime's block-quantized ops; all else is float16."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...errors import UserError
from ...targets.onnx.nodes import attr
from ...targets.storage import container
from ..onnx.dialect import Dialect, StandardLowering
from ..onnx.linear import Stack, weight_name
from ..onnx.lowering import MS, torch_tensor
from ..onnx.standard_attention import scatter_slots
from ..onnx.weight_file import WeightFile, codes_chunks, content_key, scales_chunks


def dialect(rows: WeightFile) -> Dialect:
    """How HTP wants the standard's ops: everything float16, linears as MatMulNBits; the embedding's rows go to `rows`."""

    def embedding(low: StandardLowering, node: ir.Node) -> None:
        _embedding(low, node, rows)

    return Dialect(linear=_linear, embedding=embedding, write_cache=scatter_slots, all_half=True)


def _stack(node: ir.Node) -> Stack:
    codes = torch_tensor(node.inputs[1])
    bits = int(attr(node, "bits"))
    columns = codes.shape[1] * 8 // bits
    stack = Stack([weight_name(node.inputs[1])], [codes], [torch_tensor(node.inputs[2])], bits, columns)
    if columns % stack.block:
        raise UserError(f"{stack.name}: {columns} inputs are no multiple of 16, which --format qnn needs")
    return stack


def _codes(low: StandardLowering, stack: Stack, suffix: str, shape: tuple[int, ...]) -> ir.Value:
    wide = container("qnn", stack.bits)
    return low.weight(
        f"{stack.name}.q{wide}{suffix}",
        f"codes{suffix}:{stack.bits}>{wide}:{content_key(stack.codes[0])}",
        codes_chunks(stack.codes, stack.bits, wide, stack.columns),
        ir.DataType.UINT8,
        shape,
    )


def _scales(low: StandardLowering, stack: Stack, suffix: str) -> ir.Value:
    """float16 [N, blocks]; one scale per channel is repeated for each block."""
    blocks = stack.columns // stack.block
    repeat = blocks // stack.scales[0].shape[1]
    chunks = (_half(stack.name, chunk) for chunk in scales_chunks(stack.scales, repeat))
    key = f"scales16{suffix}:{repeat}:{content_key(stack.scales[0])}"
    return low.weight(f"{stack.name}.scales{suffix}", key, chunks, ir.DataType.FLOAT16, (stack.rows, blocks))


def _half(name: str, scales: np.ndarray) -> np.ndarray:
    """Scales as float16. Raises ValueError if one is not canonical, so that no value changes."""
    exact = scales.astype(np.float16)
    if not np.array_equal(exact.astype(np.float32), scales):
        raise ValueError(f"{name}: a scale is not exact in float16")
    return exact


def _linear(low: StandardLowering, node: ir.Node) -> None:
    stack, wide = _stack(node), container("qnn", int(attr(node, "bits")))
    data = _codes(low, stack, "", (stack.rows, stack.columns // stack.block, stack.block * wide // 8))
    sizes = {"K": stack.columns, "N": stack.rows, "bits": wide, "block_size": stack.block}
    x = node.inputs[0]
    assert x is not None
    assert x.shape is not None
    deep = len(x.shape) > 3  # pixels: HTP takes no more than a rank of 3
    rows = low.one(node, "Reshape", [x, low.ints(1, -1, stack.columns)]) if deep else x
    out = low.emit(node, "MatMulNBits", [rows, data, _scales(low, stack, "")], domain=MS, **sizes)[0]
    stack.label(out)
    if deep:
        out = low.one(node, "Reshape", [out, low.ints(*x.shape[:-1], stack.rows)])  # type: ignore[arg-type]
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        out = low.one(node, "Add", [out, node.inputs[3]])
    low.replace(node, [out])


def _embedding(low: StandardLowering, node: ir.Node, rows: WeightFile) -> None:
    stack, wide = _stack(node), container("qnn", int(attr(node, "bits")))
    weights, low.weights = low.weights, rows
    data = _codes(low, stack, ".rows", (stack.rows, stack.columns * wide // 8))
    scales = _scales(low, stack, ".rows")
    low.weights = weights
    sizes = {"bits": wide, "block_size": stack.block, "gather_axis": 0, "quantize_axis": 1}
    out = low.emit(node, "GatherBlockQuantized", [data, node.inputs[0], scales], domain=MS, **sizes)[0]
    stack.label(out)
    low.replace(node, [out])
