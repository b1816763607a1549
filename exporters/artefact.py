"""What every exporter takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a user may say of a target.

    max_positions bounds rotary tables and KV caches, in tokens. choices: what is asked of this target alone, such as compute
    capabilities (`targets.target.TargetOption`). prompts: token ids that calibrate static activation ranges, where a target
    has them. kv_cache: "float32" or "int8" (`models.kv_cache`).
    """

    max_positions: int
    choices: tuple[int, ...] | tuple[str, ...] = ()
    prompts: tuple[tuple[int, ...], ...] = ()
    kv_cache: Literal["float32", "int8"] = "float32"

    @property
    def numbers(self) -> tuple[int, ...]:
        """The choices of a target whose option takes whole numbers."""
        return tuple(int(choice) for choice in self.choices)

    @property
    def names(self) -> tuple[str, ...]:
        """The choices of a target whose option takes names."""
        return tuple(str(choice) for choice in self.choices)


@dataclass(frozen=True)
class Artefact:
    """What an exporter wrote into its folder.

    files: relative to the folder. ops: graph -> op -> nodes of the artefact. facts: what else a report should show
    (placement at build time, vendor estimates …), plain JSON values; each says in its key whether it is measured,
    vendor-simulated or predicted.
    """

    files: tuple[str, ...]
    ops: dict[str, dict[str, int]]
    facts: dict[str, object] = field(default_factory=dict)
