"""The main job, top to bottom: load, plan, quantize, lower, verify, write the bundle. All rooms enter."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch

from . import __version__, backends
from .bundle import (
    CHECKPOINT,
    EXAMPLES,
    Bundle,
    GraphSpec,
    Manifest,
    TargetEntry,
    hash_files,
    write_manifest,
)
from .checkpoint import open_checkpoint
from .errors import UserError, VerificationFailure
from .exporters.artefact import Options
from .lowering import lower, lower_apart
from .memory import PeakAnonymous
from .models.module import is_factory
from .planning import Alone, Planned, Progress, Request, plan
from .quant.stream import quantize_checkpoint
from .untrusted import one_line
from .verdict import Report, require, require_placement
from .verification import require_memory, verify

__all__ = ["Alone", "Cost", "Exported", "Planned", "Request", "export", "plan"]


@dataclass(frozen=True)
class Cost:
    """What lowering one target took: seconds, and the peak anonymous memory of this process and its children, in bytes."""

    seconds: float
    peak_anonymous: int


@dataclass
class Exported:
    """A finished export. costs: format -> what its lowering took (measured)."""

    path: Path
    planned: Planned
    manifest: Manifest
    report: Report | None
    peak_anonymous: int
    costs: dict[str, Cost]


def export(
    request: Request, output: Path, check: bool = True, progress: Progress = lambda _: None, strict: bool = False
) -> Exported:
    """Compile a model into a bundle at `output`, which must not exist; it appears when whole.

    check: reload every artefact and compare it with the reference; a mismatch raises VerificationFailure and leaves no
    bundle. strict: so does an op that fell back to another unit. Raises UserError for anything the user can mend.
    """
    _refuse_existing(output)
    for name in request.formats:
        backends.require(name)  # a missing library is refused before any work
    with PeakAnonymous() as peak:
        planned = plan(request, progress)
        if check:
            require_memory(planned.weights, {f: planned.true_bytes(f) for f in planned.formats}, original=False)
        partial = _partial(output)
        try:
            manifest, costs = _write(planned, request, partial, progress)
            report = None
            if check:
                report = verify(partial, progress=progress)
                _judge(report, output, strict)
                costed = {"costs": {name: asdict(cost) for name, cost in costs.items()}}
                Bundle(partial, manifest).write_report("export", report.to_json() | costed)
            partial.chmod(0o755)
            partial.rename(output)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{output} cannot be written ({one_line(error)})") from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return Exported(output, planned, manifest, report, peak.bytes, costs)


def _write(planned: Planned, request: Request, folder: Path, progress: Progress) -> tuple[Manifest, dict[str, Cost]]:
    """Quantized checkpoint, artefacts, tokenizer and manifest into `folder`."""
    checkpoint_dir = folder / CHECKPOINT
    checkpoint_dir.mkdir()

    told = -1

    def count(name: str, done: int, total: int) -> None:
        nonlocal told
        tenth = 10 * done // max(1, total)
        if tenth > told:  # a line for every tenth, not for every tensor
            told = tenth
            progress(f"quantizing: {10 * tenth}% ({name})")

    quantize_checkpoint(planned.checkpoint, planned.plan, planned.model.tied, checkpoint_dir, planned.other, count)
    # The planned config: a rehearsal's has fewer layers than the source.
    (checkpoint_dir / "config.json").write_text(json.dumps(planned.config, indent=1, sort_keys=True) + "\n")
    if (checkpoint_dir / "tokenizer.json").exists():
        shutil.copyfile(checkpoint_dir / "tokenizer.json", folder / "tokenizer.json")

    if planned.examples:
        named = {f"{i}.{g}.{n}": v.contiguous() for i, (g, e) in enumerate(planned.examples) for n, v in e.items()}
        safetensors.torch.save_file(named, checkpoint_dir / EXAMPLES)
    fingerprint = planned.checkpoint.fingerprint()
    planned.checkpoint = open_checkpoint(str(checkpoint_dir))  # the source is done with: a GGUF's vocabulary is large
    gc.collect()
    targets: list[TargetEntry] = []
    costs: dict[str, Cost] = {}
    prompts = tuple(tuple(p) for p in planned.prompts)
    options = Options(planned.generation.max_context, request.sms, request.htp, request.ethos_u, prompts)
    for name in request.formats:
        (folder / name).mkdir()
        start = time.perf_counter()
        with PeakAnonymous() as peak:
            if len(request.formats) == 1:
                made = lower(name, checkpoint_dir, folder / name, options, progress)
            else:
                code = request.model if is_factory(request.model) else None
                made = lower_apart(name, checkpoint_dir, folder / name, options, progress, code)
        costs[name] = Cost(time.perf_counter() - start, peak.bytes)
        targets.append(
            TargetEntry(
                format=name,
                files=tuple(f"{name}/{f}" for f in made.files),
                ops=made.ops,
                facts=made.facts,
                stored_bytes=planned.true_bytes(name),
                ideal_bytes=planned.ideal_bytes(name),
            )
        )
    progress("hashing")
    manifest = Manifest(
        source=_source_name(request.model),
        source_fingerprint=fingerprint,
        model_type=str(planned.config["model_type"]),
        graphs=tuple(GraphSpec.of(g) for g in planned.model.graphs()),
        generation=planned.generation,
        average_bits=planned.plan.average_bits,
        weights=planned.weights,
        targets=tuple(targets),
        prompts=prompts,
        contexts=tuple(tuple(c) for c in planned.contexts),
        files=hash_files(folder),
        tools=_tools(request.formats),
    )
    write_manifest(folder, manifest)
    return manifest, costs


def _judge(report: Report, output: Path, strict: bool) -> None:
    """Raise VerificationFailure if a target does not match; the report stays beside where the bundle would have been."""
    try:
        require(report)
        if strict:
            require_placement(report)
    except VerificationFailure:
        left = output.with_name(f"{output.name}.verification.json")
        left.write_text(json.dumps(report.to_json(), indent=1) + "\n")
        raise


def _refuse_existing(output: Path) -> None:
    try:
        found = output.exists() or output.is_symlink()
        parent = next((p for p in output.absolute().parents if p.exists()), output)
        usable = parent.is_dir() and os.access(parent, os.W_OK)
    except OSError as error:
        raise UserError(f"{one_line(output)} cannot be made ({error.strerror}); choose another -o") from None
    if found:
        raise UserError(f"{output} exists already; remove it or choose another -o")
    if not usable:
        raise UserError(f"{output} cannot be made ({parent} is no folder to write in); choose another -o")


def _partial(output: Path) -> Path:
    """A new folder beside `output` that is renamed to it once it is whole. Raises UserError if the disk refuses."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{output.name[:64]}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise UserError(f"{output} cannot be made ({error.strerror}); choose another -o") from None


def _source_name(model: str) -> str:
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _tools(formats: tuple[str, ...]) -> dict[str, str]:
    packages = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
    tools = {"edgewright": __version__} | {p: importlib.metadata.version(p) for p in packages}
    for name in formats:
        distribution, _, version = (backends.BACKENDS[name].version or f"{name} unknown").partition(" ")
        tools[distribution] = version
    return tools
