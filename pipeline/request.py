"""What a user asks of `export` or `plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..calibration.samples import MOST_TOKENS
from ..calibration.source import PART_TOKENS
from ..importance.fisher import WINDOWS
from ..quant.overrides import Override
from ..quant.plan import BitPlan
from ..system.workers import ONE, Workers
from ..targets.registry import TARGETS
from ..verification.options import Against

DEFAULT_BITS = 4.5
Progress = Callable[[str], None]


@dataclass(frozen=True)
class BudgetOptions:
    """How many bits there are and where they may go. Of `bits`, `size`, `latency_ms`, `joules` and `memory` one at most is given.

    bits: average bits a weight, scales counted. size: bytes of the quantized checkpoint. latency_ms: predicted milliseconds of
    a decode step on `device`; sure: at the slow end of the prediction's interval. joules: of a decode step there. memory: bytes
    of weights and of one stream's states, in every target. plan: taken as it is, instead of an allocation. overrides: the first
    regex that matches a weight's name decides its bits. widths: the widths to choose from; None: those that every target stores
    whole. groups: the group sizes to choose from, 0 for one scale per output channel. importance: as `--importance`."""

    bits: float | None = None
    size: int | None = None
    latency_ms: float | None = None
    device: str | None = None
    sure: bool = False
    joules: float | None = None
    memory: int | None = None
    plan: BitPlan | None = None
    overrides: tuple[Override, ...] = ()
    widths: tuple[int, ...] | None = None
    groups: tuple[int, ...] = (32, 64, 128)
    importance: str = "auto"


@dataclass(frozen=True)
class CalibrationOptions:
    """The calibration data, a text or a task file, and what is done with them.

    shipped: without either, whether the text that ships with the product is used where the model's tokenizer knows it.
    quantizer: auto is gptq where there are data, else rtn. norms: whether they are tuned to GPTQ's codes. tokens: of the data, at
    most. part_tokens: that go through the model together. fisher_windows: samples that Fisher's backward pass reads at most.
    prompts: how many LIM and every later `verify` use.
    """

    text: Path | None = None
    task: Path | None = None
    shipped: bool = True
    quantizer: Literal["auto", "rtn", "gptq"] = "auto"
    norms: Literal["tuned", "kept"] = "tuned"
    tokens: int = MOST_TOKENS
    part_tokens: int = PART_TOKENS
    fisher_windows: int = WINDOWS
    prompts: int = 32

    @property
    def file(self) -> Path | None:
        """The file of the data, whichever it is."""
        return self.text or self.task


@dataclass(frozen=True)
class TargetOptions:
    """The targets and what each of them is told.

    kv_cache: how KV caches are stored. own: target -> what is asked of it alone (`Target.option`); without, its default.
    """

    formats: tuple[str, ...] = ("onnx",)
    kv_cache: Literal["float32", "int8"] = "float32"
    own: Mapping[str, tuple[int, ...] | tuple[str, ...]] = field(default_factory=dict)

    def choices(self, name: str) -> tuple[int, ...] | tuple[str, ...]:
        """What is asked of the target alone: what was given, or the default of its option."""
        option = TARGETS[name].option
        return self.own.get(name, () if option is None else option.default)


@dataclass(frozen=True)
class CheckOptions:
    """What is checked before a bundle appears.

    verify: every artefact is reloaded and compared with the reference. strict_placement: an op that fell back to another unit
    than the target's is a failure, too. against: whether the checkpoint's reading is compared with transformers; "auto": where
    it is installed, knows the model, and there is the memory.
    """

    verify: bool = True
    strict_placement: bool = False
    against: Against = "auto"


@dataclass(frozen=True)
class Request:
    """What a user asks of `export` or `plan`.

    model: a directory, a .gguf file, a hub id, or "package.module:factory". adapter: the folder of a LoRA adapter, which is merged
    into its weights. pooling: of a model of embeddings, in place of what its files say. num_layers: layers of each stack to
    keep, for a rehearsal. max_context: tokens that a prompt and its answer may take. memory_limit: bytes of anonymous memory.
    """

    model: str
    adapter: str | None = None
    pooling: tuple[str, ...] = ()
    budget: BudgetOptions = field(default_factory=BudgetOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    targets: TargetOptions = field(default_factory=TargetOptions)
    checks: CheckOptions = field(default_factory=CheckOptions)
    num_layers: int | None = None
    max_context: int | None = None
    memory_limit: int | None = None
    workers: Workers = ONE

    @property
    def formats(self) -> tuple[str, ...]:
        """The targets' names."""
        return self.targets.formats
