"""What a user asks of `export` or `plan`. A leaf: plan, overrides and workers enter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..quant.overrides import Override
from ..quant.plan import BitPlan
from ..system.workers import ONE, Workers

DEFAULT_BITS = 4.5
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What a user asks of `export` or `plan`.

    quantizer: auto is gptq where the user gave calibration data, else rtn. norms: whether they are tuned to the codes where there
    are calibration data. memory_limit: bytes of anonymous memory.
    """

    model: str
    formats: tuple[str, ...] = ("onnx",)
    bits: float | None = None
    size: int | None = None
    plan: BitPlan | None = None
    overrides: tuple[Override, ...] = ()
    widths: tuple[int, ...] | None = None
    groups: tuple[int, ...] = (32, 64, 128)
    importance: str = "auto"
    calibration: Path | None = None
    task: Path | None = None
    quantizer: Literal["auto", "rtn", "gptq"] = "auto"
    norms: Literal["tuned", "kept"] = "tuned"
    latency_ms: float | None = None
    device: str | None = None
    kv_cache: Literal["float32", "int8"] = "float32"
    memory_limit: int | None = None
    workers: Workers = ONE
    num_layers: int | None = None
    max_context: int | None = None
    sms: tuple[int, ...] = (86, 89, 120)
    htp: tuple[int, ...] = (75,)
    ethos_u: tuple[str, ...] = ("ethos-u85-256",)
