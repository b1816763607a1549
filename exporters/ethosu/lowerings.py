"""The `edgewright::` ops in ATen that the Ethos-U computes, as a table.

`Rewriter` points the private nodes at these functions, and tracing inlines them. The NPU has integer sums, products, tables and
matrix products. So a mean is a sum, GELU is one table, a softmax divides after the product with the values, and a mask is a
number that is added.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from ...errors import UserError
from ...ops.packing import unpack
from .internals import register_quantized_ops

register_quantized_ops()
EW = torch.ops.edgewright
QD = torch.ops.quantized_decomposed
NEGLIGIBLE = 16.0
"""Scores that far below the largest of their row saturate there: exp(-16) is 1e-7, which counts as nothing."""

NO_SOFTCAP = 112.0
"""Where no soft-capping bounds the scores, larger ones saturate here: masked scores must stay apart from the others."""


def signed_codes(codes: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """int8 [N, K] of packed codes [N, K*bits/8]."""
    return (unpack(codes, bits, columns).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def quantized_linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The bias is added afterwards: as part of the product it would be rounded to a step that differs by channel.

    Codes of fewer bits are stored in 8: the NPU's 4-bit weights take 8-bit activations only.
    """
    weight = QD.dequantize_per_channel.default(codes, scales, zeros, 0, -128, 127, torch.int8)
    product = torch.nn.functional.linear(x, weight)
    return product if bias is None else product + bias


def quantized_embedding(ids: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The one op with weights that stays on the host: ExecuTorch's own kernel over int8 rows."""
    out: torch.Tensor = QD.embedding_byte.dtype(codes, scales, None, -128, 127, ids, dtype=torch.float32)
    return out


def rms_norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """gamma: the weight times sqrt(D), so that a sum takes the place of the mean.

    Each row is first divided by its peak: else the squares of small rows would vanish in 16 bits. The norm takes that factor out
    again, so it need not be exact. There is no eps: it matters only for rows near its root, which are a few steps of the fixed
    point.
    """
    level = x * torch.reciprocal(x.abs().amax(-1, keepdim=True))
    return level * torch.rsqrt((level * level).sum(-1, keepdim=True)) * gamma


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """One table. Spelled out, the cube would need a range that costs small values their digits."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: [B, S, H, D]; cos, sin: [S, 1, D], the first half of sin negated. The halves change places."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin


def mask_bias(mask: torch.Tensor, allowed: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """bool [1, 1, T, T] -> float32 [1, T, T] to add to scores. On the host: the smaller NPUs have no select."""
    return torch.where(mask.squeeze(0), allowed, masked)


def bidirectional_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """q [1, S, H, D]; k, v [1, S, KV, D]; bias [1, S, S]. Query heads that share a key head are rows of one product."""
    _, seq, heads, width = q.shape
    kv = k.shape[2]
    groups = heads // kv
    q = q.reshape(seq, kv, groups, width).permute(1, 2, 0, 3).reshape(kv, groups * seq, width)
    k, v = k.squeeze(0).permute(1, 2, 0), v.squeeze(0).permute(1, 0, 2)
    scores = torch.bmm(q, k)
    scores = torch.tanh(scores * (scale / softcap)) * softcap if softcap else scores * scale
    bias = torch.cat([bias] * groups, 1) if groups > 1 else bias
    reach = (softcap or NO_SOFTCAP) + NEGLIGIBLE
    scores = torch.clamp(scores + bias, -reach, reach)
    weights = torch.exp(torch.clamp(scores - scores.amax(-1, keepdim=True), -NEGLIGIBLE, NEGLIGIBLE))
    total = weights.sum(-1, keepdim=True)
    share = torch.reciprocal(total)
    out = torch.bmm(weights, v) * share
    return out.reshape(kv, groups, seq, width).permute(2, 0, 1, 3).reshape(1, seq, heads * width)


class Rewriter:
    """Points the private nodes of one exported module at the functions above.

    checkpoint_name: the module's own name of a parameter -> the checkpoint's. After `run`, `linears` are the names of the
    linears' weights in the order of the graph, `table` is the name of the embedding's, which has `rows` rows.
    """

    def __init__(self, module: fx.GraphModule, checkpoint_name: Callable[[str], str]) -> None:
        self.module, self.graph, self.checkpoint_name = module, module.graph, checkpoint_name
        self.linears: list[str] = []
        self.table, self.rows = "", 0
        self._constants: dict[tuple[Any, ...], str] = {}
        self._memo: dict[tuple[Any, ...], fx.Node] = {}

    def run(self) -> fx.GraphModule:
        """Raises UserError for a weight that the NPU cannot hold or an op that has no form here."""
        self._require_quantized()
        self._fold_constants()
        for node in list(self.graph.nodes):
            if node.op == "call_function" and getattr(node.target, "namespace", "") == "edgewright":
                rewrite = _REWRITES.get(node.target)
                if rewrite is None:
                    raise UserError(
                        f"{node.target} has no form on Ethos-U, which takes encoders; choose another --format"
                    )
                with self.graph.inserting_before(node):
                    rewrite(self, node)
        self._mark_entries()
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return fx.GraphModule(self.module, self.graph)

    def _require_quantized(self) -> None:
        for node in self.graph.nodes:
            if node.target in _FLOAT_WEIGHTS:
                weight = node.all_input_nodes[_FLOAT_WEIGHTS[node.target]]
                while weight.op != "get_attr":  # a cast of it
                    weight = weight.all_input_nodes[0]
                name = self.checkpoint_name(str(weight.target))
                raise UserError(
                    f"{name} is not quantized, and Ethos-U computes with 8-bit weights: give it 8 bits or less"
                )

    def _fold_constants(self) -> None:
        """What depends on no input (positions, distances) becomes a constant."""
        varying: set[fx.Node] = set()
        for node in list(self.graph.nodes):
            if node.op in ("placeholder", "output") or any(n in varying for n in node.all_input_nodes):
                varying.add(node)
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node not in varying and any(u in varying for u in node.users):
                with self.graph.inserting_before(node):
                    node.replace_all_uses_with(self.constant(("folded", node.name), partial(self.value, node)))

    def _mark_entries(self) -> None:
        """Put a clone, which tracing keeps, where a value of the host enters the NPU's part of the graph."""
        functions = {quantized_linear, rms_norm, gelu_tanh, rope, bidirectional_attention}
        hosted: set[fx.Node] = {n for n in self.graph.nodes if n.op == "placeholder"}
        entries: dict[fx.Node, list[fx.Node]] = {}
        for node in self.graph.nodes:
            from_host = [n for n in node.all_input_nodes if n in hosted]
            if node.op == "output" or not from_host:
                continue
            if node.target not in functions and all(n in hosted or n.op == "get_attr" for n in node.all_input_nodes):
                hosted.add(node)
                continue
            for value in from_host:
                entries.setdefault(value, []).append(node)
        for value, users in entries.items():
            with self.graph.inserting_after(value):
                entry = self.graph.call_function(torch.ops.aten.clone.default, (value,))
            for user in users:
                user.replace_input_with(value, entry)

    def value(self, node: Any) -> torch.Tensor:
        """The tensor of a node that depends on constants alone."""
        if node.op == "get_attr":
            tensor: torch.Tensor = operator.attrgetter(str(node.target))(self.module)
            return tensor
        arguments: Any = fx.map_arg((node.args, node.kwargs), self.value)
        computed: torch.Tensor = node.target(*arguments[0], **arguments[1])
        return computed

    def constant(self, key: tuple[Any, ...], make: Callable[[], torch.Tensor]) -> fx.Node:
        """A node for a constant, made once for each key."""
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self.module.register_buffer(name, make().detach().clone(memory_format=torch.contiguous_format))
            self._constants[key] = name
        return self.graph.get_attr(self._constants[key])

    def _codes(self, codes: fx.Node, scales: fx.Node, bits: int, group: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        """(weight name, int8 [N, K], float32 [N])."""
        name = self.checkpoint_name(str(codes.target).removesuffix(".codes") + ".weight")
        factors = self.value(scales)
        if factors.shape[1] != 1:
            raise UserError(
                f"{name} has a scale for every {group} inputs, which an Ethos-U cannot hold; "
                "quantize with one scale per channel: --group-size channel"
            )
        signed = signed_codes(self.value(codes), bits, group)
        return name, signed, factors.to(torch.float32).reshape(-1)

    def linear(self, node: fx.Node) -> None:
        x, codes, scales, bias, bits, group = node.args
        assert isinstance(codes, fx.Node)
        assert isinstance(scales, fx.Node)
        assert isinstance(bits, int)
        assert isinstance(group, int)
        name, signed, factors = self._codes(codes, scales, bits, group)
        self.linears.append(name)
        node.target = quantized_linear
        node.args = (
            x,
            self.constant(("codes", name), lambda: signed),
            self.constant(("scales", name), lambda: factors),
            self.constant(("zeros", len(factors)), lambda: torch.zeros(len(factors), dtype=torch.int64)),
            bias,
        )

    def embedding(self, node: fx.Node) -> None:
        ids, codes, scales, bits, group = node.args
        assert isinstance(codes, fx.Node)
        assert isinstance(scales, fx.Node)
        assert isinstance(bits, int)
        assert isinstance(group, int)
        name, signed, factors = self._codes(codes, scales, bits, group)
        self.table, self.rows = name, len(signed)
        node.target = quantized_embedding
        node.args = (
            ids,
            self.constant(("rows", name), lambda: signed),
            self.constant(("factors", name), lambda: factors),
        )

    def rms_norm(self, node: fx.Node) -> None:
        x, weight, _, offset = node.args
        gamma = self.value(weight).to(torch.float32) + float(offset)  # type: ignore[arg-type]
        size = gamma.shape[0]
        node.target = rms_norm
        node.args = (x, self.constant(("gamma", node.name), lambda: gamma * math.sqrt(size)))

    def gelu(self, node: fx.Node) -> None:
        node.target = gelu_tanh

    def rope(self, node: fx.Node) -> None:
        x, positions, inv_freq = node.args
        angles = self.value(positions).to(torch.float32).unsqueeze(-1) * self.value(inv_freq)
        cos, sin = angles.cos(), angles.sin()
        key = inv_freq.target  # type: ignore[union-attr]
        node.target = rope
        node.args = (
            x,
            self.constant(("cos", key), lambda: torch.cat((cos, cos), -1).unsqueeze(1)),
            self.constant(("sin", key), lambda: torch.cat((-sin, sin), -1).unsqueeze(1)),
        )

    def attention(self, node: fx.Node) -> None:
        q, k, v, mask, scale, softcap = node.args
        assert isinstance(softcap, float)
        key = (mask, softcap)
        if key not in self._memo:
            low = -2.0 * ((softcap or NO_SOFTCAP) + NEGLIGIBLE)
            allowed = self.constant(("number", 0.0), lambda: torch.zeros(()))
            masked = self.constant(("number", low), lambda: torch.full((), low))
            self._memo[key] = self.graph.call_function(mask_bias, (mask, allowed, masked))
        node.target = bidirectional_attention
        node.args = (q, k, v, self._memo[key], scale, softcap)


_FLOAT_WEIGHTS = {torch.ops.aten.linear.default: 1, torch.ops.aten.embedding.default: 0}
"""Ops with an unquantized weight -> which of their inputs it is."""

_REWRITES: dict[Any, Callable[[Rewriter, fx.Node], None]] = {
    EW.quantized_linear.default: Rewriter.linear,
    EW.quantized_embedding.default: Rewriter.embedding,
    EW.rms_norm.default: Rewriter.rms_norm,
    EW.gelu_tanh.default: Rewriter.gelu,
    EW.rope.default: Rewriter.rope,
    EW.bidirectional_attention.default: Rewriter.attention,
}
"""An `edgewright::` op without a row is refused: the NPU must take the encoder in one piece."""
