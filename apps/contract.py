"""`app.json`: all that a client needs of a bundle, one file for every platform. No torch is imported.

Its JSON schema is docs/app.schema.json. Paths are relative to the folder that `app.json` lies in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..bundle import (
    CHECKPOINT,
    Bundle,
    ContextSpec,
    EmbeddingSpec,
    Generation,
    GraphSpec,
    PortSpec,
    SamplingSpec,
    StateSpec,
    Token,
)
from ..checkpoints.tokenizer import Tokenizer
from ..errors import UserError
from ..runtimes.session import array_bytes, sized
from ..system.hashes import of_file
from ..system.reading import one_line
from ..targets.onnx.oldest import read_oldest
from .tokenizer_parts import TokenizerParts

TASKS = ("seq2seq", "causal", "memory", "embed")
"""What there are clients for; the last makes vectors of texts."""

APP = "app.json"
TRACES = "traces.json"
TOKENIZER = "tokenizer.json"
_SWAPPED_COPIES = 2
_USER = "\u2402question\u2403"  # stands for the user's words in a rendered chat; no template has it


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileFact(_Strict):
    """A file: its SHA-256 (hex) and bytes. A client refuses any other: damaged weights load without an error."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class AppGraph(_Strict):
    """A graph: its file, what goes in and out, and the oldest ONNX Runtime that opens it (`because`: what older ones lack).

    A state that is `updated` goes in as `name` and comes out as `name_out`; one buffer serves as both where its kind is "kv", two
    that change places otherwise. One that is not updated is the output of another graph.
    """

    name: str
    file: str
    inputs: tuple[PortSpec, ...]
    outputs: tuple[PortSpec, ...]
    states: tuple[StateSpec, ...]
    onnxruntime: str
    because: str


class AppTokenizer(_Strict):
    """How text becomes tokens: the file, its model's kind, and the ids that stand around a prompt without a chat template.

    bos: one of two begin-of-text tokens is left out. unknown: of what the vocabulary does not have.
    """

    file: str
    kind: str
    before: tuple[Token, ...]
    after: tuple[Token, ...]
    bos: Token | None
    unknown: Token | None


class AppChat(_Strict):
    """The chat template, in jinja, and what it makes of one question: the words between `before` and `after`.

    trims: whether it takes white space off the ends of the words. No template for a lone question: before and after are None.
    """

    template: str
    before: str | None
    after: str | None
    trims: bool


class AppMemory(_Strict):
    """Bytes that a client takes beside its runtime: weights, the states of one stream with the whole context, and their sum."""

    weights: int
    states: int
    total: int


class AppStops(_Strict):
    """What ends an answer: tokens, and strings that an app may add to."""

    tokens: tuple[Token, ...]
    strings: tuple[str, ...] = ()


class Matrix(_Strict):
    """A matrix that a client expands when it loads: float32 [columns, rows] at `offset` of the expanded file.

    codes, scales: where they lie in the weights' file, (offset, bytes). Codes [rows, columns] are `bits` wide, lowest bits first; a
    scale float32 holds for `block` of a row. A weight is (code - 2 ** (bits - 1)) * scale.
    """

    offset: int
    rows: int
    columns: int
    bits: int
    block: int
    codes: tuple[int, int]
    scales: tuple[int, int]


class Expanded(_Strict):
    """A file that is not stored: a client makes it of the weights' file when it loads."""

    file: str
    of: str
    bytes: int
    matrices: tuple[Matrix, ...]


class AppCoreml(_Strict):
    """A Core ML package beside the graphs: its folder, its functions, and its files, which belong to it alone.

    A client of ONNX Runtime leaves it out of what it checks, and may be shipped without.
    """

    package: str
    functions: tuple[str, ...]
    files: dict[str, FileFact]


class App(_Strict):
    """`app.json`. embedding: of the task "embed", what its graph `encoder` makes of a text: one vector, `sentence_embedding`.
    coreml: where the bundle has a package and the platform runs it.
    """

    schema_version: Literal[1] = 1
    name: str
    model_type: str
    task: Literal["seq2seq", "causal", "memory", "embed"]
    bits: float
    weights: int
    graphs: tuple[AppGraph, ...]
    decoder_start: Token | None
    forced: tuple[Token, ...]
    pad: Token
    vocab: int
    max_context: int
    max_new_tokens: int
    prefill_chunk: int
    context: ContextSpec | None
    embedding: EmbeddingSpec | None = None
    sampling: SamplingSpec
    stops: AppStops
    tokenizer: AppTokenizer | None
    chat: AppChat | None
    memory: AppMemory
    expanded: Expanded | None = None
    fingerprint: str
    files: dict[str, FileFact]
    coreml: AppCoreml | None = None

    @property
    def oldest_runtime(self) -> str:
        """The oldest ONNX Runtime that opens every graph."""
        return max((g.onnxruntime for g in self.graphs), key=lambda v: tuple(map(int, v.split("."))))


def make_app(
    bundle: Bundle,
    name: str,
    files: Mapping[str, Path],
    tokenizer: Tokenizer | None,
    parts: TokenizerParts | None,
    expanded: Expanded | None = None,
    coreml: AppCoreml | None = None,
) -> App:
    """The contract of a bundle's ONNX artefact.

    files: name in the app -> the file that it will be. tokenizer, parts: None for a bundle without one. expanded: of a form whose
    weights a client expands. coreml: of a platform that runs it. Raises UserError for a task that no client has a loop for.
    """
    manifest, spec = bundle.manifest, bundle.manifest.generation
    require_task(bundle)
    graphs_folder = next(path.parent for key, path in files.items() if key.endswith(".onnx"))
    floors = read_oldest(graphs_folder)
    graphs = tuple(
        AppGraph(
            name=g.name,
            file=f"{g.name}.onnx",
            inputs=g.inputs,
            outputs=g.outputs,
            states=g.states,
            onnxruntime=str(floors[g.name]["release"]),
            because=str(floors[g.name]["because"]),
        )
        for g in manifest.graphs
    )
    weights = sum(path.stat().st_size for path in files.values())
    if expanded is not None:
        weights += 2 * expanded.bytes  # the file and the runtime's copy of it, until the last graph is open
    states = states_bytes(manifest.graphs, spec)
    return App(
        name=name,
        model_type=manifest.model_type,
        task=spec.task,  # type: ignore[arg-type]  # require_task
        bits=round(manifest.average_bits, 4),
        weights=manifest.weights,
        graphs=graphs,
        decoder_start=spec.decoder_start,
        forced=spec.forced,
        pad=spec.pad_id,
        vocab=spec.vocab,
        max_context=spec.max_context,
        max_new_tokens=spec.max_new_tokens,
        prefill_chunk=spec.prefill_chunk,
        context=spec.context,
        embedding=spec.embedding,
        sampling=spec.sampling or SamplingSpec(),
        stops=AppStops(tokens=tuple(sorted(spec.eos_ids))),
        tokenizer=None if tokenizer is None or parts is None else _tokenizer(tokenizer, parts, spec),
        chat=None if tokenizer is None or spec.embedding is not None else _chat(tokenizer),
        memory=AppMemory(weights=weights, states=states, total=weights + states),
        expanded=expanded,
        fingerprint=manifest.files[f"{CHECKPOINT}/model.safetensors"],
        files=file_facts(files),
        coreml=coreml,
    )


def file_facts(files: Mapping[str, Path]) -> dict[str, FileFact]:
    """Name in the app -> what the file is, in the order of names."""
    return {key: FileFact(sha256=of_file(path), bytes=path.stat().st_size) for key, path in sorted(files.items())}


def require_task(bundle: Bundle) -> None:
    """Raise UserError for a bundle that there is no client for."""
    spec = bundle.manifest.generation
    where = one_line(bundle.path)
    if spec.speech is not None:
        raise UserError(f"{where}: this model reads sound, and no app here has a microphone's side; use 'run --audio'")
    if spec.task not in TASKS:
        raise UserError(
            f"{where}: apps are made of models of text ({', '.join(TASKS)}), and this is a {spec.task} bundle; "
            "docs/using-the-onnx-graphs.md shows how an app runs its graphs"
        )


def states_bytes(graphs: Iterable[GraphSpec], spec: Generation) -> int:
    """Bytes of the states of one stream that uses the whole context, those that change places twice."""
    sizes = {"batch": 1, "capacity": spec.max_context, "source": spec.max_context}
    states = {s.name: s for g in graphs for s in g.states}
    copies = {name: 1 if s.kind in ("kv", "cross") else _SWAPPED_COPIES for name, s in states.items()}
    return sum(copies[n] * array_bytes(sized(s.shape, sizes), s.dtype) for n, s in states.items())


def _tokenizer(tokenizer: Tokenizer, parts: TokenizerParts, spec: Generation) -> AppTokenizer:
    before, after = tokenizer.special_tokens()
    if spec.task not in ("seq2seq", "embed") and after and after[-1] in tokenizer.eos_ids:
        after = after[:-1]  # as `checkpoints.prompt` does: the model is to go on
    return AppTokenizer(
        file=TOKENIZER,
        kind=parts.model,
        before=tuple(before),
        after=tuple(after),
        bos=tokenizer.bos_id,
        unknown=tokenizer.unk_id,
    )


def _chat(tokenizer: Tokenizer) -> AppChat | None:
    """The default template, and what it puts around a lone question where it leaves the words whole."""
    source = tokenizer.chat_template
    if source is None:
        return None
    none = AppChat(template=source, before=None, after=None, trims=False)
    try:
        plain, spaced = (tokenizer.apply_chat([{"role": "user", "content": c}]) for c in (_USER, f"  {_USER} "))
    except UserError:  # a template that takes no such chat
        return none
    if plain is None or spaced is None or plain.count(_USER) != 1:
        return none
    before, after = plain.split(_USER)
    if spaced not in (plain, f"{before}  {_USER} {after}"):
        return none
    return AppChat(template=source, before=before, after=after, trims=spaced == plain)
