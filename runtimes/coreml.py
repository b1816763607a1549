"""Core ML behind `Session`. What may enter: `bundle`, the package reader and its evaluator; never torch.

Core ML runs on Apple's systems alone. `CoremlEvaluator` computes the saved package anywhere, op by op in numpy: wide (all
floats in float32), which tells whether the program is right, or with every float16 tensor rounded as the program declares,
which tells what float16 costs. On a Mac `CoremlDevice` runs the artefact itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..bundle import GraphSpec
from ..errors import UserError
from ..untrusted import one_line
from .coreml_evaluator import Evaluator
from .coreml_package import OUT, PACKAGE, STEP, FunctionDef, Package
from .session import Array, PlacedSession, Placement, StateBuffers

ACCELERATOR = "Neural Engine or GPU"


def here() -> str:
    """What this machine can do with Core ML artefacts, in words."""
    if sys.platform == "darwin":
        return "exports, runs and verifies in Core ML"
    return "exports; verifies with Edgewright's numpy evaluator of the saved package (no Mac: Core ML does not run)"


def open_coreml(directory: Path, graphs: Sequence[GraphSpec], exact: bool) -> PlacedSession:
    """The session for a bundle's `coreml` folder: the device on a Mac, else (and for `exact`) the evaluator.

    Raises UserError for a damaged package, or one whose functions are not those of `graphs`.
    """
    if sys.platform == "darwin" and not exact:
        from .coreml_device import CoremlDevice

        return CoremlDevice(directory, graphs)
    return CoremlEvaluator(directory, graphs, "float32" if exact else "float16")


class Batch:
    """What both kinds of session share: choosing a function, and running the rows of a batch one after the other."""

    def __init__(self, package: Package, graphs: Sequence[GraphSpec]) -> None:
        self.package = package
        self.graphs = {g.name: g for g in graphs}
        self.states = {s.name: s for g in graphs for s in g.states}
        for graph in graphs:
            if graph.name not in package.functions:
                raise UserError(f"{package.path}: the package has no function '{graph.name}'; export the bundle again")
            for name in (graph.name, graph.name + STEP):
                if name in package.functions:
                    _expect(package, graph, name, package.functions[name])

    def own(self, graph: str) -> dict[str, tuple[int, ...]]:
        """State that the functions of `graph` write themselves -> the static shape of one row."""
        return {n: shape for n, (_, shape) in self.package.functions[graph].states.items()}

    def carried(self, graph: str, batch: int) -> StateBuffers:
        """A new stream's states that come in as inputs and go out as outputs: zeros, an array a row."""
        updated = {s.name for s in self.graphs[graph].states if s.updated}
        inputs = self.package.functions[graph].inputs.items()
        return {n: [np.zeros(s, np.float32) for _ in range(batch)] for n, (_, s) in inputs if n in updated}

    def check(self, graph: str, capacity: int) -> None:
        """Raise UserError if the caches of the package are smaller than `capacity` tokens."""
        for name, shape in self.own(graph).items():
            if "capacity" in self.states[name].shape and capacity > shape[2]:
                raise UserError(
                    f"{capacity} tokens do not fit the package's caches of {shape[2]}; export with a larger --max-context"
                )

    def run(
        self,
        graph: str,
        inputs: Mapping[str, Array],
        state: StateBuffers,
        predict: Callable[[str, dict[str, Array], int], dict[str, Array]],
    ) -> dict[str, Array]:
        """`predict(function, inputs of one row, row)` for every row; outputs that bear a state's name go into `state`.

        A state that a function does not write itself is given to it and taken from it here.
        """
        spec = self.graphs[graph]
        batched = {p.name for p in (*spec.inputs, *spec.states) if p.shape[:1] == ("batch",)}
        rows = next((len(inputs[p.name]) for p in spec.inputs if p.name in batched), 1)
        step = graph + STEP
        asked = list(inputs.get("logit_positions", [0]))
        single = "input_ids" in inputs and inputs["input_ids"].shape[1] == 1 and asked == [0]
        function = step if single and step in self.package.functions else graph
        wanted = self.package.functions[function].inputs
        given = dict(inputs) | {s.name: state[s.name] for s in spec.states if not s.updated}
        carried = [s.name for s in spec.states if s.updated and s.name in wanted]
        collected: dict[str, list[Array]] = {}
        for row in range(rows):
            one = {n: state[n][row] for n in carried}
            one |= {n: given[n][row : row + 1] if n in batched else given[n] for n in wanted if n not in one}
            made = predict(function, one, row)
            for name in carried:
                state[name][row] = made.pop(name + OUT)
            for name, value in made.items():
                collected.setdefault(name, []).append(value)
        results: dict[str, Array] = {}
        for name, values in collected.items():
            whole = np.concatenate(values).astype(np.float32, copy=False)
            (state if name in self.states else results)[name] = whole
        return results


def _expect(package: Package, graph: GraphSpec, name: str, function: FunctionDef) -> None:
    """Raise UserError unless a function has exactly the ports of its graph; a step has no `logit_positions`.

    A recurrent state is an input and an output.
    """
    implied = {"logit_positions"} if name != graph.name else set()
    given = {s.name for s in graph.states if not s.updated or s.kind == "recurrent"}
    updated = {s.name for s in graph.states if s.updated}
    ports = {
        "input": ({p.name for p in graph.inputs} | given, set(function.inputs)),
        "state": (updated - given, set(function.states)),
        "output": ({p.name for p in graph.outputs} | {n + OUT for n in updated & given}, set(function.outputs)),
    }
    for kind, (wanted, got) in ports.items():
        odd = sorted((wanted ^ got) - implied)
        if odd:
            fault = "lacks" if odd[0] in wanted else "has, unknown to the bundle,"
            raise UserError(
                f"{package.path}: {name} {fault} the {kind} {one_line(odd[0], 80)}; export the bundle again"
            )


class CoremlEvaluator:
    """The package computed in numpy. activations: "float32" is the wide mode, "float16" rounds as declared."""

    how = "Edgewright's numpy evaluator of the saved package, in place of Core ML (no Mac)"
    stand_in = True

    def __init__(self, directory: Path, graphs: Sequence[GraphSpec], activations: str = "float32") -> None:
        self.activations = activations
        self._batch = Batch(Package(directory / PACKAGE), graphs)
        self._programs: dict[str, Evaluator] = {}

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        """Zeroed states of the package's own, static size for each row."""
        self._batch.check(graph, capacity)
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
        """Unknown: Core ML decides on the device, and its compute plan tells on a Mac."""
        source = (
            "Core ML places operations on the device; its compute plan, which 'edgewright verify' asks on a Mac, knows"
        )
        return Placement(ACCELERATOR, {}, source=source, known=False)

    def _program(self, name: str) -> Evaluator:
        if name not in self._programs:
            package = self._batch.package
            self._programs[name] = Evaluator(package, name, rounding=self.activations == "float16")
        return self._programs[name]
