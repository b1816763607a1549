"""The session of a TensorRT artefact: its engines where there is a GPU, else the network they were built from."""

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
    """The engines where there is a GPU; without one, and for `exact` (float32 activations), their ONNX on the CPU.

    Raises UserError if a file is damaged, or its inputs and outputs are not those of `graphs`.
    """
    if gpu_available() and not exact:
        return EngineSession(directory, graphs)
    return NetworkSession(directory, graphs, threads, exact)


def open_session(folder: Path, graphs: Sequence[GraphSpec], threads: int, exact: bool) -> PlacedSession:
    """As `runtimes.registry` asks for it."""
    return open_tensorrt(folder, graphs, threads, exact)
