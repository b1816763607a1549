"""The package run by Core ML itself, on a Mac. What may enter: coremltools, the package reader; never torch.

Nothing here could be run where this was written: it follows coremltools' documentation, and `edgewright verify` on a Mac
compares what it computes with the reference, as everywhere.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import GraphSpec
from ...targets.coreml.package import PACKAGE, Package
from ..session import Array, Placement, StateBuffers, place
from .batch import Batch

_TYPES = {"INT32": np.int32, "FLOAT16": np.float16, "FLOAT32": np.float32}
ACCELERATORS = ("MLNeuralEngineComputeDevice", "MLGPUComputeDevice")
"""What coremltools' compute plan calls the units the package is for; its third is the CPU."""


class CoremlDevice:
    """A model for each function, compiled once; a state for each row, made by one function and used by the others."""

    how = "Core ML on this Mac"
    stand_in = False

    def __init__(self, directory: Path, graphs: Sequence[GraphSpec]) -> None:
        import coremltools as ct

        self.activations = "float16"
        self._batch = Batch(Package(directory / PACKAGE), graphs)
        whole = ct.models.MLModel(str(directory / PACKAGE))
        self._compiled = str(whole.get_compiled_model_path())
        self._whole = whole  # its compiled copy is removed with it
        self._models = {
            name: ct.models.CompiledMLModel(self._compiled, function_name=name)
            for name in self._batch.package.functions
        }

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        """One Core ML state for each row, under the name of every state in it; arrays for the other states."""
        self._batch.check(graph, capacity)
        made, own = self._batch.carried(graph, batch), self._batch.own(graph)
        if not own:
            return made
        rows = [self._models[graph].make_state() for _ in range(batch)]
        return made | dict.fromkeys(own, rows)

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        def predict(function: str, one: dict[str, Array], row: int) -> dict[str, Array]:
            spec = self._batch.package.functions[function]
            given = {name: np.ascontiguousarray(one[name], _TYPES[dtype]) for name, (dtype, _) in spec.inputs.items()}
            carried = next((state[n][row] for n in spec.states), None)
            made: Any = self._models[function].predict(given, state=carried)
            return {name: np.asarray(made[name]) for name in spec.outputs}

        return self._batch.run(graph, inputs, state, predict)

    def placement(self) -> Placement:
        """The device Core ML prefers for each operation, from its compute plan; what it leaves to the CPU fell back."""
        from coremltools.models.compute_plan import MLComputePlan

        plan = MLComputePlan.load_from_path(self._compiled)
        found: dict[str, dict[str, dict[str, int]]] = {}
        for name, function in plan.model_structure.program.functions.items():
            units: dict[str, Counter[str]] = defaultdict(Counter)
            for op in function.block.operations:
                usage = plan.get_compute_device_usage_for_mlprogram_operation(op)
                if usage is not None:  # constants run nowhere
                    units[type(usage.preferred_compute_device).__name__][op.operator_name] += 1
            found[name] = {unit: dict(ops) for unit, ops in units.items()}
        return place(found, ACCELERATORS, (), "Core ML's compute plan on this Mac")
