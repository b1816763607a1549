"""The part of a Core ML program that is computed in float32: recurrences, and the gates that feed them.

A graph's float32 is float16 in the program, and its float64 is float32. So the recurrences are decomposed in float64, and what
leads to them, from the last linear, convolution or split on, is moved to float64 before. In float16 a decay near 1 has too few
digits, and the squares of a key's norm may overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...ops import DECOMPOSITIONS

EW, ATEN = torch.ops.edgewright, torch.ops.aten
WIDE_OPS = tuple(
    op.default
    for op in (
        *(EW.gated_delta_rule, EW.generalized_delta_rule, EW.linear_attention),
        *(EW.selective_scan, EW.diagonal_scan),
    )
)
_POINTWISE = (
    *("add", "sub", "rsub", "mul", "div", "neg", "abs", "pow", "square", "reciprocal", "sqrt", "rsqrt", "exp", "log"),
    *(
        "log1p",
        "expm1",
        "sigmoid",
        "log_sigmoid",
        "softplus",
        "silu",
        "tanh",
        "clamp",
        "clamp_min",
        "clamp_max",
        "relu",
    ),
    *("where", "maximum", "minimum", "to", "_to_copy"),
)
_REDUCTIONS = ("sum", "mean", "linalg_vector_norm")
_VIEWS = (
    *("clone", "contiguous", "expand", "expand_as", "unsqueeze", "squeeze", "view", "reshape", "_unsafe_view"),
    *("transpose", "permute"),
)
_FOLLOWED = {f"aten::{name}" for name in (*_POINTWISE, *_REDUCTIONS, *_VIEWS)}
"""The pointwise ops, reductions and views between the last linear, convolution or split and a recurrence."""


def wide_decompositions() -> dict[Any, Callable[..., Any]]:
    """The recurrences' decompositions, computed in float64 whatever type the inputs have."""
    return {op: _in_float64(DECOMPOSITIONS[op]) for op in WIDE_OPS}


def _in_float64(reference: Callable[..., Any]) -> Callable[..., Any]:
    def wide(*args: Any) -> Any:
        wide_args = [a.to(torch.float64) if isinstance(a, torch.Tensor) else a for a in args]
        return tuple(out.to(torch.float32) for out in reference(*wide_args))

    return wide


def widen_gates(program: torch.export.ExportedProgram) -> None:
    """Move what feeds a program's recurrences to float64. Where other nodes read it, it is cast back to float32."""
    graph, fixed = program.graph, _fixed(program)
    wide: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.target in WIDE_OPS:
            for source in node.all_input_nodes:
                _follow(source, wide, fixed)
    for node in [n for n in graph.nodes if n in wide]:
        if _is_float_cast(node):  # not needed in float64
            source = node.args[0]
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            del wide[node]
            if source not in wide:
                _widen(graph, source, [n for n in source.users if n in wide])
            continue
        for source in node.all_input_nodes:
            if source not in wide and source not in fixed and _is_float(source):
                _widen(graph, source, [node])
        node.meta["val"] = node.meta["val"].to(torch.float64)
    for node in wide:
        others = [user for user in node.users if user not in wide and user.target not in WIDE_OPS]
        if others:
            _back(graph, node, others)
    for node in [n for n in graph.nodes if n.target in WIDE_OPS]:
        for out in list(node.users):  # float32 once decomposed; until then the op itself gives its inputs' float64
            _back(graph, out, list(out.users))
    graph.lint()
    program.graph_module.recompile()


def _fixed(program: torch.export.ExportedProgram) -> set[fx.Node]:
    """Parameters and what depends on them alone: the exporter computes that itself, in the graph's own types."""
    signature = program.graph_signature
    stored = {
        *signature.inputs_to_parameters,
        *signature.inputs_to_buffers,
        *signature.inputs_to_lifted_tensor_constants,
    }
    constant: set[fx.Node] = set()
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        if node.name in stored or (node.op == "call_function" and inputs and all(n in constant for n in inputs)):
            constant.add(node)
    return constant


def _follow(node: fx.Node, wide: dict[fx.Node, None], fixed: set[fx.Node]) -> None:
    """Add to `wide` the node and what leads to it, as far as the ops in `_FOLLOWED` go."""
    waiting = [node]
    while waiting:
        at = waiting.pop()
        name = at.target._schema.name if isinstance(at.target, torch._ops.OpOverload) else ""
        if at not in wide and at not in fixed and name in _FOLLOWED and _is_float(at):
            wide[at] = None
            waiting += at.all_input_nodes


def _widen(graph: fx.Graph, source: fx.Node, users: list[fx.Node]) -> None:
    """Let `users` read `source` in float64."""
    with graph.inserting_after(source):
        cast = graph.call_function(ATEN._to_copy.default, (source,), {"dtype": torch.float64})
    cast.meta["val"] = source.meta["val"].to(torch.float64)
    for user in users:
        user.replace_input_with(source, cast)


def _back(graph: fx.Graph, node: fx.Node, users: list[fx.Node]) -> None:
    """Let `users` read `node` in float32."""
    with graph.inserting_after(node):
        back = graph.call_function(ATEN._to_copy.default, (node,), {"dtype": torch.float32})
    back.meta["val"] = node.meta["val"].to(torch.float32)
    for user in users:
        user.replace_input_with(node, back)


def _is_float_cast(node: fx.Node) -> bool:
    return node.target in (ATEN.to.dtype, ATEN._to_copy.default) and _is_float(node.args[0])


def _is_float(node: Any) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
