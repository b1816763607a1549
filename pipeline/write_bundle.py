"""The bundle's folder: artefacts, tokenizer and manifest."""

from __future__ import annotations

import importlib.metadata
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ..bundle import (
    CHECKPOINT,
    GraphSpec,
    Manifest,
    TargetEntry,
    TunedNorms,
    hash_files,
    write_manifest,
)
from ..exporters.artefact import Artefact, Options
from ..models.kv_cache import stored_as
from ..models.user_module.module import is_factory
from ..system.memory_peak import PeakAnonymous
from ..system.resumable import WORK, ResumableExport
from ..system.version import __version__
from ..targets.registry import TARGETS
from .genai_config import GRAPH, write_genai_config
from .lower import lower, lower_apart
from .planned import Planned
from .request import Progress, Request


@dataclass(frozen=True)
class Cost:
    """What lowering one target took: seconds, and the peak anonymous memory of this process and its children, in bytes."""

    seconds: float
    peak_anonymous: int


@dataclass(frozen=True)
class Lowered:
    """One target's artefact and what it cost."""

    artefact: Artefact
    cost: Cost


def lower_targets(planned: Planned, request: Request, run: ResumableExport, progress: Progress) -> dict[str, Lowered]:
    """Every target's artefact in the run's folder, by target; those of an earlier run are kept."""
    prompts = tuple(tuple(p) for p in planned.prompts)
    asked = request.targets
    length = planned.generation.max_context
    options = {name: Options(length, asked.choices(name), prompts, asked.kv_cache) for name in request.formats}
    return {name: _lower(name, request, run, options[name], progress) for name in request.formats}


def write_bundle(
    planned: Planned, request: Request, run: ResumableExport, lowered: dict[str, Lowered], progress: Progress
) -> Manifest:
    """Tokenizer and manifest, beside the quantized checkpoint and the artefacts."""
    folder = run.path
    tokenizer = folder / CHECKPOINT / "tokenizer.json"
    if tokenizer.exists():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
    graphs = tuple(GraphSpec.of(g) for g in stored_as(planned.model.graphs(), request.targets.kv_cache))
    if (folder / "onnx" / GRAPH).exists():
        write_genai_config(folder, graphs[0], planned.generation)
    progress("hashing")
    norms = run.finished("norms")
    manifest = Manifest(
        source=_source_name(request),
        source_fingerprint=planned.fingerprint,
        model_type=str(planned.config["model_type"]),
        graphs=graphs,
        generation=planned.generation,
        average_bits=planned.plan.average_bits,
        weights=planned.weights,
        targets=tuple(_entry(planned, name, made.artefact) for name, made in lowered.items()),
        prompts=tuple(tuple(p) for p in planned.prompts),
        contexts=tuple(tuple(c) for c in planned.contexts),
        kv_cache=request.targets.kv_cache,
        tuned_norms=TunedNorms(**norms) if norms else None,
        files=hash_files(folder, WORK),
        tools=tool_versions(request.formats),
    )
    write_manifest(folder, manifest)
    return manifest


def _entry(planned: Planned, name: str, artefact: Artefact) -> TargetEntry:
    return TargetEntry(
        format=name,
        files=tuple(f"{name}/{file}" for file in artefact.files),
        ops=artefact.ops,
        facts=artefact.facts,
        stored_bytes=planned.true_bytes(name),
        ideal_bytes=planned.ideal_bytes(name),
    )


def _lower(name: str, request: Request, run: ResumableExport, options: Options, progress: Progress) -> Lowered:
    """One target's artefact, unless an earlier run made it."""
    finished = run.finished(name)
    if finished is not None:
        progress(f"{name}: lowered already")
        return Lowered(Artefact(tuple(finished["files"]), finished["ops"], finished["facts"]), Cost(**finished["cost"]))
    folder = run.fresh_folder(name)
    start = time.perf_counter()
    with PeakAnonymous() as peak:
        if len(request.formats) == 1:
            artefact = lower(name, run.path / CHECKPOINT, folder, options, progress)
        else:
            code = request.model if is_factory(request.model) else None
            artefact = lower_apart(name, run.path / CHECKPOINT, folder, options, progress, code)
    cost = Cost(time.perf_counter() - start, peak.bytes)
    run.finish(name, asdict(artefact) | {"cost": asdict(cost)})
    return Lowered(artefact, cost)


def _source_name(request: Request) -> str:
    path = Path(request.model).expanduser()
    name = path.resolve().name if path.exists() else request.model
    if request.adapter is None:
        return name
    return f"{name} with the adapter {Path(request.adapter).expanduser().resolve().name}"


def tool_versions(formats: tuple[str, ...]) -> dict[str, str]:
    """The versions of the libraries that decide the bytes of a bundle, by distribution."""
    packages = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
    tools = {"edgewright": __version__} | {p: importlib.metadata.version(p) for p in packages}
    for name in formats:
        distribution, _, version = (TARGETS[name].version or f"{name} unknown").partition(" ")
        tools[distribution] = version
    return tools
