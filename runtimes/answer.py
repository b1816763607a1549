"""An answer as it is written: pieces of text, stop strings, and why and how fast it ended. No torch is imported."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal

from ..checkpoints.tokenizer import DecodeStream
from ..errors import UserError
from .generate import Ending

Reason = Literal["end", "limit", "context", "stop", "unfinished"]
"""As `Ending`; "stop": a stop string or stop token; "unfinished": it is being written, or was left."""

MOST_STOPS, LONGEST_STOP = 64, 1 << 12


@dataclass(frozen=True)
class Stops:
    """What ends an answer beside the model's end tokens. None of it is part of the answer.

    strings: texts. tokens: ids.
    """

    strings: tuple[str, ...] = ()
    tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Raises UserError for an empty string, and for too many or too long ones."""
        if not all(self.strings):
            raise UserError("--stop '' would stop before the first letter; give some text")
        if len(self.strings) > MOST_STOPS or max(map(len, self.strings), default=0) > LONGEST_STOP:
            raise UserError(f"--stop takes {MOST_STOPS} texts of at most {LONGEST_STOP} letters each")


NO_STOPS = Stops()


class Writer:
    """The text of one answer as its tokens are given to it, up to what stops it.

    Attributes:
        ids: the tokens so far.
        stopped: whether a stop string or stop token has come; no token may follow.
        whole: whether the text is that of the tokens: not before `end`, and not where a stop string was cut off.
    """

    def __init__(self, stream: DecodeStream, stops: Stops = NO_STOPS) -> None:
        self.ids: list[int] = []
        self.stopped = self.whole = self._cut = False
        self._stream, self._stops = stream, stops
        self._held = ""

    def put(self, token: int) -> str:
        """The text that may be shown after `token`; often empty."""
        if token in self._stops.tokens:
            self.stopped = True
            return ""
        self.ids.append(token)
        return self._shown(self._stream.put(token))

    def end(self) -> str:
        """What was held back. The last call."""
        if self._cut:
            return ""
        text = self._shown(self._stream.end(), last=True)
        self.whole = not self._cut
        return text

    def _shown(self, text: str, last: bool = False) -> str:
        """What of the held text and `text` is no beginning of a stop string; with `last`, all before one that is whole."""
        text, self._held = self._held + text, ""
        found = [at for stop in self._stops.strings if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = self._cut = True
            return text[: min(found)]
        stops = () if last else self._stops.strings
        kept = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


class Answer(Iterator[str]):
    """The text of generated tokens, piece by piece.

    Attributes:
        reason: why it ended.
        prompt_tokens: tokens that the model read first.
        first_seconds, seconds: until the first token, and from then on.
    """

    def __init__(
        self,
        tokens: Generator[int, None, Ending],
        stream: DecodeStream,
        stops: Stops = NO_STOPS,
        prompt_tokens: int = 0,
    ) -> None:
        self.reason: Reason = "unfinished"
        self.prompt_tokens = prompt_tokens
        self.first_seconds = self.seconds = 0.0
        self._writer = Writer(stream, stops)
        self._pieces = self._written(tokens)

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop writing."""
        self._pieces.close()

    @property
    def ids(self) -> list[int]:
        """The tokens so far."""
        return self._writer.ids

    @property
    def whole(self) -> bool:
        """Whether the text is that of the tokens: not where a stop string was cut off, or the writing was left."""
        return self._writer.whole

    @property
    def rate(self) -> float:
        """Tokens a second after the first one; 0 where there are none."""
        return (len(self.ids) - 1) / self.seconds if len(self.ids) > 1 and self.seconds > 0 else 0.0

    def _written(self, tokens: Generator[int, None, Ending]) -> Generator[str, None, None]:
        writer = self._writer
        for token in self._timed(tokens):
            if piece := writer.put(token):
                yield piece
            if writer.stopped:
                break
        if piece := writer.end():
            yield piece
        if writer.stopped:
            self.reason = "stop"

    def _timed(self, tokens: Generator[int, None, Ending]) -> Iterator[int]:
        """The tokens; their times are kept, and why they end."""
        began = time.perf_counter()
        try:
            while True:
                token = next(tokens)
                now = time.perf_counter()
                if not self.ids:
                    self.first_seconds, began = now - began, now
                self.seconds = now - began
                yield token
        except StopIteration as ended:
            if self.reason == "unfinished":
                self.reason = ended.value
        finally:
            tokens.close()
