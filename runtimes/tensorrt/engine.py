"""TensorRT engines on an NVIDIA GPU as a `Session`. No torch is imported; the driver is called through `cuda`.

States stay in GPU memory, each in two buffers that change places at every call, because a scatter must not write the buffer that
it reads. Keys and values are float16, states of recurrences float32.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import GraphSpec, StateSpec
from ...errors import UserError
from ...targets.tensorrt.engine_file import read_header
from ..session import DTYPES, Array, Placement, StateBuffers, sized
from .cuda import Device
from .ports import GPU, NO_FALLBACK, check_ports, network_ops, port_names, state_dtype

_LIBRARIES = ("tensorrt_rtx_bindings", "tensorrt")


class EngineSession:
    """The engines on the GPU, with one execution context for prefill and one for the decode step."""

    activations = "float16"
    how = "the engine, on this NVIDIA GPU"
    stand_in = False

    def __init__(self, directory: Path, graphs: Sequence[GraphSpec]) -> None:
        library = next((n for n in _LIBRARIES if importlib.util.find_spec(n) is not None), None)
        if library is None:
            raise UserError("running tensorrt artefacts needs TensorRT-RTX: pip install 'edgewright[tensorrt]'")
        trt: Any = importlib.import_module(library)
        self.device = Device()
        self._directory = directory
        self._graphs = {g.name: g for g in graphs}
        self._states: dict[str, StateSpec] = {s.name: s for g in graphs for s in g.states}
        self._engines: dict[str, Any] = {}
        self._contexts: dict[tuple[str, int], Any] = {}
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        for graph in graphs:
            path = directory / f"{graph.name}.engine"
            engine = runtime.deserialize_cuda_engine(path.read_bytes())
            if engine is None:
                sms = ", ".join(map(str, read_header(path).sms)) if library == _LIBRARIES[0] else "another GPU"
                raise UserError(f"{path}: this GPU cannot load the engine (made for SM {sms}); export for its SM")
            inputs, outputs = port_names(graph)
            check_ports(path, [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)], [*inputs, *outputs])
            self._engines[graph.name] = engine
            for profile in range(engine.num_optimization_profiles):
                context = engine.create_execution_context()
                if not context.set_optimization_profile_async(profile, 0):
                    raise UserError(f"{path}: optimization profile {profile} does not load; export the bundle again")
                self._contexts[graph.name, profile] = context

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        """For each state that `graph` updates two zeroed GPU buffers: the one that is read, then the one that is written."""
        sizes = {"batch": batch, "capacity": capacity}
        return {
            s.name: [self.device.zeros(sized(s.shape, sizes), state_dtype(s, np.float16)) for _ in range(2)]
            for s in self._graphs[graph].updated_states
        }

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        """As `Session.run`. Raises UserError for a size outside the profiles that the engine was built with."""
        spec, engine = self._graphs[graph], self._engines[graph]
        step = engine.num_optimization_profiles > 1 and inputs["input_ids"].shape[1] == 1
        context = self._contexts[graph, 1 if step and inputs["logit_positions"].shape[0] == 1 else 0]
        held = {name: self.device.put(value) for name, value in inputs.items()}  # must outlive the run
        for s in spec.states:
            held[s.name] = state[s.name][0] if s.updated else state[s.name]
        sizes: dict[str, int] = {}
        for port in (*spec.inputs, *spec.states):
            buffer = held[port.name]
            sizes |= {d: n for d, n in zip(port.shape, buffer.shape, strict=True) if isinstance(d, str)}
            if not context.set_input_shape(port.name, buffer.shape):
                raise UserError(
                    f"{graph}: {port.name} of {list(buffer.shape)} is outside what the engine was built for"
                )
            context.set_tensor_address(port.name, buffer.address)
        written = {}
        for port in spec.outputs:
            state_of = self._states.get(port.name)
            dtype = np.dtype(DTYPES[port.dtype]) if state_of is None else state_dtype(state_of, np.float16)
            known = all(isinstance(d, int) or d in sizes for d in port.shape)
            shape = sized(port.shape, sizes) if known else tuple(context.get_tensor_shape(port.name))
            written[port.name] = self.device.empty(shape, dtype)
            context.set_tensor_address(port.name, written[port.name].address)
        for s in spec.updated_states:
            context.set_tensor_address(f"{s.name}_out", state[s.name][1].address)
        if not context.execute_async_v3(0):
            raise RuntimeError(f"{graph}: the engine failed to run")
        self.device.synchronize()
        for s in spec.updated_states:
            state[s.name].reverse()
        results: dict[str, Array] = {}
        for name, buffer in written.items():
            if name in self._states:
                state[name] = buffer
            else:
                results[name] = buffer.numpy()
        return results

    def placement(self) -> Placement:
        """The ops of the network, all of them in the engine, which fuses them into fewer layers."""
        ops = network_ops(self._directory, list(self._graphs.values()))
        return Placement(GPU, ops, source=f"{NO_FALLBACK}; the engine runs on this GPU")
