"""A graph as ONNX for TensorRT: the standard's ops, weights through DequantizeLinear, linears and attention in float16."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...errors import UserError
from ...graph import Graph
from ...targets.onnx.nodes import attr
from ...targets.storage import container, scale_block
from ..artefact import Options
from ..onnx.dialect import Dialect, StandardLowering
from ..onnx.linear import weight_name
from ..onnx.lowering import torch_tensor
from ..onnx.standard_attention import scatter_slots
from ..onnx.standard_ops import lower_standard, rows
from ..onnx.translate import translate
from ..onnx.weight_file import WeightFile, codes_chunks, content_key
from .weights import NAMES


def _dequantized(low: StandardLowering, node: ir.Node) -> ir.Value:
    """The weight of a quantized node, float16 [N, K]: INT4 or INT8 codes and float16 scales through DequantizeLinear."""
    codes_in, scales_in = node.inputs[1], node.inputs[2]
    codes, scales = torch_tensor(codes_in), torch_tensor(scales_in)
    bits = int(attr(node, "bits"))
    rows, columns = codes.shape[0], codes.shape[1] * 8 // bits
    groups, wide = scales.shape[1], container("tensorrt", bits)
    # With one INT4 scale per channel TensorRT would widen the codes to INT8. Repeated per block, they stay INT4.
    repeat = columns // scale_block(columns) if groups == 1 and wide == 4 and columns % 16 == 0 else 1
    blocks = groups * repeat
    name = weight_name(codes_in)
    if wide == 4 and columns // blocks not in (16, 32, 64, 128):
        raise UserError(
            f"{name}: one scale for {columns // blocks} inputs does not exist for tensorrt at {bits} bits; "
            "give it groups of 16, 32, 64 or 128, or 8 bits"
        )
    kind = ir.DataType.INT4 if wide == 4 else ir.DataType.INT8
    q = low.weight(
        f"{name}.int{wide}",
        f"int{wide}:{bits}:{content_key(codes)}",
        _signed(codes_chunks([codes], bits, wide, columns), wide),
        kind,
        (rows, columns),
    )
    per_channel = blocks == 1
    s = low.weight(
        f"{name}.scales",
        f"scales:{repeat}:{content_key(scales)}",
        [_half(scales.repeat_interleave(repeat, 1) if repeat > 1 else scales)],
        ir.DataType.FLOAT16,
        (rows,) if per_channel else (rows, blocks),
    )
    attributes: dict[str, Any] = {"axis": 0} if per_channel else {"axis": 1, "block_size": columns // blocks}
    dense = low.built(("dequantized", q, s), lambda: low.one(node, "DequantizeLinear", [q, s], **attributes))
    label = dense.producer().metadata_props  # type: ignore[union-attr]
    label[NAMES] = json.dumps(sorted({*json.loads(label.get(NAMES, "[]")), f"{name}.weight"}))
    return dense


def _signed(chunks: Iterable[np.ndarray], bits: int) -> Iterator[np.ndarray]:
    """Codes stored from 0 up as two's complement of the same packing: their highest bit flips."""
    flip = np.uint8(0x88 if bits == 4 else 0x80)
    for chunk in chunks:
        yield np.bitwise_xor(chunk, flip)


def _half(scales: torch.Tensor) -> np.ndarray:
    """Scales as float16. Raises ValueError if one is not canonical, so that no value changes."""
    exact = scales.to(torch.float16)
    if not torch.equal(exact.to(torch.float32), scales.to(torch.float32)):
        raise ValueError("a scale is not exact in float16")
    return np.asarray(exact.numpy())


def _linear(low: StandardLowering, node: ir.Node) -> None:
    weight = _dequantized(low, node)
    if ("turned", weight) in low.shared:
        weight = _copied(low, node, weight)
    turned = low.built(("turned", weight), lambda: low.one(node, "Transpose", [weight], perm=[1, 0]))
    x = node.inputs[0]
    assert x is not None
    out = low.widen(node, low.one(node, "MatMul", [low.narrow(node, x), turned]))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        out = low.one(node, "Add", [out, node.inputs[3]])
    low.replace(node, [out])


def _copied(low: StandardLowering, node: ir.Node, weight: ir.Value) -> ir.Value:
    """A weight again, for a second linear: builders segfault where attentions share theirs. The file has its bytes once."""
    source = weight.producer()
    assert source is not None
    again: list[ir.Value | None] = []
    for value in source.inputs:
        assert value is not None
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        name = f"{value.name}.again{len(low.graph.initializers)}"
        place = (tensor.location, tensor.offset, tensor.length, tensor.dtype)
        copy = ir.ExternalTensor(*place, shape=ir.Shape(tensor.shape), name=name, base_dir=tensor.base_dir)
        one = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=value.type, const_value=copy)
        low.graph.register_initializer(one)
        again.append(one)
    attributes = {key: value.value for key, value in source.attributes.items()}
    dense = low.one(node, "DequantizeLinear", again, **attributes)
    dense.producer().metadata_props[NAMES] = source.metadata_props[NAMES]  # type: ignore[union-attr]
    return dense


def _embedding(low: StandardLowering, node: ir.Node) -> None:
    rows = low.one(node, "Gather", [_dequantized(low, node), node.inputs[0]], axis=0)
    low.replace(node, [low.widen(node, rows)])


DIALECT = Dialect(linear=_linear, embedding=_embedding, write_cache=scatter_slots, half=True)


def lower(
    graph: Graph, states: set[str], weights: WeightFile, options: Options, directory: Path
) -> tuple[dict[str, int], list[str]]:
    """Write `<graph>.onnx`. The states named `states` are float16 in every graph that has them.

    The state of a recurrence and its arithmetic stay float32. Returns op -> nodes, and the inputs that the graph does not use
    (`past_length`, where no layer looks back).
    """
    model = translate(graph, rows(DIALECT))
    idle = [str(v.name) for v in model.graph.inputs if not v.uses()]
    half = ir.TensorType(ir.DataType.FLOAT16)
    for value in model.graph.inputs:
        if value.name in states:
            value.type = half
    low = StandardLowering(model.graph, weights, options.max_positions, dialect=DIALECT)
    lower_standard(model, low)
    for i, value in enumerate(model.graph.outputs):
        if value.name in states and value.dtype != ir.DataType.FLOAT16:
            name, value.name = value.name, f"{value.name}.wide"
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16})
            model.graph.append(cast)
            cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = name, half, value.shape
            model.graph.outputs[i] = cast.outputs[0]
    ir.save(model, directory / f"{graph.name}.onnx")
    return dict(Counter(node.op_type for node in model.graph)), idle
