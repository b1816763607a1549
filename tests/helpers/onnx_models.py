"""Small ONNX models of one node or two, built, loaded and run; for the tests of ONNX Runtime's facts."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as Kind
from onnx import helper

MS = "com.microsoft"
RNG = np.random.default_rng(0)
KINDS = {"float32": Kind.FLOAT, "int64": Kind.INT64, "int32": Kind.INT32, "uint8": Kind.UINT8, "bool": Kind.BOOL}
Arrays = dict[str, np.ndarray]


def same_numbers() -> None:
    """Let `normal` begin anew, whatever ran before."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(
    nodes: list[onnx.NodeProto], inputs: Arrays, outputs: list[str], initializers: Arrays | None = None
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "fact",
        [helper.make_tensor_value_info(n, KINDS[a.dtype.name], [None] * a.ndim) for n, a in inputs.items()],
        [helper.make_tensor_value_info(o, Kind.FLOAT, None) for o in outputs],
        [onnx.numpy_helper.from_array(a, n) for n, a in (initializers or {}).items()],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def load(model: onnx.ModelProto | bytes, **entries: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    raw = model if isinstance(model, bytes) else model.SerializeToString()
    return ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])


def run(
    nodes: list[onnx.NodeProto], inputs: Arrays, outputs: list[str], initializers: Arrays | None = None
) -> list[np.ndarray]:
    return load(build(nodes, inputs, outputs, initializers)).run(None, inputs)


def close(got: np.ndarray, want: np.ndarray, tolerance: float = 2e-6) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()
