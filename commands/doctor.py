"""`doctor`: which targets work on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..targets.libraries import BACKENDS


def doctor() -> dict[str, Any]:
    """Each target: whether its library is installed, in which version, what it can do on this machine, how to get it."""
    targets: dict[str, dict[str, Any]] = {}
    for name, backend in BACKENDS.items():
        targets[name] = {
            "installed": backend.installed,
            "version": backend.version if backend.installed else None,
            "here": HERE[name]() if backend.installed else None,
            "get": None if backend.installed else backend.install,
        }
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch": importlib.metadata.version("torch"),
        "targets": targets,
        "executable": Path(sys.executable).name,
    }


def _native() -> str:
    return "exports, runs and verifies"


def _coreml() -> str:
    from ..runtimes.coreml.session import here

    return here()


def _tensorrt() -> str:
    from ..runtimes.tensorrt.session import here

    return here()


def _qnn() -> str:
    from ..runtimes.qnn.session import here

    return here()


def _ethosu() -> str:
    return "exports encoders; verifies them through Arm's TOSA reference model on this CPU (the NPU itself is not here)"


HERE: dict[str, Callable[[], str]] = {
    "onnx": _native,
    "executorch": _native,
    "coreml": _coreml,
    "tensorrt": _tensorrt,
    "qnn": _qnn,
    "ethosu": _ethosu,
}


"""What a target whose library is installed can do on this machine, in words."""


def doctor_text(found: dict[str, Any]) -> str:
    lines = [f"python {found['python']}, torch {found['torch']}, {found['cores']} cores, {found['platform']}"]
    for name, t in found["targets"].items():
        said = f"{t['here']} ({t['version'] or 'of unknown version'})" if t["installed"] else f"missing: {t['get']}"
        lines.append(f"{name:<11} {said}")
    return "\n".join(lines)
