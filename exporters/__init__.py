"""One file a target, each a table of lowerings. What may enter: `ops`, `graph`, `bundle`.

An exporter module has `export(graphs, directory, options, progress) -> Artefact`: it stores the codes and scales that the
graphs' quantized modules carry and never quantizes. Its library is imported inside it, when it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ..errors import UserError

BACKENDS: dict[str, tuple[str, str, str, str]] = {
    "onnx": ("onnx", "onnxruntime", "onnxruntime", "pip install edgewright"),
}
"""Format -> (module here, library module, distribution, how to get it): the formats this version exports."""


def exporter(format: str) -> Any:
    """The exporter module of a format. Raises UserError for an unknown format or a library that is not installed."""
    if format not in BACKENDS:
        raise UserError(f"--format {format} is not known; choose from {', '.join(BACKENDS)}")
    module, library, _, how = BACKENDS[format]
    if importlib.util.find_spec(library) is None:
        raise UserError(f"--format {format} needs {library}, which is not installed: {how}")
    return importlib.import_module(f".{module}", __package__)
