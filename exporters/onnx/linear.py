"""Linears and embeddings on ONNX Runtime's kernels: MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

import json
from dataclasses import dataclass

import onnx_ir as ir
import torch

from ...targets.onnx.nodes import LABEL, attr
from ...targets.storage import container, scale_block
from .lowering import MS, Lowering, parameter, torch_tensor
from .weight_file import codes_chunks, content_key, scales_chunks


def weight_name(codes: ir.Value | None) -> str:
    """The quantized module's name in the checkpoint, from that of its codes."""
    return str(codes.name).removesuffix(".codes")  # type: ignore[union-attr]


@dataclass
class Stack:
    """The weights of linears that share an input, as one matrix: the rows of one after the rows of the other.

    names: those of the linears in the checkpoint, in this order.
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
        """Write on the node of `value` which weights it has and how many rows of each, for `targets.onnx.weights`."""
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
        if not low.has("GatherBlockQuantized" if embedding else "MatMulNBits", f"bits={wide}"):
            wide = 4  # the same values, in twice the bytes
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
