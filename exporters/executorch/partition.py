"""Which nodes of an exported graph XNNPACK computes, and the program with its delegates.

ExecuTorch's own way to a delegate interprets the program many times and copies every weight in one byte a code. Here one pass
over the nodes decides what runs where, and `xnnpack` writes XNNPACK's graph of each part. What XNNPACK does not take stays with
ExecuTorch's kernels.
"""

from __future__ import annotations

import torch
from executorch.exir import EdgeCompileConfig, EdgeProgramManager
from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.verification.verifier import EXIREdgeDialectVerifier
from torch import fx
from torch.export import ExportedProgram

from .delegate import Constants
from .internals import (
    HigherOrderOperator,
    OpOverload,
    create_partitions,
    default_decompositions,
    duplicate_constant_nodes,
    insert_lowered_submodule,
)
from .lowerings import no_kernel
from .passes.edge import BEFORE_DELEGATES, is_float, to_edge
from .passes.ops import DELEGATED
from .xnnpack import OPS, takes, write

ATEN = torch.ops.aten
BACKEND = "XnnpackBackend"
_MOST_DIMENSIONS = 6  # XNNPACK's own limit
_CONFIG = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
_IN_PLACE = ("auto_functionalized", "auto_functionalized_v2")


def edge_programs(programs: dict[str, ExportedProgram]) -> EdgeProgramManager:
    """The exported methods with everything that XNNPACK computes inside delegates. Empties `programs`.

    Raises UserError for control flow, which ExecuTorch is not given here.
    """
    table = default_decompositions()
    table.pop(ATEN.linear.default)
    constants = Constants()
    lowered: dict[str, ExportedProgram] = {}
    for name in list(programs):
        plain = programs.pop(name).run_decompositions(table)
        for node in plain.graph.nodes:
            # Branches, loops and ops with effects are refused. A write to a cache is an op with effects until it is emitted.
            if isinstance(node.target, HigherOrderOperator) and str(node.target) not in _IN_PLACE:
                inner = [str(a) for a in node.args if isinstance(a, OpOverload)]
                raise no_kernel(name, (inner or [str(node.target)])[0])
        lowered[name] = _delegated(plain, constants)
    return EdgeProgramManager(lowered, None, _CONFIG)


def _delegated(program: ExportedProgram, constants: Constants) -> ExportedProgram:
    """One method with its delegates, in the edge dialect."""
    program = _with_graph(program, program.graph_module)
    for each in BEFORE_DELEGATES:
        each(program.graph)
    tags = _partition(program)
    # The bookkeeping of inputs, outputs and constants is ExecuTorch's own; only XNNPACK's preprocessing is replaced.
    tag_constant_data(program)
    signature = program.graph_signature
    carried = set(signature.buffers_to_mutate.values())
    for node in program.graph.nodes:
        if signature.inputs_to_buffers.get(node.name) in carried:  # a state is no constant of a delegate that reads it
            node.meta.pop("delegation_tag", None)
    for tag in tags:
        duplicate_constant_nodes(program, tag)
    result = PartitionResult(program, {tag: DelegationSpec(BACKEND, []) for tag in tags})
    calls = create_partitions(program.graph_module, result, program).get(BACKEND, [])
    for call in calls:
        part = call.meta["submodule_program"]
        blob, data = write(part, constants)
        lowered = LoweredBackendModule(part, BACKEND, blob, [], data)
        lowered.meta = {"debug_handle_map": {}}
        insert_lowered_submodule(
            part,
            program,
            call,
            call.meta["submodule_output_node"],
            lowered,
            False,
            call.meta["toplevel_input_specs_to_delete"],
            call.meta["toplevel_output_specs_to_delete"],
        )
    to_edge(program.graph)
    program.graph_module.recompile()
    return _with_graph(program, program.graph_module)


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

    A node joins the earliest delegate after the kernels that it waits for. So all between two writes to a KV cache is one
    delegate.
    """
    signature = program.graph_signature
    states = {n for n, b in signature.inputs_to_buffers.items() if b in signature.buffers_to_mutate.values()}
    inputs = {*signature.user_inputs, *states}
    varying: set[fx.Node] = set()  # what depends on an input: a delegate of constants alone would have none
    active: set[fx.Node] = set()  # floats that come from inputs through XNNPACK's ops
    level: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        before = [(level[i], "delegation_tag" in i.meta) for i in node.all_input_nodes if i in level]
        if node.name in inputs or any(i in varying for i in node.all_input_nodes):
            varying.add(node)
        if node.name in inputs and is_float(node):
            active.add(node)
        if node in varying and _taken(node, active):
            active.add(node)
            level[node] = max((n if inside else n + 1 for n, inside in before), default=0)
            node.meta["delegation_tag"] = f"delegate_{level[node]}"
        else:
            level[node] = max((n for n, _ in before), default=-1)
    return [f"delegate_{n}" for n in sorted({level[node] for node in level if "delegation_tag" in node.meta})]


def _taken(node: fx.Node, active: set[fx.Node]) -> bool:
    """Whether XNNPACK computes the node: an op of the table on activations.

    Activations have three dimensions and more, or come from such. Other floats are positions and masks, which come from integers;
    ExecuTorch's kernels compute them.
    """
    if node.op != "call_function" or node.target not in OPS or not is_float(node):
        return False
    rank = node.meta["val"].dim()
    activation = rank >= 3 or node.target in DELEGATED or any(i in active for i in node.all_input_nodes)
    return 0 < rank <= _MOST_DIMENSIONS and activation and takes(node)
