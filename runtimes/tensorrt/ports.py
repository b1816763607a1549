"""Names and types that both TensorRT sessions check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import GraphSpec, StateSpec
from ...errors import UserError
from ...system.reading import one_line
from ...targets.tensorrt.engine_file import HALF_STATES
from ..session import DTYPES, Counts

GPU = "NVIDIA GPU"


def _dtype(state: StateSpec, half: type[np.generic]) -> np.dtype[Any]:
    return np.dtype(half if state.kind in HALF_STATES else DTYPES[state.dtype])


def _names(graph: GraphSpec) -> tuple[list[str], list[str]]:
    """Inputs and outputs of a graph, its states among them."""
    updated = [f"{s.name}_out" for s in graph.states if s.updated]
    return [p.name for p in (*graph.inputs, *graph.states)], [p.name for p in graph.outputs] + updated


def _expect(path: Path, got: Sequence[str] | frozenset[str], want: Sequence[str]) -> None:
    """Raise UserError unless a file has exactly these inputs or outputs: one dropped is a state lost in silence."""
    odd = sorted(set(want) ^ set(got))
    if odd:
        fault = "lacks" if odd[0] in want else "has, unknown to the bundle,"
        raise UserError(f"{path} {fault} the input or output {one_line(odd[0], 80)}; export the bundle again")


def _network_ops(directory: Path, graphs: Sequence[GraphSpec]) -> Counts:
    """Graph -> op -> nodes of the ONNX its engine was built from."""
    import onnx

    models = {g.name: onnx.load(str(directory / f"{g.name}.onnx"), load_external_data=False) for g in graphs}
    return {name: dict(Counter(node.op_type for node in model.graph.node)) for name, model in models.items()}


_WHOLE = "TensorRT has no CPU fallback: an engine holds every op of its network, or its build fails"
