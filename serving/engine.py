"""One loaded session behind a queue: requests are answered in the order in which they come, together where the graphs allow it.

The rows of an encoder-decoder's batch are padded and run in step. A decoder-only batch would need prompts of one length, so there
requests run one by one, each over the state whose beginning it shares.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import UserError
from ..runtimes.answer import NO_STOPS, Reason, Stops, Writer
from ..runtimes.conversation import PrefixCache
from ..runtimes.generate import Stream
from ..runtimes.sampling import GREEDY, Sampling
from ..runtimes.session import Array
from ..runtimes.text_generation import OpenBundle

BATCH = 16
"""The most rows that run in step: what a TensorRT engine takes."""

CACHES = 2
"""States that are kept for prompts to come; each is as long as the context."""


@dataclass(frozen=True)
class TokenScore:
    """A token with its log-probability, and the best ones at its place."""

    id: int
    logprob: float
    best: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Event:
    """What happens to a request: a piece of text, its end, or an error.

    Attributes:
        text: what can be shown since the last event.
        scores: of the tokens since the last event, where they were asked for.
        reason: why the answer ended; None while it goes on.
        new_tokens: how many there are so far. reused: tokens of the prompt that had been read before.
        error: what went wrong, and whether the request is to blame.
    """

    text: str = ""
    scores: tuple[TokenScore, ...] = ()
    reason: Reason | None = None
    new_tokens: int = 0
    reused: int = 0
    error: tuple[str, Literal["request", "server"]] | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.reason is not None or self.error is not None


@dataclass
class Job:
    """A request.

    Attributes:
        ids: the prompt. new_tokens: the most that are generated.
        best: alternatives to be scored for each token; None: no scores at all.
        send: is called with each event, in the engine's thread.
        cancelled: set by whoever no longer waits.
    """

    ids: Sequence[int]
    new_tokens: int
    send: Callable[[Event], None]
    sampling: Sampling = GREEDY
    stops: Stops = NO_STOPS
    best: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass
class Call:
    """Work of another kind on the session: what is run in the engine's thread, and what is told of its result or error."""

    run: Callable[[], Any]
    done: Callable[[Any, Exception | None], None]


class Full(Exception):
    """More requests wait than the engine keeps."""


class Engine:
    """A bundle that answers jobs in a thread of its own."""

    def __init__(self, opened: OpenBundle, waiting: int = 256) -> None:
        """waiting: jobs that may wait; one more is refused."""
        self.opened = opened
        self._jobs: queue.Queue[Job | Call | None] = queue.Queue()
        self._waiting = waiting
        self._caches: list[PrefixCache] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job | Call) -> None:
        """Queue a job or a call. Raises Full."""
        if self._jobs.qsize() >= self._waiting:
            raise Full
        self._jobs.put(job)

    def close(self) -> None:
        """Answer what is queued, then end."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        together = BATCH if self.opened.bundle.manifest.generation.task == "seq2seq" else 1
        following: Job | Call | None = None
        ended = False
        while (job := following or self._jobs.get()) is not None:
            following = None
            if isinstance(job, Call):
                _call(job)
                continue
            batch = [job]
            while len(batch) < together and not self._jobs.empty() and following is None and not ended:
                match self._jobs.get():
                    case Job() as another:
                        batch.append(another)
                    case None:
                        ended = True
                    case call:
                        following = call
            batch = [job for job in batch if not job.cancelled.is_set()]
            try:
                if together > 1 and batch:
                    self._together(batch)
                elif batch:
                    self._alone(batch[0])
            except UserError as error:
                self._fail(batch, (str(error), "request"))
            except Exception as error:
                self._caches.clear()  # no state is trusted after a failure that nobody foresaw
                self._fail(batch, (f"unforeseen {type(error).__name__}: {error}", "server"))
            if ended:
                return

    @staticmethod
    def _fail(batch: Sequence[Job], error: tuple[str, Literal["request", "server"]]) -> None:
        for job in batch:
            job.send(Event(error=error))

    def _alone(self, job: Job) -> None:
        cache = self._cache(job.ids)
        scores: list[TokenScore] = []

        def observe(token: int, logits: Array) -> None:
            if job.best is not None:
                scores.append(_score(token, logits, job.best))

        answer = cache.answer(job.ids, job.new_tokens, job.sampling, job.stops, observe)
        for piece in answer:
            if job.cancelled.is_set():
                answer.close()
                return
            job.send(Event(piece, tuple(scores), new_tokens=len(answer.ids)))
            scores.clear()
        kept = tuple(scores) if not job.stops.tokens or answer.reason != "stop" else tuple(scores[:-1])
        job.send(Event("", kept, answer.reason, len(answer.ids), cache.reused))

    def _cache(self, ids: Sequence[int]) -> PrefixCache:
        """The state that has read most of `ids`; else a new one, in the place of that used longest ago."""
        best = max(self._caches, key=lambda cache: cache.shared(ids), default=None)
        if best is None or best.shared(ids) == 0:
            while len(self._caches) >= CACHES:
                del self._caches[0]
            best = PrefixCache(self.opened)
        else:
            self._caches.remove(best)
        self._caches.append(best)
        return best

    def _together(self, jobs: Sequence[Job]) -> None:
        spec = self.opened.bundle.manifest.generation
        fitting = []
        for job in jobs:
            if len(job.ids) > spec.max_context:
                self._fail(
                    [job], (f"the prompt has {len(job.ids)} tokens, the model reads {spec.max_context}", "request")
                )
            else:
                fitting.append(_Row(job, Writer(self.opened.tokenizer.stream(), job.stops)))
        if not fitting:
            return
        most = max(row.job.new_tokens for row in fitting)
        stream = Stream(self.opened.session, spec, [row.job.ids for row in fitting], most)
        logits = stream.prefill()
        while True:
            tokens = [row.step(logits[i, -1], spec.eos_ids, stream) for i, row in enumerate(fitting)]
            if all(row.ended for row in fitting):
                return
            logits = stream.feed(np.array(tokens, np.int64)[:, None])


def _call(call: Call) -> None:
    try:
        result = call.run()
    except Exception as error:
        call.done(None, error)
    else:
        call.done(result, None)


class _Row:
    """A job of a batch."""

    def __init__(self, job: Job, writer: Writer) -> None:
        self.job, self.ended = job, False
        self._writer = writer
        self._rng = np.random.default_rng(job.sampling.seed)

    def step(self, logits: Array, ends: Sequence[int], stream: Stream) -> int:
        """Take a token of logits [vocab] and tell the job; the token to be fed, anything once the row has ended."""
        if not self.ended and self.job.cancelled.is_set():
            self.ended = True
        if self.ended:
            return 0
        job, writer = self.job, self._writer
        start = stream.read[: stream.past - len(writer.ids)]
        token = job.sampling.pick(logits, self._rng, start, writer.ids)
        if token in ends:
            return self._end("end")
        piece = writer.put(token)
        scores = () if job.best is None else (_score(token, logits, job.best),)
        if writer.stopped:
            return self._end("stop", piece)
        if piece or scores:
            job.send(Event(piece, scores, new_tokens=len(writer.ids)))
        if len(writer.ids) >= job.new_tokens:
            return self._end("limit")
        if stream.past >= stream.capacity:
            return self._end("context")
        return token

    def _end(self, reason: Reason, piece: str = "") -> int:
        self.ended = True
        piece += self._writer.end()
        if self._writer.stopped:
            reason = "stop"
        self.job.send(Event(piece, (), reason, len(self._writer.ids)))
        return 0


def _score(token: int, logits: Array, best: int) -> TokenScore:
    """The log-probabilities of logits [vocab], before temperature and cuts."""
    shifted = logits.astype(np.float64) - logits.max()
    chances = shifted - np.log(np.exp(shifted).sum())
    order = np.argsort(-chances, kind="stable")[:best]
    return TokenScore(token, float(chances[token]), tuple((int(i), float(chances[i])) for i in order))
