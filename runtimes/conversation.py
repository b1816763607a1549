"""Prompts that begin alike, such as the turns of a chat: what a decoder has read already is not read again. No torch.

A KV cache can also go back to where two prompts part; a recurrent state cannot, so there a prompt that is not a continuation is
read from its beginning. An encoder reads each prompt whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..checkpoints.prompt import AS_IT_IS, ChatOptions, Prompt, read_messages, read_prompt
from ..errors import UserError
from .answer import NO_STOPS, Answer, Stops
from .generate import Observer, Stream, continued, generate
from .sampling import GREEDY, Sampling
from .session import Array
from .text_generation import OpenBundle

Message = Mapping[str, Any]


class PrefixCache:
    """One decoding state, and the tokens that are in it.

    Attributes:
        reused: tokens of the last prompt that were in the state already.
        fed: tokens of it that had to be read.
    """

    def __init__(self, opened: OpenBundle, memory: Array | None = None) -> None:
        """memory: of a "memory" task, what a context gave."""
        opened.require_generator()
        self._opened, self._memory = opened, memory
        self._spec = opened.bundle.manifest.generation
        states = [] if self._spec.task == "seq2seq" else opened.bundle.graph("decoder").updated_states
        self._rewinds = all(state.kind == "kv" for state in states)
        self._stream: Stream | None = None
        self._before = 0  # positions of the memory, ahead of the prompt
        self.reused = self.fed = 0

    def answer(
        self,
        ids: Sequence[int],
        new_tokens: int,
        sampling: Sampling = GREEDY,
        stops: Stops = NO_STOPS,
        observe: Observer | None = None,
    ) -> Answer:
        """What follows the prompt `ids`. The answer before it must have been read or closed. observe: as of `continued`.

        Raises UserError for a prompt that does not fit the context.
        """
        spec, text = self._spec, self._opened.tokenizer.stream()
        if spec.task == "seq2seq":
            self.reused, self.fed = 0, len(ids)
            tokens = generate(self._opened.session, spec, ids, new_tokens, sampling, observe=observe)
            return Answer(tokens, text, stops, len(ids))
        if len(ids) >= spec.max_context:
            raise UserError(f"the prompt has {len(ids)} tokens, the bundle's context is {spec.max_context}")
        stream, pending = self._resumed(ids)
        return Answer(continued(stream, pending, new_tokens, sampling, observe), text, stops, len(ids))

    def shared(self, ids: Sequence[int]) -> int:
        """How many tokens of `ids` need not be read."""
        stream = self._stream
        if stream is None or not stream.whole:
            return 0
        count = min(_shared(stream.read[self._before :], ids), len(ids) - 1)
        return count if self._rewinds or count == len(stream.read) - self._before else 0

    def _resumed(self, ids: Sequence[int]) -> tuple[Stream, Array]:
        """A stream that has read the longest possible beginning of `ids`, and the tokens [1, n] that are left, one at least."""
        stream, shared = self._stream, self.shared(ids)
        if stream is not None and shared > 0:
            stream.rewind(self._before + shared)
            self.reused, self.fed = shared, len(ids) - shared
            return stream, np.array([ids[shared:]], np.int64)
        self._stream = None  # the buffers go before new ones are made
        room = self._spec.max_context
        stream = Stream(self._opened.session, self._spec, [ids], room, self._memory)
        self._before = stream.pending.shape[1] - len(ids)
        self._stream, self.reused, self.fed = stream, 0, len(ids)
        return stream, stream.pending


@dataclass(frozen=True)
class _Turn:
    """A prompt as it was rendered and read, and the answer that followed."""

    text: str
    ids: list[int]


class Conversation:
    """A chat with a bundle: messages in, answers out.

    Attributes:
        messages: what was said, the system message first where there is one.
        cache: the state behind it.
        notes: lines about the last prompt.
    """

    def __init__(
        self,
        opened: OpenBundle,
        chat: ChatOptions = AS_IT_IS,
        memory: Array | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        """chat: its system message begins the conversation. memory: of a "memory" task."""
        self._opened, self._chat = opened, replace(chat, system=None)
        self.cache = PrefixCache(opened, memory)
        self.messages: list[Message] = []
        self.notes: list[str] = []
        self._new_tokens = max_new_tokens or opened.bundle.manifest.generation.max_new_tokens
        self._last: _Turn | None = None
        if chat.system is not None:
            self.system(chat.system)

    def system(self, text: str) -> None:
        """Begin anew under this system message."""
        self.messages = [{"role": "system", "content": text}]

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def say(self, text: str, sampling: Sampling, stops: Stops = NO_STOPS) -> Answer:
        """The answer to `text`; when it has been read, `heard` keeps it. Raises UserError for what no prompt can be made of."""
        self.messages.append({"role": "user", "content": text})
        self.notes = []
        try:
            prompt = self._prompt()
        except UserError:
            self.messages.pop()
            raise
        self._last = _Turn(prompt.text, prompt.ids)
        spec = self._opened.bundle.manifest.generation
        return self.cache.answer(prompt.ids, min(self._new_tokens, spec.max_context - 1), sampling, stops)

    def heard(self, answer: Answer, text: str) -> None:
        """Keep an answer, whole or not, as what the assistant said."""
        self.messages.append({"role": "assistant", "content": text})
        if self._last is not None:
            kept = answer.whole  # else the tokens are more than the text
            self._last = _Turn(self._last.text + text, [*self._last.ids, *answer.ids]) if kept else None

    def _prompt(self) -> Prompt:
        """The prompt of all messages; the oldest turns are left out where the context does not hold them."""
        room = self._opened.bundle.manifest.generation.max_context
        least = max(8, min(self._new_tokens, room // 4))
        while True:
            prompt = self._rendered()
            turns = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
            if len(prompt.ids) + least <= room or len(turns) == 1:
                break
            self.notes.append("the conversation is longer than the context; its oldest turn is left out")
            del self.messages[turns[0] : turns[1]]
            self._last = None
        self.notes.extend(prompt.notes)
        return prompt

    def _rendered(self) -> Prompt:
        """What the template makes of the messages. The tokens of the turns before stay those that were read and written."""
        tokenizer = self._opened.tokenizer
        prompt = None
        if self._chat.use is not False:
            prompt = read_messages(tokenizer, self.messages, self._chat)
        if prompt is None:
            continues = self._opened.bundle.manifest.generation.task != "seq2seq"
            return read_prompt(tokenizer, str(self.messages[-1]["content"]), continues, replace(self._chat, use=False))
        last = self._last
        if last is not None and prompt.text.startswith(last.text):
            rest = tokenizer.encode(prompt.text[len(last.text) :], special=False)
            if rest and rest[0] in tokenizer.special_ids:  # no token reaches over the border
                return replace(prompt, ids=[*last.ids, *rest])
        return prompt


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    for i, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return i
    return min(len(first), len(second))
