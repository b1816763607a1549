"""The ONNX network that an engine was built from, run on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import GraphSpec, StateSpec
from ...targets.onnx.graph_check import check_graph
from ...targets.tensorrt.engine_file import Header, read_header
from ..session import Array, Placement, StateBuffers, keep_states, require_room, sized, state_bytes
from .ports import GPU, NO_FALLBACK, check_ports, network_ops, port_names, state_dtype


class NetworkSession:
    """The ONNX files that the engines were built from, on ONNX Runtime's CPU kernels. It checks the network, not the engine.

    exact: float16 arithmetic and states of the network become float32, weights stay as they are, so the outputs must equal the
    reference's. Without it, the headers of the engines are checked too.
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
            inputs, outputs = port_names(graph)
            engine, path = directory / f"{graph.name}.engine", directory / f"{graph.name}.onnx"
            check_graph(path)
            if not exact:
                self.headers[graph.name] = read_header(engine)
                check_ports(engine, self.headers[graph.name].ports, [*inputs, *outputs])
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            # Weights are dequantized once, at load: no fusion may change the arithmetic that is checked.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            model: str | bytes = str(path)
            if exact:
                options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
                model = _widened(path)
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            check_ports(path, [i.name for i in session.get_inputs()], inputs)
            check_ports(path, [o.name for o in session.get_outputs()], outputs)
            self.sessions[graph.name] = session

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        """Zeroed arrays of the states that `graph` updates; keys and values are float16, with `exact` float32."""
        sizes = {"batch": batch, "capacity": capacity}
        updated = self._graphs[graph].updated_states
        require_room(state_bytes(updated, sizes), capacity)
        return {s.name: np.zeros(sized(s.shape, sizes), state_dtype(s, self._half)) for s in updated}

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        spec = self._graphs[graph]
        feeds = dict(inputs) | {s.name: state[s.name] for s in spec.states}
        _, names = port_names(spec)
        results = dict(zip(names, self.sessions[graph].run(names, feeds), strict=True))
        keep_states(results, [s.name for s in spec.updated_states], self._states, state)
        return results

    def placement(self) -> Placement:
        """The ops of the network, all on the GPU: an engine holds every op, or its build fails."""
        ops = network_ops(self._directory, list(self._graphs.values()))
        return Placement(GPU, ops, source=f"{NO_FALLBACK}; the engine was not run here (no NVIDIA GPU)")


def _widened(path: Path) -> bytes:
    """The ONNX model with every float16 type as float32. Integer codes and bfloat16 weights stay in their file."""
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
