"""Measuring the machine we run on: memory bandwidth, peak rates, and the rate of streaming 4-bit weights.

Part of the room `device_profiles`; numpy, onnx and onnxruntime enter. Every task is run in turn, round after round, so that a
busy spell of a shared machine falls on all of them alike; a number is the median over the rounds.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import __version__
from ..errors import UserError
from ..system.reading import one_line
from .profile import ComputeUnit, DeviceProfile, Memory, Quantity, Rates, Reach, Target

_MEBI = 1 << 20
_ROWS, _SIDE = 256, 2048  # a product [256, 2048] x [2048, 2048]: large enough to be bound by arithmetic
_GROUP = 64  # columns a scale, in 4-bit weights
_STREAM_K = 4096  # columns of the weights streamed
_PASSES = 4  # over a buffer in one run: a run of one pass is over before the system has spread the threads
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class _Task:
    """Something to time: `work` bytes or operations a run; `what` says what runs, for the source line."""

    key: str
    what: str
    work: float
    run: Callable[[], object]


def measure_host(seconds: float = 20.0, progress: Callable[[str], None] | None = None) -> DeviceProfile:
    """The profile of this machine, named "host", from about `seconds` of timing after a few seconds of preparation.

    At least 3 rounds are run, whatever `seconds` says. Takes at most about half of the memory that is free: 1.7 GB where the
    last-level cache has 32 MiB. The load of the machine is not corrected for; it is told to `progress`, which is called with one
    line a step, and kept in `description`. Raises UserError if `seconds` is not between 0 and 3600.
    """
    if not 0 < seconds <= 3600:
        raise UserError(f"--seconds {seconds}: give more than 0 and at most 3600")
    note = progress if progress is not None else lambda line: None
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cache = _last_level_cache()
    size = _buffer_bytes(cache)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > 0.25 * threads:
        note(f"this machine is busy (load {load:.2f} on {threads} CPUs): the rates may come out too low")
    note(f"preparing buffers of {size // _MEBI} MiB and products of [{_ROWS}, {_SIDE}] x [{_SIDE}, {_SIDE}]")
    with ThreadPoolExecutor(threads) as pool:
        tasks = _memory_tasks(size, threads, pool)
        for count in sorted({1, threads}):
            tasks += [_fp32_task(count), _int8_task(count), _prefill_task(count), _stream_task(size, count)]
        note(f"timing {len(tasks)} tasks in turn for {seconds:g} s on {threads} threads")
        times = _interleaved(tasks, seconds)
    made = {task.key: _quantity(task, times[task.key]) for task in tasks}
    for key, quantity in made.items():
        note(f"{key}: {quantity.value:g} {quantity.unit}")

    def get(key: str, count: int) -> Quantity:
        return made[f"{key}, {count} threads"]

    about = f"buffers of {size // _MEBI} MiB, " + (f"{size / cache:.1f} times" if cache else "unknown beside")
    about += " the last-level cache" + (f"; load {load:.2f} before measuring" if load is not None else "")
    unit = ComputeUnit(
        name=_cpu_model(),
        kind="cpu",
        cores=_physical_cores(),
        threads=Quantity(
            value=threads, unit="threads", source=_measured("the CPUs this process may use"), kind="measured"
        ),
        peak=Rates(fp32=get("fp32", threads), int8=get("int8", threads)),
        peak_one_thread=Rates(fp32=get("fp32", 1), int8=get("int8", 1)),
        weight_stream=get("4-bit stream", threads),
        weight_stream_one_thread=get("4-bit stream", 1),
        prefill_rate=get("4-bit prefill", threads),
        prefill_rate_one_thread=get("4-bit prefill", 1),
    )
    return DeviceProfile(
        name="host",
        kind="host",
        description=one_line(f"{_cpu_model()}, {platform.system()} {platform.machine()}; {about}", 300),
        reach=Reach(by="local"),
        memory=Memory(
            size=_memory_size(),
            bandwidth=get("read", threads),
            bandwidth_one_thread=get("read", 1),
            copy_rate=get("copy", threads),
        ),
        units=(unit,),
        targets=_targets(),
    )


def _interleaved(tasks: Sequence[_Task], seconds: float) -> dict[str, list[float]]:
    """Seconds of every run of every task; each task runs once in a round, every other round backwards."""
    for task in tasks:
        task.run()  # touches the pages and packs the weights; not timed
    times: dict[str, list[float]] = {task.key: [] for task in tasks}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _LEAST_ROUNDS or time.perf_counter() < end:
        for task in tasks if rounds % 2 == 0 else reversed(tasks):
            start = time.perf_counter()
            task.run()
            times[task.key].append(time.perf_counter() - start)
        rounds += 1
    return times


def _quantity(task: _Task, times: list[float]) -> Quantity:
    """The median rate of a task, to 4 digits; operations are given in units of 10^9."""
    scale, unit = 1.0, "bytes/s"
    if task.key.startswith(("fp32", "int8", "4-bit prefill")):
        scale, unit = 1e9, "GFLOP/s" if task.key.startswith("fp32") else "GOP/s"
    slow, middle, fast = (task.work / t / scale for t in np.quantile(times, [0.75, 0.5, 0.25]).tolist())
    spread = f"median of {len(times)} interleaved runs, quartiles {slow:.4g} and {fast:.4g}"
    return Quantity(
        value=float(f"{middle:.4g}"), unit=unit, source=_measured(f"{task.what}; {spread}"), kind="measured"
    )


def _measured(what: str) -> str:
    import onnxruntime

    versions = f"edgewright {__version__}, numpy {np.__version__}, onnxruntime {onnxruntime.__version__}"
    today = datetime.date.today().isoformat()
    return one_line(f"measured by edgewright devices measure on {today} with {versions}: {what}", 1000)


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory_tasks(size: int, threads: int, pool: ThreadPoolExecutor) -> list[_Task]:
    """Reading and copying buffers of `size` bytes; numpy lets go of the interpreter lock in both, so threads run at once."""
    source = np.random.default_rng(0).integers(0, 1 << 62, size // 8, dtype=np.int64)
    target = np.zeros_like(source)
    sources, targets = np.array_split(source, threads), np.array_split(target, threads)

    def read(part: npt.NDArray[np.int64]) -> None:
        # The maximum is the reduction that numpy vectorises best: it reads, and does next to nothing else.
        for _ in range(_PASSES):
            np.maximum.reduce(part)

    def copy(into: npt.NDArray[np.int64], part: npt.NDArray[np.int64]) -> None:
        for _ in range(_PASSES):
            np.copyto(into, part)

    passes = f"{_PASSES} passes over {size // _MEBI} MiB"
    one = _Task(
        "read, 1 threads", f"numpy maximum of int64, {passes}, 1 thread(s)", _PASSES * size, lambda: read(source)
    )
    tasks = [one]
    if threads > 1:
        what = f"numpy maximum of int64, {passes}, {threads} thread(s)"
        tasks.append(_Task(f"read, {threads} threads", what, _PASSES * size, lambda: list(pool.map(read, sources))))
    what = f"numpy copy, {passes}, {threads} thread(s), bytes read plus bytes written"
    copying = _Task(
        f"copy, {threads} threads", what, 2 * _PASSES * size, lambda: list(pool.map(copy, targets, sources))
    )
    return [*tasks, copying]


def _buffer_bytes(cache: int | None) -> int:
    """Four times the last-level cache, at least 128 MiB; at most 1.5 GiB and a 32nd of the memory that is free.

    (An ONNX model ends at 2 GiB; the two sessions over the weights and their packing take about 13 times the buffer.)
    """
    wanted = max(128 * _MEBI, 4 * (cache or 32 * _MEBI))
    free = _meminfo("MemAvailable")
    most = 1536 * _MEBI if free is None else min(1536 * _MEBI, free // 32)
    return max(8, min(wanted, most) // _MEBI) * _MEBI


def _last_level_cache() -> int | None:
    """Bytes of all the last-level caches of the CPUs we may use; None where the system does not tell."""
    sizes: dict[tuple[int, str], int] = {}
    try:
        for cpu in sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []:
            for index in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
                size = (index / "size").read_text().strip()
                level, shared = int((index / "level").read_text()), (index / "shared_cpu_list").read_text().strip()
                sizes[(level, shared)] = int(size.removesuffix("K")) << 10
    except (OSError, ValueError):
        return None
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) or None


# --- products ---------------------------------------------------------------------------------------------------------


def _fp32_task(threads: int) -> _Task:
    weights = np.random.default_rng(1).standard_normal((_SIDE, _SIDE), dtype=np.float32)
    rows = np.random.default_rng(2).standard_normal((_ROWS, _SIDE), dtype=np.float32)
    run = _product("MatMul", "", rows, {"b": weights}, {}, 1, threads)
    what = f"onnxruntime MatMul fp32 [{_ROWS}, {_SIDE}] x [{_SIDE}, {_SIDE}], 2*M*N*K operations, {threads} thread(s)"
    return _Task(f"fp32, {threads} threads", what, 2.0 * _ROWS * _SIDE * _SIDE, run)


def _int8_task(threads: int) -> _Task:
    weights = np.random.default_rng(1).integers(-128, 128, (_SIDE, _SIDE), dtype=np.int8)
    rows = np.random.default_rng(2).integers(0, 256, (_ROWS, _SIDE), dtype=np.uint8)
    # TensorProto element types: 2 uint8, 6 int32.
    run = _product("MatMulInteger", "", rows, {"b": weights}, {}, 6, threads, given=2)
    shape = f"[{_ROWS}, {_SIDE}] x [{_SIDE}, {_SIDE}]"
    what = f"onnxruntime MatMulInteger uint8 x int8 {shape}, 2*M*N*K operations, {threads} thread(s)"
    return _Task(f"int8, {threads} threads", what, 2.0 * _ROWS * _SIDE * _SIDE, run)


def _prefill_task(threads: int) -> _Task:
    run, _ = _nbits(4, _ROWS, _SIDE, _SIDE, threads)
    what = (
        f"onnxruntime MatMulNBits 4-bit block {_GROUP} accuracy level 4, [{_ROWS}, {_SIDE}] x [{_SIDE}, {_SIDE}], "
        f"2*M*N*K operations, {threads} thread(s)"
    )
    return _Task(f"4-bit prefill, {threads} threads", what, 2.0 * _ROWS * _SIDE * _SIDE, run)


def _stream_task(size: int, threads: int) -> _Task:
    """One row against 4-bit weights of about `size` bytes: too many for the cache, as in decoding."""
    n = size // (_STREAM_K // 2)
    run, nbytes = _nbits(4, 1, n, _STREAM_K, threads)
    what = (
        f"onnxruntime MatMulNBits 4-bit block {_GROUP} accuracy level 4, one row x [{_STREAM_K}, {n}]: "
        f"{nbytes / _MEBI:.0f} MiB of codes and fp32 scales a run, {threads} thread(s)"
    )
    return _Task(f"4-bit stream, {threads} threads", what, nbytes, run)


def _nbits(bits: int, m: int, n: int, k: int, threads: int) -> tuple[Callable[[], Any], int]:
    """A MatMulNBits of random weights [n, k] with `m` rows, ready to run, and the bytes of its codes and scales."""
    random = np.random.default_rng(3)
    codes = random.integers(0, 256, (n, k // _GROUP, _GROUP * bits // 8), dtype=np.uint8)
    scales = random.uniform(0.005, 0.02, (n, k // _GROUP)).astype(np.float32)
    rows = random.standard_normal((m, k), dtype=np.float32)
    attributes: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": _GROUP, "accuracy_level": 4}
    run = _product("MatMulNBits", "com.microsoft", rows, {"b": codes, "s": scales}, attributes, 1, threads)
    return run, codes.nbytes + scales.nbytes


def _product(
    op: str,
    domain: str,
    rows: npt.NDArray[Any],
    weights: dict[str, npt.NDArray[Any]],
    attributes: dict[str, Any],
    result: int,
    threads: int,
    given: int = 1,
) -> Callable[[], Any]:
    """A one-node onnxruntime session over constant weights (so that it packs them), as a function that runs it.

    `given` and `result` are the ONNX element types of rows and result (1: float).
    """
    import onnxruntime
    from onnx import helper, numpy_helper

    node = helper.make_node(op, ["a", *weights], ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        op,
        [helper.make_tensor_value_info("a", given, rows.shape)],
        [helper.make_tensor_value_info("y", result, None)],
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


# --- what the machine is ----------------------------------------------------------------------------------------------


def _targets() -> tuple[Target, ...]:
    bits = tuple(b for b in (2, 4, 8) if _holds(b))
    what = _measured(f"MatMulNBits block {_GROUP} accuracy level 4 run at 2, 4 and 8 bits and compared with numpy")
    found = [Target(name="onnx", bits=bits or None, source=what)]
    if importlib.util.find_spec("executorch") is not None:
        found.append(
            Target(name="executorch", source=_measured("the executorch package is installed; nothing was run"))
        )
    return tuple(found)


def _holds(bits: int) -> bool:
    """Whether a small MatMulNBits at this width gives the product of the dequantized weights, to int8-activation accuracy."""
    n, k = 32, 2 * _GROUP
    random = np.random.default_rng(4)
    values = random.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    each = 8 // bits
    shifts = np.arange(each, dtype=np.uint8) * np.uint8(bits)
    codes = np.bitwise_or.reduce(values.reshape(n, k // _GROUP, -1, each) << shifts, axis=-1)
    scales = random.uniform(0.005, 0.02, (n, k // _GROUP)).astype(np.float32)
    rows = random.standard_normal((4, k), dtype=np.float32)
    weights = (values.astype(np.float32) - (1 << (bits - 1))) * np.repeat(scales, _GROUP, axis=1)
    attributes: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": _GROUP, "accuracy_level": 4}
    exact = rows @ weights.T
    got = _product("MatMulNBits", "com.microsoft", rows, {"b": codes, "s": scales}, attributes, 1, 1)()
    return bool(np.linalg.norm(got - exact) < 0.03 * np.linalg.norm(exact))


def _cpu_model() -> str:
    """The CPU's name from /proc/cpuinfo, else what the platform calls it (Arm kernels give no name)."""
    names = [value for entry in _cpuinfo() if (value := entry.get("model name"))]
    return one_line(names[0] if names else platform.processor() or platform.machine() or "CPU", 120)


def _physical_cores() -> Quantity | None:
    """Distinct (package, core) pairs in /proc/cpuinfo; None where it does not give them."""
    cores = {(e["physical id"], e["core id"]) for e in _cpuinfo() if "physical id" in e and "core id" in e}
    if not cores:
        return None
    return Quantity(value=len(cores), unit="cores", source=_measured("/proc/cpuinfo"), kind="measured")


def _memory_size() -> Quantity | None:
    total = _meminfo("MemTotal")
    if total is None:
        return None
    return Quantity(value=total, unit="bytes", source=_measured("/proc/meminfo MemTotal"), kind="measured")


def _meminfo(field: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), None)
    except (OSError, ValueError, IndexError):
        return None


def _cpuinfo() -> list[dict[str, str]]:
    """One dict a CPU; empty where there is no /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    pairs = [[line.partition(":") for line in block.splitlines()] for block in text.split("\n\n") if block.strip()]
    return [{key.strip(): value.strip() for key, _, value in block} for block in pairs]
