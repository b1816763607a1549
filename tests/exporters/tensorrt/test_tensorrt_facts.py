"""What TensorRT-RTX takes, refuses and drops, on graphs of one operation: what the exporter relies on, one fact a test."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgewright.errors import UserError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed"
)
F16, F32, I64 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT64
ROWS = COLUMNS = 512
Value = onnx.ValueInfoProto


def value(name: str, kind: int, *shape: int) -> Value:
    return helper.make_tensor_value_info(name, kind, shape)


def build(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    weights: Sequence[onnx.TensorProto] = (),
    sm: int = 86,
) -> bytes:
    from edgewright.exporters.tensorrt.engine import build_engine

    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    domains = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=11), folder / "g.onnx")
    return bytes(build_engine(folder / "g.onnx", (sm,), []))


def codes(bits: int) -> np.ndarray:
    most = 1 << (bits - 1)
    return np.random.default_rng(0).integers(-most, most, (ROWS, COLUMNS)).astype(np.int8)


def packed(values: np.ndarray) -> bytes:
    """Pairs of nibbles, the first the low one."""
    low, high = values[:, ::2] & 15, values[:, 1::2] & 15
    return (low | high << 4).astype(np.uint8).tobytes()


def product(
    folder: Path, kind: int, values: np.ndarray, scales: np.ndarray, zero: int | None = None, sm: int = 86
) -> bytes:
    """x times a dequantized weight; scales [rows] per channel, or [rows, groups]."""
    narrow = kind in (TensorProto.INT4, TensorProto.UINT4)
    raw = packed(values) if narrow else values.tobytes()
    weights = [
        helper.make_tensor("q", kind, values.shape, raw, raw=True),
        numpy_helper.from_array(scales.astype(np.float16), "s"),
    ]
    if zero is not None:
        weights.append(
            helper.make_tensor("z", kind, scales.shape, np.full(scales.size, zero, np.int8).tobytes(), raw=True)
        )
    form = {"axis": 0} if scales.ndim == 1 else {"axis": 1, "block_size": values.shape[1] // scales.shape[1]}
    operands = ["q", "s"] if zero is None else ["q", "s", "z"]
    nodes = [
        helper.make_node("DequantizeLinear", operands, ["w"], **form),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    return build(folder, nodes, [value("x", F16, 1, COLUMNS)], [value("y", F16, 1, ROWS)], weights, sm)


def test_int4_in_blocks_stays_int4_and_one_scale_per_channel_makes_it_int8(tmp_path: Path) -> None:
    """Why the exporter repeats a channel's scale in blocks."""
    values = codes(4)
    blocked = product(tmp_path, TensorProto.INT4, values, np.ones((ROWS, 4)))
    channel = product(tmp_path, TensorProto.INT4, values, np.ones(ROWS))
    assert packed(values) in blocked
    assert packed(values) not in channel
    assert len(channel) - len(blocked) > 0.9 * values.size / 2  # half a byte more for each weight


def test_int8_per_channel_stays_int8(tmp_path: Path) -> None:
    values = codes(8)
    engine = product(tmp_path, TensorProto.INT8, values, np.ones(ROWS))
    assert values.tobytes() in engine or values.T.copy().tobytes() in engine


@pytest.mark.parametrize("kind", [TensorProto.UINT4, TensorProto.UINT8], ids=["uint4", "uint8"])
def test_unsigned_codes_are_refused(tmp_path: Path, kind: int) -> None:
    """Why codes are stored as two's complement."""
    with pytest.raises(UserError, match=r"g\.onnx"):
        product(tmp_path, kind, np.abs(codes(4)), np.ones((ROWS, 4)))


def test_zero_points_other_than_zero_are_refused(tmp_path: Path) -> None:
    """Why codes are symmetric."""
    assert product(tmp_path, TensorProto.INT8, codes(8), np.ones(ROWS), zero=0)
    with pytest.raises(UserError, match=r"g\.onnx"):
        product(tmp_path, TensorProto.INT8, codes(8), np.ones(ROWS), zero=3)


def test_sm75_has_no_int4(tmp_path: Path) -> None:
    """Why SM75 is not among the compute capabilities to choose from."""
    with pytest.raises(UserError, match="no engine"):
        product(tmp_path, TensorProto.INT4, codes(4), np.ones((ROWS, 4)), sm=75)


def test_matmulnbits_is_refused(tmp_path: Path) -> None:
    """Why the ONNX Runtime graphs cannot be used."""
    weights = [
        numpy_helper.from_array(np.zeros((ROWS, 4, 64), np.uint8), "q"),
        numpy_helper.from_array(np.ones(ROWS * 4, np.float32), "s"),
    ]
    node = helper.make_node(
        "MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", K=COLUMNS, N=ROWS, bits=4, block_size=128
    )
    with pytest.raises(UserError, match="MatMulNBits"):
        build(tmp_path, [node], [value("x", F32, 1, COLUMNS)], [value("y", F32, 1, ROWS)], weights)


def attention(folder: Path, operands: list[str], outputs: list[str]) -> bytes:
    shapes = {n: value(n, F16, 1, 2, 8, 16) for n in ("q", "k", "v", "past_k", "past_v")}
    shapes |= {"nonpad": value("nonpad", I64, 1)}
    made = {
        "y": value("y", F16, 1, 2, 8, 16),
        "pk": value("pk", F16, 1, 2, 16, 16),
        "pv": value("pv", F16, 1, 2, 16, 16),
    }
    node = helper.make_node("Attention", operands, outputs)
    return build(folder, [node], [shapes[n] for n in operands if n], [made[n] for n in outputs])


def test_attention_with_a_past_is_refused(tmp_path: Path) -> None:
    """Why attention is spelled out over a cache that ScatterElements writes."""
    assert attention(tmp_path, ["q", "k", "v"], ["y"])
    with pytest.raises(UserError, match="Attention"):
        attention(tmp_path, ["q", "k", "v", "", "past_k", "past_v"], ["y", "pk", "pv"])


def test_the_length_of_a_padded_cache_is_dropped_and_that_is_an_error(tmp_path: Path) -> None:
    """TensorRT only warns: without the check the engine would attend to padding."""
    with pytest.raises(UserError, match="an input was dropped"):
        attention(tmp_path, ["q", "k", "v", "", "", "", "nonpad"], ["y"])
