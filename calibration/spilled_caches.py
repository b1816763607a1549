"""Key-value caches of calibration data, in files as soon as they are computed.

A calibration needs a layer's cache until the next layer at most, but a graph returns the caches of all layers at its end: they
are most of what a token takes. The system can write a mapped file out when memory is short.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..errors import UserError
from ..graph import Graph
from ..ops import DECOMPOSITIONS
from ..runtimes.eager import EagerSession
from ..runtimes.session import Array, StateBuffers

SMALLEST = 1 << 16
"""Bytes of a cache that is worth a file."""

_OPS = {op.overloadpacket for op in DECOMPOSITIONS}
_ENDS = (torch.index_select, torch.Tensor.index_select)


def scratch() -> Path:
    """The folder for large temporary files: TMPDIR, or /var/tmp, which is on a disk where /tmp may be memory."""
    on_disk = Path("/var/tmp")
    usable = "TMPDIR" not in os.environ and os.access(on_disk, os.W_OK)
    return on_disk if usable else Path(tempfile.gettempdir())


class DiskCacheSession(EagerSession):
    """The eager runtime that keeps states in files of `folder`. They have no names and are gone with the process.

    smallest: bytes of a state that is worth a file.
    """

    def __init__(self, graphs: Sequence[Graph], folder: Path, smallest: int = SMALLEST) -> None:
        super().__init__(graphs)
        self._files = Files(folder, smallest)

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        before = dict(state)
        names = set(self._graphs[graph].output_names)
        # A graph that returns states alone, such as keys and values of the encoder's output, computes them by linears.
        projects = bool(names) and names <= self._states.keys()
        with _FileStates({tuple(v.shape) for v in state.values()}, projects, self._files):
            outputs = super().run(graph, inputs, state)
        for name, value in state.items():
            if value is not before.get(name):
                state[name] = self._files.keep(value)
        return outputs


class Files:
    """Tensors in nameless files of a folder."""

    def __init__(self, folder: Path, smallest: int = SMALLEST) -> None:
        self._folder, self._smallest = folder, smallest
        self._held: set[int] = set()

    def keep(self, value: torch.Tensor) -> torch.Tensor:
        """The same values in a file, if they are many and in no file yet. Raises UserError when the disk refuses."""
        if value.nbytes < self._smallest or value.untyped_storage().data_ptr() in self._held:
            return value
        octets = value.detach().contiguous().view(-1).view(torch.uint8)
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder) as file:
                file.write(octets.numpy().data)  # a full disk says so here; of a mapped page it would kill the process
                file.flush()
                # unlike Python's mmap this keeps no descriptor: there is a file for each layer and part
                mapped = torch.from_file(file.name, shared=True, size=octets.numel(), dtype=torch.uint8)
        except OSError as error:
            raise UserError(
                f"{self._folder} cannot hold the caches of the calibration data ({error.strerror}); make room, or give less text"
            ) from None
        self._held.add(mapped.untyped_storage().data_ptr())
        return mapped.view(value.dtype).view(value.shape)


class _FileStates(TorchFunctionMode):
    """Puts an op's outputs that have the shape of a state into files; with projects a linear's outputs, too.

    Ops: `edgewright::` ones, and those that a window of plain operations ends with.
    """

    def __init__(self, shapes: Collection[tuple[int, ...]], projects: bool, files: Files) -> None:
        super().__init__()
        self._shapes, self._projects, self._files = shapes, projects, files

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._projects and func is F.linear:
            return self._files.keep(output)
        if func in _ENDS and tuple(output.shape) in self._shapes:
            return self._files.keep(output)
        if func not in _OPS or not isinstance(output, tuple):
            return output
        return tuple(self._files.keep(v) if tuple(v.shape) in self._shapes else v for v in output)
