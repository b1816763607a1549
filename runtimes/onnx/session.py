"""ONNX Runtime on the CPU as a `Session`. No torch is imported, so that memory figures are those of an app.

A KV cache is one buffer, bound as past and as present: the kernels write it in place. Every other updated state has two buffers,
which change places at each call: a kernel may write the new state before it has read the old one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from ...bundle import GraphSpec, StateSpec
from ...targets.onnx.graph_check import check_graph
from ..session import DTYPES, Array, PlacedSession, Placement, StateBuffers, place, require_room, sized, state_bytes

Activations = Literal["int8", "float32"]
"""int8: as shipped, MatMulNBits quantizes each row of its input. float32: exact arithmetic, to check the lowering."""

PROVIDER = "CPUExecutionProvider"

IN_PLACE = ("kv",)
"""The kinds of state that kernels write in place."""


@dataclass
class _Bound:
    """The IOBindings of a graph to the states `state`: one, or two in turn where states change places."""

    state: StateBuffers
    turns: list[Any]


class OnnxSession:
    """The graphs of a bundle's `onnx` folder."""

    how = f"onnxruntime {ort.__version__} on this CPU"
    stand_in = False

    def __init__(
        self,
        directory: Path,
        graphs: Sequence[GraphSpec],
        threads: int = 0,
        activations: Activations = "int8",
        profile_prefix: Path | None = None,
    ) -> None:
        self.activations: str = activations
        self._graphs = {g.name: g for g in graphs}
        self._states: dict[str, StateSpec] = {s.name: s for g in graphs for s in g.states}
        self.sessions: dict[str, ort.InferenceSession] = {}
        self._bindings: dict[str, _Bound] = {}
        for name in self._graphs:
            prefix = None if profile_prefix is None else f"{profile_prefix}-{name}"
            self.sessions[name] = load(directory / f"{name}.onnx", threads, activations, prefix)

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        """Zeroed OrtValues of the states that `graph` updates, two of each that changes places."""
        sizes = {"batch": batch, "capacity": capacity}
        updated = self._graphs[graph].updated_states
        copies = {s.name: 1 if s.kind in IN_PLACE else 2 for s in updated}
        require_room(sum(state_bytes([s], sizes, copies[s.name]) for s in updated), capacity)

        def zeros(s: StateSpec) -> ort.OrtValue:
            return ort.OrtValue.ortvalue_from_numpy(np.zeros(sized(s.shape, sizes), DTYPES[s.dtype]))

        return {s.name: zeros(s) if copies[s.name] == 1 else [zeros(s), zeros(s)] for s in updated}

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        spec = self._graphs[graph]
        turns = self._bound(spec, state).turns
        binding = turns[0]
        held = {name: np.ascontiguousarray(value) for name, value in inputs.items()}  # must outlive the run
        for name, value in held.items():
            binding.bind_cpu_input(name, value)
        for port in spec.outputs:
            binding.bind_output(port.name)
        self.sessions[graph].run_with_iobinding(binding)
        # One OrtValue for each output, in the order of binding: states, which are bound once, then the ports bound above.
        values = dict(zip(self._bound_outputs(spec), binding.get_outputs(), strict=True))
        results: dict[str, Array] = {}
        for port in spec.outputs:
            if port.name in self._states:
                state[port.name] = values[port.name]
            else:
                results[port.name] = values[port.name].numpy()
        turns.reverse()
        for s in spec.updated_states:
            if s.kind not in IN_PLACE:
                state[s.name].reverse()
        return results

    def placement(self) -> Placement:
        """The providers that the runtime assigned to the nodes."""
        units: dict[str, dict[str, dict[str, int]]] = {}
        for name, session in self.sessions.items():
            counts: dict[str, Counter[str]] = defaultdict(Counter)
            for part in session.get_provider_graph_assignment_info():
                counts[part.ep_name].update(node.op_type for node in part.get_nodes())
            units[name] = {provider: dict(ops) for provider, ops in counts.items()}
        return place(units, (PROVIDER,), (), "onnxruntime's own assignment")

    @staticmethod
    def _bound_outputs(spec: GraphSpec) -> list[str]:
        return [f"{s.name}_out" for s in spec.updated_states] + [p.name for p in spec.outputs]

    def _bound(self, spec: GraphSpec, state: StateBuffers) -> _Bound:
        """The graph's IOBindings to `state`; kept for the next call with the same state."""
        known = self._bindings.get(spec.name)
        if known is None or known.state is not state:
            count = 2 if any(s.kind not in IN_PLACE for s in spec.updated_states) else 1
            known = _Bound(state, [self._binding(spec, state, turn) for turn in range(count)])
            self._bindings[spec.name] = known
        return known

    def _binding(self, spec: GraphSpec, state: StateBuffers, turn: int) -> Any:
        binding = self.sessions[spec.name].io_binding()
        for s in spec.states:
            held = state[s.name]
            past, present = (held[turn], held[1 - turn]) if isinstance(held, list) else (held, held)
            binding.bind_ortvalue_input(s.name, past)
            if s.updated:
                binding.bind_ortvalue_output(f"{s.name}_out", present)
        return binding


def load(path: Path, threads: int, activations: Activations, profile_prefix: str | None = None) -> ort.InferenceSession:
    """A session on the CPU provider alone. threads 0: all cores. Raises UserError for a graph that no exporter here writes."""
    check_graph(path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    if activations == "int8":
        return ort.InferenceSession(str(path), options, providers=[PROVIDER])
    model, folder = _with_float_activations(path)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(model, options, providers=[PROVIDER])


def _with_float_activations(path: Path) -> tuple[bytes, Path]:
    """The model with every MatMulNBits at accuracy level 1 (float32 activations), and the folder of its weights' files.

    In the hub's cache those files are links, which the runtime follows for a model in a file alone: here they have their own names.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    folder = path.parent
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                file = (path.parent / entry.value).resolve()
                folder, entry.value = file.parent, file.name
    return model.SerializeToString(), folder


def open_session(folder: Path, graphs: Sequence[GraphSpec], threads: int, exact: bool) -> PlacedSession:
    """As `runtimes.registry` asks for it."""
    return OnnxSession(folder, graphs, threads, "float32" if exact else "int8")
