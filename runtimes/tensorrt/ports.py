"""Names and types of a graph's inputs and outputs, as both TensorRT sessions check them."""

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
NO_FALLBACK = "TensorRT has no CPU fallback: an engine holds every op of its network, or its build fails"


def state_dtype(state: StateSpec, half: type[np.generic]) -> np.dtype[Any]:
    """The type of a state's buffer; `half` where the engine keeps it in float16."""
    return np.dtype(half if state.kind in HALF_STATES else DTYPES[state.dtype])


def port_names(graph: GraphSpec) -> tuple[list[str], list[str]]:
    """Names of a graph's inputs and of its outputs, the states among them."""
    updated = [f"{s.name}_out" for s in graph.updated_states]
    return [p.name for p in (*graph.inputs, *graph.states)], [p.name for p in graph.outputs] + updated


def check_ports(path: Path, got: Sequence[str] | frozenset[str], want: Sequence[str]) -> None:
    """Raise UserError unless a file has exactly these inputs or outputs; without this check a lost state goes unnoticed."""
    odd = sorted(set(want) ^ set(got))
    if odd:
        fault = "lacks" if odd[0] in want else "has, unknown to the bundle,"
        raise UserError(f"{path} {fault} the input or output {one_line(odd[0], 80)}; export the bundle again")


def network_ops(directory: Path, graphs: Sequence[GraphSpec]) -> Counts:
    """Graph -> op -> number of nodes, in the ONNX that its engine was built from."""
    import onnx

    models = {g.name: onnx.load(str(directory / f"{g.name}.onnx"), load_external_data=False) for g in graphs}
    return {name: dict(Counter(node.op_type for node in model.graph.node)) for name, model in models.items()}
