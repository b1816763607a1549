"""What a machine says about itself: processor, caches, memory."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import numpy as np

from ..system.reading import MEBIBYTE, one_line
from ..system.version import __version__
from .profile import Quantity


def measured(what: str) -> str:
    """The `source` of a measured number: tool, date, versions, and `what` was run."""
    import onnxruntime

    versions = f"edgewright {__version__}, numpy {np.__version__}, onnxruntime {onnxruntime.__version__}"
    today = datetime.date.today().isoformat()
    return one_line(f"measured by edgewright devices measure on {today} with {versions}: {what}", 1000)


def buffer_bytes(cache: int | None) -> int:
    """Four times the last-level cache, at least 128 MiB; at most 1.5 GiB and a 32nd of the memory that is free.

    An ONNX model may have 2 GiB at most, and the sessions over the weights take many times the buffer.
    """
    wanted = max(128 * MEBIBYTE, 4 * (cache or 32 * MEBIBYTE))
    free = _meminfo("MemAvailable")
    most = 1536 * MEBIBYTE if free is None else min(1536 * MEBIBYTE, free // 32)
    return max(8, min(wanted, most) // MEBIBYTE) * MEBIBYTE


def last_level_cache() -> int | None:
    """Bytes of all last-level caches of the CPUs that this process may use; None where the system does not report them."""
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


def cpu_model() -> str:
    """The CPU's name from /proc/cpuinfo, or the platform's where that has none, as on Arm."""
    names = [value for entry in _cpuinfo() if (value := entry.get("model name"))]
    return one_line(names[0] if names else platform.processor() or platform.machine() or "CPU", 120)


def physical_cores() -> Quantity | None:
    """The number of distinct (package, core) pairs in /proc/cpuinfo; None where it has none."""
    cores = {(e["physical id"], e["core id"]) for e in _cpuinfo() if "physical id" in e and "core id" in e}
    if not cores:
        return None
    return Quantity(value=len(cores), unit="cores", source=measured("/proc/cpuinfo"), kind="measured")


def memory_size() -> Quantity | None:
    """Bytes of main memory; None where the system does not report them."""
    total = _meminfo("MemTotal")
    if total is None:
        return None
    return Quantity(value=total, unit="bytes", source=measured("/proc/meminfo MemTotal"), kind="measured")


def _meminfo(field: str) -> int | None:
    """Bytes of a field of /proc/meminfo."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), None)
    except (OSError, ValueError, IndexError):
        return None


def _cpuinfo() -> list[dict[str, str]]:
    """One dict for each CPU; none where there is no /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    pairs = [[line.partition(":") for line in block.splitlines()] for block in text.split("\n\n") if block.strip()]
    return [{key.strip(): value.strip() for key, _, value in block} for block in pairs]
