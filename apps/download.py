"""Weights that an app fetches instead of shipping them: in parts that a server and a phone can hold, each with its hash."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from ..errors import UserError
from ..system.hashes import of_file
from ..system.reading import shown

DOWNLOAD, UPLOAD = "download.json", "upload"
MOST_PART = 2_000_000_000
"""Bytes of a part: what a server serves of one file, and a phone counts in 32 bits."""

_CHUNK = 1 << 22
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Strict):
    """A part of a file: its name behind the base, its bytes and their SHA-256 (hex)."""

    name: str
    bytes: Annotated[int, Field(gt=0, le=MOST_PART)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class RemoteFile(_Strict):
    """A file of `app.json` that is fetched: its parts, one behind the other."""

    name: str
    parts: tuple[Part, ...]


class Download(_Strict):
    """`download.json`. base: the address that the names of parts stand behind; it ends with a slash."""

    schema_version: Literal[1] = 1
    base: str
    files: tuple[RemoteFile, ...]


def make_download(name: str, file: Path, url: str, work: Path) -> tuple[Download, dict[str, Path]]:
    """What an app fetches, and part -> the file to upload.

    work: a folder for parts that are made; a file of one part is that part. Raises UserError for an address that is none.
    """
    base, size = _base(url), file.stat().st_size
    if size <= MOST_PART:
        paths = {name: file}
    else:
        paths = {f"{name}.{number:03}": work / f"{name}.{number:03}" for number in range(-(-size // MOST_PART))}
        _split(file, list(paths.values()))
    parts = tuple(Part(name=key, bytes=path.stat().st_size, sha256=of_file(path)) for key, path in paths.items())
    return Download(base=base, files=(RemoteFile(name=name, parts=parts),)), paths


def _base(url: str) -> str:
    parts = urlsplit(url)
    if not (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)) or not parts.hostname:
        raise UserError(f"--weights-url {shown(url, 80)} is no address that starts with https://; give the folder's")
    if parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise UserError(f"--weights-url {shown(url, 80)} is no folder: names are put behind it; leave out ? and #")
    return url if url.endswith("/") else f"{url}/"


def _split(file: Path, into: list[Path]) -> None:
    with open(file, "rb") as source:
        for path in into:
            with open(path, "wb") as target:
                left = MOST_PART
                while left > 0 and (data := source.read(min(_CHUNK, left))):
                    target.write(data)
                    left -= len(data)
