"""One file a target, each a table of lowerings. What may enter: `ops`, `graph`, `bundle`, `backends`.

An exporter module bears its target's name and has `export(graphs, directory, options, progress) -> Artefact`, which stores
the codes and scales that the graphs' quantized modules carry and never quantizes, and `read_weights(directory)`, which
reads them back from the files. Its library is imported inside it, when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from .. import backends


def exporter(format: str) -> Any:
    """The exporter module of a format. Raises UserError for an unknown format or a library that is not installed."""
    backends.require(format)
    return importlib.import_module(f".{format}", __package__)
