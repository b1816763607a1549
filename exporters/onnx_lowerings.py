"""The table from `edgewright::` op to ONNX Runtime kernels, and the fusions the CPU provider is fast with.

What may enter: `ops`, onnx_ir, `onnx_weights`. Each lowering rewrites one private node in place. Facts it relies on (which
kernels exist, that softcap comes before the mask, that packed QKV and shared past and present work) are pinned in
tests/test_onnx_facts.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ..errors import UserError
from ..quant.targets import container, scale_block
from .onnx_translate import DOMAIN
from .onnx_weights import WeightFile, codes_chunks, content_key, scales_chunks

MS = "com.microsoft"
LABEL = "edgewright.weights"
"""The metadata of a node with quantized weights: JSON, [[checkpoint name, rows], …]."""

MASKED = float(np.finfo(np.float32).min)  # finite: a fully masked row must stay finite, padding rows feed later layers


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
    """The mapped torch tensor behind an initializer that torch.onnx made, or the array where it folded a small Cast."""
    assert value is not None
    assert value.const_value is not None
    raw = getattr(value.const_value, "raw", None)
    return raw.detach() if isinstance(raw, torch.Tensor) else torch.from_numpy(value.const_value.numpy().copy())


def weight_name(codes: ir.Value | None) -> str:
    """The quantized module's name in the checkpoint, from that of its codes."""
    return str(codes.name).removesuffix(".codes")  # type: ignore[union-attr]


def attr(node: ir.Node, name: str) -> Any:
    return node.attributes[name].value


def nodes(graph: ir.Graph, op: str) -> list[ir.Node]:
    return [n for n in graph if n.domain == DOMAIN and n.op_type == op]


# ---- quantized weights ----------------------------------------------------------------------------------------------


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
    low.replace(node, [_matmul(low, [node], before=node)])


def _matmul(low: Lowering, family: list[ir.Node], before: ir.Node) -> ir.Value:
    """One MatMulNBits for linears that share input, bits and group size: their outputs side by side."""
    stack = _stack(family)
    codes, scales, wide = stack.initializers(low, embedding=False)
    bias = None
    if _has_bias(family[0]):
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


def _has_bias(node: ir.Node) -> bool:
    return len(node.inputs) > 3 and node.inputs[3] is not None


def _bias(value: ir.Value | None) -> torch.Tensor:
    """A bias initializer, through the Cast that a bfloat16 one has before it."""
    assert value is not None
    producer = value.producer()
    return torch_tensor(producer.inputs[0] if producer is not None else value).to(torch.float32)


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


# ---- pointwise ------------------------------------------------------------------------------------------------------


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


# ---- attention ------------------------------------------------------------------------------------------------------


@dataclass
class Heads:
    """An attention operand [B, S, heads, head_dim] traced back to its flat [B, S, heads * head_dim] value."""

    flat: ir.Value
    heads: int
    head_dim: int


def _heads(low: Lowering, value: ir.Value, before: ir.Node) -> Heads:
    assert value.shape is not None
    heads, dim = int(value.shape[2]), int(value.shape[3])  # type: ignore[arg-type]
    if dim % 16:
        raise UserError(
            f"head_dim {dim}: ONNX Runtime's GroupQueryAttention takes multiples of 16; choose another format"
        )
    reshape = value.producer()
    if reshape is not None and reshape.op_type == "Reshape" and reshape.domain == "":
        source = reshape.inputs[0]
        if source is not None and source.shape is not None and len(source.shape) == 3:
            return Heads(source, heads, dim)
    flat = low.constant(np.array([0, 0, heads * dim], np.int64))
    (out,) = low.emit(before, "Reshape", [value, flat])
    return Heads(out, heads, dim)


def _unroped(value: ir.Value | None) -> tuple[ir.Value, ir.Node | None]:
    """The value before its Rope node, and that node."""
    assert value is not None
    node = value.producer()
    if node is not None and node.domain == DOMAIN and node.op_type == "Rope":
        assert node.inputs[0] is not None
        return node.inputs[0], node
    return value, None


def _tables(low: Lowering, rope: ir.Node) -> tuple[ir.Value, ir.Value]:
    """cos and sin [max_positions, head_dim / 2] as initializers."""
    inv_freq = torch_tensor(rope.inputs[2]).to(torch.float32)
    angles = torch.arange(low.max_positions, dtype=torch.float32).unsqueeze(-1) * inv_freq
    return low.float_tensor("rope.cos", angles.cos()), low.float_tensor("rope.sin", angles.sin())


def _operands(low: Lowering, node: ir.Node, parts: list[Heads]) -> list[ir.Value | None]:
    """q, k and v for GroupQueryAttention: packed by one MatMulNBits where their linears allow it, else apart.

    Only here are linears fused: gate and up as one product would need a Split, which costs more than it saves.
    """
    family = [p.flat.producer() for p in parts]
    linears = [n for n in family if n is not None and n.domain == DOMAIN and n.op_type == "QuantizedLinear"]

    def form(n: ir.Node) -> Any:
        return n.inputs[0], attr(n, "bits"), attr(n, "group_size"), _has_bias(n)

    if len(linears) < 3 or len({form(n) for n in linears}) > 1:
        return [p.flat for p in parts]
    return [_matmul(low, linears, before=node), None, None]


def lower_cached_attention(low: Lowering, node: ir.Node) -> None:
    """GroupQueryAttention with past and present in one buffer, RoPE inside where positions count on from past_length."""
    q_in, k_in, v, k_cache, v_cache, past = node.inputs[:6]
    q, q_rope = _unroped(q_in)
    k, k_rope = _unroped(k_in)
    inside = q_rope is not None and k_rope is not None and _counts_on(q_rope, past) and _counts_on(k_rope, past)
    if not inside:
        raise ValueError(f"{node.name}: rotary positions that do not count on from past_length have no lowering")
    assert q_rope is not None
    assert v is not None
    assert past is not None
    cos, sin = _tables(low, q_rope)
    parts = [_heads(low, q, node), _heads(low, k, node), _heads(low, v, node)]
    operands = _operands(low, node, parts)
    total = _shared(low, ("total", past), lambda: _total_length(low, parts[0].flat, past))
    lengths = _shared(low, ("lengths", past), lambda: _seqlens(low, parts[0].flat, total))
    window = int(attr(node, "window"))
    outs = low.emit(
        node,
        "GroupQueryAttention",
        [*operands, k_cache, v_cache, lengths, total, cos, sin],
        outputs=3,
        domain=MS,
        num_heads=parts[0].heads,
        kv_num_heads=parts[1].heads,
        scale=float(attr(node, "scale")),
        softcap=float(attr(node, "softcap")),
        local_window_size=window if window else -1,
        do_rotary=1,
        rotary_interleaved=0,
    )
    low.replace(node, list(outs))


def _shared(low: Lowering, key: Any, build: Callable[[], ir.Value]) -> ir.Value:
    if key not in low.shared:
        low.shared[key] = build()
    return low.shared[key]


def _counts_on(rope: ir.Node, past: ir.Value | None) -> bool:
    positions = rope.inputs[1]
    add = positions.producer() if positions is not None else None
    if add is None or add.op_type != "Add" or past not in add.inputs:
        return False
    other = add.inputs[1] if add.inputs[0] is past else add.inputs[0]
    made = other.producer() if other is not None else None
    return made is not None and made.op_type == "Range"


def _first(low: Lowering) -> ir.Node:
    return next(iter(low.graph))


def _total_length(low: Lowering, flat: ir.Value, past: ir.Value) -> ir.Value:
    """past + new tokens, int32 scalar."""
    anchor = _first(low)
    (length,) = low.emit(anchor, "Shape", [low.graph.inputs[0]], start=1, end=2)
    (total,) = low.emit(anchor, "Add", [past, length])
    (scalar,) = low.emit(anchor, "Squeeze", [total])
    (out,) = low.emit(anchor, "Cast", [scalar], to=ir.DataType.INT32)
    return out


def _seqlens(low: Lowering, flat: ir.Value, total: ir.Value) -> ir.Value:
    """total - 1 for every row of the batch, int32 [B]."""
    producer = total.producer()
    assert producer is not None
    batch_node = ir.node("Shape", [low.graph.inputs[0]], {"start": 0, "end": 1})
    less = ir.node("Sub", [total, low.constant(np.array(1, np.int32))])
    expand = ir.node("Expand", [less.outputs[0], batch_node.outputs[0]])
    low.graph.insert_after(producer, [batch_node, less, expand])
    return expand.outputs[0]


def _float_mask(low: Lowering, mask: ir.Value) -> ir.Value:
    """A bool mask as 0 or the lowest float, made once for each mask."""

    def build() -> ir.Value:
        where = ir.node(
            "Where", [mask, low.constant(np.array(0.0, np.float32)), low.constant(np.array(MASKED, np.float32))]
        )
        producer = mask.producer()
        if producer is None:
            low.graph.insert_before(_first(low), where)
        else:
            low.graph.insert_after(producer, where)
        return where.outputs[0]

    return _shared(low, ("bias", mask), build)


def lower_bidirectional_attention(low: Lowering, node: ir.Node) -> None:
    """GroupQueryAttention with causal off, the mask as a bias; softcap comes before the bias."""
    q, q_rope = _unroped(node.inputs[0])
    k, k_rope = _unroped(node.inputs[1])
    v, mask = node.inputs[2], node.inputs[3]
    if q_rope is None or k_rope is None or not (_counts_from_zero(q_rope) and _counts_from_zero(k_rope)):
        raise ValueError(f"{node.name}: rotary positions that do not count from zero have no lowering")
    assert v is not None
    assert mask is not None
    cos, sin = _tables(low, q_rope)
    parts = [_heads(low, q, node), _heads(low, k, node), _heads(low, v, node)]
    operands = _operands(low, node, parts)
    total = _shared(low, "source_total", lambda: _source_length(low))
    lengths = _shared(low, "source_lengths", lambda: _seqlens(low, parts[0].flat, total))
    outs = low.emit(
        node,
        "GroupQueryAttention",
        [*operands, None, None, lengths, total, cos, sin, None, _float_mask(low, mask)],
        outputs=3,
        domain=MS,
        num_heads=parts[0].heads,
        kv_num_heads=parts[1].heads,
        scale=float(attr(node, "scale")),
        softcap=float(attr(node, "softcap")),
        local_window_size=-1,
        do_rotary=1,
        rotary_interleaved=0,
        causal=0,
    )
    low.replace(node, [outs[0]])


def _counts_from_zero(rope: ir.Node) -> bool:
    made = rope.inputs[1].producer() if rope.inputs[1] is not None else None
    return made is not None and made.op_type == "Range"


def _source_length(low: Lowering) -> ir.Value:
    anchor = _first(low)
    (length,) = low.emit(anchor, "Shape", [low.graph.inputs[0]], start=1, end=2)
    (scalar,) = low.emit(anchor, "Squeeze", [length])
    (out,) = low.emit(anchor, "Cast", [scalar], to=ir.DataType.INT32)
    return out


def lower_cross_attention(low: Lowering, node: ir.Node) -> None:
    """The standard Attention-24: the one CPU kernel with soft-capping whose query and key lengths may differ."""
    q, k, v, mask = node.inputs[:4]
    assert q is not None
    assert q.shape is not None
    assert mask is not None
    rows = _shared(low, ("rows", mask), lambda: _mask_rows(low, mask))
    heads, dim = int(q.shape[2]), int(q.shape[3])  # type: ignore[arg-type]
    (q_first,) = low.emit(node, "Transpose", [q], perm=[0, 2, 1, 3])
    (attended,) = low.emit(
        node,
        "Attention",
        [q_first, k, v, rows],
        scale=float(attr(node, "scale")),
        softcap=float(attr(node, "softcap")),
    )
    (back,) = low.emit(node, "Transpose", [attended], perm=[0, 2, 1, 3])
    flat = low.constant(np.array([0, 0, heads * dim], np.int64))
    (out,) = low.emit(node, "Reshape", [back, flat])
    low.replace(node, [out])


def _mask_rows(low: Lowering, mask: ir.Value) -> ir.Value:
    """A mask [B, 1, 1, T] as [B, 1, S, T]: the kernel does not broadcast over queries."""
    producer = mask.producer()
    assert producer is not None
    length = ir.node("Shape", [low.graph.inputs[0]], {"start": 1, "end": 2})
    one = low.constant(np.array([1], np.int64))
    shape = ir.node("Concat", [one, one, length.outputs[0], one], {"axis": 0})
    expand = ir.node("Expand", [mask, shape.outputs[0]])
    low.graph.insert_after(producer, [length, shape, expand])
    return expand.outputs[0]


LOWERINGS: dict[str, Callable[[Lowering, ir.Node], None]] = {
    "CachedAttention": lower_cached_attention,
    "BidirectionalAttention": lower_bidirectional_attention,
    "CrossAttention": lower_cross_attention,
    "QuantizedLinear": lower_linear,
    "QuantizedEmbedding": lower_embedding,
    "RmsNorm": lower_rms_norm,
    "GeluTanh": lower_gelu_tanh,
}
"""Lowered one node at a time, in this order: attention first, which takes Rope and the q/k/v linears into itself."""
