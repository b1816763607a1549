"""TensorRT behind `Session`: the engine where there is an NVIDIA GPU, else the ONNX it was built from on the CPU.

What may enter: `bundle`; never torch. The engine path speaks to the driver through `cuda`; states stay in its memory, two
buffers each that change places at every call, because a scatter must not write where it reads. Keys and values are float16,
what a recurrence carries is float32.
"""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import GraphSpec, StateSpec
from ..errors import UserError
from ..untrusted import one_line
from .cuda import Device
from .session import DTYPES, Array, Counts, Placement, StateBuffers, sized

GPU = "NVIDIA GPU"
HALF_STATES = ("kv", "cross")
"""Kinds of states that are float16."""

_SM_BITS = (75, 80, 86, 89, 120, 121)
_LIBRARIES = ("tensorrt_rtx_bindings", "tensorrt")
_HEAD = 36  # bytes of an engine file that are read as its header
# A tagged string (its length, then its letters) in an engine's plan, and what stands behind the name of an input or output.
_STRING, _PORT = b"\x01\x80\x0c\x80\x01\x00", b"\x1c\x80\x01\x00\x03\x80\x01\x00"
_LONGEST = 512  # letters of a name
_PROFILE = re.compile(r" \[profile (\d+)\]$")


@dataclass(frozen=True)
class Header:
    """What a TensorRT-RTX engine file says of itself.

    ports: names of its inputs and outputs. profiles: how many optimization profiles it was built with.
    """

    version: tuple[int, int, int, int]
    payload_bytes: int
    sms: tuple[int, ...]
    ports: frozenset[str]
    profiles: int


def read_header(path: Path) -> Header:
    """The header of an engine and the names in its plan. Raises UserError if it is none, or shorter than it says."""
    if not path.is_file() or path.stat().st_size < _HEAD:
        raise UserError(f"{path}: not a TensorRT-RTX engine; export the bundle again")
    # Nothing but names and numbers is taken from a plan, each within the file.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        if plan[:4] != b"vtrt" or plan[28:32] != b"vtrt":
            raise UserError(f"{path}: not a TensorRT-RTX engine; export the bundle again")
        (payload,) = struct.unpack_from("<Q", plan, 16)
        (mask,) = struct.unpack_from("<I", plan, 32)
        if len(plan) < payload:
            raise UserError(f"{path}: {len(plan)} bytes where its header says {payload}; export the bundle again")
        names = _ports(plan)
        version = (plan[24], plan[25], plan[26], plan[27])
    sms = tuple(sm for i, sm in enumerate(_SM_BITS) if mask >> i & 1)
    profiles = 1 + max((int(m[1]) for m in map(_PROFILE.search, names) if m is not None), default=0)
    return Header(version, payload, sms, frozenset(_PROFILE.sub("", n) for n in names), profiles)


def _ports(plan: mmap.mmap) -> list[str]:
    """Names of inputs and outputs; those of a second profile end in `[profile 1]`.

    Layers that TensorRT named itself can look like ports; no port of ours is unnamed.
    """
    found = []
    for match in re.finditer(re.escape(_STRING) + rb"(..)\0{6}", plan, re.DOTALL):
        (length,) = struct.unpack("<H", match[1])
        stop = match.end() + length
        if 0 < length <= _LONGEST and plan[stop : stop + len(_PORT)] == _PORT:
            found.append(plan[match.end() : stop].decode("utf-8", "replace"))
    return [name for name in found if not name.startswith("(Unnamed Layer")]


def here() -> str:
    """What this machine can do with TensorRT artefacts, in words."""
    if Device.available():
        return "exports, runs the engines on this NVIDIA GPU and verifies them"
    return "exports engines; verifies the network they are built from on this CPU (no NVIDIA GPU: they are not run)"


def open_tensorrt(
    directory: Path, graphs: Sequence[GraphSpec], threads: int = 0, exact: bool = False
) -> EngineSession | NetworkSession:
    """The engines where there is a GPU, else (and for `exact`, which an engine is not) their ONNX on the CPU.

    Raises UserError if a file is damaged, or does not have the inputs and outputs that the bundle names.
    """
    if Device.available() and not exact:
        return EngineSession(directory, graphs)
    return NetworkSession(directory, graphs, threads, exact)


def _dtype(state: StateSpec, half: type[np.generic]) -> np.dtype[Any]:
    return np.dtype(half if state.kind in HALF_STATES else DTYPES[state.dtype])


def _names(graph: GraphSpec) -> tuple[list[str], list[str]]:
    """Inputs and outputs of a graph, its states among them."""
    updated = [f"{s.name}_out" for s in graph.states if s.updated]
    return [p.name for p in (*graph.inputs, *graph.states)], [p.name for p in graph.outputs] + updated


def _expect(path: Path, got: Sequence[str] | frozenset[str], want: Sequence[str]) -> None:
    """Raise UserError unless a file has exactly these inputs or outputs: one dropped is a state lost in silence."""
    odd = sorted(set(want) ^ set(got))
    if odd:
        fault = "lacks" if odd[0] in want else "has, unknown to the bundle,"
        raise UserError(f"{path} {fault} the input or output {one_line(odd[0], 80)}; export the bundle again")


def _network_ops(directory: Path, graphs: Sequence[GraphSpec]) -> Counts:
    """Graph -> op -> nodes of the ONNX its engine was built from."""
    import onnx

    models = {g.name: onnx.load(str(directory / f"{g.name}.onnx"), load_external_data=False) for g in graphs}
    return {name: dict(Counter(node.op_type for node in model.graph.node)) for name, model in models.items()}


class NetworkSession:
    """The ONNX files the engines were built from, on ONNX Runtime's CPU kernels: checks the network, not the engine.

    Of the engines the header is read: kind, length, compute capabilities, names of inputs and outputs. exact: all float16
    arithmetic and states of the network widened to float32, weights unchanged, so that it must equal the reference; the
    engines are then not looked at.
    """

    stand_in = True

    def __init__(self, directory: Path, graphs: Sequence[GraphSpec], threads: int = 0, exact: bool = False) -> None:
        import onnxruntime as ort

        self.activations = "float32" if exact else "float16"
        self.how = "the ONNX the engine was built from, on this CPU" + (
            ", float16 widened to float32" if exact else " (no NVIDIA GPU: the engine itself was not run)"
        )
        self._directory, self._half = directory, np.float32 if exact else np.float16
        self._graphs = {g.name: g for g in graphs}
        self._states: dict[str, StateSpec] = {s.name: s for g in graphs for s in g.states}
        self.sessions: dict[str, Any] = {}
        self.headers: dict[str, Header] = {}
        for graph in graphs:
            inputs, outputs = _names(graph)
            engine, path = directory / f"{graph.name}.engine", directory / f"{graph.name}.onnx"
            if not exact:
                self.headers[graph.name] = read_header(engine)
                _expect(engine, self.headers[graph.name].ports, [*inputs, *outputs])
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            # The dequantized weights are folded once: no fusion may change the arithmetic that is checked.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            model: str | bytes = str(path)
            if exact:
                options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
                model = _widened(path)
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            _expect(path, [i.name for i in session.get_inputs()], inputs)
            _expect(path, [o.name for o in session.get_outputs()], outputs)
            self.sessions[graph.name] = session

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        """Zeroed arrays for the states that `graph` updates, keys and values in float16 (exact: float32)."""
        sizes, updated = {"batch": batch, "capacity": capacity}, [s for s in self._graphs[graph].states if s.updated]
        return {s.name: np.zeros(sized(s.shape, sizes), _dtype(s, self._half)) for s in updated}

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        spec = self._graphs[graph]
        feeds = dict(inputs) | {s.name: state[s.name] for s in spec.states}
        _, names = _names(spec)
        results = dict(zip(names, self.sessions[graph].run(names, feeds), strict=True))
        for s in spec.states:
            if s.updated:
                state[s.name] = results.pop(f"{s.name}_out")
        for name in [n for n in results if n in self._states]:
            state[name] = results.pop(name)
        return results

    def placement(self) -> Placement:
        """The ops of the network, on the GPU: an engine holds them all or is not built."""
        ops = _network_ops(self._directory, list(self._graphs.values()))
        return Placement(GPU, ops, source=f"{_WHOLE}; the engine was not run here (no NVIDIA GPU)")


_WHOLE = "TensorRT has no CPU fallback: an engine holds every op of its network, or its build fails"


def _widened(path: Path) -> bytes:
    """The ONNX with every float16 type made float32, in memory. Integer codes and bfloat16 weights stay in their file."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor

    half, wide = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph

    def widen(tensor: Any) -> None:
        if tensor.data_type != half:
            return
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            load_external_data_for_tensor(tensor, str(path.parent))
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    for tensor in graph.initializer:
        widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == half:
                attribute.i = wide
            if attribute.HasField("t"):
                widen(attribute.t)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = wide
    del graph.value_info[:]
    serialised: bytes = model.SerializeToString()
    return serialised


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
