"""Qualcomm NPU: each graph in static shapes, compiled to HTP context binaries. What may enter: `ops`, `graph`, and the
leaf `runtimes.qnn_provider`, which knows the backend.

Main path: fix the sizes (`programs`) -> translate -> lower to the standard's ops with MatMulNBits weights -> save the ONNX ->
a context binary for each HTP version (`qnn_compile`). Only the embedding stays on the CPU: rows
of packed codes are looked up there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from ...errors import UserError
from ...graph import Graph, Port, State
from ...targets.onnx.nodes import attr
from ...targets.onnx.weights import read_nbits
from ...targets.qnn.context import NAME, PROGRAMS, Program, Programs, compiled
from ...targets.storage import container
from ..artefact import Artefact, Options, Progress
from ..onnx.lowering import MS, Stack, nodes, parameter, torch_tensor, weight_name
from ..onnx.standard_ops import MASKED, Dialect, StandardLowering, lower_standard, scatter_slots
from ..onnx.standard_ops import rows as private_rows
from ..onnx.translate import translate
from ..onnx.weight_file import WeightFile, codes_chunks, content_key, scales_chunks
from .compile import SOC, compile_programs

WEIGHTS = "weights.bin"
ROWS = "embedding.bin"
"""The embedding's rows, which the CPU looks up at run time: apart from the weights, which only the compiler reads."""
HTP = (68, 69, 73, 75, 79, 81)
SHORT = 32
"""Tokens of the shorter of an encoder's two programs."""
CHUNK = 128
"""Tokens of a decoder-only prompt that one call takes, as the generate loop feeds them."""
WHOLE = 32
"""The same where states would carry padding on: only whole chunks are fed, what is left of a prompt goes token by token."""
SHRINK = 0.125
"""What the residual is multiplied by: that of Gemma 3 270M reaches 101,753, float16 ends at 65,504."""
LOGITS = 32, 1 << 20
"""The most positions a chunk gives logits for, and the most values: a large vocabulary is asked in several calls."""


def programs(graph: Graph, max_positions: int) -> dict[str, Program]:
    """File stem -> static program of a graph, batch 1, source and cache as long as the context, other dimensions at their bound.

    An encoder has a shorter program beside it. A decoder-only graph gives a chunk for prompts and a step; the decoder
    behind an encoder starts from one token: a step. Each program stores its graph's weights again: no more than pay.
    A graph without symbolic dimensions is one program. Raises UserError for a graph that cannot tell padding from tokens.
    """
    ports: list[Port | State] = [*graph.inputs, *graph.states]
    symbols = {d for p in ports for d in p.shape if isinstance(d, str)}
    if not symbols:
        return {graph.name: _program(graph, symbols, {})}
    source = min(max_positions, graph.bounds.get("source", (1, max_positions))[1])
    sizes = {name: most for name, (_, most) in graph.bounds.items()}
    sizes |= {"batch": 1, "source": source, "capacity": max_positions}
    if "sequence" not in symbols:
        encodes = any(p.dtype == torch.int64 for p in graph.inputs)
        if encodes and "source" in symbols and not any(p.dtype == torch.bool for p in graph.inputs):
            raise UserError(
                f"--format qnn: the graph {graph.name} takes no padding, and a program's length is fixed; leave this target out"
            )
        lengths = sorted({min(SHORT, source), source}) if encodes else [source]
        return {f"{graph.name}_{n}": _program(graph, symbols, sizes | {"source": n}) for n in lengths}
    found = {f"{graph.name}_step": _program(graph, symbols, sizes | {"sequence": 1, "logits": 1})}
    if "source" not in symbols:
        carries = any(s.updated and "capacity" not in s.shape for s in graph.states)
        chunk = min(WHOLE if carries else CHUNK, max_positions, graph.bounds.get("sequence", (1, CHUNK))[1])
        width = next(int(p.shape[-1]) for p in graph.outputs if "logits" in p.shape)
        logits = max(1, min(LOGITS[0], chunk, LOGITS[1] // width))
        found[f"{graph.name}_chunk"] = _program(graph, symbols, sizes | {"sequence": chunk, "logits": logits})
    return found


def _program(graph: Graph, symbols: set[str], sizes: dict[str, int]) -> Program:
    return Program.model_validate({"graph": graph.name, "sizes": {k: v for k, v in sizes.items() if k in symbols}})


def fixed(graph: Graph, stem: str, program: Program) -> Graph:
    """The graph with every symbolic dimension replaced."""
    sizes: dict[str, int] = {str(k): v for k, v in program.sizes.items()}

    def shape(port: Port | State) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else sizes[d] for d in port.shape)

    return replace(
        graph,
        name=stem,
        inputs=tuple(replace(p, shape=shape(p)) for p in graph.inputs),
        outputs=tuple(replace(p, shape=shape(p)) for p in graph.outputs),
        states=tuple(replace(s, shape=shape(s)) for s in graph.states),
        example={},
        bounds={},
    )


# ---- lowering -------------------------------------------------------------------------------------------------------


def dialect(rows: WeightFile) -> Dialect:
    """How HTP wants the standard's ops: everything float16, linears as MatMulNBits; the embedding's rows go to `rows`."""

    def embedding(low: StandardLowering, node: ir.Node) -> None:
        _embedding(low, node, rows)

    return Dialect(linear=_linear, embedding=embedding, write_cache=scatter_slots, all_half=True)


def _stack(node: ir.Node) -> Stack:
    codes = torch_tensor(node.inputs[1])
    bits = int(attr(node, "bits"))
    columns = codes.shape[1] * 8 // bits
    stack = Stack([weight_name(node.inputs[1])], [codes], [torch_tensor(node.inputs[2])], bits, columns)
    if columns % stack.block:
        raise UserError(f"{stack.name}: {columns} inputs are no multiple of 16, which --format qnn needs")
    return stack


def _codes(low: StandardLowering, stack: Stack, suffix: str, shape: tuple[int, ...]) -> ir.Value:
    wide = container("qnn", stack.bits)
    return low.weight(
        f"{stack.name}.q{wide}{suffix}",
        f"codes{suffix}:{stack.bits}>{wide}:{content_key(stack.codes[0])}",
        codes_chunks(stack.codes, stack.bits, wide, stack.columns),
        ir.DataType.UINT8,
        shape,
    )


def _scales(low: StandardLowering, stack: Stack, suffix: str) -> ir.Value:
    """float16 [N, blocks]; one scale per channel is repeated for each block."""
    blocks = stack.columns // stack.block
    repeat = blocks // stack.scales[0].shape[1]
    chunks = (_half(stack.name, chunk) for chunk in scales_chunks(stack.scales, repeat))
    key = f"scales16{suffix}:{repeat}:{content_key(stack.scales[0])}"
    return low.weight(f"{stack.name}.scales{suffix}", key, chunks, ir.DataType.FLOAT16, (stack.rows, blocks))


def _half(name: str, scales: np.ndarray) -> np.ndarray:
    """Scales as float16. Raises ValueError if one is not canonical, so that no value changes."""
    exact = scales.astype(np.float16)
    if not np.array_equal(exact.astype(np.float32), scales):
        raise ValueError(f"{name}: a scale is not exact in float16")
    return exact


def _linear(low: StandardLowering, node: ir.Node) -> None:
    stack, wide = _stack(node), container("qnn", int(attr(node, "bits")))
    data = _codes(low, stack, "", (stack.rows, stack.columns // stack.block, stack.block * wide // 8))
    sizes = {"K": stack.columns, "N": stack.rows, "bits": wide, "block_size": stack.block}
    x = node.inputs[0]
    assert x is not None
    assert x.shape is not None
    deep = len(x.shape) > 3  # pixels: HTP takes no more than a rank of 3
    rows = low.one(node, "Reshape", [x, low.ints(1, -1, stack.columns)]) if deep else x
    out = low.emit(node, "MatMulNBits", [rows, data, _scales(low, stack, "")], domain=MS, **sizes)[0]
    stack.label(out)
    if deep:
        out = low.one(node, "Reshape", [out, low.ints(*x.shape[:-1], stack.rows)])  # type: ignore[arg-type]
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        out = low.one(node, "Add", [out, node.inputs[3]])
    low.replace(node, [out])


def _embedding(low: StandardLowering, node: ir.Node, rows: WeightFile) -> None:
    stack, wide = _stack(node), container("qnn", int(attr(node, "bits")))
    weights, low.weights = low.weights, rows
    data = _codes(low, stack, ".rows", (stack.rows, stack.columns * wide // 8))
    scales = _scales(low, stack, ".rows")
    low.weights = weights
    sizes = {"bits": wide, "block_size": stack.block, "gather_axis": 0, "quantize_axis": 1}
    out = low.emit(node, "GatherBlockQuantized", [data, node.inputs[0], scales], domain=MS, **sizes)[0]
    stack.label(out)
    low.replace(node, [out])


def shrink_residual(low: StandardLowering) -> None:
    """Let the residual run at `SHRINK` of its size: norms alone read it, and what they give does not depend on its size.

    What is added to it, its beginning too, is multiplied by `SHRINK`, a power of two; a norm's epsilon by its square. A graph whose
    residual is read by anything else stays as it is.
    """
    adds: set[ir.Node] = set()
    readers: list[ir.Node] = []
    for norm in nodes(low.graph, "RmsNorm"):
        add = _residual(norm.inputs[0])
        if add is not None:
            readers.append(norm)
            while add is not None:
                adds.add(add)
                add = next((a for a in (_residual(v) for v in add.inputs) if a is not None and a not in adds), None)
    stream = {a.outputs[0] for a in adds}
    begins = {v for a in adds for v in a.inputs if v is not None and v not in stream}
    readers += [n for n in nodes(low.graph, "RmsNorm") if n.inputs[0] in begins]
    chosen = {
        v for v in (n.inputs[0] for n in readers) if v is not None and v not in stream | begins
    }  # positions of it
    if any(u.node not in adds | {*readers} and u.node.outputs[0] not in chosen for v in stream for u in v.uses()):
        return
    if any(v.is_graph_output() for v in stream | chosen):
        return
    for value in sorted(begins, key=lambda v: str(v.name)):
        users = [u.node for u in value.uses() if u.node in adds or u.node in readers]
        small = low.one(users[0], "Mul", [value, low.scalar(SHRINK, False)])
        small.shape, small.type = value.shape, value.type
        for user in users:
            for i, given in enumerate(user.inputs):
                if given is value:
                    user.replace_input_with(i, small)
    for norm in readers:
        norm.attributes["eps"] = ir.AttrFloat32("eps", float(attr(norm, "eps")) * SHRINK**2)


def _residual(value: ir.Value | None) -> ir.Node | None:
    """The Add of two whole activations [B, S, hidden] that made `value`, itself or some of its positions."""
    made = value.producer() if value is not None else None
    if made is not None and made.op_type == "Gather" and made.domain == "":
        made = made.inputs[0].producer() if made.inputs[0] is not None else None
    if made is None or made.op_type != "Add" or made.domain != "":
        return None
    shapes = [v.shape for v in made.inputs if v is not None]
    return (
        made if len(shapes) == 2 and shapes[0] == shapes[1] and shapes[0] is not None and len(shapes[0]) == 3 else None
    )


def mask_before_exp(low: StandardLowering) -> None:
    """`exp(x) * mask` of zeros and ones becomes `exp(x + bias)`: `lay_out_factors` would make the mask large."""
    for node in [n for n in low.graph if n.domain == "" and n.op_type == "Mul"]:
        x, mask = node.inputs
        exp = x.producer() if x is not None else None
        known = mask.const_value.numpy() if mask is not None and mask.const_value is not None else None
        if exp is None or exp.op_type != "Exp" or known is None or not np.isin(known, (0, 1)).all():
            continue
        bias = low.constant(np.where(known, 0, MASKED).astype(np.float32))
        low.replace(node, [low.one(node, "Exp", [low.one(node, "Add", [exp.inputs[0], bias])])])


def lay_out_factors(low: StandardLowering) -> None:
    """A constant factor of a product that is multiplied again is laid out as large as the product, vectors excepted.

    Where it is broadcast HTP reads what is not there, and the process may die (tests/test_qnn_facts.py).
    """
    for node in [n for n in low.graph if n.domain == "" and n.op_type == "Mul"]:
        out = node.outputs[0]
        whole = [d for d in out.shape if isinstance(d, int)] if out.shape is not None else []
        again = any(u.node.domain == "" and u.node.op_type == "Mul" for u in out.uses())
        if not again or out.shape is None or len(whole) != len(out.shape):
            continue
        for i, factor in enumerate(node.inputs):
            sizes = [int(d) for d in factor.shape] if factor is not None and factor.shape is not None else []  # type: ignore[arg-type]
            if all(d == 1 for d in sizes[:-1]) or sizes == whole:
                continue
            try:
                _, values = parameter(factor)
            except ValueError:  # computed: HTP takes it
                continue
            spread = values.to(torch.float32).reshape(sizes).broadcast_to(whole)
            node.replace_input_with(i, low.constant(spread.contiguous().numpy()))


def part_linears(low: StandardLowering) -> None:
    """Linears whose outputs are laid side by side come there through two negations.

    HTP's compiler makes one product of them and runs out of memory (tests/test_qnn_facts.py); what changes nothing it leaves out.
    """
    for node in [n for n in low.graph if n.domain == "" and n.op_type == "Concat"]:
        for i, value in enumerate(node.inputs):
            made = value.producer() if value is not None else None
            if value is None or made is None or made.op_type != "QuantizedLinear":
                continue
            apart = low.one(node, "Neg", [low.one(node, "Neg", [value])])
            apart.shape, apart.type = value.shape, value.type
            node.replace_input_with(i, apart)


def _lower(graph: Graph, weights: WeightFile, rows: WeightFile, options: Options, directory: Path) -> dict[str, int]:
    """Write `<graph>.onnx`, all float16. Returns op -> nodes."""
    model = translate(graph, private_rows(dialect(rows)))
    low = StandardLowering(model.graph, weights, options.max_positions, dialect=dialect(rows))
    shrink_residual(low)
    mask_before_exp(low)
    lay_out_factors(low)
    part_linears(low)
    ops = lower_standard(model, low)
    model.opset_imports[MS] = 1
    ir.save(model, directory / f"{graph.name}.onnx")
    return ops


# ---- the artefact ---------------------------------------------------------------------------------------------------


def check_htp(versions: Sequence[int]) -> tuple[int, ...]:
    """The versions without repetitions. Raises UserError for one the compiler would only warn of and replace."""
    if not versions:
        raise UserError(f"no HTP version to compile for; choose from {', '.join(map(str, HTP))}")
    for version in versions:
        if version not in HTP:
            raise UserError(f"HTP version {version} is not known; choose from {', '.join(map(str, HTP))}")
    return tuple(dict.fromkeys(versions))


def export(graphs: Sequence[Graph], directory: Path, options: Options, progress: Progress = lambda _: None) -> Artefact:
    """Write the static ONNX files, their weights, `programs.json` and a context binary for each of `options.numbers`.

    Raises UserError for an HTP version that is not known, or for which a graph does not compile.
    """
    versions = check_htp(options.numbers)
    weights, rows = WeightFile(directory / WEIGHTS), WeightFile(directory / ROWS)
    made: dict[str, Program] = {}
    ops: dict[str, dict[str, int]] = {}
    try:
        for graph in graphs:
            for stem, program in programs(graph, options.max_positions).items():
                progress(f"qnn: {stem}: ONNX")
                ops[stem] = _lower(fixed(graph, stem, program), weights, rows, options, directory)
                made[stem] = program
    finally:
        weights.close()
        rows.close()
    found = compile_programs(directory, list(made), versions, ROWS, progress)
    listed = Programs.model_validate(
        {"programs": made, "placement": {int(v): placed for v, placed in found["placement"].items()}}
    )
    (directory / PROGRAMS).write_text(listed.model_dump_json(indent=1) + "\n")
    facts: dict[str, object] = {
        "htp_versions": list(versions),
        "not_on_npu_measured_at_build": _elsewhere(listed),
        "context_nodes_measured_at_build": found["contexts"],
        "compiler_peak_anonymous_bytes_measured": found["peak_anonymous"],
        "vendor_simulated": {
            "simulator": f"Qualcomm's simulator of SoC model {SOC}",
            "soc_model": SOC,
            "note": "an automotive part, a proxy for phones; ops without a cost are not counted",
            "programs": {stem: values for stem, values in found["estimates"].items() if values},
        },
    }
    files = sorted(p.name for p in directory.iterdir() if p.is_file())
    return Artefact(tuple(files), ops, facts)


def _elsewhere(listed: Programs) -> dict[str, dict[str, int]]:
    """`<compiled program>` -> op -> nodes that are not on the NPU, by choice (`HOST_OPS`) or not."""
    return {
        compiled(stem, version).removesuffix(".onnx"): ops
        for version, placed in listed.placement.items()
        for stem, providers in placed.items()
        for provider, ops in providers.items()
        if provider != NAME
    }


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, float32 [N, K]) of every quantized weight, from the ONNX files that were compiled."""
    for stem in Programs.read(directory).programs:
        yield from read_nbits(directory / f"{stem}.onnx")
