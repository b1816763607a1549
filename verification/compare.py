"""One session against another on prompts or example inputs, and what a session is worth on a task or a text.

What may enter: `bundle`, `runtimes`, `prompts`, `verdict`; no model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..bundle import CHECKPOINT, Bundle, Generation
from ..calibration.prompts import Passage, Task
from ..checkpoints.opening import open_checkpoint
from ..errors import UserError
from ..runtimes.example_inputs import Call, read_examples
from ..runtimes.generate import Stream, generate_batch, read_context
from ..runtimes.session import Array, Session
from .report import TOLERANCE, Agreement, TextScore

NEW_TOKENS = 16
LONG_PROMPT = 700  # tokens: past two prefill chunks and Gemma 3's window of 512
_TASK_BATCH = 16  # the rows that a TensorRT engine takes
_ROWS = 16  # positions whose distributions are held in float64 at once: Gemma's are 2 MiB each


class Probe(Protocol):
    """What artefacts are compared on: prompts through the generate loop, or a module's example inputs."""

    @property
    def what(self) -> str: ...

    def first(self, count: int | None) -> Probe:
        """The same with at most `count` of them."""
        ...

    def compare(self, reference: Session, candidates: Sequence[Session]) -> list[Agreement]: ...


def probe_of(bundle: Bundle) -> Probe:
    """The bundle's own prompts, or examples. Raises UserError for examples that do not fit its graphs."""
    m = bundle.manifest
    if m.generation.task == "module":
        return Examples(read_examples(bundle), {g.name: [p.name for p in g.outputs] for g in m.graphs})
    return Prompts(m.generation, [list(p) for p in m.prompts], [list(c) for c in m.contexts])


def compare(
    reference: Session, candidates: Sequence[Session], spec: Generation, prompts: Sequence[Sequence[int]]
) -> list[Agreement]:
    """Each candidate against the reference on prompts without contexts (see `Prompts`)."""
    return Prompts(spec, prompts, []).compare(reference, candidates)


@dataclass(frozen=True)
class Prompts:
    """Token prompts, and of a "memory" task their contexts."""

    spec: Generation
    prompts: Sequence[Sequence[int]]
    contexts: Sequence[Sequence[int]]

    @property
    def what(self) -> str:
        return f"{len(self.prompts)} prompts"

    def first(self, count: int | None) -> Prompts:
        return Prompts(self.spec, self.prompts[:count], self.contexts[:count])

    def compare(self, reference: Session, candidates: Sequence[Session]) -> list[Agreement]:
        """Free-running greedy tokens, then teacher-forced on the reference's tokens; a context is read by each for itself."""
        spec = self.spec
        tallies = [_Tally() for _ in candidates]
        new_tokens = min(NEW_TOKENS, spec.max_new_tokens)
        batches = [*_batches(self.prompts, spec), *_long_prompt(self.prompts, spec)]
        for i, batch in enumerate(batches):
            context = self.contexts[i : i + 1]  # batches of one, where there are contexts
            tokens = generate_batch(reference, spec, batch, new_tokens, context)
            want = _teacher_forced(reference, spec, batch, tokens, context)
            for candidate, tally in zip(candidates, tallies, strict=True):
                tally.tokens(tokens, generate_batch(candidate, spec, batch, new_tokens, context))
                tally.logits(want, _teacher_forced(candidate, spec, batch, tokens, context))
        count = sum(map(len, batches))
        return [tally.agreement(count) for tally in tallies]


@dataclass(frozen=True)
class Examples:
    """Inputs of graphs that have no loop: (graph, inputs by name). outputs: graph -> their names."""

    calls: Sequence[Call]
    outputs: dict[str, list[str]]

    @property
    def what(self) -> str:
        return f"{len(self.calls)} example inputs"

    def first(self, count: int | None) -> Examples:
        return Examples(self.calls[:count], self.outputs)

    def compare(self, reference: Session, candidates: Sequence[Session]) -> list[Agreement]:
        """All outputs, floats."""
        found = []
        for candidate in candidates:
            worst = squares = energy = 0.0
            close = 0
            for graph, inputs in self.calls:
                want, got = reference.run(graph, inputs, {}), candidate.run(graph, inputs, {})
                most = 0.0
                for name in self.outputs[graph]:
                    a, b = want[name].astype(np.float64), got[name].astype(np.float64)
                    real = inputs.get("encoder_mask")  # rows of padding see nothing: what they hold has no meaning
                    if real is not None and a.shape[:2] == real.shape:
                        a, b = a[real], b[real]
                    if not np.isfinite(a).all():
                        raise UserError(f"the reference's output {name} is not finite; the module overflows float32")
                    apart = np.abs(a - b).max(initial=0.0) if np.isfinite(b).all() else sys.float_info.max
                    most = max(most, float(min(apart / max(np.abs(a).max(initial=0.0), 1e-30), sys.float_info.max)))
                    squares += float(((a - b) ** 2).sum()) if np.isfinite(b).all() else sys.float_info.max
                    energy += float((a**2).sum())
                worst = max(worst, most)
                close += bool(most <= TOLERANCE)
            rms = min(float(np.sqrt(squares / max(energy, 1e-30))), sys.float_info.max)
            found.append(Agreement(float(worst), 0.0, 1.0, len(self.calls), close, 0, rms))
        return found


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
    session: Session,
    spec: Generation,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    contexts: Sequence[Sequence[int]] = (),
) -> list[Array]:
    """For each prompt the logits [1 + len(tokens), vocab] that predict each of its tokens and what follows them.

    Prompt and tokens go in as one prefill where they are short, in chunks behind a past where they are long, so these
    paths are checked beside the decode steps of the free-running tokens.
    """
    longest = max(len(t) for t in tokens)
    memory = read_context(session, spec, contexts[0]) if contexts else None
    stream = Stream(session, spec, prompts, longest + 1, memory)
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
        contexts = [tokenizer.encode(task.contexts[i], special=False) for i in rows if task.contexts]
        for row, tokens in zip(rows, generate_batch(session, spec, ids, spec.max_new_tokens, contexts), strict=True):
            right += tokenizer.decode(tokens).strip() in task.answers[row]
    return right / len(order)


def perplexity(session: Session, spec: Generation, windows: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood of each window's tokens after its first, of a decoder-only model."""
    (found,) = score_text(session, [], spec, [Passage(tuple(w[1:]), (w[0],)) for w in windows])
    return found.perplexity


def score_text(
    base: Session, candidates: Sequence[Session], spec: Generation, passages: Sequence[Passage]
) -> list[TextScore]:
    """The base and each candidate on passages of text, compared with the base; the base's own score comes first.

    All go through a passage side by side, a chunk of it at a time, so no more than a chunk's logits are ever held. Raises
    UserError for a base whose logits are not finite.
    """
    sessions = [base, *candidates]
    tallies = [_TextTally() for _ in sessions]
    for passage in passages:
        for step in zip(*(predictions(s, spec, passage) for s in sessions), strict=True):
            for at in range(0, len(step[0][1]), _ROWS):
                want = step[0][0][at : at + _ROWS]
                if not np.isfinite(want).all():
                    raise UserError(
                        "the reference's logits are not finite; the checkpoint is broken or overflows float32"
                    )
                p = _log_softmax(want)
                for tally, (logits, tokens) in zip(tallies, step, strict=True):
                    tally.add(p, logits[at : at + _ROWS], tokens[at : at + _ROWS])
    return [tally.score() for tally in tallies]


def predictions(session: Session, spec: Generation, passage: Passage) -> Iterator[tuple[Array, Array]]:
    """For each of a passage's scored tokens what predicts it, in chunks: (logits [n, vocab], tokens [n]).

    Teacher-forced: a decoder-only model is fed prompt and tokens, the decoder of an encoder-decoder its start token and the
    tokens. Raises UserError for a passage that does not fit the context.
    """
    scored = np.asarray(passage.scored, np.int64)
    if spec.task == "seq2seq":
        stream = Stream(session, spec, [passage.prompt], len(scored))
        fed = np.concatenate([stream.pending, scored[None, :-1]], 1)
    else:
        memory = read_context(session, spec, passage.context) if passage.context else None
        stream = Stream(session, spec, [[*passage.prompt, *passage.scored[:-1]]], 1, memory)
        fed = stream.pending
    before = fed.shape[1] - len(scored)
    if before < 0:
        raise ValueError("a passage's first scored token needs something before it")
    for at in range(0, fed.shape[1], spec.prefill_chunk):
        part = fed[:, at : at + spec.prefill_chunk]
        skip = max(0, before - at)
        wanted = skip < part.shape[1]
        logits = stream.feed(part, every=wanted)[0]
        if wanted:
            yield logits[skip:], scored[at + skip - before : at + part.shape[1] - before]


class _TextTally:
    """Sums over positions. A candidate that is not finite counts as wrong by the largest float."""

    def __init__(self) -> None:
        self.loss = self.kl = 0.0
        self.same = self.positions = 0

    def add(self, p: Array, logits: Array, tokens: Array) -> None:
        """p: the base's log-probabilities [n, vocab], for tokens [n]."""
        self.positions += len(tokens)
        if not np.isfinite(logits).all():
            self.loss = self.kl = sys.float_info.max
            return
        q = _log_softmax(logits)
        self.loss -= float(q[np.arange(len(tokens)), tokens].sum())
        self.kl += float((np.exp(p) * (p - q)).sum())
        self.same += int((p.argmax(-1) == q.argmax(-1)).sum())

    def score(self) -> TextScore:
        count = max(1, self.positions)
        loss = min(self.loss / count, np.log(sys.float_info.max))
        return TextScore(float(np.exp(loss)), self.kl / count, self.same / count)
