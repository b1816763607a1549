"""One file a target, each a table of lowerings. What may enter: `ops`, `graph`, `bundle`.

An exporter module has `export(graphs, directory, options, progress) -> Artefact`: it stores the codes and scales that the
graphs' quantized modules carry and never quantizes. Its library is imported inside it, when it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from ..errors import UserError


@dataclass(frozen=True)
class Backend:
    """A target's exporter module here (None: this version does not export it) and the library it needs."""

    module: str | None
    library: str
    distribution: str
    install: str

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.library) is not None


BACKENDS: dict[str, Backend] = {
    "onnx": Backend("onnx", "onnxruntime", "onnxruntime", "pip install edgewright"),
    "executorch": Backend(None, "executorch", "executorch", "pip install 'edgewright[executorch]'"),
    "coreml": Backend(None, "coremltools", "coremltools", "pip install 'edgewright[coreml]'"),
    "tensorrt": Backend(
        None, "tensorrt_rtx_bindings", "tensorrt-rtx-cu13-bindings", "pip install 'edgewright[tensorrt]'"
    ),
    "qnn": Backend(None, "onnxruntime_qnn", "onnxruntime-qnn", "pip install 'edgewright[qnn]'"),
}


def exporter(format: str) -> Any:
    """The exporter module of a format. Raises UserError for an unknown format or a library that is not installed."""
    exported = ", ".join(name for name, backend in BACKENDS.items() if backend.module is not None)
    backend = BACKENDS.get(format)
    if backend is None:
        raise UserError(f"--format {format} is not known; choose from {exported}")
    if backend.module is None:
        raise UserError(f"--format {format} is not exported by this version; choose from {exported}")
    if not backend.installed:
        raise UserError(f"--format {format} needs {backend.library}, which is not installed: {backend.install}")
    return importlib.import_module(f".{backend.module}", __package__)
