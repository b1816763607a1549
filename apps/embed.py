"""`embed`: a bundle becomes the project of a platform. Everything that can be refused is refused before anything is written."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..bundle import CHECKPOINT, Bundle
from ..checkpoints.tokenizer import Tokenizer
from ..errors import UserError
from ..system.hashes import of_file
from ..system.reading import one_line
from .card import make_card
from .contract import APP, TOKENIZER, TRACES, App, make_app, require_task
from .coreml_package import read_package
from .download import DOWNLOAD, UPLOAD, make_download
from .expanded import write_expanded
from .platforms import PLATFORMS, Platform, platform_named, require_fit
from .render import render
from .tokenizer_parts import TokenizerParts, read_parts, require_known
from .traces import make_traces
from .vendor import Vendored, find_packages

_ONNX, _WEIGHTS = "onnx", "weights.bin"
_SITE_MODEL = PLATFORMS["web"].model
_EXAMPLE = "Hello"
Note = Callable[[str], None]


@dataclass(frozen=True)
class EmbedOptions:
    """platform: its name. name: of the app; None is the bundle's folder. packages: a node_modules folder, of "web".

    most_memory: bytes of the device, None for any. tokenizer: whether the app reads text; without, it takes token ids. check:
    whether the bundle's files are hashed first. weights_url: where the app fetches its weights, None for those that are shipped.
    """

    platform: str
    name: str | None = None
    packages: Path | None = None
    most_memory: int | None = None
    tokenizer: bool = True
    check: bool = True
    weights_url: str | None = None


@dataclass(frozen=True)
class Project:
    """A project as it will be written. files: path -> contents, or a file to copy. size: of all of them."""

    app: App
    files: Mapping[str, bytes | Path]
    size: int = 0


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
    if options.packages is not None and platform.name != "web":
        raise UserError(f"--packages is for --platform web; leave it out for {platform.name}")
    if options.weights_url is not None and not platform.fetches:
        fetching = ", ".join(name for name, p in PLATFORMS.items() if p.fetches)
        raise UserError(f"--weights-url is for --platform {fetching}; leave it out for {platform.name}")
    vendored = find_packages(options.packages) if platform.name == "web" else None
    if vendored is not None:
        platform = replace(platform, runtime=vendored.runtime)
    with tempfile.TemporaryDirectory(prefix="edgewright-embed-") as work:
        project = _project(bundle, platform, vendored, options, Path(work), note)
        if output.is_dir() and any(output.iterdir()):
            _require_same(project, output)
            note(f"{one_line(output)} is what this bundle gives: nothing was written")
        else:
            _write(project, output)
        return replace(project, size=_bytes(project.files))


def _project(
    bundle: Bundle, platform: Platform, vendored: Vendored | None, options: EmbedOptions, work: Path, note: Note
) -> Project:
    """work: a folder for files that are made."""
    folder, names = bundle.path / _ONNX, [g.name for g in bundle.manifest.graphs]
    tokenizer, parts = _tokenizer(bundle, platform) if options.tokenizer else (None, None)
    expanded = write_expanded(folder, names, _WEIGHTS, work) if platform.float_activations else None
    graphs = work if expanded is not None else folder
    model = {f"{name}.onnx": graphs / f"{name}.onnx" for name in names} | {_WEIGHTS: folder / _WEIGHTS}
    if parts is not None:
        model[TOKENIZER] = bundle.path / CHECKPOINT / TOKENIZER
    name = options.name or bundle.path.resolve().name
    coreml, package = read_package(bundle, options.check) if platform.coreml else (None, {})
    app = make_app(bundle, one_line(name, 80), model, tokenizer, parts, expanded, coreml)
    require_fit(app, platform, options.most_memory)
    shipped, files = dict[str, bytes | Path]({**model, **package}), dict[str, bytes | Path]()
    if options.weights_url is not None:
        download, parts_of_weights = make_download(_WEIGHTS, model[_WEIGHTS], options.weights_url, work)
        files |= {f"{UPLOAD}/{key}": file for key, file in parts_of_weights.items()}
        shipped = {key: file for key, file in shipped.items() if key != _WEIGHTS} | {DOWNLOAD: json_bytes(download)}
    elif platform.most_file is not None and app.files[_WEIGHTS].bytes > platform.most_file:
        raise UserError(
            f"--platform {platform.name}: {_WEIGHTS} has {app.files[_WEIGHTS].bytes} bytes, and an app ships files of at most "
            f"{platform.most_file}; give --weights-url, and the app fetches it"
        )
    note("running the bundle for its golden traces")
    shipped |= {APP: json_bytes(app), TRACES: json_bytes(make_traces(bundle, tokenizer))}
    files |= {f"{platform.model}/{key}": file for key, file in shipped.items()}
    values = {
        "app": app,
        "card": make_card(bundle, app),
        "prompt": _example(bundle, tokenizer),
        "url": options.weights_url,
    }
    if vendored is not None:
        files |= vendored.files
        return Project(app, files | _site(files, values, vendored))
    return Project(app, files | render(platform.name, values))


def _site(files: Mapping[str, bytes | Path], values: Mapping[str, Any], vendored: Vendored) -> dict[str, bytes]:
    """The rendered files of a site. Its service worker keeps the page's own files, under a version that is theirs."""
    values = {**values, "vendored": ", ".join(vendored.packages), "version": "", "shell": []}
    pages = render("web", values)
    own = {name: contents for name, contents in {**files, **pages}.items() if not name.startswith(f"{_SITE_MODEL}/")}
    kept = [name for name in sorted(own) if name not in ("sw.js", "README.md")] + [
        f"{_SITE_MODEL}/{APP}",
        f"{_SITE_MODEL}/{TRACES}",
    ]
    digest = hashlib.sha256()
    for name in kept:
        contents = own.get(name, files.get(name, b""))
        digest.update(of_file(contents).encode() if isinstance(contents, Path) else contents)
    shell = ["./", *(f"./{name}" for name in kept if name != "index.html")]
    return render("web", values | {"version": digest.hexdigest()[:16], "shell": shell})


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
        needed = _bytes(project.files)
        if needed > free:
            raise UserError(
                f"{one_line(output)}: the project takes {needed} bytes, {free} are free; free some, or give another -o"
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


def _bytes(files: Mapping[str, bytes | Path]) -> int:
    return sum(f.stat().st_size if isinstance(f, Path) else len(f) for f in files.values())


@contextmanager
def _hidden(output: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name[:64]}.", suffix=".partial", dir=output.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
