"""The targets and the libraries they need, in one table. A leaf: the standard library, `errors`, `untrusted`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

from ..errors import UserError
from ..system.reading import MEBIBYTE


@dataclass(frozen=True)
class Backend:
    """What a target needs on this machine.

    libraries: sets of modules of which one must be importable whole. distributions: the packages whose version is told,
    the first that is there. install: the command that brings them. graphs: those it takes, where not all; such a target is
    exported only when asked for by name, not by `all`. peak: anonymous memory of lowering, bytes and bytes a byte of the
    artefact's weights, rounded up from what Gemma 3 270M took (benchmarks/RESULTS.md); Ethos-U's is a guess.
    """

    libraries: tuple[tuple[str, ...], ...]
    distributions: tuple[str, ...]
    install: str
    graphs: tuple[str, ...] = ()
    peak: tuple[int, float] = (700 * MEBIBYTE, 0.0)

    def peak_bytes(self, stored: int) -> int:
        """About the anonymous memory that lowering takes whose artefact's weights are `stored` bytes."""
        return self.peak[0] + int(self.peak[1] * stored)

    @property
    def installed(self) -> bool:
        return any(all(importlib.util.find_spec(name) for name in modules) for modules in self.libraries)

    @property
    def version(self) -> str | None:
        """`name version` of the distribution that is here, None where there is none."""
        for name in self.distributions:
            try:
                return f"{name} {importlib.metadata.version(name)}"
            except importlib.metadata.PackageNotFoundError:
                continue
        return None

    def missing(self, format: str) -> str:
        """The one line about a library that is not there."""
        first = next((n for n in self.libraries[0] if importlib.util.find_spec(n) is None), self.libraries[0][0])
        return f"--format {format} needs {first}, which is not installed: {self.install}"


def _extra(name: str) -> str:
    return f"pip install 'edgewright[{name}]'"


BACKENDS: dict[str, Backend] = {
    "onnx": Backend((("onnxruntime",),), ("onnxruntime",), "pip install edgewright"),
    "executorch": Backend((("executorch",),), ("executorch",), _extra("executorch"), peak=(700 * MEBIBYTE, 2.5)),
    "coreml": Backend((("coremltools",),), ("coremltools",), _extra("coreml"), peak=(700 * MEBIBYTE, 2.5)),
    "tensorrt": Backend(
        (("tensorrt_rtx_bindings",), ("tensorrt",)),
        ("tensorrt-rtx-cu13-bindings", "tensorrt"),
        _extra("tensorrt"),
        peak=(1100 * MEBIBYTE, 2.5),
    ),
    "qnn": Backend((("onnxruntime_qnn",),), ("onnxruntime-qnn",), _extra("qnn"), peak=(800 * MEBIBYTE, 2.5)),
    # Without their pins, which are below what the other targets are tested with: see docs/ethos-u.md.
    "ethosu": Backend(
        (("executorch", "ethosu", "tosa", "tosa_reference_model"),),
        ("ethos-u-vela",),
        f"{_extra('ethosu')} && pip install --no-deps ethos-u-vela==5.1.0 tosa-tools==2026.5.0",
        ("encoder",),
        peak=(1500 * MEBIBYTE, 3.0),
    ),
}

ALL = "all"
"""The format that stands for every target whose library is here."""


def require(format: str) -> None:
    """Raise UserError for a format that is not in the table or whose library is not installed."""
    backend = BACKENDS.get(format)
    if backend is None:
        raise UserError(f"--format {format} is not known; choose from {', '.join(BACKENDS)} or {ALL}")
    if not backend.installed:
        raise UserError(backend.missing(format))


def chosen(formats: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """(targets to export, a line for each that `all` had to leave out). Without formats: onnx.

    A target asked for by name is never left out: `require` refuses it where its library is missing.
    """
    if ALL not in formats:
        return tuple(dict.fromkeys(formats)) or ("onnx",), []
    every = [name for name, backend in BACKENDS.items() if not backend.graphs]
    named = [name for name in dict.fromkeys(formats) if name != ALL]
    here = [name for name in every if BACKENDS[name].installed or name in named]
    left = [f"{name} is left out: {BACKENDS[name].install}" for name in every if name not in here]
    return tuple(here + [name for name in named if name not in here]), left
