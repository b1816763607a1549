"""The web application: OpenAI's paths over an `Engine`. Starlette routes, pydantic checks, the engine's thread answers."""

from __future__ import annotations

import asyncio
import base64
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..bundle import require_tokens
from ..checkpoints.prompt import ChatOptions, read_messages
from ..errors import UserError
from ..system.reading import MEBIBYTE, one_line
from .engine import Call, Engine, Event, Full, Job, TokenScore
from .protocol import Asked, ChatRequest, CompletionRequest, EmbeddingRequest, given_texts
from .wire import DONE, REASONS, ChatForm, Form, Refused, TextForm, sent

LARGEST_BODY = 16 * MEBIBYTE
MOST_JOBS = 128
"""Answers to one request."""

MOST_TEXTS = 2048
"""Texts of one request for embeddings, as many as OpenAI's own."""

_BUSY = 429
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class _Choice:
    """One answer of a request: where its events arrive, and how long its prompt is."""

    job: Job
    events: asyncio.Queue[Event]


class Service:
    """The paths of one bundle.

    Args:
        engine: what answers.
        name: the model's name in answers.
        api_key: what clients must send; None: nothing.
        chat: how messages become a prompt.
    """

    def __init__(self, engine: Engine, name: str, api_key: str | None = None, chat: ChatOptions | None = None) -> None:
        self.engine, self.name, self._key = engine, name, api_key
        self._chat = chat or ChatOptions()
        self._spec = engine.opened.bundle.manifest.generation
        self._created = int(time.time())

    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/health", self._guarded(self._health), methods=["GET"]),
            Route("/v1/models", self._guarded(self._models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._guarded(self._models), methods=["GET"]),
            Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
            Route("/v1/embeddings", self._guarded(self._embeddings), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded(self._chat_completions), methods=["POST"]),
        ]
        return Starlette(routes=routes)

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                if self._key is not None and request.url.path != "/health":
                    given = request.headers.get("authorization", "").removeprefix("Bearer ")
                    if not hmac.compare_digest(given.encode(), self._key.encode()):
                        raise Refused(401, "the API key is wrong or missing", code="invalid_api_key")
                return await handler(request)
            except Refused as refused:
                return refused.response()
            except UserError as error:
                return Refused(400, one_line(error, 400)).response()
            except Full:
                return Refused(_BUSY, "too many requests are waiting; try again later").response()
            except ClientDisconnect:
                return Response(status_code=499)

        return guarded

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": self._created, "owned_by": "edgewright"}
        model["max_context"] = self._spec.max_context
        if (name := request.path_params.get("name")) is not None:
            if name != self.name:
                raise Refused(404, f"this server has {self.name}, not {one_line(name, 80)}", code="model_not_found")
            return JSONResponse(model)
        return JSONResponse({"object": "list", "data": [model]})

    async def _embeddings(self, request: Request) -> Response:
        asked, opened = await _read(request, EmbeddingRequest), self.engine.opened
        if self._spec.embedding is None:
            raise Refused(400, f"{self.name} is no model of embeddings", "model")
        if asked.dimensions not in (None, self._spec.embedding.size):
            raise Refused(
                400, f"the vectors have {self._spec.embedding.size} numbers, not {asked.dimensions}", "dimensions"
            )
        given = given_texts(asked.input)
        if not 0 < len(given) <= MOST_TEXTS:
            raise Refused(400, f"{len(given)} texts in one request; 1 to {MOST_TEXTS} are read", "input")

        def tokens(text: str | list[int]) -> list[int]:
            if isinstance(text, str):
                return opened.encode_texts([text])[0]
            require_tokens(text, self._spec.vocab, "a text")
            return text[: self._spec.max_context]

        ids = await asyncio.to_thread(lambda: [tokens(text) for text in given])
        vectors = await self._called(lambda: opened.embed_ids(ids))
        data = [
            {"object": "embedding", "index": i, "embedding": packed(vector, asked.encoding_format)}
            for i, vector in enumerate(vectors)
        ]
        count = sum(map(len, ids))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": self.name, "usage": usage})

    async def _called(self, run: Callable[[], Any]) -> Any:
        """What `run` gives in the engine's thread."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if answer.cancelled():
                return
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)

        def done(result: Any, error: Exception | None) -> None:
            loop.call_soon_threadsafe(settle, result, error)

        self.engine.submit(Call(run, done))
        return await answer

    def _require_text(self) -> None:
        if self._spec.task == "embed":
            raise Refused(400, f"{self.name} is a model of embeddings; use /v1/embeddings", "model")
        if self._spec.speech is not None:
            raise Refused(400, f"{self.name} reads sound, which this server does not take", "model")

    async def _completions(self, request: Request) -> Response:
        asked = await _read(request, CompletionRequest)
        self._require_text()
        given = given_texts(asked.prompt)
        if not 0 < len(given) * asked.n <= MOST_JOBS:
            raise Refused(400, f"{len(given) * asked.n} answers in one request; 1 to {MOST_JOBS} are given", "prompt")
        # Encoding a long text takes a while, which must not hold the event loop.
        prompts = await asyncio.to_thread(lambda: [self._plain(prompt) for prompt in given])
        form = TextForm(self.name, self._spell)
        return await self._answers(request, asked, form, prompts, asked.max_tokens, asked.logprobs)

    async def _chat_completions(self, request: Request) -> Response:
        asked = await _read(request, ChatRequest)
        self._require_text()
        tools = asked.tools if asked.tool_choice == "auto" else None
        chat = replace(self._chat, tools=tools, arguments={**self._chat.arguments, **asked.chat_template_kwargs})
        messages = asked.messages
        if self._chat.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._chat.system}, *messages]
        # Rendering takes milliseconds, which must not hold the event loop.
        prompt = await asyncio.to_thread(read_messages, self.engine.opened.tokenizer, messages, chat)
        if prompt is None:
            raise Refused(400, "the model has no chat template; use /v1/completions", "messages")
        require_tokens(prompt.ids, self._spec.vocab, "the prompt")
        best = (asked.top_logprobs or 0) if asked.logprobs else None
        return await self._answers(request, asked, ChatForm(self.name, self._spell), [prompt.ids], asked.most, best)

    def _plain(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a prompt without a template. Raises UserError for an empty one, and tokens that the model lacks."""
        ids = prompt if isinstance(prompt, list) else self.engine.opened.read_prompt(prompt, ChatOptions(use=False)).ids
        require_tokens(ids, self._spec.vocab, "the prompt")
        return ids

    def _spell(self, token: int) -> str:
        tokenizer = self.engine.opened.tokenizer
        return tokenizer.decode([token]) or tokenizer.spelling(token)

    async def _answers(
        self,
        request: Request,
        asked: Asked,
        form: Form,
        prompts: Sequence[Sequence[int]],
        most: int | None,
        best: int | None,
    ) -> Response:
        """Queue the jobs of a request, and answer it whole or as a stream."""
        sampling, stops = asked.sampling(self.engine.opened.default_sampling()), asked.stops()
        new = min(most or self._spec.max_new_tokens, self._spec.max_context - 1)
        choices = []
        for i, ids in enumerate(prompt for prompt in prompts for _ in range(asked.n)):
            events: asyncio.Queue[Event] = asyncio.Queue()
            drawn = replace(sampling, seed=(sampling.seed + i) % (1 << 63))
            choices.append(_Choice(Job(ids, new, _sender(events), drawn, stops, best), events))
        try:
            for choice in choices:
                self.engine.submit(choice.job)
        except Full:
            _cancel(choices)
            raise
        if asked.stream:
            return StreamingResponse(self._streamed(asked, form, choices), media_type="text/event-stream")
        watch = asyncio.create_task(_left(request))
        try:
            return await self._whole(asked, form, choices, watch)
        finally:
            watch.cancel()
            _cancel(choices)

    async def _whole(self, asked: Asked, form: Form, choices: Sequence[_Choice], watch: asyncio.Task[None]) -> Response:
        """The answer at once. Raises ClientDisconnect when the client goes."""
        made, new, reused = [], 0, 0
        for i, choice in enumerate(choices):
            text, scores = "", list[TokenScore]()
            while True:
                event = await _next(choice, watch)
                text += event.text
                scores.extend(event.scores)
                if event.last:
                    break
            if event.error is not None:
                raise _refused(event.error)
            new, reused = new + event.new_tokens, reused + event.reused
            made.append(form.answer(i, text, REASONS[str(event.reason)], scores))
        return JSONResponse(form.whole(made, _usage(asked, choices, new, reused)))

    async def _streamed(self, asked: Asked, form: Form, choices: Sequence[_Choice]) -> AsyncIterator[str]:
        """Server-sent events: the pieces of all answers as they come. It is closed when the client goes."""
        new = reused = 0
        waiting = {asyncio.ensure_future(c.events.get()): i for i, c in enumerate(choices)}
        try:
            for i in range(len(choices)):
                if (beginning := form.beginning(i)) is not None:
                    yield form.event(beginning)
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    i, event = waiting.pop(task), task.result()
                    if event.error is not None:
                        yield sent(_refused(event.error).body())
                        return
                    if event.text or event.scores:
                        yield form.event(form.piece(i, event.text, event.scores))
                    if event.reason is not None:
                        new, reused = new + event.new_tokens, reused + event.reused
                        yield form.event(form.piece(i, None, reason=REASONS[event.reason]))
                    else:
                        waiting[asyncio.ensure_future(choices[i].events.get())] = i
            if asked.stream_options is not None and asked.stream_options.include_usage:
                yield form.event(usage=_usage(asked, choices, new, reused))
            yield DONE
        finally:
            for task in waiting:
                task.cancel()
            _cancel(choices)


async def _read(request: Request, kind: type[Model]) -> Model:
    """The request's body. Raises Refused for what is too long, no JSON, or no such request."""
    if int(request.headers.get("content-length") or 0) > LARGEST_BODY:
        raise Refused(413, f"the request has more than {LARGEST_BODY} bytes")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise Refused(413, f"the request has more than {LARGEST_BODY} bytes")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(p) for p in first["loc"][:1]) or None
        message = one_line(first["msg"].removeprefix("Value error, "), 200)
        raise Refused(400, f"{where}: {message}" if where else message, where) from None


async def _left(request: Request) -> None:
    """Return when the client goes."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


async def _next(choice: _Choice, watch: asyncio.Task[None]) -> Event:
    """The next event of an answer. Raises ClientDisconnect when the client goes."""
    event = asyncio.ensure_future(choice.events.get())
    await asyncio.wait((event, watch), return_when=asyncio.FIRST_COMPLETED)
    if not event.done():
        event.cancel()
        raise ClientDisconnect
    return event.result()


def _cancel(choices: Sequence[_Choice]) -> None:
    for choice in choices:
        choice.job.cancelled.set()


def _sender(events: asyncio.Queue[Event]) -> Callable[[Event], None]:
    """What the engine's thread calls with an event."""
    loop = asyncio.get_running_loop()

    def send(event: Event) -> None:
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    return send


def _refused(error: tuple[str, str]) -> Refused:
    return Refused(400 if error[1] == "request" else 500, one_line(error[0], 400))


def _usage(asked: Asked, choices: Sequence[_Choice], new: int, reused: int) -> dict[str, Any]:
    """Tokens read and written; a prompt with several answers counts once."""
    prompt = sum(len(c.job.ids) for c in choices[:: asked.n])
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return counts | {"prompt_tokens_details": {"cached_tokens": min(reused, prompt)}}


def packed(vector: Any, form: str) -> Any:
    """A vector of float32 as numbers, or as base64 of its little-endian bytes."""
    if form == "base64":
        return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
    return [float(x) for x in vector]
