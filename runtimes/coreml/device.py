"""The package run by Core ML itself, on a Mac. No torch is imported.

This file follows coremltools' documentation and has not been run on a Mac; `edgewright verify` on a Mac compares its results with
the reference.
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
"""The units that the package is for, as coremltools' compute plan names them; its third unit is the CPU."""


class CoremlDevice:
    """A model for each function, compiled once. A row's state comes from one function's model; the others share it."""

    how = "Core ML on this Mac"
    stand_in = False

    def __init__(self, directory: Path, graphs: Sequence[GraphSpec]) -> None:
        from ...targets.coreml.library import ct

        self.activations = "float16"
        self._batch = Batch(Package(directory / PACKAGE), graphs)
        self._package = ct.models.MLModel(str(directory / PACKAGE))  # the compiled copy is removed with this object
        self._compiled = str(self._package.get_compiled_model_path())
        self._models = {
            name: ct.models.CompiledMLModel(self._compiled, function_name=name)
            for name in self._batch.package.functions
        }

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        """One Core ML state for each row, under the name of every state in it; arrays for the other states."""
        self._batch.check(graph, capacity, batch)
        carried, own = self._batch.carried(graph, batch), self._batch.own(graph)
        if not own:
            return carried
        rows = [self._models[graph].make_state() for _ in range(batch)]
        return carried | dict.fromkeys(own, rows)

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        def predict(function: str, one: dict[str, Array], row: int) -> dict[str, Array]:
            spec = self._batch.package.functions[function]
            feeds = {name: np.ascontiguousarray(one[name], _TYPES[dtype]) for name, (dtype, _) in spec.inputs.items()}
            carried = next((state[n][row] for n in spec.states), None)
            outputs: Any = self._models[function].predict(feeds, state=carried)
            return {name: np.asarray(outputs[name]) for name in spec.outputs}

        return self._batch.run(graph, inputs, state, predict)

    def placement(self) -> Placement:
        """The device that Core ML prefers for each operation, from its compute plan; ops on the CPU fell back."""
        from coremltools.models.compute_plan import MLComputePlan

        plan = MLComputePlan.load_from_path(self._compiled)
        by_function: dict[str, dict[str, dict[str, int]]] = {}
        for name, function in plan.model_structure.program.functions.items():
            units: dict[str, Counter[str]] = defaultdict(Counter)
            for op in function.block.operations:
                usage = plan.get_compute_device_usage_for_mlprogram_operation(op)
                if usage is not None:  # constants run nowhere
                    units[type(usage.preferred_compute_device).__name__][op.operator_name] += 1
            by_function[name] = {unit: dict(ops) for unit, ops in units.items()}
        return place(by_function, ACCELERATORS, (), "Core ML's compute plan on this Mac")
