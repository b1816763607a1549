"""Values that a stranger may put where a config has another, and configs changed by them, key by key."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

Path = tuple[str | int, ...]
ABSENT = object()


def deep_list(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


HOSTILE: tuple[Any, ...] = (
    *(ABSENT, None, True, False, 0, -1, 1, 3, 7, 1 << 24, (1 << 24) + 1, 10**12, 10**400, -(10**400)),
    *(0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *("", "1", "auto", "\x1b[31m\n" * 200, "\ud800", [], [1], [[1]], ["\n"] * 3, [10**12] * 3, {}, {"a": 1}),
    *({"rope_type": "linear", "factor": math.inf}, {"factor": []}, deep_list(50), deep_list(5000)),
)


class Recorded(dict[str, Any]):
    """A section of a config that notes which keys are looked for in it."""

    def __init__(self, values: dict[str, Any], path: Path, seen: set[Path]) -> None:
        super().__init__({k: Recorded(v, (*path, k), seen) if isinstance(v, dict) else v for k, v in values.items()})
        self._path, self._seen = path, seen

    def get(self, key: str, default: Any = None) -> Any:
        self._seen.add((*self._path, key))
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._seen.add((*self._path, key))
        return super().__getitem__(key)


def places(config: dict[str, Any], read: Callable[[dict[str, Any]], object]) -> list[Path]:
    """The paths of a config that `read` looks at, those that it has, and the first element of each list."""
    seen: set[Path] = set()
    read(Recorded(config, (), seen))
    seen |= set(_own(config, ()))
    return sorted(seen, key=repr)


def _own(value: Any, path: Path) -> Iterator[Path]:
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, item in inner:
        yield from _own(item, (*path, key))


def changed(value: Any, path: Path, new: Any) -> Any:
    """A copy of a config with `new` at `path`; a section that is not there is made."""
    if not path:
        return new
    key, *rest = path
    if isinstance(value, list):
        copy: Any = list(value)
    else:
        copy = dict(value) if isinstance(value, dict) else {}
    if not rest and new is ABSENT:
        if isinstance(copy, dict):
            copy.pop(key, None)
        return copy
    old = copy[key] if isinstance(copy, list) else copy.get(key, {})
    copy[key] = changed(old, tuple(rest), new)
    return copy
