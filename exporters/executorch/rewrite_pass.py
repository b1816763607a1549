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

from ...ops import DECOMPOSITIONS
from . import attention_int8 as int8
from . import lowerings as low
from . import recurrence
from .patterns import exact_gelu, joined_rest

EW = torch.ops.edgewright


class Rewriter:
    """Rewrites one exported module in place. Constants are shared by content; sub-results by the nodes they come from."""

    def __init__(self, module: fx.GraphModule, capacity: int) -> None:
        self.module, self.graph, self.capacity = module, module.graph, capacity
        self._past_length: Any = None
        self._constants: dict[tuple[Any, ...], str] = {}
        self._nodes: dict[tuple[Any, ...], fx.Node] = {}
        self._memo: dict[tuple[Any, ...], fx.Node] = {}
        self._fold_casts()
        self._fold_constants()
        self._share_constants()
        shared = CSEPass()(module)  # a new module; what the layers compute alike (positions, masks) is one node in it
        assert shared is not None
        self.module, self.graph = shared.graph_module, shared.graph_module.graph
        self._nodes.clear()  # those of the graph before

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
        """The node of a constant, made once for each key. SingleTargetPlan in its storage: ExecuTorch stores storages whole."""
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self.module.register_buffer(name, _owned(make().detach()))
            self._constants[key] = name
        if key not in self._nodes:
            self._nodes[key] = self.graph.get_attr(self._constants[key])
        return self._nodes[key]

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

    def _fold_constants(self) -> None:
        """What is made of parameters alone (`-exp(A_log)`) is computed here, not at every call."""
        for node in list(self.graph.nodes):
            inputs = node.all_input_nodes
            ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
            fixed = all(n.op == "get_attr" and not str(n.target).startswith("state_") for n in inputs)
            if not ours or not inputs or not fixed or not isinstance(node.meta.get("val"), torch.Tensor):
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
            with self.graph.inserting_before(node):
                made = self.constant(("folded", node.name), partial(node.target, *args, **kwargs))
            made.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(made)
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
        """Where only the first dimensions of a head are rotated and the rest joined to them, the head is taken whole."""
        x, positions, inv_freq = node.args
        assert isinstance(inv_freq, fx.Node)
        values, whole = self.value(inv_freq), joined_rest(node)
        made, x = (node, x) if whole is None else whole
        half, width = values.shape[0], int(x.meta["val"].shape[-1])  # type: ignore[union-attr]
        rates = self.constant(("frequencies", inv_freq.target, width), lambda: low.frequencies(values, width))
        tables = self.once(low.rotary_tables, positions, rates)
        cos, sin = (self.once(operator.getitem, tables, i) for i in (0, 1))
        made.target = low.rope
        made.args = (x, cos, sin, self.constant(("rotation", half, width), lambda: low.rotation(half, width)))
        made.kwargs = {}

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
        start = self.start(past_length)
        self._hand_on(node, k_cache, v_cache)
        window = self._window(window)
        if not softcap and not window:
            node.target = low.flash_attention
            node.args = (q, k, v, k_cache, v_cache, start, scale)
            return
        bias = self._causal_bias(past_length, window)
        if softcap:
            node.target = low.capped_attention
            bias = self.once(low.per_group, bias, _groups(q, k))
            node.args = (q, k, v, k_cache, v_cache, start, bias, scale, softcap)
        else:
            node.target = low.windowed_attention
            node.args = (q, k, v, k_cache, v_cache, start, bias, scale)

    def merged(self, node: fx.Node) -> None:
        q, k, v, k_cache, v_cache, cross_k, cross_v, mask, past_length, scale, softcap, window = node.args
        assert isinstance(past_length, fx.Node)
        start = self.start(past_length)
        self._hand_on(node, k_cache, v_cache)
        bias = self.once(low.merged_bias, self._causal_bias(past_length, self._window(window)), mask)
        bias = self.once(low.per_group, bias, _groups(q, k))
        node.target = low.merged_attention
        node.args = (q, k, v, k_cache, v_cache, cross_k, cross_v, start, bias, self._input(-1), scale, softcap)

    def shared(self, node: fx.Node) -> None:
        q, k_cache, v_cache, positions, scale = node.args
        start = self.start(self._past_length)
        bias = self.once(low.causal_bias, positions, self._input(-1), 0)
        node.target = low.shared_attention
        node.args = (q, k_cache, v_cache, start, bias, scale)

    # -- caches in int8

    def appended(self, node: fx.Node) -> None:
        cache, new, past_length = node.args
        assert isinstance(past_length, fx.Node)
        node.target = int8.append_kv
        node.args = (cache, new, self.start(past_length))

    def quantized(self, node: fx.Node) -> None:
        node.target = int8.quantize_kv

    def quantized_causal(self, node: fx.Node) -> None:
        q, keys, key_scales, values, value_scales, positions, scale, softcap, window = node.args
        bias = self.once(low.causal_bias, positions, self._input(-1), self._window(window))
        bias = self.once(low.per_group, bias, _groups(q, keys))
        node.target = int8.causal_attention
        node.args = (q, keys, key_scales, values, value_scales, bias, self._input(-1), scale, softcap)

    def quantized_cross(self, node: fx.Node) -> None:
        q, keys, key_scales, values, value_scales, mask, scale, softcap = node.args
        node.target = int8.cross_attention
        node.args = (q, keys, key_scales, values, value_scales, self.once(low.mask_bias, mask), scale, softcap)

    def quantized_merged(self, node: fx.Node) -> None:
        q, *caches = node.args[:9]
        mask, positions, scale, softcap, window = node.args[9:]
        bias = self.once(low.causal_bias, positions, self._input(-1), self._window(window))
        bias = self.once(low.per_group, self.once(low.merged_bias, bias, mask), _groups(q, caches[0]))
        node.target = int8.merged_attention
        node.args = (q, *caches, bias, self._input(-1), scale, softcap)

    def _hand_on(self, node: fx.Node, k_cache: Any, v_cache: Any) -> None:
        """Who reads the caches that an attention returns reads the buffers that it has written."""
        self._past_length = node.args[8] if node.target is EW.merged_attention.default else node.args[5]
        for user in list(node.users):
            if user.target is operator.getitem and user.args[1] != 0:
                user.replace_all_uses_with(k_cache if user.args[1] == 1 else v_cache)
                self.graph.erase_node(user)

    def _window(self, window: Any) -> int:
        """0 where nothing in the cache is ever out of sight."""
        return 0 if window >= self.capacity else int(window)

    def _causal_bias(self, past_length: fx.Node, window: int) -> fx.Node:
        # torch.export knows the length of the last input, and so XNNPACK takes it; one computed from past_length it refuses.
        filled, ids = self._input(-1), self._input(0)
        return self.once(low.causal_bias, self.once(low.new_positions, past_length, ids), filled, window)

    # -- recurrences: of one token, or of a length known only at run time

    def conv(self, node: fx.Node) -> None:
        x, weight, bias, state = node.args
        if _is_step(x):
            node.target = recurrence.causal_conv_step
            return
        assert isinstance(weight, fx.Node)
        taps = self.value(weight).unbind(1)
        rows = [
            self.constant(("tap", weight.target, i), partial(torch.Tensor.float, tap)) for i, tap in enumerate(taps)
        ]
        node.target = recurrence.causal_conv
        node.args = (x, rows, bias, state)

    def delta(self, node: fx.Node) -> None:
        if _is_step(node.args[0]):
            node.target = recurrence.delta_rule_step
            return
        quarters = [
            self._mask(("quarter", size), partial(recurrence.quarter_mask, size)) for size in recurrence.QUARTERS
        ]
        identity = self._mask(("identity",), recurrence.identity_mask)
        node.target = recurrence.delta_rule
        node.args = (*node.args, *self._fading_masks(), identity, quarters)

    def linear_attention(self, node: fx.Node) -> None:
        if _is_step(node.args[0]):
            node.target = recurrence.linear_attention_step
            return
        _, _, heads, decays = node.args[3].meta["val"].shape  # type: ignore[union-attr]
        of_head = self.constant(("of_head", heads, decays), partial(recurrence.of_head_mask, heads, decays))
        node.target = recurrence.linear_attention
        node.args = (*node.args, *self._fading_masks(), of_head)

    def scan(self, node: fx.Node) -> None:
        if _is_step(node.args[0]):
            node.target = recurrence.selective_scan_step
            return
        node.target = recurrence.selective_scan

    def _fading_masks(self) -> list[fx.Node]:
        until = self._mask(("until",), recurrence.until_mask)
        whole = self.once(recurrence.row, self.constant(("until",), recurrence.until_mask), self._input(0))
        return [until, self._mask(("after",), recurrence.after_mask), whole]

    def _mask(self, key: tuple[Any, ...], make: Callable[[], torch.Tensor]) -> fx.Node:
        return self.once(recurrence.square, self.constant(key, make), self._input(0))

    def gelu(self, node: fx.Node) -> None:
        """x / 2 (1 + erf(x / sqrt 2)) becomes XNNPACK's one op for it; any other erf stays."""
        found = exact_gelu(node)
        if found is not None:
            result, x = found
            result.target, result.args, result.kwargs = torch.ops.aten.gelu.default, (x,), {}

    def matmul(self, node: fx.Node) -> None:
        """A product with a constant matrix is a linear."""
        x, matrix = node.args
        if isinstance(matrix, fx.Node) and matrix.op == "get_attr" and self.value(matrix).dim() == 2:
            turned = self.constant(("turned", matrix.target), lambda: self.value(matrix).t())
            node.target, node.args = torch.ops.aten.linear.default, (x, turned)

    def filled(self, node: fx.Node) -> None:
        """A small tensor of one number, whose shape is known, is a constant."""
        made: torch.Tensor = node.meta["val"]
        number = node.args[1] if len(node.args) > 1 else float(node.target is torch.ops.aten.ones_like.default)
        if made.dtype == torch.float32 and all(isinstance(d, int) for d in made.shape) and made.numel() <= 4096:
            assert isinstance(number, int | float)
            shape = tuple(made.shape)
            node.replace_all_uses_with(
                self.constant(("filled", shape, number), lambda: torch.full(shape, float(number)))
            )

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


def _is_step(x: Any) -> bool:
    """Whether [1, T, …] has the constant length 1."""
    length = x.meta["val"].shape[1]
    return isinstance(length, int) and length == 1


_CASTS = {torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default}
_VIEWS = {torch.ops.aten.view.default, torch.ops.aten.reshape.default}
PRIVATE = {EW.quantized_linear.default, EW.rms_norm.default, EW.gelu_tanh.default}
"""What `executorch_xnnpack` writes itself."""
_REWRITES: dict[Any, Callable[[Rewriter, fx.Node], None]] = {
    EW.quantized_embedding.default: Rewriter.embedding,
    EW.rope.default: Rewriter.rope,
    torch.ops.aten.erf.default: Rewriter.gelu,
    torch.ops.aten.matmul.default: Rewriter.matmul,
    torch.ops.aten.zeros_like.default: Rewriter.filled,
    torch.ops.aten.ones_like.default: Rewriter.filled,
    torch.ops.aten.full_like.default: Rewriter.filled,
    EW.bidirectional_attention.default: Rewriter.bidirectional,
    EW.cross_attention.default: Rewriter.cross,
    EW.cached_attention.default: Rewriter.cached,
    EW.merged_attention.default: Rewriter.merged,
    EW.shared_attention.default: Rewriter.shared,
    EW.quantize_kv.default: Rewriter.quantized,
    EW.append_kv.default: Rewriter.appended,
    EW.quantized_attention.default: Rewriter.quantized_cross,
    EW.quantized_causal_attention.default: Rewriter.quantized_causal,
    EW.quantized_merged_attention.default: Rewriter.quantized_merged,
    EW.causal_conv.default: Rewriter.conv,
    EW.gated_delta_rule.default: Rewriter.delta,
    EW.linear_attention.default: Rewriter.linear_attention,
    EW.selective_scan.default: Rewriter.scan,
}


def decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without those of our ops that have neither a rewrite nor a place in a delegate."""
    left = {op: fn for op, fn in DECOMPOSITIONS.items() if op not in _REWRITES and op not in PRIVATE}
    if not any(node.target in left for node in program.graph.nodes):
        return program
    plain: torch.export.ExportedProgram = program.run_decompositions(left)
    return plain
