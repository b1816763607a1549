"""What every exporter takes and gives. A leaf: nothing of a backend enters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a user may say of targets.

    max_positions bounds rotary tables and KV caches, in tokens. tensorrt_sms: compute capabilities an engine is built
    for. qnn_htp: HTP versions. ethosu: accelerator configurations. prompts: token ids that calibrate static activation
    ranges, where a target has them. kv_cache: "float32" or "int8" (`models.kv_cache`).
    """

    max_positions: int
    tensorrt_sms: tuple[int, ...] = (86, 89, 120)
    qnn_htp: tuple[int, ...] = (75,)
    ethosu: tuple[str, ...] = ("ethos-u85-256",)
    prompts: tuple[tuple[int, ...], ...] = ()
    kv_cache: Literal["float32", "int8"] = "float32"


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
