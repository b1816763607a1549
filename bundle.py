"""The bundle on disk: manifest, hashes, opening and checking. No torch enters: an app-side tool must open one in a blink.

A bundle is a folder: `manifest.json`, `tokenizer.json`, `checkpoint/` (the quantized checkpoint, source of every
artefact and reference of every check), a folder per target, `reports/`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import UserError, VerificationFailure

if TYPE_CHECKING:
    from .graph import Graph

SCHEMA = 1
MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint"
REPORTS = "reports"
_MANIFEST_LIMIT = 64 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PortSpec(_Strict):
    """A graph input or output; strings in `shape` are symbolic dimensions."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class StateSpec(PortSpec):
    kind: str
    updated: bool


class GraphSpec(_Strict):
    """A graph's ports and states, as `graph.Graph` has them, without the program."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    inputs: tuple[PortSpec, ...]
    outputs: tuple[PortSpec, ...]
    states: tuple[StateSpec, ...] = ()

    @staticmethod
    def of(graph: Graph) -> GraphSpec:
        def kind(dtype: object) -> str:
            return str(dtype).removeprefix("torch.")

        return GraphSpec(
            name=graph.name,
            inputs=tuple(PortSpec(name=p.name, dtype=kind(p.dtype), shape=p.shape) for p in graph.inputs),
            outputs=tuple(PortSpec(name=p.name, dtype=kind(p.dtype), shape=p.shape) for p in graph.outputs),
            states=tuple(
                StateSpec(name=s.name, dtype=kind(s.dtype), shape=s.shape, kind=s.kind, updated=s.updated)
                for s in graph.states
            ),
        )


class Generation(_Strict):
    """What the generate loop needs: the kind of loop, where it starts, where it stops, and how far it can go."""

    task: Literal["seq2seq", "causal"]
    decoder_start: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    vocab: int = Field(gt=0)
    max_context: int = Field(gt=0)
    max_new_tokens: int = Field(gt=0)


class TargetEntry(_Strict):
    """One artefact: its files, op counts and sizes. `stored_bytes` are the weight bytes it really takes."""

    format: str
    files: tuple[str, ...]
    ops: dict[str, dict[str, int]]
    facts: dict[str, Any] = {}
    stored_bytes: int
    ideal_bytes: int


class Manifest(_Strict):
    """`manifest.json`. Paths are relative to the bundle and cannot leave it."""

    schema_version: Literal[1] = 1
    source: str
    source_fingerprint: str
    model_type: str
    graphs: tuple[GraphSpec, ...]
    generation: Generation
    average_bits: float
    weights: int
    targets: tuple[TargetEntry, ...]
    prompts: tuple[tuple[int, ...], ...]
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
        return files


class Bundle:
    """An opened bundle: `path` and `manifest`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @staticmethod
    def open(path: str | Path) -> Bundle:
        """Read and validate the manifest. Raises UserError if there is none, it is damaged, or of another version."""
        root = Path(path)
        file = root / MANIFEST
        if not file.is_file():
            raise UserError(f"{root} is not a bundle: no {MANIFEST} in it; make one with 'edgewright export'")
        if file.stat().st_size > _MANIFEST_LIMIT:
            raise UserError(f"{file} is {file.stat().st_size} bytes; no manifest is that large")
        try:
            raw = json.loads(file.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not JSON ({error}); export the bundle again") from None
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA:
            raise UserError(
                f"{file}: schema version {version!r}, this edgewright reads {SCHEMA}; export the bundle again"
            )
        try:
            return Bundle(root, Manifest.model_validate(raw))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in first["loc"])
            raise UserError(f"{file}: {where}: {first['msg']}; export the bundle again") from None

    def graph(self, name: str) -> GraphSpec:
        return next(g for g in self.manifest.graphs if g.name == name)

    def target(self, format: str) -> TargetEntry:
        """The artefact of a format. Raises UserError naming those the bundle has."""
        for entry in self.manifest.targets:
            if entry.format == format:
                return entry
        have = ", ".join(t.format for t in self.manifest.targets)
        raise UserError(f"{self.path} holds no {format} artefact; it has: {have}")

    def check_files(self) -> None:
        """Raise VerificationFailure naming the first file that is missing or does not match its hash."""
        for name, digest in sorted(self.manifest.files.items()):
            file = self.path / name
            if not file.resolve().is_relative_to(self.path.resolve()):
                raise VerificationFailure(f"{name}: a link leads out of the bundle")
            if not file.is_file():
                raise VerificationFailure(f"{name}: missing from the bundle")
            if sha256(file) != digest:
                raise VerificationFailure(f"{name}: the file is not what was exported (its SHA-256 differs)")

    def write_report(self, name: str, report: dict[str, Any]) -> Path:
        """Write `reports/<name>.json` beside the artefacts (reports are not hashed: they change with every check)."""
        folder = self.path / REPORTS
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.json"
        path.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
        return path


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write manifest.json through a temporary name."""
    temporary = root / f".{MANIFEST}.partial"
    temporary.write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n")
    temporary.replace(root / MANIFEST)


def hash_files(root: Path) -> dict[str, str]:
    """SHA-256 of every file under `root` but the manifest and the reports, by relative POSIX path."""
    found = sorted(p for p in root.rglob("*") if p.is_file())
    names = {p.relative_to(root).as_posix(): p for p in found}
    return {n: sha256(p) for n, p in names.items() if n != MANIFEST and not n.startswith(f"{REPORTS}/")}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
