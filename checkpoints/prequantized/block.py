"""The block of config.json that says how weights were quantized. Each value is checked when it is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from ...system.reading import shown

MOST_GROUP = 1 << 20
"""The largest group size that is believed."""

ORIGINAL = "give the model before it was quantized"


@dataclass(frozen=True)
class Block:
    """values: the block's contents. where: what it is called in an error."""

    values: Mapping[str, Any]
    where: str

    def error(self, key: str, expected: str) -> UserError:
        return UserError(f"{self.where}: {key} is {shown(self.values.get(key), 60)}; {expected}; {ORIGINAL}")

    def integer(self, key: str, allowed: Iterable[int]) -> int:
        """One of some integers."""
        value, known = self.values.get(key), list(allowed)
        if not isinstance(value, int) or isinstance(value, bool) or value not in known:
            raise self.error(key, f"read here: {', '.join(map(str, known))}")
        return value

    def group(self, key: str, default: int | None = None) -> int:
        """A group size; 0 for one group in a row, which is written -1."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not (value == -1 or 0 < value <= MOST_GROUP):
            raise self.error(key, f"a group size is 1 to {MOST_GROUP}, or -1 for whole rows")
        return max(value, 0)

    def word(self, key: str, default: str, allowed: Iterable[str]) -> str:
        """One of some words, in any case."""
        value, known = self.values.get(key), list(allowed)
        value = default if value is None else value
        if not isinstance(value, str) or value.lower() not in known:
            raise self.error(key, f"read here: {', '.join(known)}")
        return value.lower()

    def inner(self, key: str) -> Block | None:
        """A block within; None where there is none."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, "an object is expected")
        return Block(value, f"{self.where}.{key}")


def grouping(group: int) -> str:
    """A group size in words."""
    return f"in groups of {group}" if group else "with one scale a row"
