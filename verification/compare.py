"""One session compared with another, on prompts, on texts or on example inputs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..bundle import Bundle, Generation
from ..errors import UserError
from ..runtimes.encoder_inputs import Prompt, token_prompt
from ..runtimes.example_inputs import Call, read_examples
from ..runtimes.generate import Stream, generate_batch, read_context
from ..runtimes.logits import divergence, log_softmax, same_top1
from ..runtimes.session import Array, Session
from ..runtimes.text_embedding import embed_tokens
from .report import TOLERANCE, Agreement
from .similarity import similarity_of

NEW_TOKENS = 16
_SOUNDS = 2  # in a batch: an encoder's scores of a window of 1500 positions take 9 MB a head
LONG_PROMPT = 700  # tokens: longer than two prefill chunks and than Gemma 3's window of 512


class Probe(Protocol):
    """What sessions are compared on: prompts through the generate loop, texts that become vectors, or a module's example inputs."""

    @property
    def what(self) -> str: ...

    def first(self, count: int | None) -> Probe:
        """The same with at most `count` prompts or inputs; None is all."""
        ...

    def compare(self, reference: Session, candidates: Sequence[Session]) -> list[Agreement]:
        """Each candidate against the reference. Raises UserError if the reference is not finite."""
        ...


def probe_of(bundle: Bundle) -> Probe:
    """The bundle's own prompts, or examples. Raises UserError for examples that do not fit its graphs."""
    m = bundle.manifest
    if m.generation.task == "module":
        return Examples(read_examples(bundle), {g.name: [p.name for p in g.outputs] for g in m.graphs})
    if m.generation.task == "embed":
        return Texts(m.generation, m.prompts)
    if m.generation.speech is not None:
        return Prompts(m.generation, [inputs for _, inputs in read_examples(bundle)], [])
    return Prompts(m.generation, [list(p) for p in m.prompts], [list(c) for c in m.contexts])


def compare(
    reference: Session, candidates: Sequence[Session], spec: Generation, prompts: Sequence[Prompt]
) -> list[Agreement]:
    """Each candidate against the reference on prompts without contexts; see `Prompts`."""
    return Prompts(spec, prompts, []).compare(reference, candidates)


@dataclass(frozen=True)
class Prompts:
    """Prompts as token ids or sounds, and for a "memory" task their contexts."""

    spec: Generation
    prompts: Sequence[Prompt]
    contexts: Sequence[Sequence[int]]

    @property
    def what(self) -> str:
        return f"{len(self.prompts)} {'prompts' if self.spec.speech is None else 'sounds'}"

    def first(self, count: int | None) -> Prompts:
        return Prompts(self.spec, self.prompts[:count], self.contexts[:count])

    def compare(self, reference: Session, candidates: Sequence[Session]) -> list[Agreement]:
        """Greedy tokens that each session generates alone, then the logits of each when fed the reference's tokens.

        Each session reads the contexts itself.
        """
        spec = self.spec
        tallies = [_Tally() for _ in candidates]
        new_tokens = min(NEW_TOKENS, spec.max_new_tokens)
        batches = [*_batches(self.prompts, spec), *_long_prompt(self.prompts, spec)]
        for i, batch in enumerate(batches):
            context = self.contexts[i : i + 1]  # where there are contexts, a batch is one prompt
            tokens = generate_batch(reference, spec, batch, new_tokens, context)
            logits = _teacher_forced(reference, spec, batch, tokens, context)
            for candidate, tally in zip(candidates, tallies, strict=True):
                tally.add_tokens(tokens, generate_batch(candidate, spec, batch, new_tokens, context))
                tally.add_logits(logits, _teacher_forced(candidate, spec, batch, tokens, context))
        count = sum(map(len, batches))
        return [tally.agreement(count) for tally in tallies]


class _Tally:
    """Sums over the prompts of one comparison. A candidate that is not finite counts as wrong by the largest float."""

    def __init__(self) -> None:
        self.worst = self.scale = self.kl = 0.0
        self.same = self.positions = self.identical = 0

    def add_tokens(self, expected: Sequence[Sequence[int]], actual: Sequence[Sequence[int]]) -> None:
        self.identical += sum(a == b for a, b in zip(expected, actual, strict=True))

    def add_logits(self, expected: Sequence[Array], actual: Sequence[Array]) -> None:
        """Logits [positions, vocab] of each prompt. Raises UserError if the expected ones are not finite."""
        for a, b in zip(expected, actual, strict=True):
            require_finite_reference(a)
            self.positions += len(a)
            if not np.isfinite(b).all():
                self.worst = self.kl = sys.float_info.max
                continue
            self.worst = max(self.worst, float(np.abs(a - b).max()))
            self.scale = max(self.scale, float(np.abs(a).max()))
            self.kl += divergence(log_softmax(a), log_softmax(b))
            self.same += same_top1(a, b)

    def agreement(self, prompts: int) -> Agreement:
        count = max(1, self.positions)
        error = min(self.worst / max(self.scale, 1e-30), sys.float_info.max)
        return Agreement(error, self.kl / count, self.same / count, prompts, self.identical, self.positions)


def require_finite_reference(logits: Array) -> None:
    """Raise UserError unless all of the reference's logits are finite."""
    if not np.isfinite(logits).all():
        raise UserError("the reference's logits are not finite; the checkpoint is broken or overflows float32")


def _batches(prompts: Sequence[Prompt], spec: Generation) -> list[list[Prompt]]:
    """Encoder-decoder prompts in padded batches, so that padding is checked too; other prompts one by one."""
    size = 1 if spec.task != "seq2seq" else 16 if spec.speech is None else _SOUNDS
    return [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]


def _long_prompt(prompts: Sequence[Prompt], spec: Generation) -> list[list[Prompt]]:
    """For a decoder-only model one prompt longer than two prefill chunks and any common window, made of the others.

    An encoder-decoder has none: its encoder reads a prompt in one call.
    """
    if spec.task != "causal":
        return []
    length = min(LONG_PROMPT, spec.max_context - NEW_TOKENS - 1)
    joined = [token for prompt in prompts for token in token_prompt(prompt)]
    if not joined or length <= max(len(p) for p in prompts):
        return []
    repeated = joined * (length // len(joined) + 1)
    return [[repeated[:length]]]


def _teacher_forced(
    session: Session,
    spec: Generation,
    prompts: Sequence[Prompt],
    tokens: Sequence[Sequence[int]],
    contexts: Sequence[Sequence[int]] = (),
) -> list[Array]:
    """For each prompt the logits [1 + len(tokens), vocab] that predict each of its tokens and the one after them.

    Prompt and tokens are one prefill where they are short, several chunks where they are long. So these paths are checked
    beside the decode steps of the generated tokens.
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


@dataclass(frozen=True)
class Texts:
    """Texts as token ids, of which an "embed" model makes vectors. They are read in padded batches, so padding is checked too."""

    spec: Generation
    texts: Sequence[Sequence[int]]

    @property
    def what(self) -> str:
        return f"{len(self.texts)} texts"

    def first(self, count: int | None) -> Texts:
        return Texts(self.spec, self.texts[:count])

    def compare(self, reference: Session, candidates: Sequence[Session]) -> list[Agreement]:
        """The vectors of all texts."""
        expected = embed_tokens(reference, self.spec, self.texts)
        return [self._agreement(expected, embed_tokens(candidate, self.spec, self.texts)) for candidate in candidates]

    def _agreement(self, expected: Array, actual: Array) -> Agreement:
        similarity = similarity_of(expected, actual)
        errors = np.full(len(expected), sys.float_info.max)
        if np.isfinite(actual).all():
            errors = np.abs(expected - actual).max(-1) / np.maximum(np.abs(expected).max(-1), 1e-30)
        close = int((errors <= TOLERANCE).sum())
        worst = min(float(errors.max(initial=0.0)), sys.float_info.max)
        return Agreement(worst, 0.0, 1.0, len(self.texts), close, 0, None, similarity)


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
        """All outputs, which are floats."""
        return [self._agreement(reference, candidate) for candidate in candidates]

    def _agreement(self, reference: Session, candidate: Session) -> Agreement:
        worst = squares = energy = 0.0
        close = 0
        for graph, inputs in self.calls:
            expected, actual = reference.run(graph, inputs, {}), candidate.run(graph, inputs, {})
            most = 0.0
            for name in self.outputs[graph]:
                a, b = expected[name].astype(np.float64), actual[name].astype(np.float64)
                mask = inputs.get("encoder_mask")
                if mask is not None and a.shape[:2] == mask.shape:
                    a, b = a[mask], b[mask]  # values at padding have no meaning
                if not np.isfinite(a).all():
                    raise UserError(f"the reference's output {name} is not finite; the module overflows float32")
                finite = np.isfinite(b).all()
                apart = np.abs(a - b).max(initial=0.0) if finite else sys.float_info.max
                most = max(most, float(min(apart / max(np.abs(a).max(initial=0.0), 1e-30), sys.float_info.max)))
                squares += float(((a - b) ** 2).sum()) if finite else sys.float_info.max
                energy += float((a**2).sum())
            worst = max(worst, most)
            close += bool(most <= TOLERANCE)
        rms = min(float(np.sqrt(squares / max(energy, 1e-30))), sys.float_info.max)
        return Agreement(float(worst), 0.0, 1.0, len(self.calls), close, 0, rms)
