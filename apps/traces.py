"""Golden traces: what the bundle itself answers, step by step, which every client must answer too. No torch is imported.

A step is the token with the largest logit, and the five largest logits. A client is fed the recorded tokens, so that one near tie
does not change all that follows. It fails where its best token is another one by a margin beyond the tolerance, which is measured:
twice the largest difference of those logits between the two arithmetics of ONNX Runtime, int8 and float32 activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..bundle import Bundle, Generation, Token
from ..checkpoints.tokenizer import Tokenizer
from ..runtimes.generate import Ending, Stream, read_context
from ..runtimes.registry import open_exact, open_session
from ..runtimes.session import Array, PlacedSession
from ..runtimes.text_embedding import embed_tokens

MOST_CASES, MOST_STEPS, TOP, MOST_VECTORS = 6, 24, 5, 12
LEAST_TOLERANCE = 1e-3
LEAST_DISTANCE = 1e-4
_DECIMALS, _VECTOR_DECIMALS = 4, 6

TEXTS = (
    "k n i g h t",
    "Hello, world!",
    "  two  spaces and a tab\there ",
    "line one\nline two\r\n\r\nline four",
    "don't they've I'M it'll 'quoted'",
    "12345 6.78 3rd 0x1F",
    "½ of ² is ⅷ, ① and ٣",
    "naïve café, e\u0301 and \u0041\u030a",
    "Straße, ÆØÅ, Ελληνικά, русский",
    "日本語のテキスト、中文字符。한국어",
    "🙂 👩‍👩‍👧 🇩🇪 and \U0001f680!",
    "a_b-c/d\\e{f}[g](h)<i>|j~k^l`m",
    "https://example.org/?q=1&r=%20#top",
    "\u00a0no-break\u2003em\u3000ideographic",
    "x" * 60,
    "",
    " ",
)
"""What each client's tokenizer is held to."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Step(_Strict):
    """The best token, and (token, logit) of the five largest logits, the largest first."""

    token: Token
    top: tuple[tuple[Token, float], ...]


class Case(_Strict):
    """A prompt, for a "memory" task behind a context, and the steps of its answer. The last may be an end token.

    text: what the tokenizer makes of the answer; None without one.
    """

    ids: tuple[Token, ...]
    context: tuple[Token, ...] = ()
    steps: tuple[Step, ...]
    ending: Literal["end", "limit", "context"]
    text: str | None


class TextCase(_Strict):
    """A text, its tokens without those that stand around a prompt, and the text that they make."""

    text: str
    ids: tuple[Token, ...]
    decoded: str


class VectorCase(_Strict):
    """A text of a model of embeddings, or None where only tokens are known: all its tokens, and its vector."""

    text: str | None
    ids: tuple[Token, ...]
    vector: tuple[float, ...]


class Traces(_Strict):
    """`traces.json`. vectors: of a model of embeddings, which has no cases; no number may be further off than the tolerance."""

    schema_version: Literal[1] = 1
    runtime: str
    new_tokens: int
    tolerance: Annotated[float, Field(gt=0)]
    cases: tuple[Case, ...]
    texts: tuple[TextCase, ...]
    vectors: tuple[VectorCase, ...] = ()


def make_traces(bundle: Bundle, tokenizer: Tokenizer | None) -> Traces:
    """The traces of a bundle's ONNX artefact as it ships, on one thread: of the prompts that it is compared on.

    Raises UserError if the artefact does not load.
    """
    shipped = open_session(bundle, "onnx", threads=1)
    exact = open_exact(bundle, "onnx", threads=1)
    assert exact is not None
    manifest, spec = bundle.manifest, bundle.manifest.generation
    texts = () if tokenizer is None else tuple(_text_case(tokenizer, text) for text in TEXTS)
    if spec.embedding is not None:
        vectors, difference = _vectors(bundle, tokenizer, shipped, exact)
        tolerance = round(max(LEAST_DISTANCE, 2 * difference), _VECTOR_DECIMALS)
        return Traces(runtime=shipped.how, new_tokens=0, tolerance=tolerance, cases=(), texts=texts, vectors=vectors)
    contexts = manifest.contexts or ((),) * len(manifest.prompts)
    new_tokens = min(MOST_STEPS, spec.max_new_tokens)
    cases, difference = list[Case](), 0.0
    for ids, context in list(zip(manifest.prompts, contexts, strict=True))[:MOST_CASES]:
        if not fits(spec, ids, context):
            continue
        case, logits = _case(shipped, spec, ids, context, new_tokens, tokenizer)
        others = replay(exact, spec, case, new_tokens)
        for step, ours, theirs in zip(case.steps, logits, others, strict=True):
            top = [token for token, _ in step.top]
            difference = max(difference, float(np.abs(ours[top] - theirs[top]).max()))
        cases.append(case)
    return Traces(
        runtime=shipped.how,
        new_tokens=new_tokens,
        tolerance=round(max(LEAST_TOLERANCE, 2 * difference), _DECIMALS),
        cases=tuple(cases),
        texts=texts,
    )


def _vectors(
    bundle: Bundle, tokenizer: Tokenizer | None, shipped: PlacedSession, exact: PlacedSession
) -> tuple[tuple[VectorCase, ...], float]:
    """Vectors of the first texts, or of the prompts that the bundle is compared on; and how far the two arithmetics are apart."""
    spec = bundle.manifest.generation
    assert spec.embedding is not None
    read: list[tuple[str | None, list[int]]] = [
        (None, list(ids)) for ids in bundle.manifest.prompts if fits(spec, ids, ())
    ]
    if tokenizer is not None:
        prompt = spec.embedding.prompt(None)
        wholes = [(text, spec.embedding.prepared(text, prompt)) for text in TEXTS if text.strip()]
        read = [(text, tokenizer.encode_within(whole, spec.max_context)[0]) for text, whole in wholes]
    read = [(text, ids) for text, ids in read if ids and max(ids) < spec.vocab][:MOST_VECTORS]
    ours, theirs = (embed_tokens(session, spec, [[*ids] for _, ids in read]) for session in (shipped, exact))
    numbers = [tuple(round(float(x), _VECTOR_DECIMALS) for x in vector) for vector in ours]
    cases = tuple(VectorCase(text=t, ids=tuple(ids), vector=v) for (t, ids), v in zip(read, numbers, strict=True))
    return cases, float(np.abs(ours - theirs).max(initial=0))


def fits(spec: Generation, ids: Sequence[int], context: Sequence[int]) -> bool:
    """Whether a prompt leaves room for an answer."""
    if spec.task in ("seq2seq", "embed"):
        return 0 < len(ids) <= spec.max_context
    rows = 0 if spec.context is None or not context else spec.context.rows
    lead = 0 if spec.context is None else len(spec.context.prefix)
    return len(ids) > 0 and len(ids) + rows + lead + 1 < spec.max_context


def _case(
    session: PlacedSession,
    spec: Generation,
    ids: Sequence[int],
    context: Sequence[int],
    new_tokens: int,
    tokenizer: Tokenizer | None,
) -> tuple[Case, list[Array]]:
    """The greedy answer, and its logits [vocab] of each step."""
    stream = _stream(session, spec, ids, context, new_tokens)
    logits, steps, said = [stream.prefill()[0, -1]], list[Step](), list[int]()
    while True:
        step = _step(logits[-1])
        steps.append(step)
        ending: Ending | None = None
        if step.token in spec.eos_ids:
            ending = "end"
        else:
            said.append(step.token)
            if len(said) == new_tokens:
                ending = "limit"
            elif stream.past >= stream.capacity:
                ending = "context"
        if ending is not None:
            text = None if tokenizer is None else tokenizer.decode(said)
            case = Case(ids=tuple(ids), context=tuple(context), steps=tuple(steps), ending=ending, text=text)
            return case, logits
        logits.append(stream.feed(np.array([[step.token]], np.int64))[0, -1])


def replay(session: PlacedSession, spec: Generation, case: Case, new_tokens: int) -> list[Array]:
    """The logits [vocab] of each step where a session is fed the recorded tokens."""
    stream = _stream(session, spec, case.ids, case.context, new_tokens)
    logits = [stream.prefill()[0, -1]]
    logits += (stream.feed(np.array([[step.token]], np.int64))[0, -1] for step in case.steps[:-1])
    return logits


def _stream(
    session: PlacedSession, spec: Generation, ids: Sequence[int], context: Sequence[int], new_tokens: int
) -> Stream:
    memory = read_context(session, spec, context) if context else None
    return Stream(session, spec, [ids], new_tokens, memory)


def _step(logits: Array) -> Step:
    best = np.argsort(-logits, kind="stable")[:TOP]
    return Step(token=int(logits.argmax()), top=tuple((int(t), round(float(logits[t]), _DECIMALS)) for t in best))


def _text_case(tokenizer: Tokenizer, text: str) -> TextCase:
    ids = tokenizer.encode(text, special=False) if text else []
    return TextCase(text=text, ids=tuple(ids), decoded=tokenizer.decode(ids))
