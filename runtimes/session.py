"""What every runtime offers: a graph run on arrays, with states carried from call to call. No torch is imported."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..bundle import StateSpec
from ..system.memory import require_available

Array = NDArray[Any]
StateBuffers = dict[str, Any]
"""State name -> its buffer, of a type that the runtime chooses. `new_state` allocates it, `run` updates it."""


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
    fallback: on the CPU because the accelerator did not take them; `--strict-placement` fails on them. source: where this
    comes from. known: False where nothing on this machine can say; `source` then names where to ask.
    """

    accelerator: str
    accelerated: Counts
    host: Counts = field(default_factory=dict)
    fallback: Counts = field(default_factory=dict)
    source: str = ""
    known: bool = True


def place(units: Units, accelerators: Sequence[str], host: Collection[str], source: str) -> Placement:
    """The placement from a runtime's report of each op's unit. host: ops that the lowering keeps off the accelerators."""
    sorted_: tuple[Counts, Counts, Counts] = ({}, {}, {})
    for graph, by_unit in units.items():
        for unit, ops in by_unit.items():
            for op, nodes in ops.items():
                kind = 0 if unit in accelerators else 1 if op in host else 2
                counts = sorted_[kind].setdefault(graph, {})
                counts[op] = counts.get(op, 0) + nodes
    return Placement(" or ".join(accelerators), *sorted_, source)


class PlacedSession(Session, Protocol):
    """A session of an artefact, which knows where its ops run.

    activations: their arithmetic, "float32" (checked strictly against the reference), or reduced: "int8", "float16".
    how: one line on what runs on this machine. stand_in: something else runs in place of the artefact on its device, so its
    results can be compared and its speed means nothing.
    """

    activations: str
    how: str
    stand_in: bool

    def placement(self) -> Placement: ...


class Joined:
    """Two sessions as one: `part` runs the graphs that it has, `rest` the others."""

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


_FEW = 64 << 20
"""Bytes of states that are allocated without a look at the memory."""


def state_bytes(states: Iterable[StateSpec], sizes: Mapping[str, int], copies: int = 1) -> int:
    """Bytes of the buffers of these states, `copies` of each, by the widest dtype that a runtime stores them as."""
    return sum(copies * array_bytes(sized(s.shape, sizes), s.dtype) for s in states)


def array_bytes(shape: Sequence[int], dtype: str = "float32") -> int:
    """Bytes of an array; the product cannot overflow."""
    return math.prod(shape) * np.dtype(DTYPES.get(dtype, np.float32)).itemsize


def require_room(needed: int, capacity: int) -> None:
    """Raise UserError where the states of a stream, `needed` bytes for `capacity` tokens, do not fit into the memory."""
    if needed > _FEW:
        require_available(
            needed, f"the states of a stream of {capacity} tokens take memory", "generate fewer tokens, or give more"
        )


def keep_states(outputs: dict[str, Any], updated: Iterable[str], states: Collection[str], state: StateBuffers) -> None:
    """Move from a graph's outputs to `state` what belongs there.

    updated: the states that the graph updates; the output of each is `<state>_out`. states: names of all states; an output with
    such a name is one.
    """
    for name in updated:
        state[name] = outputs.pop(f"{name}_out")
    for name in [n for n in outputs if n in states]:
        state[name] = outputs.pop(name)
