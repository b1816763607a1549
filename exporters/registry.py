"""One file a target, each a table of lowerings. What may enter: `ops`, `graph`, `bundle`, `backends`.

An exporter module bears its target's name and has `export(graphs, directory, options, progress) -> Artefact`, which stores
the codes and scales that the graphs' quantized modules carry and never quantizes, and `read_weights(directory)`, which
reads them back from the files. Its library is imported inside it, when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from ..errors import UserError
from ..targets import libraries

INT8_CACHES = ("onnx", "executorch")
"""The formats whose lowerings know KV caches in int8."""


def exporter(format: str) -> Any:
    """The exporter module of a format. Raises UserError for an unknown format or a library that is not installed."""
    libraries.require(format)
    return importlib.import_module(f".{format}.export", __package__)


def require_kv_cache(formats: Iterable[str], stored: str) -> None:
    """Raise UserError for a format that cannot keep its KV caches as asked: "float32" or "int8" (`models.kv_cache`)."""
    lacking = [name for name in formats if stored == "int8" and name not in INT8_CACHES]
    if lacking:
        raise UserError(f"--kv-cache int8: {lacking[0]} keeps float caches; export it without")
