"""What is timed to measure a machine: memory read and copied, products of matrices, 4-bit weights streamed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..system.reading import MEBIBYTE

ROWS, SIDE = 256, 2048  # a product [256, 2048] x [2048, 2048]: large enough to be bound by arithmetic
GROUP = 64  # columns a scale, in 4-bit weights
_STREAM_K = 4096  # columns of the weights streamed
_PASSES = 4  # over a buffer in one run: a run of one pass is over before the system has spread the threads


@dataclass(frozen=True)
class Task:
    """Something to time. work: bytes or operations of a run. what: what runs, for the line that says where a number is from."""

    key: str
    what: str
    work: float
    run: Callable[[], object]


def memory_tasks(size: int, threads: int, pool: ThreadPoolExecutor) -> list[Task]:
    """Reading and copying buffers of `size` bytes; numpy releases the interpreter lock in both, so threads run at once."""
    source = np.random.default_rng(0).integers(0, 1 << 62, size // 8, dtype=np.int64)
    target = np.zeros_like(source)
    sources, targets = np.array_split(source, threads), np.array_split(target, threads)

    def read(part: npt.NDArray[np.int64]) -> None:
        # The maximum is the reduction that numpy vectorises best: it reads and does little else.
        for _ in range(_PASSES):
            np.maximum.reduce(part)

    def copy(into: npt.NDArray[np.int64], part: npt.NDArray[np.int64]) -> None:
        for _ in range(_PASSES):
            np.copyto(into, part)

    passes = f"{_PASSES} passes over {size // MEBIBYTE} MiB"
    one = Task(
        "read, 1 threads", f"numpy maximum of int64, {passes}, 1 thread(s)", _PASSES * size, lambda: read(source)
    )
    tasks = [one]
    if threads > 1:
        what = f"numpy maximum of int64, {passes}, {threads} thread(s)"
        tasks.append(Task(f"read, {threads} threads", what, _PASSES * size, lambda: list(pool.map(read, sources))))
    what = f"numpy copy, {passes}, {threads} thread(s), bytes read plus bytes written"
    copying = Task(f"copy, {threads} threads", what, 2 * _PASSES * size, lambda: list(pool.map(copy, targets, sources)))
    return [*tasks, copying]


def fp32_task(threads: int) -> Task:
    weights = np.random.default_rng(1).standard_normal((SIDE, SIDE), dtype=np.float32)
    rows = np.random.default_rng(2).standard_normal((ROWS, SIDE), dtype=np.float32)
    run = _product("MatMul", "", rows, {"b": weights}, {}, 1, threads)
    what = f"onnxruntime MatMul fp32 [{ROWS}, {SIDE}] x [{SIDE}, {SIDE}], 2*M*N*K operations, {threads} thread(s)"
    return Task(f"fp32, {threads} threads", what, 2.0 * ROWS * SIDE * SIDE, run)


def int8_task(threads: int) -> Task:
    weights = np.random.default_rng(1).integers(-128, 128, (SIDE, SIDE), dtype=np.int8)
    rows = np.random.default_rng(2).integers(0, 256, (ROWS, SIDE), dtype=np.uint8)
    # TensorProto element types: 2 uint8, 6 int32.
    run = _product("MatMulInteger", "", rows, {"b": weights}, {}, 6, threads, input_type=2)
    shape = f"[{ROWS}, {SIDE}] x [{SIDE}, {SIDE}]"
    what = f"onnxruntime MatMulInteger uint8 x int8 {shape}, 2*M*N*K operations, {threads} thread(s)"
    return Task(f"int8, {threads} threads", what, 2.0 * ROWS * SIDE * SIDE, run)


def prefill_task(threads: int) -> Task:
    run, _ = _nbits(4, ROWS, SIDE, SIDE, threads)
    what = (
        f"onnxruntime MatMulNBits 4-bit block {GROUP} accuracy level 4, [{ROWS}, {SIDE}] x [{SIDE}, {SIDE}], "
        f"2*M*N*K operations, {threads} thread(s)"
    )
    return Task(f"4-bit prefill, {threads} threads", what, 2.0 * ROWS * SIDE * SIDE, run)


def stream_task(size: int, threads: int) -> Task:
    """One row multiplied with 4-bit weights of about `size` bytes, which do not fit the cache, as in decoding."""
    n = size // (_STREAM_K // 2)
    run, nbytes = _nbits(4, 1, n, _STREAM_K, threads)
    what = (
        f"onnxruntime MatMulNBits 4-bit block {GROUP} accuracy level 4, one row x [{_STREAM_K}, {n}]: "
        f"{nbytes / MEBIBYTE:.0f} MiB of codes and fp32 scales a run, {threads} thread(s)"
    )
    return Task(f"4-bit stream, {threads} threads", what, nbytes, run)


def _nbits(bits: int, m: int, n: int, k: int, threads: int) -> tuple[Callable[[], Any], int]:
    """A MatMulNBits of random weights [n, k] and `m` rows, ready to run, and the bytes of its codes and scales."""
    random = np.random.default_rng(3)
    codes = random.integers(0, 256, (n, k // GROUP, GROUP * bits // 8), dtype=np.uint8)
    scales = random.uniform(0.005, 0.02, (n, k // GROUP)).astype(np.float32)
    rows = random.standard_normal((m, k), dtype=np.float32)
    attributes: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": GROUP, "accuracy_level": 4}
    run = _product("MatMulNBits", "com.microsoft", rows, {"b": codes, "s": scales}, attributes, 1, threads)
    return run, codes.nbytes + scales.nbytes


def _product(
    op: str,
    domain: str,
    rows: npt.NDArray[Any],
    weights: dict[str, npt.NDArray[Any]],
    attributes: dict[str, Any],
    result_type: int,
    threads: int,
    input_type: int = 1,
) -> Callable[[], Any]:
    """A function that runs a one-node onnxruntime session; its weights are constants, so that the session packs them.

    result_type, input_type: the ONNX element types of result and rows (1: float).
    """
    import onnxruntime
    from onnx import helper, numpy_helper

    node = helper.make_node(op, ["a", *weights], ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        op,
        [helper.make_tensor_value_info("a", input_type, rows.shape)],
        [helper.make_tensor_value_info("y", result_type, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that spin after a run would take the CPU from the next task.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"a": rows})[0]


def computes_width(bits: int) -> bool:
    """Whether a small MatMulNBits of this width gives the product of the dequantized weights, as exactly as int8 activations."""
    n, k = 32, 2 * GROUP
    random = np.random.default_rng(4)
    values = random.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    each = 8 // bits
    shifts = np.arange(each, dtype=np.uint8) * np.uint8(bits)
    codes = np.bitwise_or.reduce(values.reshape(n, k // GROUP, -1, each) << shifts, axis=-1)
    scales = random.uniform(0.005, 0.02, (n, k // GROUP)).astype(np.float32)
    rows = random.standard_normal((4, k), dtype=np.float32)
    weights = (values.astype(np.float32) - (1 << (bits - 1))) * np.repeat(scales, GROUP, axis=1)
    attributes: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": GROUP, "accuracy_level": 4}
    exact = rows @ weights.T
    actual = _product("MatMulNBits", "com.microsoft", rows, {"b": codes, "s": scales}, attributes, 1, 1)()
    return bool(np.linalg.norm(actual - exact) < 0.03 * np.linalg.norm(exact))
