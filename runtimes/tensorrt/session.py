"""The session of a TensorRT artefact: its engines where there is a GPU, else the network they were built from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...bundle import GraphSpec
from .cuda import Device
from .engine import EngineSession
from .network import NetworkSession


def here() -> str:
    """What this machine can do with TensorRT artefacts, in words."""
    if Device.available():
        return "exports, runs the engines on this NVIDIA GPU and verifies them"
    return "exports engines; verifies the network they are built from on this CPU (no NVIDIA GPU: they are not run)"


def open_tensorrt(
    directory: Path, graphs: Sequence[GraphSpec], threads: int = 0, exact: bool = False
) -> EngineSession | NetworkSession:
    """The engines where there is a GPU; without one, and for `exact` (float32 activations), their ONNX on the CPU.

    Raises UserError if a file is damaged, or its inputs and outputs are not those of `graphs`.
    """
    if Device.available() and not exact:
        return EngineSession(directory, graphs)
    return NetworkSession(directory, graphs, threads, exact)
