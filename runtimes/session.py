"""What every runtime offers: run a graph on arrays, with states carried from call to call. No torch enters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
StateBuffers = dict[str, Any]
"""State name -> whatever the runtime keeps it in. Made by `new_state`, updated by `run`."""


class Session(Protocol):
    """One loaded artefact."""

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        """Zeroed buffers for all states that `graph` updates; capacity in tokens."""
        ...

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        """Run `graph`. Updated states and outputs that bear a state's name go into `state`; the others are returned."""
        ...


Counts = dict[str, dict[str, int]]
"""Graph (or program of it) -> op -> nodes."""

Units = Mapping[str, Mapping[str, Mapping[str, int]]]
"""Graph -> compute unit (as the runtime names it) -> op -> nodes."""


@dataclass(frozen=True)
class Placement:
    """Where an artefact's ops run.

    accelerated: on `accelerator`, the unit the target is for. host: on the CPU because the lowering put them there.
    fallback: on the CPU because the accelerator did not take them; what `--strict-placement` fails on. source: who says
    so. known False: nothing on this machine can say, and `source` tells where to ask.
    """

    accelerator: str
    accelerated: Counts
    host: Counts = field(default_factory=dict)
    fallback: Counts = field(default_factory=dict)
    source: str = ""
    known: bool = True


def place(units: Units, accelerators: Sequence[str], host: Collection[str], source: str) -> Placement:
    """Sort what a runtime says by unit. host: the ops that the lowering itself keeps off the accelerators."""
    sorted_: tuple[Counts, Counts, Counts] = ({}, {}, {})
    for graph, by_unit in units.items():
        for unit, ops in by_unit.items():
            for op, nodes in ops.items():
                kind = 0 if unit in accelerators else 1 if op in host else 2
                counts = sorted_[kind].setdefault(graph, {})
                counts[op] = counts.get(op, 0) + nodes
    return Placement(" or ".join(accelerators), *sorted_, source)


class PlacedSession(Session, Protocol):
    """A session that tells where each op runs, in which arithmetic its activations are, and what computes them here.

    activations: "float32" (checked strictly against the reference), or what reduces them: "int8", "float16".
    how: one line on what runs here. stand_in: it is not the artefact on its own device but something in its place: what
    it computes can be compared, the time it takes says nothing.
    """

    activations: str
    how: str
    stand_in: bool

    def placement(self) -> Placement: ...


class Joined:
    """A session that has some of the graphs, and another that runs the rest."""

    def __init__(self, part: Session, graphs: Collection[str], rest: Session) -> None:
        self._part, self._graphs, self._rest = part, graphs, rest

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        return (self._part if graph in self._graphs else self._rest).new_state(batch, capacity, graph)

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        return (self._part if graph in self._graphs else self._rest).run(graph, inputs, state)


DTYPES: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "int64": np.int64,
    "int32": np.int32,
    "int8": np.int8,
    "bool": np.bool_,
}


def sized(shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A symbolic shape with its names replaced by `sizes`."""
    return tuple(d if isinstance(d, int) else sizes[d] for d in shape)
