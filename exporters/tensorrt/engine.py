"""Building an engine: one strongly typed network for all compute capabilities, with a profile for prefill and one for a step."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from ...errors import UserError
from ...graph import Graph, Port, State

BATCH = 16
"""Rows an engine takes at most."""

CHUNK = 512
"""New tokens an engine takes at most in one call. It is tuned for a prefill chunk of 128."""

LIBRARIES = ("tensorrt_rtx_bindings", "tensorrt")
"""TensorRT-RTX builds without a GPU; the full TensorRT (Jetson) is taken where it is the one installed."""

Shape = tuple[int, ...]


def library() -> Any:
    """TensorRT-RTX, else TensorRT. Raises UserError if there is neither."""
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise UserError(
        "--format tensorrt needs tensorrt_rtx_bindings, which is not installed: pip install 'edgewright[tensorrt]'"
    )


def build_engine(
    path: Path,
    sms: Sequence[int],
    profiles: Sequence[dict[str, tuple[Shape, Shape, Shape]]],
    idle: Sequence[str] = (),
) -> Any:
    """The engine of an ONNX file, as a buffer, for the compute capabilities `sms`.

    profiles: input -> (least, usual, largest) shape. idle: inputs that may stay unused. The full TensorRT builds for the GPU of
    this machine, whatever `sms` says. Raises UserError with TensorRT's own words if it refuses the file or drops an input.
    """
    trt = library()
    log = _logger(trt, idle)
    builder = trt.Builder(log)
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(f"{e.node_operator()}: {' '.join(e.desc().split())[:200]}" for e in errors)
        raise UserError(f"--format tensorrt: {path.name} is refused: {reasons}; leave this target out")
    declared = [i.name for i in onnx.load(str(path), load_external_data=False).graph.input]
    taken = {network.get_input(i).name for i in range(network.num_inputs)}
    lost = [n for n in declared if n not in taken and n not in idle]
    _refuse_dropped(path, lost + log.unused)
    config = builder.create_builder_config()
    if hasattr(trt, "ComputeCapability"):
        config.num_compute_capabilities = len(sms)
        for i, sm in enumerate(sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            profile.set_shape(name, *bounds)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    _refuse_dropped(path, log.unused)
    if engine is None:
        raise UserError(
            f"--format tensorrt: no engine of {path.name}: {'; '.join(log.errors[-3:])}; leave this target out"
        )
    return memoryview(engine)


def _refuse_dropped(path: Path, inputs: Sequence[str]) -> None:
    """Raise UserError if an input was dropped: TensorRT only warns, and the engine computes something else."""
    if inputs:
        raise UserError(
            f"--format tensorrt: {path.name}: an input was dropped ({'; '.join(inputs)}); leave this target out"
        )


def _logger(trt: Any, idle: Sequence[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the complaints of parser and builder."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.unused: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if "Unused Input" in message or ("Input Tensor" in message and "unused" in message):
                if not set(idle) & set(message.split()):
                    self.unused.append(" ".join(message.split())[:200])
            # Without a GPU there is always a cudaError 35, which has nothing to do with the graph.
            elif severity <= trt.ILogger.ERROR and "cudaError" not in message:
                self.errors.append(" ".join(message.split())[:200])

    return Logger()


def profiles(graph: Graph, max_positions: int) -> list[dict[str, tuple[Shape, Shape, Shape]]]:
    """The optimization profiles of a graph: input -> (least, usual, largest) shape.

    The first is for prefill, the second for the decode step; a graph without a sequence has the first alone. A recurrence bounds
    the tokens of one call. Dimensions that only this graph has reach to their bound.
    """
    chunk = min(CHUNK, max_positions, graph.bounds.get("sequence", (1, CHUNK))[1])
    common = {name: (least, min(max(64, least), most), most) for name, (least, most) in graph.bounds.items()}
    source = min(max_positions, graph.bounds.get("source", (1, max_positions))[1])
    common |= {"batch": (1, 1, BATCH), "source": (1, min(64, source), source)}
    common |= {"capacity": (1, min(1024, max_positions), max_positions)}
    several = {"sequence": (1, min(128, chunk), chunk), "logits": (1, 1, chunk)}
    single = {"sequence": (1, 1, 1), "logits": (1, 1, 1)}
    ports: list[Port | State] = [*graph.inputs, *graph.states]
    kinds = [several, single] if any("sequence" in p.shape for p in ports) else [several]
    shapes = []
    for kind in kinds:
        sizes: dict[str, tuple[int, int, int]] = common | kind

        def shape(port: Port | State, which: int, sizes: dict[str, tuple[int, int, int]] = sizes) -> Shape:
            return tuple(d if isinstance(d, int) else sizes[d][which] for d in port.shape)

        shapes.append({p.name: (shape(p, 0), shape(p, 1), shape(p, 2)) for p in ports})
    return shapes
