"""What a device is: machine, system, Python and its libraries, memory, clocks, and what of it can be measured."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from . import sensors
from .sensors import ROOT, text_of

_LEVEL2_OF_GLIBC = 191
"""glibc's _SC_LEVEL2_CACHE_SIZE, which Python has no name for."""

FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"


def about(folder: Path, root: Path = ROOT) -> dict[str, Any]:
    """Of this device; `folder`: whose free disk is told."""
    problems: dict[str, str] = {}
    memory = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", text_of(root / "proc/meminfo"), re.MULTILINE))
    return {
        "machine": platform.machine(),
        "emulated": emulated(root),
        "system": _system(root),
        "android": android(),
        "board": text_of(root / "proc/device-tree/model").rstrip("\0")
        or sensors.said("getprop", "ro.product.model").strip(),
        "cpu": _cpu(root),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "libc": list(platform.libc_ver()),
        "numpy": _version("numpy", problems),
        "onnxruntime": _version("onnxruntime", problems),
        "problems": problems,
        "memory_bytes": int(memory["MemTotal"]) << 10 if "MemTotal" in memory else None,
        "memory_free_bytes": int(memory["MemAvailable"]) << 10 if "MemAvailable" in memory else None,
        "disk_free_bytes": _disk(folder),
        "clocks": sensors.clocks(root),
        "celsius": sensors.temperatures(root),
        "throttling": sensors.throttling(root),
        "energy": [f"{s.name} ({s.boundary})" for s in sensors.sources(root)] or sensors.NOT_MEASURED,
    }


def android() -> bool:
    return sys.platform == "android" or hasattr(sys, "getandroidapilevel") or "ANDROID_ROOT" in os.environ


def emulated(root: Path = ROOT) -> bool:
    """Whether another machine's processor runs this program, as qemu-user does: no time means anything then."""
    kernel = text_of(root / "proc/sys/kernel/arch")
    if kernel and _family(kernel) != _family(platform.machine()):
        return True
    try:
        # of /proc/self/exe the emulator tells the program's own name, of the thread's not
        return "qemu" in os.path.basename(os.readlink(root / f"proc/self/task/{threading.get_native_id()}/exe"))
    except OSError:
        return False


def flash_is_broken(onnxruntime: str, root: Path = ROOT) -> str:
    """Why GroupQueryAttention's flash path would tile 1 x 1 here, "" if it would not.

    It sizes tiles by the level-2 cache that the C library tells: on Android 0 (onnxruntime#33196). On arm Linux glibc tells 0, too;
    from 1.30 on the runtime then asks the kernel (onnxruntime#29613).
    """
    if android():
        return "Android's C library tells no level-2 cache (onnxruntime#33196)"
    if platform.libc_ver()[0] == "glibc" and os.sysconf(_LEVEL2_OF_GLIBC) > 0:
        return ""
    caches = root.glob("sys/devices/system/cpu/cpu0/cache/index*/level")
    asks_kernel = tuple(map(int, re.findall(r"\d+", onnxruntime)[:2])) >= (1, 30)
    if asks_kernel and any(text_of(level) == "2" for level in caches):
        return ""
    return "neither the C library nor the kernel tells this runtime a level-2 cache (onnxruntime#29613)"


def _family(machine: str) -> str:
    """x86 or arm: 32-bit programs of a 64-bit machine run on it itself."""
    for family in ("arm", "aarch64", "riscv", "ppc", "s390"):
        if machine.startswith(family):
            return "arm" if family == "aarch64" else family
    return "x86"


def _system(root: Path) -> str:
    pretty = re.search(r'^PRETTY_NAME="?([^"\n]{1,100})', text_of(root / "etc/os-release"), re.MULTILINE)
    version = sensors.said("getprop", "ro.build.version.release").strip()
    name = f"Android {version}" if version else pretty[1] if pretty is not None else platform.system()
    return f"{name}, {platform.system()} {platform.release()}"


def _cpu(root: Path) -> str:
    """The processor's name; on Arm its cores' part numbers."""
    info = text_of(root / "proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.{1,100})$", info, re.MULTILINE)
    if names:
        return str(names[0])
    parts = re.findall(r"^CPU part\s*:\s*(0x[0-9a-fA-F]{1,6})$", info, re.MULTILINE)
    kinds = sorted(set(parts))
    return "Arm parts " + ", ".join(f"{parts.count(p)} x {p}" for p in kinds) if kinds else platform.machine()


def _version(module: str, problems: dict[str, str]) -> str | None:
    """A library's version; None, and why among the problems, where it cannot be imported."""
    try:
        return str(__import__(module).__version__)
    except Exception as error:  # a library of another machine fails in its own way
        problems[module] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return None


def _disk(folder: Path) -> int | None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
