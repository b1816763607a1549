"""OpenAI's requests as this server reads them. What it does not do is refused by name; what changes nothing is passed over."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..runtimes.answer import LONGEST_STOP, MOST_STOPS, Stops
from ..runtimes.sampling import Sampling

MOST_ANSWERS = 16
_NOT_DONE = ("logit_bias", "functions", "function_call", "audio", "prediction", "web_search_options", "suffix")

Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Id = Annotated[int, Field(ge=0, lt=1 << 32)]


class StreamOptions(BaseModel):
    """usage: in a last chunk of its own."""

    include_usage: bool = False


class Asked(BaseModel):
    """What every kind of completion takes. None: as the model's makers have it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str = ""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 24)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=MOST_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _nothing_that_is_not_done(self) -> Any:
        for name in _NOT_DONE:
            if (self.model_extra or {}).get(name):
                raise ValueError(f"{name} is not supported by this server")
        return self

    def sampling(self, makers: Sampling) -> Sampling:
        """The makers' sampling with what the request changes; the seed random unless it is given."""
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        seed = secrets.randbits(31) if self.seed is None else self.seed % (1 << 63)
        kept = {f: getattr(makers, f) for f in (*names, "no_repeat_ngram")}
        if 0 < given.get("temperature", 0) < 1e-3:  # clients write 1e-6 for the best token
            given["temperature"] = 0.0
        return Sampling(**(kept | given), seed=seed)

    def stops(self) -> Stops:
        """What ends an answer."""
        strings = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Stops(tuple(strings), frozenset(self.stop_token_ids))


class CompletionRequest(Asked):
    """POST /v1/completions. prompt: a text or its ids, or a list of either."""

    prompt: str | list[Id] | list[str] | list[list[Id]]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] = False
    best_of: Literal[1] | None = None


class ResponseFormat(BaseModel):
    """Any text."""

    type: Literal["text"] = "text"


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] = "auto"
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] = {}

    @field_validator("messages")
    @classmethod
    def _plain(cls, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [_plain_message(message) for message in messages]

    @property
    def most(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings. input: a text or its ids, or a list of either."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str = ""
    input: str | list[Id] | list[str] | list[list[Id]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None


def given_texts(given: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """Each text of a request, as text or as ids."""
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [[i for i in given if isinstance(i, int)]]
    return [text for text in given if not isinstance(text, int)]


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is one text; its parts are joined. Raises ValueError for what is no text."""
    if not isinstance(message.get("role"), str):
        raise ValueError("each message needs a role")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part if isinstance(part, Mapping) else {} for part in content]
        if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            raise ValueError("a part of a message is no text; this model reads text alone")
        content = "".join(str(part["text"]) for part in parts)
    if content is not None and not isinstance(content, str):
        raise ValueError("the content of a message is no text")
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role, "content": content}
