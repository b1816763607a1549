"""TensorRT: each graph an engine for the GPUs asked for, beside the very ONNX it was built from. What may enter: `ops`, `graph`,
the leaf `runtimes.tensorrt`, which knows the types of states.

Main path: translate -> lower to the standard's ops (`onnx_standard`) -> save the ONNX -> parse -> one strongly typed engine
for all compute capabilities, with an optimization profile for prefill and one for the decode step. TensorRT-RTX builds
without a GPU; the full TensorRT (Jetson) is used through the same code where it is what can be imported, for its own GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from ...errors import UserError
from ...graph import Graph, Port, State
from ...targets.onnx.nodes import attr
from ...targets.onnx.weights import stored_tensor
from ...targets.storage import container, scale_block
from ...targets.tensorrt.engine_file import HALF_STATES
from ..artefact import Artefact, Options, Progress
from ..onnx.lowering import torch_tensor, weight_name
from ..onnx.standard_ops import Dialect, StandardLowering, lower_standard, rows, scatter_slots
from ..onnx.translate import translate
from ..onnx.weight_file import WeightFile, codes_chunks, content_key

WEIGHTS = "weights.bin"
NAMES = "edgewright.names"
"""The metadata of a DequantizeLinear node: JSON, the checkpoint's names of its weight (several where they are alike)."""

BATCH = 16
"""Rows an engine takes at most."""
CHUNK = 512
"""New tokens an engine takes at most in one call; it is tuned for the prefill chunk of 128."""
SMS = (80, 86, 89, 120, 121)
"""Compute capabilities that have what our graphs need: SM75 has neither INT4 weights nor bfloat16."""
LIBRARIES = ("tensorrt_rtx_bindings", "tensorrt")


# ---- lowering -------------------------------------------------------------------------------------------------------


def _dequantized(low: StandardLowering, node: ir.Node) -> ir.Value:
    """The weight of a quantized node: INT4 or INT8 codes and float16 scales through DequantizeLinear, [N, K] float16."""
    codes_in, scales_in = node.inputs[1], node.inputs[2]
    codes, scales = torch_tensor(codes_in), torch_tensor(scales_in)
    bits = int(attr(node, "bits"))
    rows, columns = codes.shape[0], codes.shape[1] * 8 // bits
    groups, wide = scales.shape[1], container("tensorrt", bits)
    # One INT4 scale per channel would make TensorRT widen the codes to INT8: repeated per block they stay INT4.
    repeat = columns // scale_block(columns) if groups == 1 and wide == 4 and columns % 16 == 0 else 1
    blocks = groups * repeat
    name = weight_name(codes_in)
    if wide == 4 and columns // blocks not in (16, 32, 64, 128):
        raise UserError(
            f"{name}: one scale for {columns // blocks} inputs does not exist for tensorrt at {bits} bits; "
            "give it groups of 16, 32, 64 or 128, or 8 bits"
        )
    kind = ir.DataType.INT4 if wide == 4 else ir.DataType.INT8
    q = low.weight(
        f"{name}.int{wide}",
        f"int{wide}:{bits}:{content_key(codes)}",
        _signed(codes_chunks([codes], bits, wide, columns), wide),
        kind,
        (rows, columns),
    )
    per_channel = blocks == 1
    s = low.weight(
        f"{name}.scales",
        f"scales:{repeat}:{content_key(scales)}",
        [_half(scales.repeat_interleave(repeat, 1) if repeat > 1 else scales)],
        ir.DataType.FLOAT16,
        (rows,) if per_channel else (rows, blocks),
    )
    attributes: dict[str, Any] = {"axis": 0} if per_channel else {"axis": 1, "block_size": columns // blocks}

    dense = low.built(("dequantized", q, s), lambda: low.one(node, "DequantizeLinear", [q, s], **attributes))
    label = dense.producer().metadata_props  # type: ignore[union-attr]
    label[NAMES] = json.dumps(sorted({*json.loads(label.get(NAMES, "[]")), f"{name}.weight"}))
    return dense


def _signed(chunks: Iterable[np.ndarray], bits: int) -> Iterator[np.ndarray]:
    """Codes stored from 0 up as two's complement of the same packing: their highest bit flips."""
    flip = np.uint8(0x88 if bits == 4 else 0x80)
    for chunk in chunks:
        yield np.bitwise_xor(chunk, flip)


def _half(scales: torch.Tensor) -> np.ndarray:
    """Scales as float16. Raises ValueError if one is not canonical, so that no value changes."""
    exact = scales.to(torch.float16)
    if not torch.equal(exact.to(torch.float32), scales.to(torch.float32)):
        raise ValueError("a scale is not exact in float16")
    return np.asarray(exact.numpy())


def _linear(low: StandardLowering, node: ir.Node) -> None:
    weight = _dequantized(low, node)
    turned = low.built(("turned", weight), lambda: low.one(node, "Transpose", [weight], perm=[1, 0]))
    x = node.inputs[0]
    assert x is not None
    out = low.widen(node, low.one(node, "MatMul", [low.narrow(node, x), turned]))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        out = low.one(node, "Add", [out, node.inputs[3]])
    low.replace(node, [out])


def _embedding(low: StandardLowering, node: ir.Node) -> None:
    rows = low.one(node, "Gather", [_dequantized(low, node), node.inputs[0]], axis=0)
    low.replace(node, [low.widen(node, rows)])


DIALECT = Dialect(linear=_linear, embedding=_embedding, write_cache=scatter_slots, half=True)


def _lower(
    graph: Graph, states: set[str], weights: WeightFile, options: Options, directory: Path
) -> tuple[dict[str, int], list[str]]:
    """Write `<graph>.onnx`; the `states` of any graph are float16, here and where they come from.

    What a recurrence carries, and its arithmetic, stay float32. Returns op -> nodes, and the inputs that the graph has no use for
    (the length of what is past, where no layer looks back at it).
    """
    model = translate(graph, rows(DIALECT))
    idle = [str(v.name) for v in model.graph.inputs if not v.uses()]
    half = ir.TensorType(ir.DataType.FLOAT16)
    for value in model.graph.inputs:
        if value.name in states:
            value.type = half
    low = StandardLowering(model.graph, weights, options.max_positions, dialect=DIALECT)
    lower_standard(model, low)
    for i, value in enumerate(model.graph.outputs):
        if value.name in states and value.dtype != ir.DataType.FLOAT16:
            name, value.name = value.name, f"{value.name}.wide"
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16})
            model.graph.append(cast)
            cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = name, half, value.shape
            model.graph.outputs[i] = cast.outputs[0]
    ir.save(model, directory / f"{graph.name}.onnx")
    return dict(Counter(node.op_type for node in model.graph)), idle


# ---- building -------------------------------------------------------------------------------------------------------


def library() -> Any:
    """TensorRT-RTX, else TensorRT. Raises UserError if there is neither."""
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise UserError(
        "--format tensorrt needs tensorrt_rtx_bindings, which is not installed: pip install 'edgewright[tensorrt]'"
    )


def check_sms(sms: Sequence[int]) -> None:
    """Raise UserError for a compute capability that cannot run our graphs."""
    if not sms:
        raise UserError(f"no SM to build TensorRT engines for; choose from {', '.join(map(str, SMS))}")
    for sm in sms:
        if sm not in SMS:
            raise UserError(f"SM {sm} is not supported (INT4 weights and bfloat16 need SM80); choose from {SMS}")


def build_engine(
    path: Path,
    sms: Sequence[int],
    profiles: Sequence[dict[str, tuple[Shape, Shape, Shape]]],
    idle: Sequence[str] = (),
) -> Any:
    """The engine of an ONNX file, as a buffer, for `sms`; profiles: input -> (least, usual, largest) shape.

    idle: inputs that may be left unused.

    The full TensorRT builds for the GPU of this machine, whatever `sms` says. Raises UserError with TensorRT's own words if
    anything was not understood, or an input was left unused.
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


Shape = tuple[int, ...]


def _refuse_dropped(path: Path, inputs: Sequence[str]) -> None:
    """Raise UserError if an input was dropped: TensorRT only warns, and what is built computes something else."""
    if inputs:
        raise UserError(
            f"--format tensorrt: {path.name}: an input was dropped ({'; '.join(inputs)}); leave this target out"
        )


def _logger(trt: Any, idle: Sequence[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps what the parser and builder complain about."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.unused: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if "Unused Input" in message or ("Input Tensor" in message and "unused" in message):
                if not set(idle) & set(message.split()):
                    self.unused.append(" ".join(message.split())[:200])
            # A host without a GPU says cudaError 35 whatever is asked of it; it is no reason.
            elif severity <= trt.ILogger.ERROR and "cudaError" not in message:
                self.errors.append(" ".join(message.split())[:200])

    return Logger()


def profiles(graph: Graph, max_positions: int) -> list[dict[str, tuple[Shape, Shape, Shape]]]:
    """Prefill, then decode step (a graph without a sequence has one profile): input -> (least, usual, largest) shape.

    A recurrence bounds the tokens of one call; dimensions that only this graph has reach to their bound.
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
    found = []
    for kind in kinds:
        sizes: dict[str, tuple[int, int, int]] = common | kind

        def shape(port: Port | State, which: int, sizes: dict[str, tuple[int, int, int]] = sizes) -> Shape:
            return tuple(d if isinstance(d, int) else sizes[d][which] for d in port.shape)

        found.append({p.name: (shape(p, 0), shape(p, 1), shape(p, 2)) for p in ports})
    return found


def export(graphs: Sequence[Graph], directory: Path, options: Options, progress: Progress = lambda _: None) -> Artefact:
    """Write `<graph>.onnx`, `<graph>.engine` and `weights.bin` into `directory`, engines for `options.numbers`.

    `options.max_positions` bounds sources and caches. Raises UserError for an SM or a library that is not there, and for
    what TensorRT refuses.
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
            ops[graph.name], idle[graph.name] = _lower(graph, states, weights, options, directory)
    finally:
        weights.close()
    rtx = hasattr(trt, "ComputeCapability")
    made_for = f"SM {', '.join(map(str, options.numbers))}" if rtx else "the GPU of this machine"
    sizes: dict[str, int] = {}
    for graph in graphs:
        progress(f"tensorrt: {graph.name}: engine for {made_for}")
        path = directory / f"{graph.name}.engine"
        onnx_path = directory / f"{graph.name}.onnx"
        shapes = profiles(graph, options.max_positions)
        path.write_bytes(build_engine(onnx_path, options.numbers, shapes, idle[graph.name]))
        sizes[graph.name] = path.stat().st_size
    progress("tensorrt: looking for the codes in the engines")
    found = [codes_in_engine(directory / f"{g.name}.onnx", directory / f"{g.name}.engine") for g in graphs]
    there = [here for weights_of in found for here in weights_of.values()]
    files = tuple(f"{g.name}.{end}" for g in graphs for end in ("onnx", "engine"))
    facts: dict[str, object] = {
        "library": f"{trt.__name__} {trt.__version__}",
        "built_for": made_for,
        "engine_bytes_measured": sizes,
        "weights_in_engines": len(there),
        "weights_byte_for_byte_in_engines_measured": sum(there),
    }
    return Artefact((*files, WEIGHTS), ops, facts)


# ---- reading back ---------------------------------------------------------------------------------------------------


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, float32 [N, K]) of every quantized weight that a graph's ONNX in `directory` holds.

    Raises UserError for a file whose weights do not fit together.
    """
    for path in sorted(directory.glob("*.onnx")):
        for names, node in _weights(path):
            signed, factors = (stored_tensor(path, node, i).numpy().astype(np.float32) for i in (0, 1))
            groups = factors.shape[-1] if factors.ndim == 2 else 1
            if signed.ndim != 2 or factors.shape[:1] != signed.shape[:1] or not groups or signed.shape[1] % groups:
                raise UserError(f"{path}: codes and scales of {names[0]} do not fit together; export again")
            grouped = signed.reshape(len(signed), groups, -1)
            grouped *= factors.reshape(len(signed), groups, 1)
            for name in names:
                yield name, torch.from_numpy(signed)


def codes_in_engine(network: Path, engine: Path) -> dict[str, bool]:
    """Weight (its first name) -> whether its codes stand in the engine byte for byte, as stored or transposed.

    TensorRT transposes INT8 codes, and INT4 ones of small matrices; where it permutes codes otherwise this says False
    though nothing is lost.
    """
    plan = engine.read_bytes()
    found: dict[str, bool] = {}
    for (name, *_), node in _weights(network):
        codes = stored_tensor(network, node, 0)
        found[name] = codes.tobytes() in plan or ir.tensor(np.ascontiguousarray(codes.numpy().T)).tobytes() in plan
    return found


def _weights(path: Path) -> Iterator[tuple[list[str], ir.Node]]:
    """(checkpoint names, DequantizeLinear node) of each weight in an ONNX file. Raises UserError for one without a name."""
    for node in ir.load(path).graph:
        if node.op_type == "DequantizeLinear":
            try:
                names = json.loads(node.metadata_props.get(NAMES, "[]"))
            except (ValueError, RecursionError):
                names = None
            if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
                raise UserError(f"{path}: node {node.name} does not say which weight it holds; export again")
            yield names, node
