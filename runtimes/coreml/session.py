"""Core ML as a `Session`. No torch is imported.

Core ML runs on Apple's systems alone: on a Mac `CoremlDevice` runs the artefact. `CoremlEvaluator` computes the saved package
anywhere, op by op in numpy: with all floats as float32, which shows whether the program is right, or with every float16 tensor
rounded as the program declares, which shows what float16 costs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...bundle import GraphSpec
from ...targets.coreml.package import PACKAGE, Package
from ..session import Array, PlacedSession, Placement, StateBuffers
from .batch import Batch
from .evaluator import Evaluator

ACCELERATOR = "Neural Engine or GPU"


def open_coreml(directory: Path, graphs: Sequence[GraphSpec], exact: bool) -> PlacedSession:
    """The session of a bundle's `coreml` folder: Core ML on a Mac; elsewhere, and for `exact`, the evaluator.

    Raises UserError for a damaged package, or one whose functions are not those of `graphs`.
    """
    if sys.platform == "darwin" and not exact:
        from .device import CoremlDevice

        return CoremlDevice(directory, graphs)
    return CoremlEvaluator(directory, graphs, "float32" if exact else "float16")


class CoremlEvaluator:
    """The package computed in numpy. activations: "float32" rounds nothing, "float16" rounds as the program declares."""

    how = "Edgewright's numpy evaluator of the saved package, in place of Core ML (no Mac)"
    stand_in = True

    def __init__(self, directory: Path, graphs: Sequence[GraphSpec], activations: str = "float32") -> None:
        self.activations = activations
        self._batch = Batch(Package(directory / PACKAGE), graphs)
        self._programs: dict[str, Evaluator] = {}

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        """Zeroed states for each row, of the package's own static size."""
        self._batch.check(graph, capacity, batch)
        own = {n: [np.zeros(shape, np.float32) for _ in range(batch)] for n, shape in self._batch.own(graph).items()}
        return own | self._batch.carried(graph, batch)

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        def predict(function: str, one: dict[str, Array], row: int) -> dict[str, Array]:
            program = self._program(function)
            carried = {n: state[n][row] for n in program.function.states}
            results = program.run(one, carried)
            for name, value in carried.items():
                state[name][row] = value
            return results

        return self._batch.run(graph, inputs, state, predict)

    def placement(self) -> Placement:
        """Unknown: Core ML decides on the device; on a Mac its compute plan shows it."""
        source = (
            "Core ML places operations on the device; its compute plan, which 'edgewright verify' asks on a Mac, knows"
        )
        return Placement(ACCELERATOR, {}, source=source, known=False)

    def _program(self, name: str) -> Evaluator:
        if name not in self._programs:
            package = self._batch.package
            self._programs[name] = Evaluator(package, name, rounding=self.activations == "float16")
        return self._programs[name]


def open_session(folder: Path, graphs: Sequence[GraphSpec], threads: int, exact: bool) -> PlacedSession:
    """As `runtimes.registry` asks for it."""
    return open_coreml(folder, graphs, exact)
