"""The main job, top to bottom: load, plan, quantize, lower, verify, write the bundle. All rooms enter."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from . import __version__, backends
from .allocation import Alone
from .bundle import (
    CHECKPOINT,
    EXAMPLES,
    Bundle,
    GraphSpec,
    Manifest,
    TargetEntry,
    TunedNorms,
    hash_files,
    sha256,
    write_manifest,
)
from .checkpoint import Checkpoint, open_checkpoint
from .errors import UserError, VerificationFailure
from .exporters import require_kv_cache
from .exporters.artefact import Artefact, Options
from .layerwise import CodeStore, load_rounded, quantize_layerwise
from .lowering import lower, lower_apart
from .memory import PeakAnonymous, anonymous_bytes, available_bytes, limited, require_available
from .models import build
from .models.kv_cache import stored_as
from .models.module import is_factory
from .module_checkpoint import open_model
from .planning import Planned, plan
from .quant.plan import BitPlan
from .quant.stream import quantize_checkpoint
from .quant.tensor import QuantizedTensor
from .request import Progress, Request
from .tuning import enough, tune_norms, tuning_bytes
from .unfinished import WORK, Unfinished
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
    require_kv_cache(request.formats, request.kv_cache)
    limit, now = request.memory_limit, anonymous_bytes()
    if limit is not None and now >= limit:
        raise UserError(
            f"--memory-limit {limit / 2**30:.2f} GiB is too little: {now / 2**30:.2f} GiB are taken before any work"
        )
    checkpoint = open_model(request.model)
    with limited(request.memory_limit), PeakAnonymous(request.memory_limit) as peak:
        run = Unfinished(output, _job(request, checkpoint))
        for other in run.others():
            progress(f"{other} is left from another run; remove it if it is not wanted")
        try:
            planned = _plan(request, checkpoint, run, progress)
            stored_as(planned.model.graphs(), request.kv_cache)  # a model without a cache is refused now
            _refuse_too_large(planned, check)
            manifest, costs = _write(planned, request, run, progress)
            report = None
            if check:
                report = verify(run.path, progress=progress)
                _judge(report, output, strict)
                costed = {"costs": {name: asdict(cost) for name, cost in costs.items()}}
                Bundle(run.path, manifest).write_report("export", report.to_json() | costed)
            run.publish()
        except BaseException as error:
            over = peak.over and isinstance(error, KeyboardInterrupt | SystemExit)
            if isinstance(error, VerificationFailure):
                for name in request.formats:  # a target that fails its check is lowered anew
                    run.forget(name)
            kept = run.worth_keeping() and not over
            if kept:
                run.leave()
            else:
                run.discard()
            said: BaseException = error
            if over:
                said = UserError(
                    f"this takes more than --memory-limit {(request.memory_limit or 0) / 2**30:.2f} GiB "
                    f"({peak.bytes / 2**30:.2f} GiB were reached); give more, or ask for one --format at a time"
                )
            elif isinstance(error, OSError):
                said = UserError(f"{output} cannot be written ({one_line(error)})")
            if kept:
                said.add_note(f"what is done is kept in {run.path}: the same command goes on from there")
            if said is error:
                raise
            raise said from error
    return Exported(output, planned, manifest, report, peak.bytes, costs)


def _refuse_too_large(planned: Planned, check: bool) -> None:
    """Refuse before hours of work what memory cannot hold: the lowering of each target, and the check. Raises UserError."""
    stored = {f: planned.true_bytes(f) for f in planned.formats}
    for name, size in stored.items():
        require_available(
            backends.BACKENDS[name].peak_bytes(size) - anonymous_bytes(),
            f"--format {name}: its library takes memory",
            "leave this target out, or give more",
        )
    if check:
        require_memory(planned.weights, stored, original=False)


def _job(request: Request, checkpoint: Checkpoint) -> dict[str, Any]:
    """All that decides the bytes of a bundle. A file of the request counts by what is in it."""
    job = {key: value for key, value in vars(request).items() if key not in ("plan", "workers")}
    for key in ("calibration", "task"):
        if job[key] is not None and job[key].is_file():
            job[key] = sha256(job[key])
    return {
        "request": json.loads(json.dumps(job, default=str)),
        "plan": request.plan.digest() if request.plan is not None else None,
        "fingerprint": checkpoint.fingerprint(),
        "tools": _tools(request.formats),
    }


def _plan(request: Request, checkpoint: Checkpoint, run: Unfinished, progress: Progress) -> Planned:
    """The plan, or the one that an earlier run of this job made. Both calibrate with the threads of the first."""
    threads = run.found("threads")
    if threads is None:
        run.finish("threads", {"count": torch.get_num_threads()})
    else:
        progress(f"going on with the unfinished run in {run.path}")
        torch.set_num_threads(int(threads["count"]))
    kept = run.found("plan")
    if kept is not None:
        planned = plan(replace(request, plan=BitPlan.from_json(kept["plan"])), progress, checkpoint)
    else:
        planned = plan(request, progress, checkpoint)
        run.finish("plan", {"plan": planned.plan.to_json()})
    return planned


def _quantize(planned: Planned, request: Request, run: Unfinished, progress: Progress) -> None:
    """The quantized checkpoint, unless an earlier run made it."""
    directory = run.path / CHECKPOINT
    if run.found("checkpoint") is not None:
        progress("quantized already")
        return
    ready, norms = None, {}
    if planned.plan.calibration is not None:
        tuning = request.norms == "tuned" and _tuning_fits(planned, run, progress)
        store = CodeStore(run.work / "codes")
        entries = planned.plan.entries
        left = quantize_layerwise(
            planned.checkpoint,
            build(planned.config),
            planned.plan,
            planned.generation,
            planned.samples,
            planned.examples,
            store,
            progress,
            request.workers,
        )
        if left:
            progress(f"gptq: the calibration data do not reach {len(left)} weights ({left[0]}): rounded to nearest")
            rounded = {n: replace(entries[n], quantizer="rtn") for n in left}
            planned.plan = replace(planned.plan, entries=entries | rounded)
        norms = _tuned(planned, run, store, progress) if tuning else {}
        shapes = {w.name: w.shape for u in planned.units for w in u.weights}

        def ready(name: str) -> QuantizedTensor | None:
            return store.read(name, shapes[name], planned.plan.entries[name])

    told = -1

    def count(name: str, done: int, total: int) -> None:
        nonlocal told
        tenth = 10 * done // max(1, total)
        if tenth > told:  # a line for every tenth, not for every tensor
            told = tenth
            progress(f"quantizing: {10 * tenth}% ({name})")

    run.fresh_folder(CHECKPOINT)
    tied = planned.model.tied
    quantize_checkpoint(planned.checkpoint, planned.plan, tied, directory, planned.other, count, ready, norms)
    # The planned config: a rehearsal's has fewer layers than the source.
    (directory / "config.json").write_text(json.dumps(planned.config, indent=1, sort_keys=True) + "\n")
    if planned.examples:
        named = {f"{i}.{g}.{n}": v.contiguous() for i, (g, e) in enumerate(planned.examples) for n, v in e.items()}
        safetensors.torch.save_file(named, directory / EXAMPLES)
    run.finish("checkpoint", {})


def _tuning_fits(planned: Planned, run: Unfinished, progress: Progress) -> bool:
    """Whether norms can be tuned in the memory there is; decided once, so that a killed run ends as it would have."""
    if not enough(planned.samples):
        progress("norms: kept, as there are too few calibration data to tune them on")
        return False
    found = run.found("tuning")
    if found is None:
        needed = tuning_bytes(planned.model, planned.generation, planned.samples)
        available = available_bytes()
        found = {"fits": needed <= available}
        if not found["fits"]:
            progress(
                f"norms: kept, as tuning them would take about {needed / 2**30:.1f} GiB of the "
                f"{available / 2**30:.1f} there are"
            )
        run.finish("tuning", found)
    return bool(found["fits"])


def _tuned(planned: Planned, run: Unfinished, store: CodeStore, progress: Progress) -> dict[str, torch.Tensor]:
    """Norms tuned to the finished codes, by stored name; those of an earlier run if there are any."""
    file = run.work / "norms.safetensors"
    if run.found("norms") is None:
        require_available(
            tuning_bytes(planned.model, planned.generation, planned.samples),
            "tuning norms takes memory",
            "free some, and give the same command again",
        )
        model = build(planned.config)
        load_rounded(model, planned.checkpoint, planned.plan, store)
        made = tune_norms(model, planned.checkpoint, planned.config, planned.generation, planned.samples, progress)
        values, facts = ({}, {}) if made is None else (made.values, made.facts())
        safetensors.torch.save_file(values, file)
        run.finish("norms", facts)
    return safetensors.torch.load_file(file)


def _write(planned: Planned, request: Request, run: Unfinished, progress: Progress) -> tuple[Manifest, dict[str, Cost]]:
    """Quantized checkpoint, artefacts, tokenizer and manifest into the run's folder; what is there whole is kept."""
    _quantize(planned, request, run, progress)
    folder, checkpoint_dir = run.path, run.path / CHECKPOINT
    if (checkpoint_dir / "tokenizer.json").exists():
        shutil.copyfile(checkpoint_dir / "tokenizer.json", folder / "tokenizer.json")
    fingerprint = planned.checkpoint.fingerprint()
    planned.checkpoint = open_checkpoint(str(checkpoint_dir))  # the source is done with: a GGUF's vocabulary is large
    gc.collect()
    targets: list[TargetEntry] = []
    costs: dict[str, Cost] = {}
    prompts = tuple(tuple(p) for p in planned.prompts)
    options = Options(
        planned.generation.max_context, request.sms, request.htp, request.ethos_u, prompts, request.kv_cache
    )
    for name in request.formats:
        made, costs[name] = _lower(name, request, run, options, progress)
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
        graphs=tuple(GraphSpec.of(g) for g in stored_as(planned.model.graphs(), request.kv_cache)),
        generation=planned.generation,
        average_bits=planned.plan.average_bits,
        weights=planned.weights,
        targets=tuple(targets),
        prompts=prompts,
        contexts=tuple(tuple(c) for c in planned.contexts),
        kv_cache=request.kv_cache,
        tuned_norms=TunedNorms(**norms) if (norms := run.found("norms")) else None,
        files=hash_files(folder, WORK),
        tools=_tools(request.formats),
    )
    write_manifest(folder, manifest)
    return manifest, costs


def _lower(name: str, request: Request, run: Unfinished, options: Options, progress: Progress) -> tuple[Artefact, Cost]:
    """One target's artefact, unless an earlier run made it."""
    found = run.found(name)
    if found is not None:
        progress(f"{name}: lowered already")
        return Artefact(tuple(found["files"]), found["ops"], found["facts"]), Cost(**found["cost"])
    folder = run.fresh_folder(name)
    start = time.perf_counter()
    with PeakAnonymous() as peak:
        if len(request.formats) == 1:
            made = lower(name, run.path / CHECKPOINT, folder, options, progress)
        else:
            code = request.model if is_factory(request.model) else None
            made = lower_apart(name, run.path / CHECKPOINT, folder, options, progress, code)
    cost = Cost(time.perf_counter() - start, peak.bytes)
    run.finish(name, asdict(made) | {"cost": asdict(cost)})
    return made, cost


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
