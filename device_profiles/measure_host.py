"""The profile of the machine we run on: memory bandwidth, peak rates, and the rate of streaming 4-bit weights.

Every task runs in turn, round after round, so that a busy spell of a shared machine slows all of them alike. A number is the
median over the rounds. No torch is imported.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..errors import UserError
from ..system.reading import MEBIBYTE, one_line
from .host_facts import buffer_bytes, cpu_model, last_level_cache, measured, memory_size, physical_cores
from .host_tasks import (
    GROUP,
    ROWS,
    SIDE,
    Task,
    computes_width,
    fp32_task,
    int8_task,
    memory_tasks,
    prefill_task,
    stream_task,
)
from .profile import ComputeUnit, DeviceProfile, Memory, Quantity, Rates, Reach, Target

_LEAST_ROUNDS = 3


def measure_host(seconds: float = 20.0, progress: Callable[[str], None] | None = None) -> DeviceProfile:
    """The profile of this machine, named "host".

    seconds: of timing, after some of preparation; at least 3 rounds run. progress: called with one line a step. It takes at most
    about half of the free memory. The machine's load is not corrected for, but noted in `progress` and in `description`. Raises
    UserError if `seconds` is not between 0 and 3600.
    """
    if not 0 < seconds <= 3600:
        raise UserError(f"--seconds {seconds}: give more than 0 and at most 3600")
    note = progress if progress is not None else lambda line: None
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cache = last_level_cache()
    size = buffer_bytes(cache)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > 0.25 * threads:
        note(f"this machine is busy (load {load:.2f} on {threads} CPUs): the rates may come out too low")
    note(f"preparing buffers of {size // MEBIBYTE} MiB and products of [{ROWS}, {SIDE}] x [{SIDE}, {SIDE}]")
    with ThreadPoolExecutor(threads) as pool:
        tasks = memory_tasks(size, threads, pool)
        for count in sorted({1, threads}):
            tasks += [fp32_task(count), int8_task(count), prefill_task(count), stream_task(size, count)]
        note(f"timing {len(tasks)} tasks in turn for {seconds:g} s on {threads} threads")
        times = _interleaved(tasks, seconds)
    quantities = {task.key: _quantity(task, times[task.key]) for task in tasks}
    for key, quantity in quantities.items():
        note(f"{key}: {quantity.value:g} {quantity.unit}")

    def get(key: str, count: int) -> Quantity:
        return quantities[f"{key}, {count} threads"]

    about = f"buffers of {size // MEBIBYTE} MiB, " + (f"{size / cache:.1f} times" if cache else "unknown beside")
    about += " the last-level cache" + (f"; load {load:.2f} before measuring" if load is not None else "")
    unit = ComputeUnit(
        name=cpu_model(),
        kind="cpu",
        cores=physical_cores(),
        threads=Quantity(
            value=threads, unit="threads", source=measured("the CPUs this process may use"), kind="measured"
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
        description=one_line(f"{cpu_model()}, {platform.system()} {platform.machine()}; {about}", 300),
        reach=Reach(by="local"),
        memory=Memory(
            size=memory_size(),
            bandwidth=get("read", threads),
            bandwidth_one_thread=get("read", 1),
            copy_rate=get("copy", threads),
        ),
        units=(unit,),
        targets=_targets(),
    )


def _interleaved(tasks: Sequence[Task], seconds: float) -> dict[str, list[float]]:
    """Seconds of every run of every task; each task runs once in a round, and every second round is in reverse order."""
    for task in tasks:
        task.run()  # not timed: it touches the pages and packs the weights
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


def _quantity(task: Task, times: list[float]) -> Quantity:
    """The median rate of a task, to 4 digits; operations in units of 10^9."""
    scale, unit = 1.0, "bytes/s"
    if task.key.startswith(("fp32", "int8", "4-bit prefill")):
        scale, unit = 1e9, "GFLOP/s" if task.key.startswith("fp32") else "GOP/s"
    slow, middle, fast = (task.work / t / scale for t in np.quantile(times, [0.75, 0.5, 0.25]).tolist())
    spread = f"median of {len(times)} interleaved runs, quartiles {slow:.4g} and {fast:.4g}"
    return Quantity(value=float(f"{middle:.4g}"), unit=unit, source=measured(f"{task.what}; {spread}"), kind="measured")


def _targets() -> tuple[Target, ...]:
    bits = tuple(b for b in (2, 4, 8) if computes_width(b))
    what = measured(f"MatMulNBits block {GROUP} accuracy level 4 run at 2, 4 and 8 bits and compared with numpy")
    targets = [Target(name="onnx", bits=bits or None, source=what)]
    if importlib.util.find_spec("executorch") is not None:
        targets.append(
            Target(name="executorch", source=measured("the executorch package is installed; nothing was run"))
        )
    return tuple(targets)
