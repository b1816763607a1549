"""The bundle on disk: its manifest, opened and checked. No torch is imported, so that a tool opens a bundle fast.

A bundle is a folder: `manifest.json`, `checkpoint/` (the quantized checkpoint with its tokenizer, from which every artefact is
made and with which it is compared), a folder for each target, `reports/`.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import UserError, VerificationFailure
from .system.hashes import first_fault, first_odd_entry, of_files
from .system.reading import one_line, read_json_object

if TYPE_CHECKING:
    from .graph import Graph, Port, State

SCHEMA = 1
MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint"
WEIGHTS = f"{CHECKPOINT}/model.safetensors"
REPORTS = "reports"
_MANIFEST_LIMIT = 64 << 20
EXAMPLES = "examples.safetensors"
"""Inputs that a "module" is compared on: tensors `<number>.<graph>.<input>`."""

_READ_BY_VERIFY = (f"{CHECKPOINT}/config.json", WEIGHTS)
_MOST_FACTS = 1 << 20  # letters of one target's facts as JSON; a real target has a few thousand


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


MOST_IDS = 1 << 32
"""Tokens have smaller numbers."""

Size = Annotated[int, Field(ge=1, le=1 << 24)]
Count = Annotated[int, Field(ge=0, le=1 << 48)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, lt=MOST_IDS)]
Name = Annotated[str, Field(max_length=256)]
Shape = Field(max_length=16)


class PortSpec(_Strict):
    """A graph input or output; strings in `shape` are symbolic dimensions."""

    name: Name
    dtype: Literal["float32", "float16", "bfloat16", "int64", "int32", "int8", "bool"]
    shape: Annotated[tuple[Size | Name, ...], Shape]


class StateSpec(PortSpec):
    """What a graph carries from call to call; only the sizes of a batch, a cache and a source may vary."""

    shape: Annotated[tuple[Size | Literal["batch", "capacity", "source"], ...], Shape]
    kind: Name
    updated: bool


class GraphSpec(_Strict):
    """The ports and states of a `graph.Graph`, without its program."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")
    inputs: tuple[PortSpec, ...]
    outputs: tuple[PortSpec, ...]
    states: tuple[StateSpec, ...] = ()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        _refuse_repeated("the input", [p.name for p in (*self.inputs, *self.states)])
        _refuse_repeated("the output", [p.name for p in self.outputs])
        return self

    @property
    def updated_states(self) -> tuple[StateSpec, ...]:
        """The states that the graph writes."""
        return tuple(s for s in self.states if s.updated)

    @staticmethod
    def of(graph: Graph) -> GraphSpec:
        """The description of a graph."""

        def port(p: Port | State) -> dict[str, Any]:
            return {"name": p.name, "dtype": str(p.dtype).removeprefix("torch."), "shape": p.shape}

        return GraphSpec.model_validate(
            {
                "name": graph.name,
                "inputs": tuple(port(p) for p in graph.inputs),
                "outputs": tuple(port(p) for p in graph.outputs),
                "states": tuple(port(s) | {"kind": s.kind, "updated": s.updated} for s in graph.states),
            }
        )


PREFILL_CHUNK = 128
"""Tokens of a prompt fed in one call, so that activations stay small and a causal kernel skips later tokens.

Recurrences take fewer (`ops.recurrence`); benchmarks/RESULTS.md has the measurements.
"""


class ContextSpec(_Strict):
    """How a decoder-decoder (arXiv 2408.15518) turns a context into memory: rows of `hidden` numbers before the prompt.

    window: the most context tokens of one memory; a longer context gives several, joined, with at most `rows` rows in all.
    vocab: of the context's tokens. tokens: memory tokens read after each part, whose outputs are the memory; without them the
    graph `context` takes a part in one call. prefix: tokens before the memory. splice: "exact", or "released" as in the
    published Dolphin code: one position early, in place of the prefix's last token, with token 0 after the memory.
    """

    window: Size
    hidden: Size
    rows: Size
    vocab: Size
    tokens: tuple[Token, ...] = ()
    prefix: tuple[Token, ...] = ()
    splice: Literal["exact", "released"] = "exact"


class SoundSpec(_Strict):
    """What the encoder of a speech model reads of a sound: one channel of `rate` samples a second, cut into windows.

    kind: "log-mel": `input_features`, a spectrogram of `mels` bands over frames of `fft` samples, one every `hop`, of a whole
    window that silence fills. "samples": `input_values`, rows of `row` samples, each a position of the encoder; it reads `tail`
    samples beyond its row, so the last ones are masked. window: the most samples of one call. positions: of the encoder's output
    then.
    """

    kind: Literal["log-mel", "samples"]
    rate: int = Field(ge=1000, le=384_000)
    window: Size
    positions: int = Field(ge=1, le=1 << 16)
    mels: int = Field(0, ge=0, le=1024)
    fft: int = Field(0, ge=0, le=1 << 16)
    hop: int = Field(0, ge=0, le=1 << 16)
    row: int = Field(0, ge=0, le=1 << 16)
    tail: int = Field(0, ge=0, le=1 << 16)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.kind == "log-mel":
            if not (self.mels and 2 <= self.hop <= self.fft) or self.window % self.hop or self.row or self.tail:
                raise ValueError(f"no spectrogram of {self.mels} bands, frames of {self.fft} and steps of {self.hop}")
            if self.window < self.fft:
                raise ValueError(f"a window of {self.window} samples holds no frame of {self.fft}")
        elif not self.row or self.mels or self.fft or self.hop:
            raise ValueError(f"no rows of {self.row} samples")
        elif self.window < self.row + self.tail or self.rows(self.window) != self.positions:
            raise ValueError(
                f"a window of {self.window} samples has {self.rows(self.window)} rows, not {self.positions}"
            )
        return self

    @property
    def port(self) -> str:
        """The input of the graph `encoder`."""
        return "input_features" if self.kind == "log-mel" else "input_values"

    def real_rows(self, samples: int) -> int:
        """Positions of the kind "samples" that so many samples give, the last filled up with silence."""
        return max(1, -(-(samples - self.tail) // self.row))

    def rows(self, samples: int) -> int:
        """Rows of the kind "samples": the real positions', and those that the last one reads beyond."""
        return self.real_rows(samples) + -(-self.tail // self.row)

    @property
    def seconds(self) -> float:
        """Of a window."""
        return self.window / self.rate


class SpeechSpec(_Strict):
    """How sound becomes text.

    suppress: tokens that are never generated; begin_suppress: nor as the first. no_timestamps: the token that asks for text alone;
    behind it in the vocabulary is one token for each position of a window, its time. Without it the model tells no times.
    languages, tasks: tokens that the decoder is told a language and a task by, of a model that has several. first_within: the most
    seconds before the first timestamp; None for any. tokens_a_second: no more are generated of a sound; None for no limit.
    """

    sound: SoundSpec
    suppress: Annotated[tuple[Token, ...], Field(max_length=1 << 16)] = ()
    begin_suppress: Annotated[tuple[Token, ...], Field(max_length=1 << 16)] = ()
    no_timestamps: Token | None = None
    languages: Annotated[dict[Name, Token], Field(max_length=1024)] = {}
    tasks: Annotated[dict[Literal["transcribe", "translate"], Token], Field(max_length=2)] = {}
    first_within: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = None
    tokens_a_second: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None

    @property
    def first_timestamp(self) -> int | None:
        """The token of time 0; None of a model that tells no times."""
        return None if self.no_timestamps is None else self.no_timestamps + 1

    def tokens(self) -> list[int]:
        """All tokens that are named."""
        named = [*self.suppress, *self.begin_suppress, *self.languages.values(), *self.tasks.values()]
        return named if self.no_timestamps is None else [*named, self.no_timestamps]


class SamplingSpec(_Strict):
    """How the model's makers have a token drawn, as generation_config.json says; the names are `runtimes.sampling.Sampling`'s.

    temperature 0 is greedy.
    """

    temperature: Annotated[float, Field(ge=0, le=1e3, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=1e-2, le=1e2, allow_inf_nan=False)] = 1.0
    no_repeat_ngram: Annotated[int, Field(ge=0, le=1 << 10)] = 0


Pooling = Literal["cls", "max", "mean", "mean_sqrt_len", "weighted_mean", "last"]
"""How the vectors of a text's tokens become one; of several the results lie side by side."""

PromptText = Annotated[str, Field(max_length=4096)]
_QUERY, _DOCUMENT = ("query",), ("document", "passage", "corpus")


class EmbeddingSpec(_Strict):
    """What an "embed" bundle makes of a text: one vector of `size` numbers, of length 1 where it is `normalised`.

    similarity: how two of them are compared. prompts: what may be put before a text, by name; default_prompt: the name of the
    one that holds where none is asked for. lower_case: a text is put into lower case first.
    """

    size: Size
    pooling: Annotated[tuple[Pooling, ...], Field(min_length=1, max_length=6)]
    normalised: bool
    similarity: Literal["cosine", "dot", "euclidean", "manhattan"] = "cosine"
    prompts: Annotated[dict[Name, PromptText], Field(max_length=64)] = {}
    default_prompt: Name | None = None
    lower_case: bool = False

    @model_validator(mode="after")
    def _default_is_one(self) -> Self:
        if self.default_prompt is not None and self.default_prompt not in self.prompts:
            raise ValueError(f"default_prompt {one_line(self.default_prompt, 80)} is none of the prompts")
        return self

    def prompt(self, name: str | None) -> str:
        """The prompt of this name, or the default one. Raises UserError, naming those there are, for another name."""
        name = self.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(one_line(n, 40) for n in self.prompts) or "none"
            raise UserError(f"--prompt-name {one_line(name, 60)} is no prompt of this model; it has: {known}")
        return self.prompts[name]

    def role(self, query: bool) -> str:
        """The prompt for what is asked (query), or for what is searched, by the names that models give them."""
        names = [name for name in (_QUERY if query else _DOCUMENT) if name in self.prompts]
        return self.prompt(names[0] if names else None)

    def prepared(self, text: str, prompt: str) -> str:
        """What the tokenizer reads."""
        whole = prompt + text
        return whole.lower() if self.lower_case else whole


class Generation(_Strict):
    """What running a model needs: the kind of loop, where it starts and stops, and its limits.

    task: a "module" has no loop, its graphs run as they are; vocab and max_context are then the limits of its inputs. "embed" has
    none either: a text of at most max_context tokens becomes one vector, as `embedding` says.
    forced: what every answer of an encoder-decoder begins with, behind decoder_start: fed, not generated, such as a language.
    prefill_chunk: the most tokens of one call of the decoder. context: of a "memory" task. sampling: None is greedy.
    speech: of a "seq2seq" task whose encoder reads sound.
    """

    task: Literal["seq2seq", "causal", "memory", "embed", "module"]
    decoder_start: Token | None = None
    forced: tuple[Token, ...] = ()
    eos_ids: tuple[Token, ...] = ()
    pad_id: Token = 0
    vocab: Size
    max_context: Size
    max_new_tokens: Size
    prefill_chunk: int = Field(PREFILL_CHUNK, gt=0, le=4096)
    context: ContextSpec | None = None
    embedding: EmbeddingSpec | None = None
    sampling: SamplingSpec | None = None
    speech: SpeechSpec | None = None

    @property
    def pooling(self) -> tuple[str, ...]:
        """Of an "embed" task; () of others."""
        return () if self.embedding is None else self.embedding.pooling


def require_tokens(ids: Sequence[int], vocab: int, whose: str) -> None:
    """Raise UserError, whose line begins with `whose`, unless there are tokens and the model has all of them."""
    if not ids:
        raise UserError(f"{whose} has no tokens; give some text")
    if min(ids) < 0 or max(ids) >= vocab:
        worst = min(ids) if min(ids) < 0 else max(ids)
        raise UserError(
            f"{whose}: the tokenizer gives token {worst}, the model has {vocab}; is the tokenizer of another model?"
        )


NEEDED: dict[str, set[str]] = {
    "seq2seq": {"encoder", "cross_kv", "decoder"},
    "causal": {"decoder"},
    "memory": {"context", "decoder"},
    "embed": {"encoder"},
    "module": set(),
}
"""Task -> the graphs that its generate loop runs."""


class TargetEntry(_Strict):
    """One artefact: its files, ops and sizes.

    ops: graph -> op -> number of nodes. ideal_bytes: of the weights' codes and scales. stored_bytes: as the artefact stores them.
    """

    format: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")
    files: tuple[str, ...]
    ops: dict[Name, dict[Name, Count]]
    facts: dict[str, Any] = {}
    stored_bytes: Count
    ideal_bytes: Count

    @model_validator(mode="after")
    def _own_files_and_few_facts(self) -> Self:
        for name in self.files:
            if not name.startswith(f"{self.format}/"):
                raise ValueError(f"the file {one_line(name, 80)} lies outside the folder {self.format}")
        if len(json.dumps(self.facts, allow_nan=False)) > _MOST_FACTS:
            raise ValueError(f"facts of more than {_MOST_FACTS} letters")
        return self


class TunedNorms(_Strict):
    """Divergence from the original, nats a token, before and after the norms were tuned.

    It is measured on calibration data that GPTQ has seen but the tuning has not. tokens: how many the norms were tuned on.
    """

    before: Number
    after: Number
    tokens: Count


class Manifest(_Strict):
    """`manifest.json`. Paths are relative to the bundle and cannot lead out of it.

    prompts: the token ids that artefacts are compared on. contexts: of a "memory" task, one for each of `prompts`. files: path ->
    SHA-256. kv_cache: how the KV caches are stored. tuned_norms: only where norms were tuned to the codes.
    """

    schema_version: Literal[1] = 1
    source: str
    source_fingerprint: str
    model_type: str
    graphs: tuple[GraphSpec, ...]
    generation: Generation
    average_bits: Number = Field(ge=0, le=64)
    weights: Count
    targets: tuple[TargetEntry, ...] = Field(min_length=1)
    prompts: tuple[Annotated[tuple[Token, ...], Field(min_length=1)], ...]
    contexts: tuple[tuple[Token, ...], ...] = ()
    kv_cache: Literal["float32", "int8"] = "float32"
    tuned_norms: TunedNorms | None = None
    files: dict[str, str]
    tools: dict[str, str]
    verification: dict[str, Any] | None = None

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not name.isprintable():
                raise ValueError(f"the path {name!r} leaves the bundle")
            if path.as_posix() != name or name == ".":
                raise ValueError(f"the path {name!r} is not written plainly")
        # where letters of both cases are one, the second of such files replaces the first
        _refuse_repeated("the file", [unicodedata.normalize("NFC", name).casefold() for name in files])
        return files

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        """Check that every file to be read has a hash, and that the generate loop has its graphs and tokens."""
        _refuse_repeated("the target", [t.format for t in self.targets])
        _refuse_repeated("the graph", [g.name for g in self.graphs])
        needed = [*(f for t in self.targets for f in t.files), *_READ_BY_VERIFY]
        without_hash = sorted(set(needed) - set(self.files))
        if without_hash:
            raise ValueError(f"{one_line(without_hash[0], 120)} has no hash")
        spec = self.generation
        lacking = NEEDED[spec.task] - {g.name for g in self.graphs}
        if lacking:
            raise ValueError(f"a {spec.task} bundle needs the graph {min(lacking)}")
        if spec.task == "seq2seq" and spec.decoder_start is None:
            raise ValueError("a seq2seq bundle needs decoder_start")
        if not self.prompts and spec.task != "module" and spec.speech is None:
            raise ValueError("no prompts to compare on")
        if spec.speech is not None:
            self._check_speech(spec.speech)
        if spec.task == "memory" and spec.context is None:
            raise ValueError("a memory bundle needs generation.context")
        if spec.task == "embed" and spec.embedding is None:
            raise ValueError("an embed bundle needs generation.embedding")
        if len(self.contexts) not in (0, len(self.prompts)):
            raise ValueError(f"{len(self.contexts)} contexts do not fit {len(self.prompts)} prompts")
        lists = [*self.prompts, spec.forced, spec.context.prefix if spec.context is not None else ()]
        largest = max(spec.decoder_start or 0, spec.pad_id, *(token for tokens in lists for token in tokens))
        if spec.context is not None:
            context_tokens = [t for tokens in (*self.contexts, spec.context.tokens) for t in tokens]
            if max(context_tokens, default=0) >= spec.context.vocab:
                raise ValueError(
                    f"a context's token {max(context_tokens)} is not below its vocabulary of {spec.context.vocab}"
                )
        if largest >= spec.vocab:
            raise ValueError(f"token {largest} is not below the vocabulary of {spec.vocab}")
        return self

    def _check_speech(self, speech: SpeechSpec) -> None:
        """Raise ValueError unless tokens and sizes of speech are those of the model's graphs."""
        if self.generation.task != "seq2seq":
            raise ValueError("only a seq2seq bundle reads sound")
        if self.prompts:
            raise ValueError("a bundle that reads sound is compared on its examples, not on prompts")
        largest = max(speech.tokens(), default=0)
        if largest >= self.generation.vocab:
            raise ValueError(f"token {largest} of speech is not below the vocabulary of {self.generation.vocab}")
        sound, encoder = speech.sound, next(g for g in self.graphs if g.name == "encoder")
        ports = {p.name: p.shape for p in encoder.inputs}
        if sound.kind == "log-mel":
            wanted: dict[str, tuple[int | str, ...]] = {sound.port: ("batch", sound.mels, sound.window // sound.hop)}
            positions: int | str = sound.positions
        else:
            wanted = {sound.port: ("batch", "source", sound.row), "encoder_mask": ("batch", "source")}
            positions = "source"
        if ports != wanted or [p.shape[:2] for p in encoder.outputs] != [("batch", positions)]:
            raise ValueError(f"the graph encoder does not read a sound as generation.speech says ({sound.kind})")


class Bundle:
    """An opened bundle: `path` and `manifest`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @staticmethod
    def open(path: str | Path) -> Bundle:
        """Read and check the manifest. Raises UserError if there is none, or it is damaged or of another version."""
        root = Path(path)
        file = root / MANIFEST
        if not file.is_file():
            raise UserError(f"{root} is not a bundle: no {MANIFEST} in it; make one with 'edgewright export'")
        raw = read_json_object(file, _MANIFEST_LIMIT)
        version = raw.get("schema_version")
        if version != SCHEMA:
            raise UserError(
                f"{file}: schema version {one_line(repr(version), 40)}, this edgewright reads {SCHEMA}; "
                "export the bundle again"
            )
        try:
            return Bundle(root, Manifest.model_validate(raw))
        except ValidationError as error:
            first = error.errors()[0]
            where = one_line(".".join(str(p) for p in first["loc"]) or "manifest", 120)
            raise UserError(f"{file}: {where}: {one_line(first['msg'], 160)}; export the bundle again") from None

    def graph(self, name: str) -> GraphSpec:
        return next(g for g in self.manifest.graphs if g.name == name)

    def target(self, format: str) -> TargetEntry:
        """The artefact of a format. Raises UserError, naming those that the bundle has, if it lacks this one."""
        for entry in self.manifest.targets:
            if entry.format == format:
                return entry
        have = ", ".join(t.format for t in self.manifest.targets)
        raise UserError(f"{self.path} holds no {format} artefact; it has: {have}")

    def check_files(self, names: Iterable[str] | None = None) -> None:
        """Raise VerificationFailure naming the first file that is missing or has another hash. names: without, all files."""
        files = self.manifest.files
        found = first_fault(self.path, files if names is None else {name: files[name] for name in names})
        if found is not None:
            name, fault = found
            raise VerificationFailure(f"{one_line(name, 120)}: {fault}")

    def files_of(self, format: str) -> list[str]:
        """The files that running a target reads: its own, and all of the checkpoint but the weights.

        Raises UserError as `target` does.
        """
        folders = (f"{self.target(format).format}/", f"{CHECKPOINT}/")
        return [name for name in self.manifest.files if name.startswith(folders) and name != WEIGHTS]

    def check_target(self, format: str) -> None:
        """Check the hashes of `files_of`, before anything of them is loaded.

        Raises VerificationFailure as `check_files` does, UserError as `target` and `require_plain` do.
        """
        self.check_files(self.files_of(format))
        self.require_plain(format)

    def require_plain(self, format: str) -> None:
        """Raise UserError if a target's folder or the checkpoint's holds anything but regular files and folders.

        A library that opens a pipe waits for ever, and not every file that it opens has to be in the manifest.
        """
        for folder in (self.path / format, self.path / CHECKPOINT):
            found = first_odd_entry(folder, self.path)
            if found is not None:
                raise UserError(f"{one_line(found[0])}: {found[1]}; export the bundle again")

    def write_report(self, name: str, report: Mapping[str, object]) -> Path:
        """Write `reports/<name>.json`; reports have no hash, as every check writes them. Raises UserError if it cannot."""
        folder = self.path / REPORTS
        path, temporary = folder / f"{name}.json", folder / f".{name}.json.partial"
        if folder.is_symlink() or temporary.is_symlink():
            raise UserError(f"{folder}: a link in it could lead out of the bundle; remove it")
        try:
            folder.mkdir(exist_ok=True)
            temporary.unlink(missing_ok=True)  # it may be a pipe, which nobody reads
            with open(temporary, "x", encoding="utf-8") as file:
                file.write(json.dumps(report, indent=1, sort_keys=True) + "\n")
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror})") from None
        return path


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write manifest.json under a temporary name and rename it, so that it appears complete."""
    temporary = root / f".{MANIFEST}.partial"
    temporary.write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n")
    temporary.replace(root / MANIFEST)


def hash_files(root: Path, besides: str = REPORTS) -> dict[str, str]:
    """Relative POSIX path -> SHA-256, of every file under `root` but the manifest, reports and the folder `besides`."""
    paths = sorted(p for p in root.rglob("*") if p.is_file())
    names = {p.relative_to(root).as_posix(): p for p in paths}
    excluded = (f"{REPORTS}/", f"{besides}/")
    hashed = [n for n in names if n != MANIFEST and not n.startswith(excluded)]
    return dict(zip(hashed, of_files([names[n] for n in hashed]), strict=True))


def _refuse_repeated(what: str, names: Iterable[str]) -> None:
    """Raise ValueError naming what is there twice."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{what} {one_line(repeated[0], 80)} is there twice")
