"""Every artefact against its reference, and the reference against the original weights. All rooms may enter.

Two losses that are never mixed: the lowering error (artefact against the eager reference on the same dequantized
weights, float32 activations; must be tiny) and the quantization loss (dequantized against original weights). What int8
or float16 activations add on top is reported apart. The weights in an artefact's files are the checkpoint's to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..bundle import CHECKPOINT, Bundle, Generation, TargetEntry
from ..calibration.prompts import Passage, read_task, text_passages
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.opening import open_checkpoint
from ..errors import UserError, VerificationFailure
from ..exporters.registry import exporter
from ..models.kv_cache import stored_as
from ..models.loading import CODES, load_dequantized, load_original, quantized_parts
from ..models.registry import build, stored_name
from ..models.user_module.checkpoint import open_model
from ..ops.quantized import dequantize
from ..runtimes.eager import EagerSession, Int8Session
from ..runtimes.registry import open_exact, open_session
from ..runtimes.session import Joined, PlacedSession, Session
from ..system.memory import require_available
from ..system.reading import one_line
from ..targets.registry import TARGETS
from .compare import Probe, probe_of, score_text, task_accuracy
from .report import Report, TargetReport, TextScore

TEXT_WINDOWS = 16
"""Windows of a text that are scored unless another number is asked for."""


def verify(
    path: str | Path,
    model: str | None = None,
    task: Path | None = None,
    text: Path | None = None,
    task_limit: int | None = None,
    threads: int = 0,
    progress: Callable[[str], None] = lambda _: None,
    formats: Sequence[str] = (),
    text_windows: int = TEXT_WINDOWS,
) -> Report:
    """Check a bundle: hashes, then each artefact reloaded from disk and compared, then the quantization loss.

    model: the original checkpoint, for the quantization loss. task: a task file, text: a text file, measured on the
    artefact as shipped and, with `model`, on the original; of the text the first `text_windows` windows, on which the
    artefacts' next-token distributions are compared with the original's, or without one the reference's. formats: the
    targets to check; without, all whose library is here, and a note for each that is left out. Raises VerificationFailure
    for a damaged file, UserError for bad arguments; a failed comparison is in the report.
    """
    bundle = Bundle.open(path)
    progress("checking file hashes")
    bundle.check_files()
    quantized = open_checkpoint(str(bundle.path / CHECKPOINT))
    original = _original(bundle, model)
    manifest, spec = bundle.manifest, bundle.manifest.generation
    if spec.task == "module" and (task is not None or text is not None):
        raise UserError("--task and --text need a model that generates; this bundle's graphs are run as they are")
    examples = read_task(task, task_limit, spec.task == "memory") if task is not None else None
    passages = _passages(text, quantized, spec, text_windows)
    probe = probe_of(bundle)

    require_memory(manifest.weights, {t.format: t.stored_bytes for t in manifest.targets}, original is not None)
    progress("reference: dequantized weights in float32")
    built = build(quantized.config)
    load_dequantized(built, quantized)
    graphs = stored_as(built.graphs(), manifest.kv_cache)
    reference = EagerSession(graphs)
    linears = {n.removesuffix(CODES) for n in quantized.names() if n.endswith(CODES)}
    linears |= {alias for alias, name in built.tied.items() if name in linears}
    rounded = Int8Session(graphs, linears)
    plain = EagerSession(built.graphs()) if manifest.kv_cache != "float32" else None
    report = Report(targets=[])
    before = None
    if original is not None:
        progress("original weights in float32")
        before = _eager(quantized.config, original, load_original)
    for entry in _asked(bundle, formats, report):
        target, shipped = _target(bundle, entry, quantized, (reference, rounded, plain), probe, threads, progress)
        if TARGETS[entry.format].emulated_prompts is not None and (examples is not None or passages):
            report.notes.append(f"{entry.format}: task accuracy and text are not measured in an emulator")
            report.targets.append(target)
            continue
        if examples is not None:
            progress(f"{entry.format}: {len(examples.prompts)} task prompts")
            target.task_accuracy = task_accuracy(shipped, bundle, examples)
        if passages:
            progress(f"{entry.format}: {len(passages)} windows of text")
            target.text = _text_score(report, before, reference, shipped, spec, passages)
        report.targets.append(target)
    if before is not None:
        progress("quantization loss: the dequantized against the original weights")
        (report.quantization,) = probe.compare(before, [reference])
        if examples is not None:
            report.original_task_accuracy = task_accuracy(before, bundle, examples)
    report.task_size = len(examples.prompts) if examples is not None else 0
    return report


def _asked(bundle: Bundle, formats: Sequence[str], report: Report) -> list[TargetEntry]:
    """The targets to check. Raises UserError if one was asked for that is not there, or none can be checked here."""
    if formats:
        return [bundle.target(name) for name in dict.fromkeys(formats)]
    entries = [e for e in bundle.manifest.targets if e.format in TARGETS and TARGETS[e.format].installed]
    for entry in bundle.manifest.targets:
        if entry not in entries:
            known = TARGETS.get(entry.format)
            way = known.install if known is not None else "this edgewright does not know it"
            report.notes.append(f"{entry.format} was not checked here: {way}")
    if not entries:
        raise UserError(f"{bundle.path}: none of its targets can be checked here; {report.notes[0]}")
    return entries


def _target(
    bundle: Bundle,
    entry: TargetEntry,
    quantized: Checkpoint,
    references: tuple[EagerSession, Int8Session, EagerSession | None],
    probe: Probe,
    threads: int,
    progress: Callable[[str], None],
) -> tuple[TargetReport, PlacedSession]:
    """One artefact: its weights read back, then run against the reference with float32 activations and as it ships.

    references: the reference, the same with int8 activations, which is compared too where a runtime has no others, and, where
    the KV caches are int8, the same with float caches: what the rounding of the caches costs.
    """
    reference, rounded, plain = references
    progress(f"{entry.format}: reading its weights back")
    weights, wrong = 0, None
    try:
        weights = check_weights(bundle, entry.format, quantized)
    except VerificationFailure as error:
        wrong = str(error)
    probe = probe.first(TARGETS[entry.format].emulated_prompts)
    progress(f"{entry.format}: reloading, comparing on {probe.what}")
    shipped = open_session(bundle, entry.format, threads)
    exact = open_exact(bundle, entry.format, threads)
    sessions = [shipped] if exact is None else [exact, shipped]
    part = TARGETS[entry.format].graphs
    compared: list[Session] = [Joined(s, part, reference) for s in sessions] if part else [*sessions]
    beside = rounded if exact is None and shipped.activations == "int8" else plain
    found = probe.compare(reference, [*compared, *([] if beside is None else [beside])])
    arithmetic = None if beside is None else found.pop()
    target = TargetReport(
        entry.format,
        sessions[0].activations,
        found[0],
        found[-1],
        shipped.placement(),
        entry.stored_bytes,
        entry.ideal_bytes,
        shipped.how,
        weights,
        sum((bundle.path / f).stat().st_size for f in entry.files),
        wrong,
        arithmetic,
        exact is not None and exact.stand_in and not shipped.stand_in,
    )
    return target, shipped


def check_weights(bundle: Bundle, format: str, quantized: Checkpoint) -> int:
    """Compare every quantized weight in an artefact's files with the checkpoint's, to the bit; returns how many.

    Raises VerificationFailure for one that differs or is missing, UserError for files that cannot be read.
    """
    try:
        return _check_weights(bundle, format, quantized)
    except (UserError, VerificationFailure):
        raise
    except Exception as error:  # the formats' readers raise types that share no base
        reason = one_line(error)[:200]
        raise UserError(f"{bundle.path}: the {format} artefact does not load ({reason}); export again") from error


def _check_weights(bundle: Bundle, format: str, quantized: Checkpoint) -> int:
    model = build(quantized.config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    held = {n for g in model.graphs() if g.name in TARGETS[format].graphs for n in g.parameters()}
    stored = (n.removesuffix(CODES) for n in quantized.names() if n.endswith(CODES))
    wanted = {n for n in stored if n in held or not TARGETS[format].graphs}
    seen: set[str] = set()
    for found, values in exporter(format).read_weights(bundle.path / format):
        name = stored_name(model, found)
        if quantized.has(name):
            continue  # kept at 16 bits, in whatever float type the target has
        if name not in wanted:
            raise VerificationFailure(
                f"{format}: the artefact holds a weight {one_line(found, 120)} that the plan has not"
            )
        if not torch.equal(values, dequantize(*quantized_parts(quantized, name, shapes[name]))):
            raise VerificationFailure(f"{format}: {name} in the artefact's files is not the checkpoint's to the bit")
        seen.add(name)
    if wanted - seen:
        raise VerificationFailure(f"{format}: {min(wanted - seen)} is not in the artefact's files")
    return len(seen)


def require_memory(weights: int, stored: Mapping[str, int], original: bool) -> None:
    """Refuse before hours of work: the reference is dequantized to float32, and an artefact is loaded twice beside it.

    With `original` the original's float32 weights come on top. Raises UserError.
    """
    held = [2 * size + TARGETS[target].stand_in_bytes * weights for target, size in stored.items()]
    needed = (8 if original else 4) * weights + max(held, default=0)
    require_available(
        needed, "verifying this model takes memory", "export with --no-verify and verify on a larger machine"
    )


def _original(bundle: Bundle, model: str | None) -> Checkpoint | None:
    if model is None:
        return None
    original = open_model(model)
    if original.fingerprint() != bundle.manifest.source_fingerprint:
        raise UserError(f"{model} is not the checkpoint this bundle was made from ({bundle.manifest.source})")
    return original


def _passages(text: Path | None, quantized: Checkpoint, spec: Generation, count: int) -> list[Passage]:
    if text is None:
        return []
    if quantized.tokenizer is None:
        raise UserError("--text needs a tokenizer, and the bundle has none")
    return text_passages(text, quantized.tokenizer, spec, count)


def _text_score(
    report: Report,
    before: EagerSession | None,
    reference: EagerSession,
    shipped: PlacedSession,
    spec: Generation,
    passages: Sequence[Passage],
) -> TextScore:
    """The artefact's score beside the original's, or the reference's; what they score themselves goes into the report."""
    base = before if before is not None else reference
    besides = [reference] if before is not None and report.dequantized_text is None else []
    own, *others = score_text(base, [*besides, shipped], spec, passages)
    if before is not None:
        report.original_text, report.text_against = own, "original"
        if besides:
            report.dequantized_text = others[0]
    else:
        report.dequantized_text, report.text_against = own, "dequantized"
    report.text_windows, report.text_positions = len(passages), sum(len(p.scored) for p in passages)
    return others[-1]


def _eager(config: dict[str, Any], checkpoint: Checkpoint, load: Callable[[Any, Checkpoint], None]) -> EagerSession:
    model = build(config)
    load(model, checkpoint)
    return EagerSession(model.graphs())
