"""The QNN compiler in a process of its own (see `system.subprocesses`).

It writes to standard output, a graph it cannot compile may end it, and where the vendor's simulator has run no context
binary can run any more. It imports no torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx

from ...errors import UserError
from ...system.memory_peak import PeakAnonymous
from ...system.reading import one_line
from ...system.subprocesses import ChildFailed, Progress, run_child, serve
from ...targets.qnn.context import compiled, session, units

SOC = "72"
"""The `soc_model` of the vendor's estimates: an automotive part."""


def compile_programs(
    directory: Path, stems: Sequence[str], versions: Sequence[int], rows: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Compile `<stem>.onnx` of `directory` for each HTP version into `<stem>.v<version>.onnx` and the binary beside it.

    rows: the file of the embedding's rows, which the compiled files point to as well. Returns `placement` (version ->
    program -> provider -> op -> nodes), `contexts` (version -> program -> context nodes), `estimates` (see `estimate`) and
    `peak_anonymous` (bytes, of the compiling process). Raises UserError if a program does not compile.
    """
    stage = "the compiler"

    def report(text: str) -> None:
        nonlocal stage
        stage = text
        progress(f"qnn: {text}")

    job = {"directory": str(directory), "stems": [*stems], "versions": [*versions], "rows": rows}
    try:
        return run_child(__name__, job, report)
    except ChildFailed as error:
        raise UserError(f"--format qnn: {stage}: the compiler {error}; leave this target out") from None


# ---- in the process of its own --------------------------------------------------------------------------------------


def _compile_job(job: dict[str, Any], say: Progress) -> dict[str, Any]:
    directory, stems, rows = Path(job["directory"]), list(job["stems"]), str(job["rows"])
    result: dict[str, Any] = {"placement": {}, "contexts": {}, "estimates": {}}
    with PeakAnonymous() as peak:
        for version in job["versions"]:
            result["placement"][str(version)] = {
                stem: _compile(directory / f"{stem}.onnx", int(version), say) for stem in stems
            }
            result["contexts"][str(version)] = {
                stem: _share_rows(directory / compiled(stem, int(version)), directory / f"{stem}.onnx", rows)
                for stem in stems
            }
        for stem in stems:
            say(f"{stem}: the vendor's simulator")
            result["estimates"][stem] = estimate(directory / f"{stem}.onnx")
    result["peak_anonymous"] = peak.bytes
    return result


def _compile(path: Path, version: int, say: Progress) -> dict[str, dict[str, int]]:
    """Write the compiled file and its context binary. Returns provider -> op -> nodes."""
    say(f"{path.stem}: context binary for HTP v{version}")
    config = _context(path.with_name(compiled(path.stem, version)))
    try:
        return units(session(path, {"htp_arch": str(version)}, config))
    except Exception as error:  # onnxruntime raises a dozen types that share no base
        raise UserError(
            f"--format qnn: {path.name} does not compile for HTP v{version} ({one_line(error)[-200:]}); "
            "choose another version, or leave this target out"
        ) from error


def _context(target: Path) -> dict[str, str]:
    return {"ep.context_enable": "1", "ep.context_embed_mode": "0", "ep.context_file_path": str(target)}


def _share_rows(target: Path, source: Path, rows: str) -> int:
    """Point the compiled file's copy of the embedding at the rows `source` points at. Returns its context nodes."""
    stored = {t.name: t for t in onnx.load(str(source), load_external_data=False).graph.initializer}
    model = onnx.load(str(target), load_external_data=False)
    for tensor in model.graph.initializer:
        there = stored.get(tensor.name)
        if there is not None and any(e.key == "location" and e.value == rows for e in there.external_data):
            tensor.CopyFrom(there)
    onnx.save(model, str(target))
    return context_nodes(model)


def context_nodes(model: onnx.ModelProto) -> int:
    """Context binaries a compiled model runs: more than one means a graph cut in parts."""
    return sum(n.op_type == "EPContext" for n in model.graph.node)


def estimate(path: Path, soc: str = SOC) -> dict[str, int]:
    """Latency and DDR traffic of a static ONNX as the vendor's simulator has them for `soc`; {} if it cuts the graph.

    Only for a process that runs nothing afterwards.

    microseconds with lower and upper bounds; ddr_fill_bytes and ddr_spill_bytes read and written; ops_without_cost: ops
    the simulator knows no cost of, so that the truth lies higher.
    """
    with tempfile.TemporaryDirectory() as folder:
        target, profile = Path(folder, "compiled.onnx"), Path(folder, "profile.csv")
        options = {
            "soc_model": soc,
            "profiling_level": "basic",
            "profiling_file_path": str(profile),
            "enable_htp_prepare_only": "1",
        }
        loaded = session(path, options, _context(target))
        del loaded  # the profile is whole when the session is gone
        if context_nodes(onnx.load(str(target), load_external_data=False)) != 1:
            return {}
        return read_profile(profile)


def read_profile(profile: Path) -> dict[str, int]:
    """The totals of a profiling CSV. Raises UserError where the vendor's simulator wrote none."""
    rows = [line.split(",") for line in profile.read_text().splitlines()[1:]] if profile.is_file() else []
    found = {row[6].strip(): int(row[2]) for row in rows if len(row) > 6 and row[2].strip().isdecimal()}
    time = "Simulated (Accelerator exec time us"
    fills = ("Input Fill", "Intermediate Fill", "Inter HTP Fill")
    spills = ("Output Spill", "Intermediate Spill", "Inter HTP Spill")
    try:
        return {
            "microseconds": found[f"{time})"],
            "microseconds_lower": found[f"{time} (lower estimate))"],
            "microseconds_upper": found[f"{time} (upper estimate))"],
            "ddr_fill_bytes": sum(found[n] for n in fills),
            "ddr_spill_bytes": sum(found[n] for n in spills),
            "ops_without_cost": found.get("Missing Ops (Number of Ops with no Costs associated)", 0),
        }
    except KeyError as error:
        raise UserError(f"the vendor's simulator gave no {error}; is onnxruntime-qnn 2.7 installed?") from None


if __name__ == "__main__":
    serve(_compile_job)
