"""Qualcomm NPU: each graph in static shapes, compiled to HTP context binaries.

Fix the sizes (`programs`) -> translate -> rewrite (`passes`) -> lower to the standard's ops with MatMulNBits weights
(`lowerings`) -> save the ONNX -> compile a context binary for each HTP version (`compile`). Only the embedding stays on the CPU,
which looks up rows of packed codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir
import torch

from ...errors import UserError
from ...graph import Graph
from ...targets.onnx.weights import read_nbits
from ...targets.qnn.context import NAME, PROGRAMS, Program, Programs, compiled
from ..artefact import Artefact, Options, Progress
from ..onnx.dialect import StandardLowering
from ..onnx.lowering import MS
from ..onnx.standard_ops import lower_standard
from ..onnx.standard_ops import rows as private_rows
from ..onnx.translate import translate
from ..onnx.weight_file import WeightFile
from .compile import SOC, compile_programs
from .lowerings import dialect
from .passes import PASSES
from .programs import fixed, programs

WEIGHTS = "weights.bin"
ROWS = "embedding.bin"
"""The embedding's rows, which the CPU looks up at run time. The weights are another file, which only the compiler reads."""
HTP = (68, 69, 73, 75, 79, 81)


def _lower(graph: Graph, weights: WeightFile, rows: WeightFile, options: Options, directory: Path) -> dict[str, int]:
    """Write `<graph>.onnx`, all float16. Returns op -> nodes."""
    model = translate(graph, private_rows(dialect(rows)))
    low = StandardLowering(model.graph, weights, options.max_positions, dialect=dialect(rows))
    for each in PASSES:
        each(low)
    ops = lower_standard(model, low)
    model.opset_imports[MS] = 1
    ir.save(model, directory / f"{graph.name}.onnx")
    return ops


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
    stored: dict[str, Program] = {}
    ops: dict[str, dict[str, int]] = {}
    try:
        for graph in graphs:
            for stem, program in programs(graph, options.max_positions).items():
                progress(f"qnn: {stem}: ONNX")
                ops[stem] = _lower(fixed(graph, stem, program), weights, rows, options, directory)
                stored[stem] = program
    finally:
        weights.close()
        rows.close()
    result = compile_programs(directory, list(stored), versions, ROWS, progress)
    listed = Programs.model_validate(
        {"programs": stored, "placement": {int(v): placed for v, placed in result["placement"].items()}}
    )
    (directory / PROGRAMS).write_text(listed.model_dump_json(indent=1) + "\n")
    facts: dict[str, object] = {
        "htp_versions": list(versions),
        "not_on_npu_measured_at_build": _elsewhere(listed),
        "context_nodes_measured_at_build": result["contexts"],
        "compiler_peak_anonymous_bytes_measured": result["peak_anonymous"],
        "vendor_simulated": {
            "simulator": f"Qualcomm's simulator of SoC model {SOC}",
            "soc_model": SOC,
            "note": "an automotive part, a proxy for phones; ops without a cost are not counted",
            "programs": {stem: values for stem, values in result["estimates"].items() if values},
        },
    }
    files = sorted(p.name for p in directory.iterdir() if p.is_file())
    return Artefact(tuple(files), ops, facts)


def _elsewhere(listed: Programs) -> dict[str, dict[str, int]]:
    """`<compiled program>` -> op -> nodes that are not on the NPU, by choice (the embedding) or not."""
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
