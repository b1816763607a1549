"""One exported module rewritten for ExecuTorch. What may enter: `ops`.

Attention, rotary embedding and embeddings are pointed at their functions in `executorch_lowerings`, with tables stored as
the constants those want; linears, norms and GELU stay private nodes, which `executorch_delegates` writes. Small constants
are shared by content and common sub-results computed once, which keeps lowering, whose time goes by nodes, short.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass

from . import executorch_lowerings as low

EW = torch.ops.edgewright


class Rewriter:
    """Rewrites one exported module in place. Constants are shared by content; sub-results by the nodes they come from."""

    def __init__(self, module: fx.GraphModule, capacity: int) -> None:
        self.module, self.graph, self.capacity = module, module.graph, capacity
        self._constants: dict[tuple[Any, ...], str] = {}
        self._memo: dict[tuple[Any, ...], fx.Node] = {}
        self._fold_casts()
        self._share_constants()
        shared = CSEPass()(module)  # a new module; what the layers compute alike (positions, masks) is one node in it
        assert shared is not None
        self.module, self.graph = shared.graph_module, shared.graph_module.graph

    def run(self) -> fx.GraphModule:
        for node in list(self.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _REWRITES:
                with self.graph.inserting_before(node):
                    _REWRITES[node.target](self, node)
            elif node.target in _VIEWS:
                self._infer_dynamic_size(node)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return fx.GraphModule(self.module, self.graph)  # leaves behind what is read no more: export would store it

    # -- constants

    def value(self, node: Any) -> torch.Tensor:
        assert isinstance(node, fx.Node)
        assert node.op == "get_attr"
        found: torch.Tensor = operator.attrgetter(str(node.target))(self.module)
        return found

    def constant(self, key: tuple[Any, ...], make: Callable[[], torch.Tensor]) -> fx.Node:
        """A node for a constant, made once for each key. Alone in its storage: ExecuTorch stores storages whole."""
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self.module.register_buffer(name, _owned(make().detach()))
            self._constants[key] = name
        return self.graph.get_attr(self._constants[key])

    def _fold_casts(self) -> None:
        """`get_attr -> to(dtype)` becomes a constant of that dtype: XNNPACK takes no computed weights."""
        for node in list(self.graph.nodes):
            if node.target not in _CASTS or not isinstance(node.args[0], fx.Node) or node.args[0].op != "get_attr":
                continue
            source, dtype = node.args[0], node.meta["val"].dtype
            with self.graph.inserting_before(node):
                value = self.value(source)
                cast = self.constant(("cast", source.target, dtype), partial(value.to, dtype))
            node.replace_all_uses_with(cast)
            self.graph.erase_node(node)

    def _share_constants(self) -> None:
        """Small tensors of equal content (rotary frequencies) become one node each, for the CSE that follows."""
        first: dict[tuple[Any, ...], fx.Node] = {}
        for node in list(self.graph.nodes):
            if node.op != "get_attr":
                continue
            tensor = self.value(node)
            key: tuple[Any, ...] = (node.target,)
            if tensor.numel() <= 4096 and tensor.dtype == torch.float32 and not str(node.target).startswith("state_"):
                key = (tuple(tensor.shape), tensor.detach().numpy().tobytes())
            if key in first:
                node.replace_all_uses_with(first[key])
                self.graph.erase_node(node)
            else:
                first[key] = node
        entry = next(n for n in self.graph.nodes if n.op != "placeholder")
        for node in first.values():  # in front of everything, so that they dominate their new users
            if node is not entry:
                entry.prepend(node)

    # -- sub-results

    def once(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """The call's node, one for equal arguments. It comes before the node that is being rewritten."""
        key = (function, *args)
        if key not in self._memo:
            self._memo[key] = self.graph.call_function(function, args)
        return self._memo[key]

    def start(self, past_length: fx.Node) -> fx.Node:
        return self.once(low.start_of, past_length, self.capacity)

    # -- nodes

    def _infer_dynamic_size(self, node: fx.Node) -> None:
        """A reshape with one symbolic size has it inferred: XNNPACK refuses sizes it cannot see."""
        sizes = list(node.args[1])  # type: ignore[arg-type]
        dynamic = [i for i, size in enumerate(sizes) if isinstance(size, fx.Node)]
        if len(dynamic) == 1 and -1 not in sizes:
            sizes[dynamic[0]] = -1
            node.args = (node.args[0], sizes)

    def embedding(self, node: fx.Node) -> None:
        ids, codes, scales, bits, group = node.args
        assert isinstance(bits, int)
        assert isinstance(group, int)
        packed, factors = self.value(codes), self.value(scales)
        held = low.table_bits(bits)
        key = (codes.target, scales.target)  # type: ignore[union-attr]
        node.target = low.quantized_embedding
        node.args = (
            ids,
            self.constant(("rows", *key), lambda: low.table(packed, bits, held, factors.shape[1] * group)),
            self.constant(("factors", *key), lambda: factors.to(torch.float16)),  # canonical scales: exact
            held,
        )

    def rope(self, node: fx.Node) -> None:
        x, positions, inv_freq = node.args
        half = self.value(inv_freq).shape[0]
        tables = self.once(low.rotary_tables, positions, inv_freq)
        cos, sin = (self.once(operator.getitem, tables, i) for i in (0, 1))
        node.target = low.rope
        node.args = (x, cos, sin, self.constant(("rotation", half), lambda: low.rotation(half)))

    def bidirectional(self, node: fx.Node) -> None:
        q, k, v, mask, scale, softcap = node.args
        node.target = low.bidirectional_attention
        bias = self.once(low.per_group, self.once(low.mask_bias, mask), _groups(q, k))
        node.args = (q, k, v, bias, scale, softcap)

    def cross(self, node: fx.Node) -> None:
        q, k, v, mask, scale, softcap = node.args
        node.target = low.cross_attention
        node.args = (q, k, v, self.once(low.mask_bias, mask), scale, softcap)

    def cached(self, node: fx.Node) -> None:
        q, k, v, k_cache, v_cache, past_length, scale, softcap, window = node.args
        assert isinstance(past_length, fx.Node)
        assert isinstance(window, int)
        start = self.start(past_length)
        if window >= self.capacity:  # nothing in the cache is ever out of sight
            window = 0
        if not softcap and not window:
            node.target = low.flash_attention
            node.args = (q, k, v, k_cache, v_cache, start, scale)
            return
        # torch.export knows the length of `slots`, and so XNNPACK takes it; one computed from past_length it refuses.
        slots, ids = self._input(-1), self._input(0)
        bias = self.once(low.causal_bias, self.once(low.new_positions, past_length, ids), slots, window)
        if softcap:
            node.target = low.capped_attention
            bias = self.once(low.per_group, bias, _groups(q, k))
            node.args = (q, k, v, k_cache, v_cache, start, bias, scale, softcap)
        else:
            node.target = low.windowed_attention
            node.args = (q, k, v, k_cache, v_cache, start, bias, scale)

    def _input(self, index: int) -> fx.Node:
        inputs: list[fx.Node] = [n for n in self.graph.nodes if n.op == "placeholder"]
        return inputs[index]


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, alone in its storage."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _groups(q: Any, k: Any) -> int:
    """Query heads to a key head."""
    return int(q.meta["val"].shape[2]) // int(k.meta["val"].shape[2])


_CASTS = {torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default}
_VIEWS = {torch.ops.aten.view.default, torch.ops.aten.reshape.default}
_REWRITES: dict[Any, Callable[[Rewriter, fx.Node], None]] = {
    EW.quantized_embedding.default: Rewriter.embedding,
    EW.rope.default: Rewriter.rope,
    EW.bidirectional_attention.default: Rewriter.bidirectional,
    EW.cross_attention.default: Rewriter.cross,
    EW.cached_attention.default: Rewriter.cached,
}
