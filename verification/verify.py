"""A bundle checked: every artefact against its reference, and the reference against the original weights.

Two losses that are never mixed: the lowering error (`lowering`) must be tiny; the quantization loss (`quality`) is what fewer
bits cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..bundle import CHECKPOINT, Bundle, TargetEntry
from ..checkpoints.opening import open_checkpoint
from ..errors import UserError
from ..system.memory import require_available
from ..targets.registry import TARGETS
from .compare import probe_of
from .lowering import References, compare_artefact
from .quality import Quality, QualityData, load_original_session, open_original
from .report import Report, TargetReport

TEXT_WINDOWS = 16
"""Windows of a text that are scored unless another number is asked for."""


@dataclass(frozen=True)
class VerifyOptions:
    """What is checked, and what quality is measured on.

    model: the original checkpoint, for the quantization loss. task: a task file, of which the first `task_limit` lines count.
    text: a text file, of which the first `text_windows` windows are scored: next-token distributions are compared with the
    original's, or without `model` with the reference's. formats: the targets to check; without, all whose library is
    installed. threads: of the runtimes; 0 is all cores.
    """

    model: str | None = None
    task: Path | None = None
    task_limit: int | None = None
    text: Path | None = None
    text_windows: int = TEXT_WINDOWS
    formats: Sequence[str] = ()
    threads: int = 0


def verify(
    path: str | Path, options: VerifyOptions | None = None, progress: Callable[[str], None] = lambda _: None
) -> Report:
    """Check a bundle: hashes, then each artefact reloaded from disk and compared, then the quantization loss.

    Raises VerificationFailure for a damaged file, UserError for bad options. A comparison that fails is in the report, as is
    a note for each target that is left out.
    """
    options = options or VerifyOptions()
    bundle = Bundle.open(path)
    progress("checking file hashes")
    bundle.check_files()
    manifest = bundle.manifest
    quantized = open_checkpoint(str(bundle.path / CHECKPOINT))
    original = None if options.model is None else open_original(bundle, options.model)
    data = QualityData.read(bundle, quantized, options.task, options.task_limit, options.text, options.text_windows)
    probe = probe_of(bundle)
    require_memory(manifest.weights, {t.format: t.stored_bytes for t in manifest.targets}, original is not None)

    progress("reference: dequantized weights in float32")
    references = References.load(bundle, quantized)
    before = None
    if original is not None:
        progress("original weights in float32")
        before = load_original_session(quantized, original)
    quality = Quality(bundle, data, references.exact, before, progress)

    targets: list[TargetReport] = []
    entries, notes = _entries(bundle, options.formats)
    for entry in entries:
        emulated_prompts = TARGETS[entry.format].emulated_prompts
        few = probe.first(emulated_prompts)
        target, session = compare_artefact(bundle, entry, quantized, references, few, options.threads, progress)
        if emulated_prompts is not None and data:
            notes.append(f"{entry.format}: task accuracy and text are not measured in an emulator")
        else:
            accuracy = quality.task_accuracy(entry.format, session)
            target = replace(target, task_accuracy=accuracy, text=quality.text_score(entry.format, session))
        targets.append(target)

    scored = quality.dequantized_text is not None
    return Report(
        targets=targets,
        quantization=quality.quantization(probe),
        original_task_accuracy=quality.original_accuracy(),
        task_size=len(data.task.prompts) if data.task is not None else 0,
        original_text=quality.original_text,
        dequantized_text=quality.dequantized_text,
        text_against=None if not scored else "dequantized" if before is None else "original",
        text_windows=len(data.passages) if scored else 0,
        text_positions=sum(len(p.scored) for p in data.passages) if scored else 0,
        notes=notes,
    )


def _entries(bundle: Bundle, formats: Sequence[str]) -> tuple[list[TargetEntry], list[str]]:
    """The targets to check, and a note for each that cannot be checked here.

    Raises UserError if one was asked for that is not there, or none can be checked here.
    """
    if formats:
        return [bundle.target(name) for name in dict.fromkeys(formats)], []
    entries, notes = [], []
    for entry in bundle.manifest.targets:
        target = TARGETS.get(entry.format)
        if target is not None and target.installed:
            entries.append(entry)
        else:
            way = target.install if target is not None else "this edgewright does not know it"
            notes.append(f"{entry.format} was not checked here: {way}")
    if not entries:
        raise UserError(f"{bundle.path}: none of its targets can be checked here; {notes[0]}")
    return entries, notes


def require_memory(weights: int, stored: Mapping[str, int], original: bool) -> None:
    """Refuse before hours of work: the reference is dequantized to float32, and an artefact is loaded twice beside it.

    weights: how many. stored: format -> bytes of the artefact's weights. original: whether the original's float32 weights come
    on top. Raises UserError.
    """
    held = [2 * size + TARGETS[target].stand_in_bytes * weights for target, size in stored.items()]
    needed = (8 if original else 4) * weights + max(held, default=0)
    require_available(
        needed, "verifying this model takes memory", "export with --no-verify and verify on a larger machine"
    )
