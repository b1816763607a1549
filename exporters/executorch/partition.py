"""Which nodes of an exported graph XNNPACK computes, and the program with its delegates. What may enter: `ops`.

ExecuTorch's own way to a delegate re-interprets the program some thirty times and copies every weight in one byte a code;
for a 270M model that is minutes and gigabytes. Here one walk decides what runs where, and `executorch_xnnpack` writes
XNNPACK's graph of each part. Ops that XNNPACK is not given stay with ExecuTorch's kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from executorch.exir import EdgeCompileConfig, EdgeProgramManager
from executorch.exir.backend.backend_api import _create_partitions, _insert_lowered_submodule
from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
from executorch.exir.backend.utils import _maybe_duplicate_constant_nodes, tag_constant_data
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.passes.replace_aten_with_edge_pass import aten_to_edge, should_lower_to_edge
from executorch.exir.tracer import _default_decomposition_table
from executorch.exir.verification.verifier import EXIREdgeDialectVerifier
from torch import fx
from torch.export import ExportedProgram

from .lowerings import no_kernel
from .rewrite_pass import PRIVATE
from .xnnpack import OPS, Constants, Delegate, expanded, takes

ATEN = torch.ops.aten
BACKEND = "XnnpackBackend"
_MOST_DIMENSIONS = 6  # XNNPACK's own limit
_CONFIG = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
_VIEW_COPIES = {
    getattr(ATEN, name): getattr(ATEN, f"{name}_copy")
    for name in ("view", "transpose", "select", "slice", "unsqueeze", "squeeze", "permute", "expand")
}
_IN_PLACE = ("auto_functionalized", "auto_functionalized_v2")
_NOTHING = (ATEN.alias.default, ATEN.detach.default)
_WITH_NUMBER: dict[Any, Any] = {packet.Tensor: packet.Scalar for packet in (ATEN.add, ATEN.sub, ATEN.mul, ATEN.div)}
"""The kernels that take a number, for what is left to ExecuTorch; XNNPACK is given it as a constant."""


def edge_programs(programs: dict[str, ExportedProgram]) -> EdgeProgramManager:
    """The exported methods with everything that XNNPACK computes inside delegates. Empties `programs`.

    Raises UserError for control flow, which ExecuTorch is not given here.
    """
    table = _default_decomposition_table()
    table.pop(ATEN.linear.default)
    constants = Constants()
    lowered: dict[str, ExportedProgram] = {}
    for name in list(programs):
        plain = programs.pop(name).run_decompositions(table)
        for node in plain.graph.nodes:
            # Branches, loops, and ops with effects. What writes a cache in place is one too, until it is emitted.
            if isinstance(node.target, torch._ops.HigherOrderOperator) and str(node.target) not in _IN_PLACE:
                inner = [str(a) for a in node.args if isinstance(a, torch._ops.OpOverload)]
                raise no_kernel(name, (inner or [str(node.target)])[0])
        lowered[name] = _delegated(plain, constants)
    return EdgeProgramManager(lowered, None, _CONFIG)


def _delegated(program: ExportedProgram, constants: Constants) -> ExportedProgram:
    program = _with_graph(program, program.graph_module)
    _cut_splits(program.graph)
    _cut_selections(program.graph)
    _copy_views(program.graph)
    tags = _partition(program)
    # Executorch's own bookkeeping of inputs, outputs and constants; only XNNPACK's preprocessing is replaced.
    tag_constant_data(program)
    signature = program.graph_signature
    carried = set(signature.buffers_to_mutate.values())
    for node in program.graph.nodes:
        if signature.inputs_to_buffers.get(node.name) in carried:  # a state is no constant of a delegate that reads it
            node.meta.pop("delegation_tag", None)
    for tag in tags:
        _maybe_duplicate_constant_nodes(program, tag)
    result = PartitionResult(program, {tag: DelegationSpec(BACKEND, []) for tag in tags})
    calls = _create_partitions(program.graph_module, result, program).get(BACKEND, [])
    for call in calls:
        part = call.meta["submodule_program"]
        blob, data = Delegate(part, constants).finish()
        lowered = LoweredBackendModule(part, BACKEND, blob, [], data)
        lowered.meta = {"debug_handle_map": {}}
        _insert_lowered_submodule(
            part,
            program,
            call,
            call.meta["submodule_output_node"],
            lowered,
            False,
            call.meta["toplevel_input_specs_to_delete"],
            call.meta["toplevel_output_specs_to_delete"],
        )
    for node in list(program.graph.nodes):
        node.meta.pop("delegation_tag", None)
        if node.target is ATEN._assert_tensor_metadata.default:
            program.graph.erase_node(node)
        elif node.op == "call_function" and should_lower_to_edge(node.target):
            _take_numbers(program.graph, node)
            node.target = aten_to_edge(node.target)
    program.graph_module.recompile()
    return _with_graph(program, program.graph_module)


def _take_numbers(graph: fx.Graph, node: fx.Node) -> None:
    """A number where a kernel wants a tensor becomes one: ExecuTorch ends the whole process over it, with no error raised."""
    if node.target in _WITH_NUMBER and not isinstance(node.args[1], fx.Node):
        node.target = _WITH_NUMBER[node.target]
    assert isinstance(node.target, torch._ops.OpOverload)
    for index, (given, wanted) in enumerate(zip(node.args, node.target._schema.arguments, strict=False)):
        if isinstance(given, int | float) and isinstance(wanted.type, torch.TensorType):
            with graph.inserting_before(node):
                made = graph.call_function(aten_to_edge(ATEN.full.default), ([], given))
            made.meta["val"] = node.meta["val"].new_full((), given, dtype=torch.tensor(given).dtype)
            node.update_arg(index, made)


def _cut_splits(graph: fx.Graph) -> None:
    """The parts of a split become slices, of which XNNPACK has a form of its own."""
    for node in list(graph.nodes):
        if node.target not in (ATEN.split_with_sizes.default, ATEN.split.Tensor, ATEN.chunk.default):
            continue
        axis, at = node.args[2] if len(node.args) > 2 else 0, 0
        parts = {user.args[1]: user for user in node.users}
        for index, value in enumerate(node.meta["val"]):
            size = value.shape[axis]
            if index in parts:
                with graph.inserting_before(node):
                    cut = graph.call_function(ATEN.slice.Tensor, (node.args[0], axis, at, at + size))
                cut.meta = dict(parts[index].meta)
                parts[index].replace_all_uses_with(cut)
                graph.erase_node(parts[index])
            at += size
        graph.erase_node(node)


def _cut_selections(graph: fx.Graph) -> None:
    """x[..., i, ...] of floats becomes a slice of one and a view."""
    for node in list(graph.nodes):
        if node.target is not ATEN.select.int or not _is_float(node):
            continue
        x, axis, index = node.args
        axis %= x.meta["val"].dim()
        size = x.meta["val"].shape[axis]
        if not isinstance(size, int) or not isinstance(index, int):
            continue
        with graph.inserting_before(node):
            cut = graph.call_function(ATEN.slice.Tensor, (x, axis, index % size, index % size + 1))
        cut.meta["val"] = x.meta["val"].narrow(axis, index % size, 1)
        node.target, node.args = ATEN.squeeze.dims, (cut, [axis])


def _copy_views(graph: fx.Graph) -> None:
    """Views become copies, and every value dense: neither XNNPACK nor ExecuTorch's kernels have strides.

    The one dynamic size of a view is inferred: XNNPACK takes no numbers. An expansion that changes nothing is none.
    """
    for node in graph.nodes:
        if node.target is ATEN.expand.default and str(node.meta["val"].shape) == str(node.args[0].meta["val"].shape):
            node.replace_all_uses_with(node.args[0])
        if node.target is ATEN.clone.default and node.args[0].op == "call_function":
            node.replace_all_uses_with(node.args[0])  # a computed value, dense already
        if node.target in _NOTHING:
            node.replace_all_uses_with(node.args[0])
        if node.target is ATEN.expand.default:
            kept = zip(node.args[1], expanded(node), strict=True)
            node.args = (node.args[0], [-1 if isinstance(size, fx.Node) and new == 1 else size for size, new in kept])
        if node.target is ATEN.view.default:
            dynamic = [isinstance(size, fx.Node) for size in node.args[1]]
            if sum(dynamic) == 1:
                sizes = zip(node.args[1], dynamic, strict=True)
                node.args = (node.args[0], [-1 if inferred else size for size, inferred in sizes])
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            copies = _VIEW_COPIES.get(node.target.overloadpacket)
            if copies is not None:
                node.target = getattr(copies, node.target._overloadname)
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
            node.meta["val"] = node.meta["val"].contiguous()


def _with_graph(program: ExportedProgram, module: fx.GraphModule) -> ExportedProgram:
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        constants=program.constants,
        verifiers=[EXIREdgeDialectVerifier(edge_compile_config=_CONFIG, class_only=True)],
    )


def _partition(program: ExportedProgram) -> list[str]:
    """Tag the nodes of each delegate; returns the tags.

    A node joins the earliest delegate after those kernels that it waits for. So what lies between two writes to a KV
    cache is one delegate.
    """
    signature = program.graph_signature
    given = {*signature.user_inputs, *(n for n, b in signature.inputs_to_buffers.items() if _is_state(signature, b))}
    moving: set[fx.Node] = set()  # what is not made of constants alone: a delegate of those has no input
    active: set[fx.Node] = set()
    level: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        before = [(level[i], "delegation_tag" in i.meta) for i in node.all_input_nodes if i in level]
        if node.name in given or any(i in moving for i in node.all_input_nodes):
            moving.add(node)
        if node.name in given and _is_float(node):
            active.add(node)
        if node in moving and _taken(node, active):
            active.add(node)
            level[node] = max((n if inside else n + 1 for n, inside in before), default=0)
            node.meta["delegation_tag"] = f"delegate_{level[node]}"
        else:
            level[node] = max((n for n, _ in before), default=-1)
    return [f"delegate_{n}" for n in sorted({level[node] for node in level if "delegation_tag" in node.meta})]


def _taken(node: fx.Node, active: set[fx.Node]) -> bool:
    """Whether XNNPACK computes the node: an op of the table on activations.

    Those have three dimensions and more, or come from such. Other floats of fewer dimensions are positions and masks, made
    from integers; ExecuTorch's kernels compute them.
    """
    if node.op != "call_function" or node.target not in OPS or not _is_float(node):
        return False
    rank = node.meta["val"].dim()
    ours = rank >= 3 or node.target in PRIVATE or any(i in active for i in node.all_input_nodes)
    return 0 < rank <= _MOST_DIMENSIONS and ours and takes(node)


def _is_state(signature: Any, buffer: str) -> bool:
    return buffer in signature.buffers_to_mutate.values()


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32
