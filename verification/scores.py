"""What a session is worth on a task and on a text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..audio.files import read_sound
from ..bundle import CHECKPOINT, Bundle, Generation
from ..calibration.prompts import Passage, Task, text_ids
from ..calibration.sounds import sound_file
from ..checkpoints.opening import open_checkpoint
from ..checkpoints.prompt import read_prompt
from ..checkpoints.tokenizer import Tokenizer
from ..errors import UserError
from ..runtimes.generate import Stream, generate_batch, read_context
from ..runtimes.logits import divergence, log_softmax, same_top1
from ..runtimes.session import Array, Session
from ..runtimes.transcribe import require_speech, transcribe
from .compare import require_finite_reference
from .report import TextScore
from .similarity import recall
from .words import word_errors

_TASK_BATCH = 16  # the rows that a TensorRT engine takes
_ROWS = 16  # positions whose distributions are held in float64 at once: Gemma's are 2 MiB each


def task_accuracy(session: Session, bundle: Bundle, task: Task) -> float:
    """The share of prompts whose greedy text is an accepted answer; of a model of embeddings, whose most similar answer is one.

    Raises UserError if the bundle has no tokenizer.
    """
    tokenizer = open_checkpoint(str(bundle.path / CHECKPOINT)).tokenizer
    if tokenizer is None:
        raise UserError("--task needs a tokenizer, and the bundle has none")
    spec = bundle.manifest.generation
    if spec.task == "embed":
        return _retrieval(session, spec, tokenizer, task)
    order = sorted(range(len(task.prompts)), key=lambda i: len(task.prompts[i]))  # little padding
    right = 0
    for start in range(0, len(order), _TASK_BATCH):
        rows = order[start : start + _TASK_BATCH]
        ids = [read_prompt(tokenizer, task.prompts[i], spec.task != "seq2seq").ids for i in rows]
        contexts = [tokenizer.encode(task.contexts[i], special=False) for i in rows if task.contexts]
        for row, tokens in zip(rows, generate_batch(session, spec, ids, spec.max_new_tokens, contexts), strict=True):
            right += tokenizer.decode(tokens).strip() in task.answers[row]
    return right / len(order)


def _retrieval(session: Session, spec: Generation, tokenizer: Tokenizer, task: Task) -> float:
    """Recall at 1 of the prompts, among all answers of the task."""
    answers = list(dict.fromkeys(answer for accepted in task.answers for answer in accepted))
    place = {answer: i for i, answer in enumerate(answers)}
    asked = text_ids(task.prompts, tokenizer, spec, query=True, whose="--task: a prompt")
    searched = text_ids(answers, tokenizer, spec, query=False, whose="--task: an answer")
    return recall(session, spec, asked, searched, [{place[a] for a in accepted} for accepted in task.answers])


def word_error_rate(session: Session, bundle: Bundle, task: Task, file: Path) -> float:
    """The errors of the greedy transcripts of a task's sounds over the words said. file: the task file, beside its sounds.

    Raises UserError for a bundle without a tokenizer, a sound that cannot be read, or a task without a word.
    """
    tokenizer = open_checkpoint(str(bundle.path / CHECKPOINT)).tokenizer
    if tokenizer is None:
        raise UserError("--task needs a tokenizer, and the bundle has none")
    spec = bundle.manifest.generation
    rate = require_speech(spec).sound.rate
    errors = total = 0
    for name, answers in zip(task.prompts, task.answers, strict=True):
        samples = read_sound(sound_file(file, name), rate)
        text = " ".join(tokenizer.decode(part.tokens) for part in transcribe(session, spec, samples))
        wrong, count = word_errors(text, answers)
        errors, total = errors + wrong, total + count
    if not total:
        raise UserError(f"{file}: its answers have no word to count")
    return errors / total


def perplexity(session: Session, spec: Generation, windows: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood of each window's tokens after its first, of a decoder-only model."""
    (score,) = score_text(session, [], spec, [Passage(tuple(w[1:]), (w[0],)) for w in windows])
    return score.perplexity


def score_text(
    base: Session, candidates: Sequence[Session], spec: Generation, passages: Sequence[Passage]
) -> list[TextScore]:
    """The scores of the base and of each candidate, all compared with the base; the base's own score comes first.

    The sessions read a passage side by side, one chunk at a time, so that only a chunk's logits are in memory. Raises
    UserError for a base whose logits are not finite.
    """
    sessions = [base, *candidates]
    tallies = [_TextTally() for _ in sessions]
    for passage in passages:
        for step in zip(*(predictions(s, spec, passage) for s in sessions), strict=True):
            for at in range(0, len(step[0][1]), _ROWS):
                base_logits = step[0][0][at : at + _ROWS]
                require_finite_reference(base_logits)
                base_log = log_softmax(base_logits)
                for tally, (logits, tokens) in zip(tallies, step, strict=True):
                    tally.add(base_log, logits[at : at + _ROWS], tokens[at : at + _ROWS])
    return [tally.score() for tally in tallies]


def predictions(session: Session, spec: Generation, passage: Passage) -> Iterator[tuple[Array, Array]]:
    """The logits that predict each scored token of a passage, in chunks: (logits [n, vocab], tokens [n]).

    The true tokens are fed: a decoder-only model reads prompt and tokens, the decoder of an encoder-decoder its start token
    and the tokens. Raises UserError for a passage that does not fit the context.
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
        self._loss = self._kl = 0.0
        self._same = self._positions = 0

    def add(self, base_log: Array, logits: Array, tokens: Array) -> None:
        """Add positions: the base's log-probabilities [n, vocab], this session's logits [n, vocab], the tokens [n]."""
        self._positions += len(tokens)
        if not np.isfinite(logits).all():
            self._loss = self._kl = sys.float_info.max
            return
        own_log = log_softmax(logits)
        self._loss -= float(own_log[np.arange(len(tokens)), tokens].sum())
        self._kl += divergence(base_log, own_log)
        self._same += same_top1(base_log, own_log)

    def score(self) -> TextScore:
        count = max(1, self._positions)
        loss = min(self._loss / count, np.log(sys.float_info.max))
        return TextScore(float(np.exp(loss)), self._kl / count, self._same / count)
