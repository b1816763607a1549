"""The generate loop over any `Session`: prefill, then one decode step per token. No torch is imported.

`Stream` is one batch that is being decoded. It hides how the kinds of model differ: an encoder-decoder reads the prompt, tokens or
a sound, with its encoder; a decoder-only model reads it into the KV cache; so does a decoder-decoder, with the memory of a context
before it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Literal

import numpy as np

from ..bundle import ContextSpec, Generation, require_tokens
from ..errors import UserError
from .encoder_inputs import Prompt, encoder_batch, token_prompt
from .sampling import GREEDY, Sampling
from .session import Array, Session

Ending = Literal["end", "limit", "context"]
"""Why an answer ended: an end token, as many tokens as were asked for, no room in the context."""

TokenRule = Callable[[Sequence[int], Array], Array]
"""What a model may say next: the tokens so far and logits [vocab] -> the logits, those of forbidden tokens -inf."""


Observer = Callable[[int, Array], None]
"""Is told of a token and the logits [vocab] that it was chosen from."""


class Stream:
    """A batch of prompts that is being decoded, row by row in step; prompts of a decoder-only batch have one length.

    Attributes:
        past: positions in the state.
        capacity: positions that it has.
        read: tokens of the first row that the decoder has read.
        whole: whether the state is that of the tokens read: not after a call that was interrupted.
    """

    def __init__(
        self,
        session: Session,
        spec: Generation,
        prompts: Sequence[Prompt],
        new_tokens: int,
        memory: Array | None = None,
    ) -> None:
        """memory: of a "memory" task, [batch, rows, hidden]; without it, the decoder reads the prompt alone.

        Raises UserError for a prompt or memory that is empty, does not fit the context, or has tokens the model does not.
        """
        self.session, self.spec = session, spec
        self.batch, self.past = len(prompts), 0
        self.read: list[int] = []
        self.whole = True
        self._extra: dict[str, Array] = {}
        self._slots = np.zeros(0, np.int64)
        if spec.task == "seq2seq":
            self._encode(prompts, new_tokens)
        else:
            self._read([token_prompt(p) for p in prompts], new_tokens, memory)

    def _read(self, prompts: list[Sequence[int]], new_tokens: int, memory: Array | None) -> None:
        """Prompts of a decoder-only model, to be fed; behind the memory of a decoder-decoder."""
        spec = self.spec
        for prompt in prompts or [()]:
            require_tokens(prompt, spec.vocab, "the prompt")
        if spec.context is not None:
            prompts = self._splice(spec.context, prompts, memory)
        longest = max(len(p) for p in prompts)
        if longest >= spec.max_context:
            raise UserError(f"the prompt has {longest} tokens, the bundle's context is {spec.max_context}")
        if any(len(p) != longest for p in prompts):
            raise ValueError("prompts of one decoder-only batch must have one length")
        self._allocate(longest + new_tokens)
        self.pending = np.asarray(prompts, np.int64)

    def _encode(self, prompts: Sequence[Prompt], new_tokens: int) -> None:
        """Prompts through the encoder; its decoder's start is to be fed."""
        spec = self.spec
        inputs, mask = encoder_batch(spec, prompts or [()])
        self._allocate(new_tokens + 1 + len(spec.forced))
        encoded = self.session.run("encoder", inputs, self.state)
        self.session.run("cross_kv", {"encoder_hidden": encoded["encoder_hidden"]}, self.state)
        self._extra = {"encoder_mask": mask}
        start = np.array([spec.decoder_start, *spec.forced], np.int64)
        self.pending = np.tile(start, (self.batch, 1))

    def _allocate(self, capacity: int) -> None:
        self.capacity = min(self.spec.max_context, capacity)
        self.state = self.session.new_state(self.batch, self.capacity)

    def _splice(
        self, context: ContextSpec, prompts: Sequence[Sequence[int]], memory: Array | None
    ) -> list[Sequence[int]]:
        """The prompts with a token 0 for each row of memory; `_slots` gives the row at each position, or -1."""
        rows = 0 if memory is None else memory.shape[1]
        early = context.splice == "released" and rows > 0
        lead = len(context.prefix) - early
        if rows > context.rows:
            raise UserError(
                f"the context gives {rows} rows of memory, the model takes {context.rows}; give a shorter one"
            )
        slots = [*[-1] * lead, *range(rows), *[-1] * early]
        ids = [*context.prefix[:lead], *[0] * (rows + early)]
        if not rows:
            memory = np.zeros((self.batch, 1, context.hidden), np.float32)
        assert memory is not None
        self._extra = {"memory": memory}
        self._slots = np.array([*slots, *[-1] * max(len(p) for p in prompts)], np.int64)
        return [[*ids, *p] for p in prompts]

    def feed(self, tokens: Array, every: bool = False) -> Array:
        """Append tokens [batch, n]; returns the logits [batch, 1, vocab] of the last one, with `every` [batch, n, vocab].

        Raises UserError for more tokens than the context holds.
        """
        n = tokens.shape[1]
        if self.past + n > self.capacity:
            raise UserError(f"{self.past + n} tokens do not fit the context of {self.capacity}")
        most = self.spec.prefill_chunk
        if n > most:
            parts = [self.feed(tokens[:, at : at + most], every) for at in range(0, n, most)]
            return np.concatenate(parts, 1) if every else parts[-1]
        inputs = {
            "input_ids": tokens,
            "past_length": np.array([self.past], np.int64),
            "logit_positions": np.arange(n, dtype=np.int64) if every else np.array([n - 1], np.int64),
            **self._extra,
        }
        if self.spec.context is not None:
            slots = self._slots[self.past : self.past + n]
            inputs["slots"] = np.concatenate([slots, np.full(n - len(slots), -1, np.int64)])
        self.whole = False
        logits = self.session.run("decoder", inputs, self.state)["logits"]
        self.past, self.whole = self.past + n, True
        self.read.extend(tokens[0].tolist())
        return logits

    def rewind(self, tokens: int) -> None:
        """Forget what was read after the first `tokens` tokens: only where all states are KV caches, as a recurrence cannot."""
        self.past -= len(self.read) - tokens
        del self.read[tokens:]

    def prefill(self) -> Array:
        """Feed the pending prompt, of an encoder-decoder its start and what is forced; the logits [batch, 1, vocab] after it."""
        return self.feed(self.pending)


def read_context(session: Session, spec: Generation, ids: Sequence[int]) -> Array:
    """The memory [1, rows, hidden] of a context of token ids.

    The context is read in parts of at most `window` tokens, and their memories are joined. arXiv 2408.15518 reads contexts of one
    part; more parts are an extension of it. Raises UserError for an empty context, or tokens that the model does not have.
    """
    context = spec.context
    if context is None:
        raise UserError("this bundle's model reads no context; give all of it as the prompt")
    require_tokens(ids, context.vocab, "the context")
    parts = [ids[at : at + context.window] for at in range(0, len(ids), context.window)]
    return np.concatenate([_memory(session, spec, context, part) for part in parts], 1)


def _memory(session: Session, spec: Generation, context: ContextSpec, part: Sequence[int]) -> Array:
    """The memory of one part of a context."""
    if not context.tokens:
        return session.run("context", {"input_ids": np.array([part], np.int64)}, {})["memory"]
    ids = np.array([[*part, *context.tokens]], np.int64)
    state = session.new_state(1, ids.shape[1], "context")
    rows = []
    for at in range(0, ids.shape[1], spec.prefill_chunk):
        tokens = ids[:, at : at + spec.prefill_chunk]
        wanted = np.arange(max(0, len(part) - at), tokens.shape[1], dtype=np.int64)
        inputs = {
            "input_ids": tokens,
            "past_length": np.array([at], np.int64),
            "logit_positions": wanted if len(wanted) else np.array([tokens.shape[1] - 1], np.int64),
        }
        memory = session.run("context", inputs, state)["memory"]
        if len(wanted):
            rows.append(memory)
    return np.concatenate(rows, 1)


def generate(
    session: Session,
    spec: Generation,
    prompt: Prompt,
    new_tokens: int,
    sampling: Sampling = GREEDY,
    memory: Array | None = None,
    observe: Observer | None = None,
    rule: TokenRule | None = None,
) -> Generator[int, None, Ending]:
    """Yield the tokens after `prompt` until an end token (not yielded), `new_tokens` of them, or the end of the context.

    memory: for a "memory" task, what `read_context` returned. observe, rule: as of `continued`. The generator's return value says
    why it ended.
    """
    stream = Stream(session, spec, [prompt], new_tokens, memory)
    return (yield from continued(stream, stream.pending, new_tokens, sampling, observe, rule))


def continued(
    stream: Stream,
    tokens: Array,
    new_tokens: int,
    sampling: Sampling = GREEDY,
    observe: Observer | None = None,
    rule: TokenRule | None = None,
) -> Generator[int, None, Ending]:
    """As `generate`, where the stream has read what comes before `tokens` [1, n].

    observe: sees each token before it is given. rule: what may be said next; None: anything.
    """
    rng, spec = np.random.default_rng(sampling.seed), stream.spec
    logits = stream.feed(tokens)
    read, written = list(stream.read), list[int]()
    while True:
        scores = logits[0, -1] if rule is None else rule(written, logits[0, -1])
        token = sampling.pick(scores, rng, read, written)
        if token in spec.eos_ids:
            return "end"
        if observe is not None:
            observe(token, logits[0, -1])
        yield token
        written.append(token)
        if len(written) == new_tokens:
            return "limit"
        if stream.past >= stream.capacity:
            return "context"
        logits = stream.feed(np.array([[token]], np.int64))


def generate_batch(
    session: Session,
    spec: Generation,
    prompts: Sequence[Prompt],
    new_tokens: int,
    contexts: Sequence[Sequence[int]] = (),
) -> list[list[int]]:
    """Greedy tokens for each prompt. Prompts of an encoder-decoder run as one padded batch, others one by one.

    contexts: for a "memory" task, one for each prompt, or none.
    """
    if spec.task != "seq2seq":
        memories: list[Array | None] = [read_context(session, spec, c) for c in contexts]
        memories = memories or [None] * len(prompts)
        return [list(generate(session, spec, p, new_tokens, memory=m)) for p, m in zip(prompts, memories, strict=True)]
    stream = Stream(session, spec, prompts, new_tokens)
    results: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    logits = stream.prefill()
    for _ in range(min(new_tokens, stream.capacity)):
        chosen = logits[:, -1].argmax(-1)
        for row in list(open_rows):
            if int(chosen[row]) in spec.eos_ids:
                open_rows.discard(row)
            else:
                results[row].append(int(chosen[row]))
        if not open_rows or stream.past >= stream.capacity:
            break
        logits = stream.feed(chosen[:, None].astype(np.int64))
    return results
