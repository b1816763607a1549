"""What onnxruntime-qnn 2.7 was found to do, where the Qualcomm NPU's exporter and session rely on it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgewright.ops.quantized import dequantize
from edgewright.targets.qnn.context import NAME, emulated, session, units

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed"
)
HALF = TensorProto.FLOAT16
RNG = np.random.default_rng(0)


def _graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    shape: list[Any],
    out: list[Any],
    constants: dict[str, np.ndarray] | None = None,
    kind: int = HALF,
) -> Path:
    """x -> `nodes` -> y, saved at `path`."""
    x, y = helper.make_tensor_value_info("x", kind, shape), helper.make_tensor_value_info("y", kind, out)
    initializers = [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()]
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], initializers), opset_imports=opsets, ir_version=10
    )
    onnx.save(model, str(path))
    return path


def _loaded(path: Path, **options: str) -> Any:
    return session(path, {"htp_arch": "75", **options}, {}, 1)


def _nbits(bits: int, block: int, columns: int, rows: int) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    codes = RNG.integers(0, 256, (rows, columns // block, block * bits // 8), dtype=np.uint8)
    scales = 2.0 ** RNG.integers(-9, -3, (rows, columns // block)) * (
        1 + RNG.integers(0, 128, (rows, columns // block)) / 128
    )
    sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **sizes)
    return [node], {"w": codes, "s": scales.astype(np.float16)}


@pytest.mark.parametrize(("bits", "block"), [(2, 32), (4, 16), (4, 64), (8, 128)])
def test_the_npu_reads_every_code_and_scale_as_they_are(bits: int, block: int, tmp_path: Path) -> None:
    """A one-hot input gives the weight itself: float16(code * scale), 8 bits within its last place."""
    columns, rows = 128, 64
    nodes, stored = _nbits(bits, block, columns, rows)
    loaded = _loaded(_graph(tmp_path / "m.onnx", nodes, [1, columns, columns], [1, columns, rows], stored))
    assert units(loaded) == {NAME: {"MatMulNBits": 1}}
    got = loaded.run(None, {"x": np.eye(columns, dtype=np.float16)[None]})[0][0].T
    packed = torch.from_numpy(stored["w"]).reshape(rows, -1)
    want = dequantize(packed, torch.from_numpy(stored["s"]), bits, block).numpy().astype(np.float16)
    if bits < 8:
        assert np.array_equal(got, want)
    else:
        assert (np.abs(got.astype(np.float32) - want) <= np.spacing(np.abs(want)).astype(np.float32)).all()


def test_codes_behind_dequantizelinear_do_not_stay_a_weight(tmp_path: Path) -> None:
    codes = RNG.integers(-8, 8, (64, 32)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    constants = {"w": codes, "s": np.full((2, 32), 0.01, np.float16)}
    loaded = _loaded(_graph(tmp_path / "m.onnx", nodes, [1, 4, 64], [1, 4, 32], constants))
    assert "DequantizeLinear" not in units(loaded).get(NAME, {})


def test_float32_norms_do_not_compile_for_an_htp_version(tmp_path: Path) -> None:
    """Why everything is float16."""
    node = [helper.make_node("RMSNormalization", ["x", "w"], ["y"], axis=-1, epsilon=1e-6)]
    path = _graph(tmp_path / "m.onnx", node, [1, 4, 64], [1, 4, 64], {"w": np.ones(64, np.float32)}, TensorProto.FLOAT)
    with pytest.raises(Exception, match="finalize QNN graph"):
        _loaded(path)


def test_dynamic_shapes_stay_off_the_npu(tmp_path: Path) -> None:
    node = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    weight = {"w": RNG.standard_normal((64, 32)).astype(np.float16)}
    assert units(_loaded(_graph(tmp_path / "a.onnx", node, [1, 4, 64], [1, 4, 32], weight))) == {NAME: {"MatMul": 1}}
    assert NAME not in units(_loaded(_graph(tmp_path / "b.onnx", node, [1, "n", 64], [1, "n", 32], weight)))


def test_a_scatter_of_elements_runs_on_the_npu_and_of_tensors_does_not(tmp_path: Path) -> None:
    rows = {"i": np.full((1, 2, 1, 8), 3, np.int64), "n": np.ones((1, 2, 1, 8), np.float16)}
    node = [helper.make_node("ScatterElements", ["x", "i", "n"], ["y"], axis=2)]
    shape = [1, 2, 8, 8]
    loaded = _loaded(_graph(tmp_path / "a.onnx", node, shape, shape, rows))
    assert units(loaded) == {NAME: {"ScatterElements": 1}}
    written = loaded.run(None, {"x": np.zeros(shape, np.float16)})[0]
    assert written[:, :, 3].all()
    assert not np.delete(written, 3, 2).any()
    node = [helper.make_node("TensorScatter", ["x", "n", "p"], ["y"], axis=-2)]
    constants = {"n": rows["n"], "p": np.array([3], np.int64)}
    assert NAME not in units(_loaded(_graph(tmp_path / "b.onnx", node, shape, shape, constants)))


def test_rms_normalization_survives_values_whose_squares_overflow_float16(tmp_path: Path) -> None:
    x = (RNG.standard_normal((1, 4, 256)) * 3000).astype(np.float16)
    node = [helper.make_node("RMSNormalization", ["x", "w"], ["y"], axis=-1, epsilon=1e-6)]
    loaded = _loaded(_graph(tmp_path / "a.onnx", node, [1, 4, 256], [1, 4, 256], {"w": np.ones(256, np.float16)}))
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True))
    assert np.abs(loaded.run(None, {"x": x})[0] - want).max() < 3e-3


@pytest.mark.skipif(not emulated(), reason="a process that may die is for the emulator")
def test_a_broadcast_factor_of_a_product_that_is_multiplied_again_is_computed_wrongly(tmp_path: Path) -> None:
    """Why such a constant is laid out whole. When this fails, that has become needless."""
    given, shape = [1, 4, 32, 64], [1, 4, 32, 32]
    x = RNG.standard_normal(given).astype(np.float16)
    factor = RNG.standard_normal((32, 32)).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    nodes = [
        helper.make_node("Split", ["x", "sizes"], ["decay", "q", "k"], axis=-1),
        helper.make_node("Transpose", ["k"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "turned"], ["scores"]),
        helper.make_node("Mul", ["decay", "factor"], ["part"]),
        helper.make_node("Mul", ["part", "scores"], ["y"]),
    ]
    run = (
        "import sys, numpy; from pathlib import Path; from edgewright.targets.qnn.context import session\n"
        "made = session(Path(sys.argv[1]), {'htp_arch': '75'}, {}, 1).run(None, {'x': numpy.load(sys.argv[2])})\n"
        "numpy.save(sys.argv[3], made[0])"
    )
    wide = x.astype(np.float64)
    want = wide[..., :32] * factor * (wide[..., 32:48] @ wide[..., 48:].swapaxes(2, 3))
    right = {}
    for name, constant in (("broadcast", factor), ("whole", np.broadcast_to(factor, shape).copy())):
        constants = {"factor": constant, "sizes": np.array([32, 16, 16])}
        path, out = _graph(tmp_path / f"{name}.onnx", nodes, given, shape, constants), tmp_path / f"{name}.npy"
        command = [sys.executable, "-c", run, str(path), str(tmp_path / "x.npy"), str(out)]
        done = subprocess.run(command, capture_output=True, check=False)
        right[name] = done.returncode == 0 and bool(np.abs(np.load(out) - want).max() < 0.02 * np.abs(want).max())
    assert right == {"broadcast": False, "whole": True}


def test_linears_laid_side_by_side_do_not_compile_as_they_are(tmp_path: Path) -> None:
    """Why two negations stand between. When the first compiles, that has become needless."""
    stored: dict[str, np.ndarray] = {}
    plain, parted = [], []
    for name, rows in (("a", 32), ("b", 32), ("c", 96)):
        (node,), weights = _nbits(4, 32, 64, rows)
        node.input[1], node.input[2], node.output[0] = f"{name}w", f"{name}s", name
        stored |= {f"{name}{k}": v for k, v in weights.items()}
        plain.append(node)
        parted += [helper.make_node("Neg", [name], [f"{name}1"]), helper.make_node("Neg", [f"{name}1"], [f"{name}2"])]
    for suffix, nodes, compiles in (("", plain, False), ("2", plain + parted, True)):
        joined = helper.make_node("Concat", [f"{n}{suffix}" for n in "abc"], ["y"], axis=-1)
        path = _graph(tmp_path / f"m{suffix}.onnx", [*nodes, joined], [1, 1, 64], [1, 1, 160], stored)
        if compiles:
            assert set(units(_loaded(path))) == {NAME}
        else:
            with pytest.raises(Exception, match="MEM_ALLOC"):
                _loaded(path)


def test_an_unknown_htp_version_is_only_warned_of(tmp_path: Path) -> None:
    """Why `check_htp` refuses it."""
    nodes, stored = _nbits(4, 32, 64, 32)
    loaded = _loaded(_graph(tmp_path / "m.onnx", nodes, [1, 1, 64], [1, 1, 32], stored), htp_arch="70")
    assert units(loaded) == {NAME: {"MatMulNBits": 1}}


def _estimated(path: Path) -> Any:
    """The vendor's estimate, in a process of its own: afterwards no context binary runs in it."""
    code = (
        "import json, sys; from pathlib import Path; from edgewright.exporters.qnn.compile import estimate;"
        "print(json.dumps(estimate(Path(sys.argv[1]))))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True, text=True)
    return json.loads(done.stdout)


def test_no_estimate_is_given_of_a_graph_that_was_cut(tmp_path: Path) -> None:
    nodes, stored = _nbits(4, 32, 64, 64)
    first, second = helper.make_node("Relu", ["y0"], ["y1"]), helper.make_node("Neg", ["y2"], ["y"])
    nodes[0].output[0] = "y0"
    cut = helper.make_node("TensorScatter", ["y1", "n", "p"], ["y2"], axis=-2)
    stored |= {"n": np.ones((1, 1, 64), np.float16), "p": np.array([1], np.int64)}
    path = _graph(tmp_path / "m.onnx", [*nodes, first, cut, second], [1, 4, 64], [1, 4, 64], stored)
    assert _estimated(path) == {}


@pytest.mark.skipif(not emulated(), reason="a fact of the emulator")
def test_a_binary_that_shares_weights_is_smaller_and_the_emulator_cannot_load_it(tmp_path: Path) -> None:
    """Why each program stores its weights. Should this fail: store those of all programs once."""
    nodes, stored = _nbits(4, 32, 512, 512)
    for name, rows in (("step", 1), ("chunk", 8)):
        _graph(tmp_path / f"{name}.onnx", nodes, [1, rows, 512], [1, rows, 512], stored)
    code = (
        "import sys; from pathlib import Path; from edgewright.targets.qnn.context import session\n"
        "d, shared, kept = Path(sys.argv[1]), sys.argv[2], []\n"
        "for stem, last in (('step', '0'), ('chunk', '1')):\n"
        "    target = d / f'{stem}.{shared}.onnx'\n"
        "    c = {'ep.context_enable': '1', 'ep.context_embed_mode': '0', 'ep.context_file_path': str(target)}\n"
        "    if shared == 'shared': c |= {'ep.share_ep_contexts': '1', 'ep.stop_share_ep_contexts': last}\n"
        "    kept.append(session(d / f'{stem}.onnx', {'htp_arch': '75'}, c, 1))\n"
    )
    for shared in ("apart", "shared"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path), shared], check=True, capture_output=True)
    (together,) = tmp_path.glob("*.shared_qnn.bin")
    assert together.stat().st_size < 0.8 * sum(p.stat().st_size for p in tmp_path.glob("*.apart_qnn.bin"))
    load = (
        "import sys; from pathlib import Path; from edgewright.targets.qnn.context import session\n"
        "session(Path(sys.argv[1]), {'htp_arch': '75'}, {'ep.share_ep_contexts': sys.argv[2]}, 1)\n"
    )

    def loads(name: str, share: str) -> bool:
        command = [sys.executable, "-c", load, str(tmp_path / name), share]
        return subprocess.run(command, capture_output=True).returncode == 0

    assert loads("step.apart.onnx", "0")
    assert not loads("step.shared.onnx", "1")
