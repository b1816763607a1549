"""OpenAI's answers as JSON: the two kinds of completion, whole and in pieces, and errors."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from starlette.responses import JSONResponse

from .engine import TokenScore

REASONS = {"end": "stop", "stop": "stop", "limit": "length", "context": "length"}
"""`Event.reason` -> finish_reason."""

Spell = Callable[[int], str]
"""The text of one token."""


class Refused(Exception):
    """A request that is answered by an error.

    status: of HTTP. param: the field that is to blame. code: OpenAI's name of the error.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error as an object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer to a request that has not been answered yet."""
        return JSONResponse(self.body(), self.status)


class Form(ABC):
    """The answer to one request: what all its objects have in common, and how an answer is written.

    model: the name of the model. spell: for log-probabilities.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    kind_of_pieces: ClassVar[str]

    def __init__(self, model: str, spell: Spell) -> None:
        self._id, self._created, self._model = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time()), model
        self._spell = spell

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer at once."""
        return {**self._head(self.kind), "choices": list(choices), "usage": usage}

    def event(self, *choices: dict[str, Any], **more: Any) -> str:
        """A server-sent event with pieces of answers."""
        return sent({**self._head(self.kind_of_pieces), "choices": list(choices), **more})

    def answer(self, index: int, text: str, reason: str, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """A whole answer."""
        logprobs = self._scores(scores) if scores else None
        return {"index": index, **self._text(text), "logprobs": logprobs, "finish_reason": reason}

    def piece(
        self, index: int, text: str | None, scores: Sequence[TokenScore] = (), reason: str | None = None
    ) -> dict[str, Any]:
        """A piece of an answer; text: None where there is none."""
        logprobs = self._scores(scores) if scores else None
        return {"index": index, **self._piece(text), "logprobs": logprobs, "finish_reason": reason}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    @abstractmethod
    def beginning(self, index: int) -> dict[str, Any] | None:
        """The piece before an answer's first text; None where there is none."""

    @abstractmethod
    def _text(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _piece(self, text: str | None) -> dict[str, Any]: ...

    @abstractmethod
    def _scores(self, scores: Sequence[TokenScore]) -> dict[str, Any]: ...


class TextForm(Form):
    """Of /v1/completions."""

    prefix, kind, kind_of_pieces = "cmpl", "text_completion", "text_completion"

    def beginning(self, index: int) -> None:
        return None

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _piece(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def _scores(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        return {
            "tokens": [self._spell(s.id) for s in scores],
            "token_logprobs": [s.logprob for s in scores],
            "top_logprobs": [{self._spell(i): p for i, p in s.best} for s in scores],
            "text_offset": [],
        }


class ChatForm(Form):
    """Of /v1/chat/completions."""

    prefix, kind, kind_of_pieces = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def beginning(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _piece(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def _scores(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        return {
            "content": [
                {**self._score(s.id, s.logprob), "top_logprobs": [self._score(*b) for b in s.best]} for s in scores
            ],
            "refusal": None,
        }

    def _score(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._spell(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}


def sent(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
"""The last event of a stream."""
