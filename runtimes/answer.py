"""An answer as it is written: pieces of text, stop strings, and why and how fast it ended. No torch is imported."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
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


class Answer(Iterator[str]):
    """The text of generated tokens, piece by piece.

    Attributes:
        ids: the tokens so far.
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
        self.ids: list[int] = []
        self.reason: Reason = "unfinished"
        self.prompt_tokens = prompt_tokens
        self.first_seconds = self.seconds = 0.0
        self._pieces = self._written(tokens, stream, stops)

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop writing."""
        self._pieces.close()

    @property
    def rate(self) -> float:
        """Tokens a second after the first one; 0 where there are none."""
        return (len(self.ids) - 1) / self.seconds if len(self.ids) > 1 and self.seconds > 0 else 0.0

    def _written(
        self, tokens: Generator[int, None, Ending], stream: DecodeStream, stops: Stops
    ) -> Generator[str, None, None]:
        held = ""
        for token in self._timed(tokens):
            if token in stops.tokens:
                self.reason = "stop"
                break
            self.ids.append(token)
            held += stream.put(token)
            before, stopped = _until(held, stops.strings)
            if stopped:
                self.reason = "stop"
                if before:
                    yield before
                return
            if before:
                yield before
                held = held[len(before) :]
        before, stopped = _until(held + stream.end(), stops.strings, last=True)
        if stopped:
            self.reason = "stop"
        if before:
            yield before

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


def _until(text: str, stops: Sequence[str], last: bool = False) -> tuple[str, bool]:
    """What of `text` may be shown, and whether a stop string follows it.

    What could be the beginning of a stop string is held back, unless this is the last of the text.
    """
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return text[: min(found)], True
    if last:
        return text, False
    kept = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - kept], False
