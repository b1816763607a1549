"""The bundle's folder: artefacts, tokenizer and manifest."""

from __future__ import annotations

import gc
import importlib.metadata
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import __version__
from ..bundle import (
    CHECKPOINT,
    GraphSpec,
    Manifest,
    TargetEntry,
    TunedNorms,
    hash_files,
    write_manifest,
)
from ..checkpoints.opening import open_checkpoint
from ..exporters.artefact import Artefact, Options
from ..models.kv_cache import stored_as
from ..models.user_module.module import is_factory
from ..system.memory import PeakAnonymous
from ..system.resumable import WORK, ResumableExport
from ..targets import libraries
from .lower import lower, lower_apart
from .planned import Planned
from .quantize import _quantize
from .request import Progress, Request


@dataclass(frozen=True)
class Cost:
    """What lowering one target took: seconds, and the peak anonymous memory of this process and its children, in bytes."""

    seconds: float
    peak_anonymous: int


def _write(
    planned: Planned, request: Request, run: ResumableExport, progress: Progress
) -> tuple[Manifest, dict[str, Cost]]:
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


def _lower(
    name: str, request: Request, run: ResumableExport, options: Options, progress: Progress
) -> tuple[Artefact, Cost]:
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


def _source_name(model: str) -> str:
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _tools(formats: tuple[str, ...]) -> dict[str, str]:
    packages = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
    tools = {"edgewright": __version__} | {p: importlib.metadata.version(p) for p in packages}
    for name in formats:
        distribution, _, version = (libraries.BACKENDS[name].version or f"{name} unknown").partition(" ")
        tools[distribution] = version
    return tools
