"""Templates to files: `*.j2` in `apps/<platform>/` are rendered with jinja, every other file is taken as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from . import unicode_tables

_ROOM = Path(__file__).parent
_PARTS = "parts"


def render(platform: str, values: Mapping[str, Any]) -> dict[str, bytes]:
    """Path in the project -> contents, of a platform's templates. `parts/` holds what templates take in: other templates
    by `include`, texts in which braces are their own by `source`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ROOM),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["res"] = _resource
    folder, files = _ROOM / platform, dict[str, bytes]()

    def source(part: str) -> str:
        return (folder / _PARTS / part).read_text(encoding="utf-8").strip("\n")

    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith(f"{_PARTS}/"):
            continue
        if name.endswith(".j2"):
            text = environment.get_template(f"{platform}/{name}").render(
                source=source, unicode=unicode_tables, **values
            )
            files[name.removesuffix(".j2")] = text.encode()
        else:
            files[name] = path.read_bytes()
    return files


def _resource(text: str) -> str:
    """A text as Android's string resources write it: markup escaped, then quotes, backslashes and what begins a reference."""
    escaped = "".join({"&": "&amp;", "<": "&lt;", "'": "\\'", '"': '\\"', "\\": "\\\\"}.get(c, c) for c in text)
    return f"\\{escaped}" if escaped[:1] in ("@", "?") else escaped
