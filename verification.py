"""Every artefact against its reference, and the reference against the original weights. All rooms may enter.

Two losses that are never mixed: the lowering error (artefact against the eager reference on the same dequantized
weights, float32 activations; must be tiny) and the quantization loss (dequantized against original weights). What int8
or float16 activations add on top is reported apart. The weights in an artefact's files are the checkpoint's to the bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .backends import BACKENDS
from .bundle import CHECKPOINT, Bundle, Generation, TargetEntry
from .checkpoint import Checkpoint, open_checkpoint
from .errors import UserError, VerificationFailure
from .exporters import exporter
from .memory import require_available
from .models import build
from .models.loading import CODES, load_dequantized, load_original, quantized_parts
from .ops.quantized import dequantize
from .prompts import Task, read_task, text_windows
from .runtimes.eager import EagerSession, Int8Session
from .runtimes.generate import Stream, generate_batch
from .runtimes.opening import open_exact, open_session
from .runtimes.session import Array, Joined, PlacedSession, Session
from .untrusted import one_line
from .verdict import Agreement, Report, TargetReport

FEWER_PROMPTS = {"qnn": 8, "ethosu": 8}
"""Prompts compared on a target whose device is emulated here: an emulator is hundreds of times slower than the device."""

BESIDES = {"coreml": 8, "tensorrt": 16}
"""Bytes a weight that what stands in for a target's device holds beside its artefact (measured)."""

NEW_TOKENS = 16
LONG_PROMPT = 700  # tokens: past two prefill chunks and Gemma 3's window of 512
WINDOW = 512
_TASK_BATCH = 16  # the rows that a TensorRT engine takes


def verify(
    path: str | Path,
    model: str | None = None,
    task: Path | None = None,
    text: Path | None = None,
    task_limit: int | None = None,
    threads: int = 0,
    progress: Callable[[str], None] = lambda _: None,
    formats: Sequence[str] = (),
) -> Report:
    """Check a bundle: hashes, then each artefact reloaded from disk and compared, then the quantization loss.

    model: the original checkpoint, for the quantization loss. task: a task file, text: a text file, measured on the
    artefact as shipped and, with `model`, on the original. formats: the targets to check; without, all whose library is
    here, and a note for each that is left out. Raises VerificationFailure for a damaged file, UserError for bad arguments;
    a failed comparison is in the report.
    """
    bundle = Bundle.open(path)
    progress("checking file hashes")
    bundle.check_files()
    quantized = open_checkpoint(str(bundle.path / CHECKPOINT))
    original = _original(bundle, model)
    prompts = [list(p) for p in bundle.manifest.prompts]
    examples = read_task(task, task_limit) if task is not None else None
    windows = _windows(text, quantized, bundle.manifest.generation)
    spec = bundle.manifest.generation

    manifest = bundle.manifest
    require_memory(manifest.weights, {t.format: t.stored_bytes for t in manifest.targets}, original is not None)
    progress("reference: dequantized weights in float32")
    built = build(quantized.config)
    load_dequantized(built, quantized)
    reference = EagerSession(built.graphs())
    linears = {n.removesuffix(CODES) for n in quantized.names() if n.endswith(CODES)}
    linears |= {alias for alias, name in built.tied.items() if name in linears}
    rounded = Int8Session(built.graphs(), linears)
    report = Report(targets=[])
    for entry in _asked(bundle, formats, report):
        target, shipped = _target(bundle, entry, quantized, (reference, rounded), prompts, threads, progress)
        if entry.format in FEWER_PROMPTS and (examples is not None or windows):
            report.notes.append(f"{entry.format}: task accuracy and perplexity are not measured in an emulator")
            report.targets.append(target)
            continue
        if examples is not None:
            progress(f"{entry.format}: {len(examples.prompts)} task prompts")
            target.task_accuracy = task_accuracy(shipped, bundle, examples)
        if windows:
            progress(f"{entry.format}: perplexity over {len(windows)} windows")
            target.perplexity = perplexity(shipped, spec, windows)
        report.targets.append(target)
    if original is not None:
        progress("quantization loss: original weights in float32")
        before = _eager(quantized.config, original, load_original)
        (report.quantization,) = compare(before, [reference], spec, prompts)
        if examples is not None:
            report.original_task_accuracy = task_accuracy(before, bundle, examples)
        if windows:
            report.original_perplexity = perplexity(before, spec, windows)
    report.task_size = len(examples.prompts) if examples is not None else 0
    return report


def _asked(bundle: Bundle, formats: Sequence[str], report: Report) -> list[TargetEntry]:
    """The targets to check. Raises UserError if one was asked for that is not there, or none can be checked here."""
    if formats:
        return [bundle.target(name) for name in dict.fromkeys(formats)]
    entries = [e for e in bundle.manifest.targets if e.format in BACKENDS and BACKENDS[e.format].installed]
    for entry in bundle.manifest.targets:
        if entry not in entries:
            known = BACKENDS.get(entry.format)
            way = known.install if known is not None else "this edgewright does not know it"
            report.notes.append(f"{entry.format} was not checked here: {way}")
    if not entries:
        raise UserError(f"{bundle.path}: none of its targets can be checked here; {report.notes[0]}")
    return entries


def _target(
    bundle: Bundle,
    entry: TargetEntry,
    quantized: Checkpoint,
    references: tuple[EagerSession, Int8Session],
    prompts: Sequence[Sequence[int]],
    threads: int,
    progress: Callable[[str], None],
) -> tuple[TargetReport, PlacedSession]:
    """One artefact: its weights read back, then run against the reference with float32 activations and as it ships.

    references: the reference, and the same with int8 activations, which is compared too where a runtime has no others.
    """
    reference, rounded = references
    progress(f"{entry.format}: reading its weights back")
    weights, wrong = 0, None
    try:
        weights = check_weights(bundle, entry.format, quantized)
    except VerificationFailure as error:
        wrong = str(error)
    prompts = prompts[: FEWER_PROMPTS.get(entry.format, len(prompts))]
    progress(f"{entry.format}: reloading, comparing on {len(prompts)} prompts")
    shipped = open_session(bundle, entry.format, threads)
    exact = open_exact(bundle, entry.format, threads)
    sessions = [shipped] if exact is None else [exact, shipped]
    part = BACKENDS[entry.format].graphs
    compared: list[Session] = [Joined(s, part, reference) for s in sessions] if part else [*sessions]
    int8 = exact is None and shipped.activations == "int8"
    found = compare(reference, [*compared, *([rounded] if int8 else [])], bundle.manifest.generation, prompts)
    arithmetic = found.pop() if int8 else None
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
    held = {n for g in model.graphs() if g.name in BACKENDS[format].graphs for n in g.parameters()}
    stored = (n.removesuffix(CODES) for n in quantized.names() if n.endswith(CODES))
    wanted = {n for n in stored if n in held or not BACKENDS[format].graphs}
    seen: set[str] = set()
    for found, values in exporter(format).read_weights(bundle.path / format):
        name = model.tied.get(found, found)
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
    held = [2 * size + BESIDES.get(target, 0) * weights for target, size in stored.items()]
    needed = (8 if original else 4) * weights + max(held, default=0)
    require_available(
        needed, "verifying this model takes memory", "export with --no-verify and verify on a larger machine"
    )


def _original(bundle: Bundle, model: str | None) -> Checkpoint | None:
    if model is None:
        return None
    original = open_checkpoint(model)
    if original.fingerprint() != bundle.manifest.source_fingerprint:
        raise UserError(f"{model} is not the checkpoint this bundle was made from ({bundle.manifest.source})")
    return original


def _windows(text: Path | None, quantized: Checkpoint, spec: Generation) -> list[list[int]]:
    if text is None:
        return []
    if spec.task != "causal":
        raise UserError(
            "--text measures perplexity, which a decoder-only model has; give --task for an encoder-decoder"
        )
    if quantized.tokenizer is None:
        raise UserError("--text needs a tokenizer, and the bundle has none")
    return text_windows(text, quantized.tokenizer, min(WINDOW, spec.max_context - 1), 16)


def _eager(config: dict[str, Any], checkpoint: Checkpoint, load: Callable[[Any, Checkpoint], None]) -> EagerSession:
    model = build(config)
    load(model, checkpoint)
    return EagerSession(model.graphs())


def compare(
    reference: Session, candidates: Sequence[Session], spec: Generation, prompts: Sequence[Sequence[int]]
) -> list[Agreement]:
    """Each candidate against the reference: free-running greedy tokens, then teacher-forced on the reference's tokens."""
    tallies = [_Tally() for _ in candidates]
    new_tokens = min(NEW_TOKENS, spec.max_new_tokens)
    for batch in [*_batches(prompts, spec), *_long_prompt(prompts, spec)]:
        tokens = generate_batch(reference, spec, batch, new_tokens)
        want = _teacher_forced(reference, spec, batch, tokens)
        for candidate, tally in zip(candidates, tallies, strict=True):
            tally.tokens(tokens, generate_batch(candidate, spec, batch, new_tokens))
            tally.logits(want, _teacher_forced(candidate, spec, batch, tokens))
    count = len(prompts) + len(_long_prompt(prompts, spec))
    return [tally.agreement(count) for tally in tallies]


class _Tally:
    """Sums over prompts of one comparison. A candidate that is not finite counts as wrong by the largest float."""

    def __init__(self) -> None:
        self.worst = self.scale = self.kl = 0.0
        self.same = self.positions = self.identical = 0

    def tokens(self, want: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> None:
        self.identical += sum(a == b for a, b in zip(want, got, strict=True))

    def logits(self, want: Sequence[Array], got: Sequence[Array]) -> None:
        for a, b in zip(want, got, strict=True):
            if not np.isfinite(a).all():
                raise UserError("the reference's logits are not finite; the checkpoint is broken or overflows float32")
            self.positions += len(a)
            if not np.isfinite(b).all():
                self.worst = self.kl = sys.float_info.max
                continue
            self.worst = max(self.worst, float(np.abs(a - b).max()))
            self.scale = max(self.scale, float(np.abs(a).max()))
            p, q = _log_softmax(a), _log_softmax(b)
            self.kl += float((np.exp(p) * (p - q)).sum())
            self.same += int((a.argmax(-1) == b.argmax(-1)).sum())

    def agreement(self, prompts: int) -> Agreement:
        count = max(1, self.positions)
        error = min(self.worst / max(self.scale, 1e-30), sys.float_info.max)
        return Agreement(error, self.kl / count, self.same / count, prompts, self.identical, self.positions)


def _batches(prompts: Sequence[Sequence[int]], spec: Generation) -> list[list[list[int]]]:
    """Encoder-decoder prompts in padded batches, so that padding is checked too; others alone."""
    size = 16 if spec.task == "seq2seq" else 1
    return [[list(p) for p in prompts[i : i + size]] for i in range(0, len(prompts), size)]


def _long_prompt(prompts: Sequence[Sequence[int]], spec: Generation) -> list[list[list[int]]]:
    """One prompt beyond two prefill chunks and any common window, made of the others: short ones never get there.

    Encoder-decoders have none: their prompts go through the encoder whole.
    """
    length = min(LONG_PROMPT, spec.max_context - NEW_TOKENS - 1)
    joined = [token for prompt in prompts for token in prompt]
    if spec.task != "causal" or not joined or length <= max(len(p) for p in prompts):
        return []
    repeated = joined * (length // len(joined) + 1)
    return [[repeated[:length]]]


def _teacher_forced(
    session: Session, spec: Generation, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
) -> list[Array]:
    """For each prompt the logits [1 + len(tokens), vocab] that predict each of its tokens and what follows them.

    Prompt and tokens go in as one prefill where they are short, in chunks behind a past where they are long, so these
    paths are checked beside the decode steps of the free-running tokens.
    """
    longest = max(len(t) for t in tokens)
    stream = Stream(session, spec, prompts, longest + 1)
    start = stream.pending
    longest = min(longest, stream.capacity - start.shape[1])
    forced = np.zeros((len(prompts), longest), np.int64)
    for row, sequence in enumerate(tokens):
        forced[row, : len(sequence)] = sequence[:longest]
    fed = np.concatenate([start, forced], 1)
    logits = stream.feed(fed, every=True)[:, start.shape[1] - 1 :]
    return [logits[row, : len(sequence) + 1] for row, sequence in enumerate(tokens)]


def _log_softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def task_accuracy(session: Session, bundle: Bundle, task: Task) -> float:
    """Share of prompts whose greedy answer is one of the accepted ones. Raises UserError if there is no tokenizer."""
    tokenizer = open_checkpoint(str(bundle.path / CHECKPOINT)).tokenizer
    if tokenizer is None:
        raise UserError("--task needs a tokenizer, and the bundle has none")
    spec = bundle.manifest.generation
    order = sorted(range(len(task.prompts)), key=lambda i: len(task.prompts[i]))  # little padding
    right = 0
    for start in range(0, len(order), _TASK_BATCH):
        rows = order[start : start + _TASK_BATCH]
        ids = [tokenizer.encode(task.prompts[i]) for i in rows]
        for row, tokens in zip(rows, generate_batch(session, spec, ids, spec.max_new_tokens), strict=True):
            right += tokenizer.decode(tokens).strip() in task.answers[row]
    return right / len(order)


def perplexity(session: Session, spec: Generation, windows: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood of each window's tokens after its first."""
    total, count = 0.0, 0
    for window in windows:
        ids = np.asarray([window], np.int64)
        stream = Stream(session, spec, [window], 1)
        logits = _log_softmax(stream.feed(ids, every=True)[0, :-1])
        total -= float(logits[np.arange(len(window) - 1), ids[0, 1:]].sum())
        count += len(window) - 1
    return float(np.exp(total / count))
