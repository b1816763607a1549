"""What every runtime offers: run a graph on arrays, with states carried from call to call. No torch enters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
StateBuffers = dict[str, Any]
"""State name -> whatever the runtime keeps it in. Made by `new_state`, updated by `run`."""


class Session(Protocol):
    """One loaded artefact."""

    def new_state(self, batch: int, capacity: int) -> StateBuffers:
        """Empty buffers for all updated states; capacity in tokens."""
        ...

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        """Run `graph`. Updated states and outputs that bear a state's name go into `state`; the others are returned."""
        ...


Placement = dict[str, dict[str, dict[str, int]]]
"""Graph -> compute unit (as the runtime names it) -> op -> nodes."""


class PlacedSession(Session, Protocol):
    """A session whose runtime tells where each op runs, and in which arithmetic its activations are.

    activations: "float32" (checked strictly against the reference), or what reduces them: "int8", "float16".
    """

    activations: str

    def placement(self) -> Placement: ...


DTYPES: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}


def sized(shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A symbolic shape with its names replaced by `sizes`."""
    return tuple(d if isinstance(d, int) else sizes[d] for d in shape)
