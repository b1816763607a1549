"""A bundle checked in this process: every artefact against its reference, and the reference against the original weights.

Two losses that are never mixed: the lowering error (`lowering`) must be tiny; the quantization loss (`quality`) is what fewer
bits cost. `verify` does this in a process of its own, as the artefacts may be a stranger's; an export checks its own work here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bundle import CHECKPOINT, Bundle
from ..checkpoints.opening import open_checkpoint
from ..system.memory import require_available
from ..system.subprocesses import Progress, serve
from ..targets.registry import TARGETS
from .compare import probe_of
from .lowering import References, compare_artefact
from .options import VerifyOptions, chosen_entries
from .quality import Quality, QualityData, load_original_session, open_original
from .report import Report, TargetReport


def verify_here(
    path: str | Path, options: VerifyOptions | None = None, progress: Callable[[str], None] = lambda _: None
) -> Report:
    """`verification.verify.verify` in this process."""
    bundle = Bundle.open(path)
    progress("checking file hashes")
    bundle.check_files()
    return compare_bundle(bundle, options or VerifyOptions(), progress)


def compare_bundle(bundle: Bundle, options: VerifyOptions, progress: Callable[[str], None]) -> Report:
    """Every comparison of a bundle whose hashes are right. Errors as of `verification.verify.verify`."""
    manifest = bundle.manifest
    quantized = open_checkpoint(str(bundle.path / CHECKPOINT))
    original = None if options.model is None else open_original(bundle, options.model, options.adapter)
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
    entries, notes = chosen_entries(bundle, options.formats)
    for entry in entries:
        emulated_prompts = TARGETS[entry.format].emulated_prompts
        few = probe.first(emulated_prompts)
        target, session = compare_artefact(bundle, entry, quantized, references, few, options.threads, progress)
        if emulated_prompts is not None and data:
            notes.append(f"{entry.format}: task accuracy and text are not measured in an emulator")
        else:
            target = replace(
                target,
                task_accuracy=quality.task_accuracy(entry.format, session),
                word_error_rate=quality.word_error_rate(entry.format, session),
                text=quality.text_score(entry.format, session),
            )
        targets.append(target)

    count, positions = data.pieces
    scored = count > 0
    return Report(
        targets=targets,
        quantization=quality.quantization(probe),
        original_task_accuracy=quality.original_accuracy(),
        original_word_error_rate=quality.original_word_error_rate(),
        task_size=len(data.task.prompts) if data.task is not None else 0,
        original_text=quality.original_text,
        dequantized_text=quality.dequantized_text,
        text_against=None if not scored else "dequantized" if before is None else "original",
        text_windows=count,
        text_positions=positions,
        notes=notes,
    )


def require_memory(weights: int, stored: Mapping[str, int], original: bool) -> None:
    """Refuse before hours of work: the reference is dequantized to float32, and an artefact is loaded twice beside it.

    weights: how many. stored: format -> bytes of the artefact's weights. original: whether the original's float32 weights come
    on top. Raises UserError.
    """
    held = [2 * size + TARGETS[name].stand_in_bytes * weights for name, size in stored.items() if name in TARGETS]
    needed = (8 if original else 4) * weights + max(held, default=0)
    require_available(
        needed, "verifying this model takes memory", "export with --no-verify and verify on a larger machine"
    )


def _job(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    sys.path += [folder for folder in job["search"] if folder not in sys.path]
    return compare_bundle(Bundle.open(job["path"]), VerifyOptions.from_json(job["options"]), progress).to_json()


if __name__ == "__main__":
    serve(_job)
