"""From a target's name to its exporter: `exporters/<name>/export.py`, or the file `exporters/<name>.py`.

It has `export(graphs, directory, options, progress) -> Artefact`, which stores the codes and scales that the graphs' quantized
modules carry and never quantizes, and `read_weights(directory)`, which reads them back from the files. Some have
`read_facts(directory)`: those of an artefact's facts that its files bear themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch

from ..graph import Graph
from ..targets.registry import require
from .artefact import Artefact, Options, Progress


class Exporter(Protocol):
    """What an exporter module offers."""

    def export(
        self, graphs: Sequence[Graph], directory: Path, options: Options, progress: Progress = ...
    ) -> Artefact: ...

    def read_weights(self, directory: Path) -> Iterator[tuple[str, torch.Tensor]]: ...


def exporter(name: str) -> Exporter:
    """The exporter of a target. Raises UserError for an unknown target or a library that is not installed."""
    require(name)
    module = importlib.import_module(f".{name}", __package__)
    if hasattr(module, "__path__"):
        module = importlib.import_module(".export", module.__name__)
    return cast(Exporter, module)


def read_facts(name: str, directory: Path) -> dict[str, object]:
    """The facts of a target's artefact that its files bear themselves; none for a target whose exporter reads none back.

    Raises UserError for files that cannot be read.
    """
    reader = getattr(exporter(name), "read_facts", None)
    return {} if reader is None else cast(dict[str, object], reader(directory))
