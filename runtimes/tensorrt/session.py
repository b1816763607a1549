"""The session for a TensorRT artefact: its engines on a GPU, their network elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...bundle import GraphSpec
from ...targets.tensorrt.driver import gpu_available
from ..session import PlacedSession
from .engine import EngineSession
from .network import NetworkSession


def open_tensorrt(
    directory: Path, graphs: Sequence[GraphSpec], threads: int = 0, exact: bool = False
) -> EngineSession | NetworkSession:
    """The engines where there is a GPU, else (and for `exact`, which an engine is not) their ONNX on the CPU.

    Raises UserError if a file is damaged, or does not have the inputs and outputs that the bundle names.
    """
    if gpu_available() and not exact:
        return EngineSession(directory, graphs)
    return NetworkSession(directory, graphs, threads, exact)


def open_session(folder: Path, graphs: Sequence[GraphSpec], threads: int, exact: bool) -> PlacedSession:
    """As `runtimes.registry` asks for it."""
    return open_tensorrt(folder, graphs, threads, exact)
