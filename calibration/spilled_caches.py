"""Key-value caches of calibration data, in files as soon as they are made. Top-level: `ops` enters.

A walk needs a layer's cache until the next layer at most, but a graph gives the caches of all layers back at its end: they are
most of what a token takes. In a mapped file they are the system's to write out when memory is short.
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
    kept = Path("/var/tmp")
    return kept if "TMPDIR" not in os.environ and os.access(kept, os.W_OK) else Path(tempfile.gettempdir())


class DiskCacheSession(EagerSession):
    """The eager runtime that keeps states in files of `folder`, which have no names and are gone with the process."""

    def __init__(self, graphs: Sequence[Graph], folder: Path) -> None:
        super().__init__(graphs)
        self._files = Files(folder)

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        before = dict(state)
        names = set(self._graphs[graph].output_names)
        # Where states are all it gives, such as keys and values of the encoder's output, its linears make them.
        projects = bool(names) and names <= self._states.keys()
        with _Filing({tuple(v.shape) for v in state.values()}, projects, self._files):
            outputs = super().run(graph, inputs, state)
        for name, value in state.items():
            if value is not before.get(name):
                state[name] = self._files.keep(value)
        return outputs


class Files:
    """Tensors in nameless files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: set[int] = set()

    def keep(self, value: torch.Tensor) -> torch.Tensor:
        """The same values in a file, if they are many and are in none. Raises UserError when the disk refuses."""
        if value.nbytes < SMALLEST or value.untyped_storage().data_ptr() in self._held:
            return value
        octets = value.detach().contiguous().view(-1).view(torch.uint8)
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder) as file:
                file.write(octets.numpy().data)  # a full disk says so here; of a mapped page it would kill the process
                file.flush()
                # unlike Python's mmap this keeps no descriptor: there are as many files as layers times parts
                mapped = torch.from_file(file.name, shared=True, size=octets.numel(), dtype=torch.uint8)
        except OSError as error:
            raise UserError(
                f"{self._folder} cannot hold the caches of the calibration data ({error.strerror}); make room, or give less text"
            ) from None
        self._held.add(mapped.untyped_storage().data_ptr())
        return mapped.view(value.dtype).view(value.shape)


class _Filing(TorchFunctionMode):
    """What an op gives in the shape of a state goes to a file; projects: so does what a linear gives.

    Ops: `edgewright::` ones, and what a window of plain operations ends with.
    """

    def __init__(self, shapes: Collection[tuple[int, ...]], projects: bool, files: Files) -> None:
        super().__init__()
        self._shapes, self._projects, self._files = shapes, projects, files

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if self._projects and func is F.linear:
            return self._files.keep(made)
        if func in _ENDS and tuple(made.shape) in self._shapes:
            return self._files.keep(made)
        if func not in _OPS or not isinstance(made, tuple):
            return made
        return tuple(self._files.keep(v) if tuple(v.shape) in self._shapes else v for v in made)
