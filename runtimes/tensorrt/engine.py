"""TensorRT behind `Session`: the engine where there is an NVIDIA GPU, else the ONNX it was built from on the CPU.

What may enter: `bundle`; never torch. The engine path speaks to the driver through `cuda`; states stay in its memory, two
buffers each that change places at every call, because a scatter must not write where it reads. Keys and values are float16,
what a recurrence carries is float32.
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
from .ports import _WHOLE, GPU, _dtype, _expect, _names, _network_ops

_LIBRARIES = ("tensorrt_rtx_bindings", "tensorrt")


class EngineSession:
    """The engines on the GPU: one execution context for prefill, one for the decode step."""

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
                made = ", ".join(map(str, read_header(path).sms)) if library == _LIBRARIES[0] else "another GPU"
                raise UserError(f"{path}: this GPU cannot load the engine (made for SM {made}); export for its SM")
            inputs, outputs = _names(graph)
            _expect(path, [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)], [*inputs, *outputs])
            self._engines[graph.name] = engine
            for profile in range(engine.num_optimization_profiles):
                context = engine.create_execution_context()
                if not context.set_optimization_profile_async(profile, 0):
                    raise UserError(f"{path}: optimization profile {profile} does not load; export the bundle again")
                self._contexts[graph.name, profile] = context

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        """For each state that `graph` updates two zeroed buffers on the GPU: what is read and what is written next."""
        sizes = {"batch": batch, "capacity": capacity}
        return {
            s.name: [self.device.zeros(sized(s.shape, sizes), _dtype(s, np.float16)) for _ in range(2)]
            for s in self._graphs[graph].states
            if s.updated
        }

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        """As `Session.run`. Raises UserError if a size is outside the profiles the engine was built with."""
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
            dtype = np.dtype(DTYPES[port.dtype]) if state_of is None else _dtype(state_of, np.float16)
            known = all(isinstance(d, int) or d in sizes for d in port.shape)
            shape = sized(port.shape, sizes) if known else tuple(context.get_tensor_shape(port.name))
            written[port.name] = self.device.empty(shape, dtype)
            context.set_tensor_address(port.name, written[port.name].address)
        for s in spec.states:
            if s.updated:
                context.set_tensor_address(f"{s.name}_out", state[s.name][1].address)
        if not context.execute_async_v3(0):
            raise RuntimeError(f"{graph}: the engine failed to run")
        self.device.synchronize()
        for s in spec.states:
            if s.updated:
                state[s.name].reverse()
        results: dict[str, Array] = {}
        for name, buffer in written.items():
            if name in self._states:
                state[name] = buffer
            else:
                results[name] = buffer.numpy()
        return results

    def placement(self) -> Placement:
        """The ops of the network, all in the engine that runs here (which fuses them into fewer layers)."""
        ops = _network_ops(self._directory, list(self._graphs.values()))
        return Placement(GPU, ops, source=f"{_WHOLE}; the engine runs on this GPU")
