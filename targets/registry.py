"""The targets. A new one is `targets/<name>/__init__.py` with its `TARGET`, and its name in `NAMES`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from ..errors import UserError
from ..system.reading import nearest
from .target import Choices, Target

NAMES = (
    "onnx",
    "executorch",
    "coreml",
    "tensorrt",
    "qnn",
    "ethosu",
)

TARGETS: Mapping[str, Target] = {name: importlib.import_module(f".{name}", __package__).TARGET for name in NAMES}
"""Every target by its name, in the order in which they are listed to a user."""

ALL = "all"
"""The format that stands for every target whose library is installed."""


def require(name: str) -> Target:
    """The target `name`. Raises UserError if it is unknown or its library is not installed."""
    target = TARGETS.get(name)
    if target is None:
        raise UserError(
            f"--format {name} is not known{nearest(name, TARGETS)}; choose from {', '.join(TARGETS)} or {ALL}"
        )
    if not target.installed:
        raise UserError(target.missing)
    return target


def choose(formats: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """(targets to export, a line for each that `all` had to leave out). Without formats: onnx.

    A target asked for by name is never left out: `require` refuses it where its library is missing.
    """
    if ALL not in formats:
        return tuple(dict.fromkeys(formats)) or ("onnx",), []
    every = [name for name, target in TARGETS.items() if not target.graphs]
    named = [name for name in dict.fromkeys(formats) if name != ALL]
    chosen = [name for name in every if TARGETS[name].installed or name in named]
    left_out = [f"{name} is left out: {TARGETS[name].install}" for name in every if name not in chosen]
    return tuple(chosen + [name for name in named if name not in chosen]), left_out


def require_choices(own: Mapping[str, Choices]) -> None:
    """Raise UserError for what a target's own option asks and cannot be. own: target -> what is asked of it alone."""
    for name, asked in own.items():
        option = TARGETS[name].option
        if option is not None and option.check is not None:
            option.check(asked)


def require_kv_cache(formats: tuple[str, ...], stored: str) -> None:
    """Raise UserError for a target that cannot keep its KV caches as asked: "float32" or "int8"."""
    lacking = [name for name in formats if stored == "int8" and not TARGETS[name].int8_cache]
    if lacking:
        raise UserError(f"--kv-cache int8: {lacking[0]} keeps float caches; export it without")
