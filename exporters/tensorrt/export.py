"""TensorRT: each graph as an engine for the GPUs asked for, beside the ONNX it was built from.

Translate -> lower to the standard's ops (`lowerings`) -> save the ONNX -> parse and build (`engine`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import UserError
from ...graph import Graph
from ...targets.tensorrt.engine_file import HALF_STATES
from ..artefact import Artefact, Options, Progress
from ..onnx.weight_file import WeightFile
from .engine import build_engine, library, profiles
from .lowerings import lower
from .weights import codes_in_engine, read_weights

__all__ = ["check_sms", "export", "read_weights"]

WEIGHTS = "weights.bin"
SMS = (80, 86, 89, 120, 121)
"""Compute capabilities that have what our graphs need: SM75 has neither INT4 weights nor bfloat16."""


def check_sms(sms: Sequence[int]) -> None:
    """Raise UserError for a compute capability that cannot run our graphs."""
    if not sms:
        raise UserError(f"no SM to build TensorRT engines for; choose from {', '.join(map(str, SMS))}")
    for sm in sms:
        if sm not in SMS:
            raise UserError(f"SM {sm} is not supported (INT4 weights and bfloat16 need SM80); choose from {SMS}")


def export(graphs: Sequence[Graph], directory: Path, options: Options, progress: Progress = lambda _: None) -> Artefact:
    """Write `<graph>.onnx`, `<graph>.engine` and `weights.bin` into `directory`, engines for `options.numbers`.

    `options.max_positions` bounds sources and caches. Raises UserError for an unknown SM, a missing library, and for a graph
    that TensorRT refuses.
    """
    check_sms(options.numbers)
    trt = library()
    states = {s.name for g in graphs for s in g.states if s.kind in HALF_STATES}
    weights = WeightFile(directory / WEIGHTS)
    ops: dict[str, dict[str, int]] = {}
    idle: dict[str, list[str]] = {}
    try:
        for graph in graphs:
            progress(f"tensorrt: {graph.name}: ONNX")
            ops[graph.name], idle[graph.name] = lower(graph, states, weights, options, directory)
    finally:
        weights.close()
    rtx = hasattr(trt, "ComputeCapability")
    built_for = f"SM {', '.join(map(str, options.numbers))}" if rtx else "the GPU of this machine"
    sizes: dict[str, int] = {}
    for graph in graphs:
        progress(f"tensorrt: {graph.name}: engine for {built_for}")
        path = directory / f"{graph.name}.engine"
        onnx_path = directory / f"{graph.name}.onnx"
        shapes = profiles(graph, options.max_positions)
        path.write_bytes(build_engine(onnx_path, options.numbers, shapes, idle[graph.name]))
        sizes[graph.name] = path.stat().st_size
    progress("tensorrt: looking for the codes in the engines")
    engines = [codes_in_engine(directory / f"{g.name}.onnx", directory / f"{g.name}.engine") for g in graphs]
    present = [unchanged for codes in engines for unchanged in codes.values()]
    files = tuple(f"{g.name}.{end}" for g in graphs for end in ("onnx", "engine"))
    facts: dict[str, object] = {
        "library": f"{trt.__name__} {trt.__version__}",
        "built_for": built_for,
        "engine_bytes_measured": sizes,
        "weights_in_engines": len(present),
        "weights_byte_for_byte_in_engines_measured": sum(present),
    }
    return Artefact((*files, WEIGHTS), ops, facts)
