"""Where a key stands in a TOML text that tomllib has already read, so that an error can name the line."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Sequence

Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BASIC = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
_LITERAL = re.compile(r"'([^'\n]*)'")
_MULTILINE = re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}', re.DOTALL)
_SCALAR = re.compile(r"[^,\]}\n#]*")
_ESCAPE = re.compile(r'\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[btnfre"\\])')
_ESCAPED = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", "e": "\x1b"}


def line_of(text: str, path: Sequence[str | int]) -> tuple[int, int]:
    """(line, depth) of the longest part of `path` that the text holds, its first `depth` keys; lines count from 1.

    text: valid TOML. path: keys, and indices of arrays, as in pydantic's `loc`. (1, 0) where not even the first key is there.
    """
    scan = _Scan(text.replace("\r\n", "\n"), tuple(path))
    with contextlib.suppress(
        RecursionError, ValueError
    ):  # too deep, or a form unknown here: what was found before stands
        scan.document()
    return scan.text.count("\n", 0, scan.found) + 1, scan.depth


class _Scan:
    """One pass over the text. found: where the longest part of `wanted` starts."""

    def __init__(self, text: str, wanted: Path) -> None:
        self.text, self.wanted = text, wanted
        self.at = self.found = self.depth = 0

    def document(self) -> None:
        table: Path = ()
        arrays: Counter[Path] = Counter()
        while self._skip(_BLANK) < len(self.text):
            start = self.at
            if not self._take("["):
                self._pair(table)
                continue
            repeated = self._take("[")
            self._skip(_SPACE)
            table = ()
            for key in self._keys():
                table = (*table, key)
                if table in arrays:
                    table = (*table, arrays[table] - 1)
            if repeated:
                if isinstance(table[-1], int):
                    table = table[:-1]
                arrays[table] += 1
                table = (*table, arrays[table] - 1)
            self._see(table, start)
            self.at = self.text.index("]", self.at) + (2 if repeated else 1)

    def _pair(self, table: Path) -> None:
        """A key, an equals sign, a value."""
        start = self.at
        path = (*table, *self._keys())
        self._see(path, start)
        self.at = self.text.index("=", self.at) + 1
        self._value(path)

    def _value(self, path: Path) -> None:
        self._skip(_SPACE)
        if self._take("["):
            index = 0
            while self._skip(_BLANK) < len(self.text) and not self._take("]"):
                self._see((*path, index), self.at)
                self._value((*path, index))
                self._skip(_BLANK)
                self._take(",")
                index += 1
        elif self._take("{"):
            while self._skip(_BLANK) < len(self.text) and not self._take("}"):
                self._pair(path)
                self._skip(_BLANK)
                self._take(",")
        else:
            for form in (_MULTILINE, _BASIC, _LITERAL, _SCALAR):
                if match := form.match(self.text, self.at):
                    self.at = match.end()
                    break

    def _keys(self) -> list[str]:
        """A dotted key."""
        keys = []
        while True:
            self._skip(_SPACE)
            if match := _BASIC.match(self.text, self.at):
                keys.append(_ESCAPE.sub(_unescaped, match[1]))
            elif match := _LITERAL.match(self.text, self.at):
                keys.append(match[1])
            else:
                match = _BARE.match(self.text, self.at)
                if match is None:
                    raise ValueError(f"no key at {self.at}")
                keys.append(match[0])
            self.at = match.end()
            self._skip(_SPACE)
            if not self._take("."):
                return keys

    def _see(self, path: Path, start: int) -> None:
        same = 0
        for ours, theirs in zip(path, self.wanted, strict=False):
            if ours != theirs:
                break
            same += 1
        if same > self.depth:
            self.depth, self.found = same, start

    def _skip(self, form: re.Pattern[str]) -> int:
        match = form.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return self.at

    def _take(self, mark: str) -> bool:
        taken = self.text.startswith(mark, self.at)
        self.at += taken
        return taken


def _unescaped(match: re.Match[str]) -> str:
    code = match[1]
    return chr(int(code[1:], 16)) if len(code) > 1 else _ESCAPED.get(code, code)
