"""`embed`: a bundle becomes the project of a platform. Everything that can be refused is refused before anything is written."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from ..bundle import CHECKPOINT, Bundle
from ..checkpoints.tokenizer import Tokenizer
from ..errors import UserError
from ..system.reading import one_line
from .card import make_card
from .contract import APP, TOKENIZER, TRACES, App, make_app, require_task
from .platforms import Platform, platform_named, require_fit
from .render import render
from .tokenizer_parts import TokenizerParts, read_parts, require_known
from .traces import make_traces

MODEL = "model"
"""The folder of a project with what the model needs: what an app ships."""

_ONNX = "onnx"
_EXAMPLE = "Hello"
Note = Callable[[str], None]


@dataclass(frozen=True)
class EmbedOptions:
    """platform: its name. name: of the app; None is the bundle's folder. most_memory: bytes of the device, None for any.
    tokenizer: whether the app reads text; without, it takes token ids. check: whether the bundle's files are hashed first."""

    platform: str
    name: str | None = None
    most_memory: int | None = None
    tokenizer: bool = True
    check: bool = True


@dataclass(frozen=True)
class Project:
    """A project as it will be written. files: path -> contents, or a file to copy."""

    app: App
    files: Mapping[str, bytes | Path]

    @property
    def size(self) -> int:
        return sum(f.stat().st_size if isinstance(f, Path) else len(f) for f in self.files.values())


def embed(path: Path, output: Path, options: EmbedOptions, note: Note) -> Project:
    """Write the project of a bundle to the folder `output`, whole or not at all.

    A folder that is there is left alone: with the same contents that is all, else UserError says what differs. Raises UserError for
    what the platform cannot hold, VerificationFailure for a bundle whose files are not what was exported.
    """
    bundle = Bundle.open(path)
    platform = platform_named(options.platform)
    require_task(bundle)
    bundle.target(_ONNX)
    if options.check:
        bundle.check_target(_ONNX)
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"{one_line(output)} is no folder; give a new one with -o")
    project = _project(bundle, platform, options, note)
    if output.is_dir() and any(output.iterdir()):
        _require_same(project, output)
        note(f"{one_line(output)} is what this bundle gives: nothing was written")
    else:
        _write(project, output)
    return project


def _project(bundle: Bundle, platform: Platform, options: EmbedOptions, note: Note) -> Project:
    model: dict[str, Path] = {}
    for graph in bundle.manifest.graphs:
        model[f"{graph.name}.onnx"] = bundle.path / _ONNX / f"{graph.name}.onnx"
    model["weights.bin"] = bundle.path / _ONNX / "weights.bin"
    tokenizer, parts = _tokenizer(bundle, platform) if options.tokenizer else (None, None)
    if parts is not None:
        model[TOKENIZER] = bundle.path / CHECKPOINT / TOKENIZER
    name = options.name or bundle.path.resolve().name
    app = make_app(bundle, one_line(name, 80), model, tokenizer, parts)
    require_fit(app, platform, options.most_memory)
    note("running the bundle for its golden traces")
    traces = make_traces(bundle, tokenizer)
    values = {"app": app, "card": make_card(bundle, app), "prompt": _example(bundle, tokenizer)}
    files: dict[str, bytes | Path] = {f"{MODEL}/{key}": file for key, file in model.items()}
    files |= {f"{MODEL}/{APP}": json_bytes(app), f"{MODEL}/{TRACES}": json_bytes(traces)}
    return Project(app, files | render(platform.name, values))


def json_bytes(model: BaseModel) -> bytes:
    """A contract as it is written."""
    return (json.dumps(model.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode()


def _tokenizer(bundle: Bundle, platform: Platform) -> tuple[Tokenizer | None, TokenizerParts | None]:
    folder = bundle.path / CHECKPOINT
    if not (folder / TOKENIZER).is_file():
        return None, None
    parts = read_parts(folder / TOKENIZER)
    if platform.models is not None and platform.steps is not None:
        require_known(parts, platform.models, platform.steps, platform.name)
    return Tokenizer.from_dir(folder), parts


def _example(bundle: Bundle, tokenizer: Tokenizer | None) -> str:
    """A short prompt for the project's pages: the first one that the bundle is compared on, where it is plain text."""
    for ids in bundle.manifest.prompts if tokenizer is not None else ():
        assert tokenizer is not None
        text = tokenizer.decode(ids)
        if 0 < len(text) <= 60 and text.isprintable() and not set(text) & set("\"'`\\${}<>|") and "\ufffd" not in text:
            return text
    return _EXAMPLE


def _require_same(project: Project, output: Path) -> None:
    """Raise UserError, naming what differs, unless a folder holds the project's files with their contents."""
    differing = [name for name, contents in project.files.items() if not _same(output / name, contents)]
    if differing:
        shown = ", ".join(one_line(name, 60) for name in differing[:4]) + (", …" if len(differing) > 4 else "")
        raise UserError(
            f"{one_line(output)} is there, and {len(differing)} of {len(project.files)} files differ from what this bundle gives: "
            f"{shown}; give a new folder with -o and take over what you need"
        )


def _same(path: Path, contents: bytes | Path) -> bool:
    if not path.is_file():
        return False
    size = contents.stat().st_size if isinstance(contents, Path) else len(contents)
    if path.stat().st_size != size:
        return False
    return path.read_bytes() == (contents.read_bytes() if isinstance(contents, Path) else contents)


def _write(project: Project, output: Path) -> None:
    """Raises UserError if it cannot be written; nothing is left then."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if project.size > free:
            raise UserError(
                f"{one_line(output)}: the project takes {project.size} bytes, {free} are free; free some, or give another -o"
            )
        with _hidden(output) as folder:
            for name, contents in project.files.items():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(contents, Path):
                    shutil.copyfile(contents, target)
                else:
                    target.write_bytes(contents)
            folder.chmod(0o755)
            folder.rename(output)  # an empty folder there is replaced
    except OSError as error:
        raise UserError(f"{one_line(output)} cannot be written ({error.strerror}); choose another -o") from None


@contextmanager
def _hidden(output: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name[:64]}.", suffix=".partial", dir=output.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
