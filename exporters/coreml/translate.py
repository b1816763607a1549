"""A `Graph` as functions of an ML program: its shapes become static or bounded, then its torch.export nodes are lowered in order.

The program is built node by node from the tables in `lowerings` and `aten`. coremltools' own torch frontend and graph passes do
not run: they change numbers without a warning (`docs/coreml.md` lists the cases, and tests hold them).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export.graph_signature import InputKind

from ...errors import UserError
from ...graph import Graph, Port, State
from ...ops import DECOMPOSITIONS
from ...targets.coreml.library import Builder as mb
from ...targets.coreml.library import Function, Placeholder, Var, ct, get_new_symbol, types
from ...targets.coreml.package import OUT, STEP
from .aten import ATEN
from .builder import Lowering, op_name
from .lowerings import LOWERINGS, TAKES_SHRUNK, WRITES_STATE
from .precision import wide_decompositions, widen_gates
from .weights import Constants, WeightStore

_SKIPPED = {"aten::_assert_tensor_metadata", "aten::_assert_scalar", "aten::sym_constrain_range_for_size"}
_UNFOLDED = {"aten::_to_copy", "aten::to", "aten::clone", "aten::detach", "aten::alias", "aten::contiguous"}
_TOKENS = {"sequence", "logits", "capacity", "source"}
"""The dimensions that `max_positions` bounds. Others have the graph's own bounds."""


@dataclass(frozen=True)
class Shaped:
    """A graph with its sizes settled. `fixed`: dimension -> its size; the others stay within `graph.bounds`."""

    function: str
    graph: Graph
    fixed: dict[str, int]


def shaped(graph: Graph, capacity: int) -> list[Shaped]:
    """The functions of a graph: batch 1, caches of `capacity` tokens, other lengths bounded.

    A graph that carries updated states over a `sequence` becomes two functions: for any number of tokens (prefill), and for
    exactly one (the decode step, whose shapes are all static in a decoder-only model).
    """
    bounds = {n: (lo, min(hi, capacity) if n in _TOKENS else hi) for n, (lo, hi) in graph.bounds.items()}
    common = {n: s for n, s in {"batch": 1, "capacity": capacity}.items() if n in bounds}
    functions = [_fix(graph, graph.name, common, bounds)]
    if "sequence" in bounds and any(s.updated for s in graph.states):
        one = {n: 1 for n in ("sequence", "logits") if n in bounds}
        functions.append(_fix(graph, graph.name + STEP, common | one, bounds))
    return functions


def _fix(graph: Graph, name: str, fixed: dict[str, int], bounds: dict[str, tuple[int, int]]) -> Shaped:
    def port(p: Any) -> Any:
        return replace(p, shape=tuple(fixed.get(d, d) if isinstance(d, str) else d for d in p.shape))

    settled = replace(
        graph,
        inputs=tuple(port(p) for p in graph.inputs),
        outputs=tuple(port(p) for p in graph.outputs),
        states=tuple(port(s) for s in graph.states),
        bounds={n: b for n, b in bounds.items() if n not in fixed},
        example={n: min(s, bounds[n][1]) for n, s in graph.example.items()},
    )
    return Shaped(name, settled, fixed)


def translate(item: Shaped, store: WeightStore) -> Function:
    """One function of the program. Raises UserError for an op that has no lowering."""
    graph = item.graph
    program = _program(graph)
    ports: list[Port | State] = [*graph.inputs, *graph.states]
    inputs = [p for p in ports if not _implied(p, item)]
    symbols = {n: get_new_symbol() for n in graph.bounds}
    placeholders: dict[str, Any] = {}
    for p in inputs:
        shape = tuple(symbols[d] if isinstance(d, str) else d for d in p.shape)
        if _in_place(p):
            placeholders[p.name] = mb.state_tensor_placeholder(shape, dtype=types.fp16)
        else:
            placeholders[p.name] = Placeholder(shape, dtype=_type(p))
    with Function(placeholders, opset_version=ct.target.iOS18) as function:
        outputs = _Translation(item, program, function, Constants(store)).run(ports)
        names = [p.name for p in graph.outputs] + [p.name + OUT for p in graph.states if _is_wide(p)]
        function.set_outputs([mb.identity(x=v, name=n) for v, n in zip(outputs, names, strict=True)])
    function.set_input_types(tuple(_input_type(p, graph) for p in inputs if not _in_place(p)))
    return function


def _is_wide(port: Port | State) -> bool:
    """Whether a state is a float32 input and output: Core ML's own states are float16, too coarse for a running sum."""
    return isinstance(port, State) and port.kind == "recurrent" and port.updated


def _in_place(port: Port | State) -> bool:
    return isinstance(port, State) and port.updated and not _is_wide(port)


def _type(port: Port | State) -> Any:
    return types.int32 if not port.dtype.is_floating_point else types.fp32 if _is_wide(port) else types.fp16


def _program(graph: Graph) -> torch.export.ExportedProgram:
    """The exported graph, decomposed only where it has ops without a row, because that takes seconds."""
    program = graph.export()
    names = {op_name(n.target) for n in program.graph.nodes if n.op == "call_function"} - {"getitem"}
    if names <= LOWERINGS.keys() | ATEN.keys() | _SKIPPED:
        return program
    widen_gates(program)
    table = DECOMPOSITIONS | wide_decompositions()
    decomposed: torch.export.ExportedProgram = program.run_decompositions(
        {op: fn for op, fn in table.items() if op_name(op) not in LOWERINGS}
    )
    return decomposed


def _implied(port: Port | State, item: Shaped) -> bool:
    """Whether a port has one possible value: the one-token function needs no `logit_positions`."""
    return port.name == "logit_positions" and item.fixed.get("logits") == 1 and item.fixed.get("sequence") == 1


def _input_type(port: Port | State, graph: Graph) -> Any:
    dims = [
        d
        if isinstance(d, int)
        else ct.RangeDim(*graph.bounds[d], default=graph.bounds[d][0] if d != "source" else min(graph.bounds[d][1], 64))
        for d in port.shape
    ]
    return ct.TensorType(name=port.name, shape=dims, dtype=_type(port))


class _Translation:
    """Lowers the nodes of one exported program in order. Equal calls are emitted once."""

    def __init__(
        self, item: Shaped, program: torch.export.ExportedProgram, function: Any, constants: Constants
    ) -> None:
        self.item, self.program, self.function = item, program, function
        self.low = Lowering(constants)
        self.values: dict[str, Any] = {}
        self.known: dict[Any, Any] = {}
        self.input_of: dict[str, str] = {}

    def run(self, ports: Sequence[Port | State]) -> list[Any]:
        """Values of the graph's outputs, then of its recurrent states. Other updated states are written in place."""
        nodes = list(self.program.graph.nodes)
        self._bind_inputs(ports)
        for node in nodes:
            if node.op == "call_function":
                self.values[node.name] = self._call(node)
        results: Any = nodes[-1].args[0]
        count = len(self.item.graph.outputs)
        outputs = [self.low.var(self.low.plain(self._resolve(n))) for n in results[:count]]
        updated = [p for p in ports if isinstance(p, State) and p.updated]
        for port, node in zip(updated, results[count:], strict=True):
            value = self.low.plain(self.values[node.name])
            if _is_wide(port):
                outputs.append(self.low.cast(value, "fp32") if value.dtype == types.fp16 else value)
            elif id(value) not in self.low.written:  # a cache is written where it is used
                mb.coreml_update_state(state=self.function.inputs[port.name], value=self._narrowed(value, node))
        return outputs

    def _bind_inputs(self, ports: Sequence[Port | State]) -> None:
        tensors = {**self.program.state_dict, **self.program.constants}
        users = []
        for spec in self.program.graph_signature.input_specs:
            name = spec.arg.name
            if spec.kind == InputKind.USER_INPUT:
                users.append(name)
            else:
                assert spec.target is not None
                self.values[name] = tensors[spec.target]
        examples = {n.name: n.meta["val"] for n in self.program.graph.nodes if n.op == "placeholder"}
        for name, port in zip(users, ports, strict=True):
            if _implied(port, self.item):
                self.values[name] = torch.zeros(1, dtype=torch.int64)
                continue
            var = self.function.inputs[port.name]
            if _in_place(port):
                self.low.states[name] = var
                self.values[name] = self.low.states[name]
                continue
            for axis, size in enumerate(examples[name].shape):
                if isinstance(size, torch.SymInt):
                    self.low.symbols.setdefault(str(size), (var, axis))
            # Core ML has no bool inputs; a mask comes as integers.
            self.values[name] = mb.not_equal(x=var, y=0) if port.dtype == torch.bool else var

    def _call(self, node: torch.fx.Node) -> Any:
        target: Any = node.target
        if target is operator.getitem:
            return self.values[node.args[0].name][node.args[1]]  # type: ignore[union-attr, index]
        name = op_name(target)
        if name in _SKIPPED:
            return None
        args, kwargs = self._resolve(list(node.args)), self._resolve(dict(node.kwargs))
        if _is_constant(args) and name.startswith("aten::") and name not in _UNFOLDED:
            return self._folded(node)
        lowering = LOWERINGS.get(name) or ATEN.get(name)
        if lowering is None:
            raise UserError(
                f"--format coreml: the graph '{self.item.graph.name}' uses {name}, which has no lowering; "
                "leave this target out"
            )
        if name in ("aten::_to_copy", "aten::to") and node.meta["val"].dtype == torch.float64:
            source: Any = node.args[0]
            args[0] = self.values[source.name]  # as wide as it was computed
        if name not in WRITES_STATE:
            args = self._read_states(args)
        if name not in TAKES_SHRUNK:
            args = self.low.plain(args)
        key = (str(target), _identity(args), _identity(kwargs))
        if key not in self.known:
            self.known[key] = (lowering(self.low, node, *args, **kwargs), args, kwargs)  # args held: ids stay unique
        return self.known[key][0]

    def _read_states(self, value: Any) -> Any:
        """The arguments, with each state replaced by its value before this call."""
        if isinstance(value, list):
            return [self._read_states(v) for v in value]
        if any(value is state for state in self.low.states.values()):
            return self.low.once(("state", id(value)), lambda: mb.read_state(input=value))
        return value

    def _folded(self, node: torch.fx.Node) -> torch.Tensor:
        """The result of a call on parameters alone, in the graph's own types: a new tensor, which has no name in the checkpoint."""

        def own(value: Any) -> Any:
            known = self.values[value.name]
            return known.to(value.meta["val"].dtype) if isinstance(known, torch.Tensor) else known

        target: Any = node.target
        args, kwargs = torch.fx.node.map_arg(node.args, own), torch.fx.node.map_arg(node.kwargs, own)
        result: torch.Tensor = target(*args, **kwargs)
        return result.clone(memory_format=torch.contiguous_format)

    def _narrowed(self, value: Any, node: torch.fx.Node) -> Any:
        """A value that was computed in float32, as float16 where its node is float32 in the graph."""
        if isinstance(value, Var) and value.dtype == types.fp32 and node.meta["val"].dtype == torch.float32:
            return self.low.cast(value, "fp16")
        return value

    def _resolve(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return self._narrowed(self.values[value.name], value)
        if isinstance(value, list | tuple):
            return [self._resolve(v) for v in value]
        if isinstance(value, dict):
            return {k: self._resolve(v) for k, v in value.items()}
        return value


def _is_constant(value: Any) -> bool:
    """Whether the arguments of a call are numbers and tensors known at export, at least one of these."""
    flat: list[Any] = []
    for item in value:
        flat += item if isinstance(item, list) else [item]
    return any(isinstance(v, torch.Tensor) for v in flat) and not any(isinstance(v, Var) for v in flat)


def _identity(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_identity(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _identity(v)) for k, v in value.items())
    plain = value is None or isinstance(value, int | float | str | bool | torch.dtype | torch.device | torch.layout)
    return (type(value).__name__, value) if plain else id(value)
