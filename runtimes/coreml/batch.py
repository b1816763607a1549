"""One call of a Core ML function, its inputs checked against the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ...bundle import GraphSpec
from ...errors import UserError
from ...system.reading import one_line
from ...targets.coreml.package import OUT, STEP, FunctionDef, Package
from ..session import Array, StateBuffers, array_bytes, require_room


class Batch:
    """What both kinds of session share: the choice of a function, and the rows of a batch run one by one."""

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
        """State that the functions of `graph` write in place -> the static shape of one row."""
        return {n: shape for n, (_, shape) in self.package.functions[graph].states.items()}

    def carried(self, graph: str, batch: int) -> StateBuffers:
        """A new stream's states that are inputs and outputs of the functions: an array of zeros for each row."""
        shapes = self._carried(graph).items()
        return {n: [np.zeros(shape, np.float32) for _ in range(batch)] for n, shape in shapes}

    def _carried(self, graph: str) -> dict[str, tuple[int, ...]]:
        updated = {s.name for s in self.graphs[graph].updated_states}
        return {n: shape for n, (_, shape) in self.package.functions[graph].inputs.items() if n in updated}

    def check(self, graph: str, capacity: int, batch: int) -> None:
        """Raise UserError if the caches of the package are smaller than `capacity` tokens, or do not fit into the memory."""
        shapes = [*self.own(graph).values(), *self._carried(graph).values()]
        require_room(batch * sum(map(array_bytes, shapes)), capacity)
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
        """Call `predict(function, inputs of one row, row)` for every row; outputs with a state's name go into `state`.

        A state that a function does not write in place is passed to it and read from its outputs.
        """
        spec = self.graphs[graph]
        batched = {p.name for p in (*spec.inputs, *spec.states) if p.shape[:1] == ("batch",)}
        rows = next((len(inputs[p.name]) for p in spec.inputs if p.name in batched), 1)
        step = graph + STEP
        positions = list(inputs.get("logit_positions", [0]))
        single = "input_ids" in inputs and inputs["input_ids"].shape[1] == 1 and positions == [0]
        function = step if single and step in self.package.functions else graph
        wanted = self.package.functions[function].inputs
        values = dict(inputs) | {s.name: state[s.name] for s in spec.states if not s.updated}
        carried = [s.name for s in spec.updated_states if s.name in wanted]
        collected: dict[str, list[Array]] = {}
        for row in range(rows):
            one = {n: state[n][row] for n in carried}
            one |= {n: values[n][row : row + 1] if n in batched else values[n] for n in wanted if n not in one}
            outputs = predict(function, one, row)
            for name in carried:
                state[name][row] = outputs.pop(name + OUT)
            for name, value in outputs.items():
                collected.setdefault(name, []).append(value)
        results: dict[str, Array] = {}
        for name, parts in collected.items():
            joined = np.concatenate(parts).astype(np.float32, copy=False)
            (state if name in self.states else results)[name] = joined
        return results


def _expect(package: Package, graph: GraphSpec, name: str, function: FunctionDef) -> None:
    """Raise UserError unless a function has exactly the ports of its graph.

    A function for a single token has no `logit_positions`. A recurrent state is an input and an output.
    """
    implied = {"logit_positions"} if name != graph.name else set()
    passed = {s.name for s in graph.states if not s.updated or s.kind == "recurrent"}
    updated = {s.name for s in graph.updated_states}
    ports = {
        "input": ({p.name for p in graph.inputs} | passed, set(function.inputs)),
        "state": (updated - passed, set(function.states)),
        "output": ({p.name for p in graph.outputs} | {n + OUT for n in updated & passed}, set(function.outputs)),
    }
    for kind, (wanted, got) in ports.items():
        odd = sorted((wanted ^ got) - implied)
        if odd:
            fault = "lacks" if odd[0] in wanted else "has, unknown to the bundle,"
            raise UserError(
                f"{package.path}: {name} {fault} the {kind} {one_line(odd[0], 80)}; export the bundle again"
            )
