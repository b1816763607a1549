"""`doctor`: which targets work on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from ..targets.registry import TARGETS


def doctor() -> dict[str, Any]:
    """Each target: whether its library is installed, in which version, what it can do on this machine, how to get it."""
    targets: dict[str, dict[str, Any]] = {}
    for name, target in TARGETS.items():
        targets[name] = {
            "installed": target.installed,
            "version": target.version if target.installed else None,
            "here": target.describe() if target.installed else None,
            "get": None if target.installed else target.install,
        }
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch": importlib.metadata.version("torch"),
        "targets": targets,
        "executable": Path(sys.executable).name,
    }


def doctor_text(result: dict[str, Any]) -> str:
    lines = [f"python {result['python']}, torch {result['torch']}, {result['cores']} cores, {result['platform']}"]
    for name, t in result["targets"].items():
        state = f"{t['here']} ({t['version'] or 'of unknown version'})" if t["installed"] else f"missing: {t['get']}"
        lines.append(f"{name:<11} {state}")
    return "\n".join(lines)
