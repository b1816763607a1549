"""Tables and sizes as plain text."""

from __future__ import annotations

import io
from collections.abc import Collection

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def text(*parts: Table | str) -> str:
    """Tables and lines as plain text, so wide that no line folds."""
    out = io.StringIO()
    console = Console(file=out, width=200, no_color=True, highlight=False, markup=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


def table(*columns: str, left: Collection[str] = (), title: str | None = None) -> Table:
    """An empty table. The first column and those named in `left` are set to the left, the others, numbers, to the right."""
    empty = Table(box=SIMPLE, title=title, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        empty.add_column(column, justify="left" if i == 0 or column in left else "right", overflow="fold")
    return empty


def size(count: float) -> str:
    """Bytes in MB or GB (powers of ten)."""
    return (
        f"{count / 1e9:.2f} GB"
        if count >= 1e9
        else f"{count / 1e6:.2f} MB"
        if count >= 1e5
        else f"{count / 1e3:.1f} kB"
    )
