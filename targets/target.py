"""What the product knows of a target: one `Target` each, made in `targets/<name>/__init__.py`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

GROUP_SIZES = (16, 32, 64, 128, 256)
"""Group sizes that some target can hold; powers of two only."""


@dataclass(frozen=True)
class WeightStorage:
    """How a target holds codes of `bits` bits.

    container: bits of a code in the artefact. groups: the group sizes it takes; one scale per channel always works.
    scale_bytes, channel_scale_bytes: of one group scale, and of one scale per channel. zero_points: what the target could
    hold (Edgewright uses none). scales_in_blocks: the format knows no per-channel scale, so it is repeated for each block of
    inputs. table_bytes: the lookup table of one weight, where codes are indices.
    """

    bits: int
    container: int
    groups: tuple[int, ...]
    scale_bytes: int
    channel_scale_bytes: int
    zero_points: str
    scales_in_blocks: bool = False
    table_bytes: int = 0


Choices = tuple[int, ...] | tuple[str, ...]
"""What is asked of one target alone."""


@dataclass(frozen=True)
class TargetOption:
    """What the command line asks of one target alone.

    flag: such as "--sm". kind: whole numbers separated by commas, names (then the flag is repeatable), or one version.
    check: raises UserError for what can be refused before any work.
    """

    flag: str
    kind: Literal["numbers", "names", "version"]
    default: Choices
    help: str
    check: Callable[[Choices], None] | None = None


@dataclass(frozen=True)
class Target:
    """Every fact about a target. Its exporter is `exporters.<name>`, its session `runtimes.<name>`.

    libraries: sets of modules of which one must be importable whole. distributions: the packages whose version is told, the
    first that is there. install: the command that brings them. describe: what the target can do on this machine, in words.

    graphs: the graphs it takes; empty for all. A target of some graphs is exported only when asked for by name.
    storage: how it holds each width. signed_scales: it holds negative scales. tied_twice: it stores an embedding's rows and
    the matrix of the head tied to it apart. int8_cache: its lowerings know KV caches in int8. option: its own option.

    lowering_bytes: anonymous memory of lowering, (bytes, bytes a byte of the artefact's weights). unit: what runs it in a
    prediction; None where no decode step is predicted.

    activations: of the artefact as it ships. exact: its session can also compute with float32 activations; the lowering is
    then judged by its largest error, else by top-1 agreement. emulated_prompts: the most prompts compared where its device is
    emulated here; None for no limit. stand_in_bytes: memory a weight that what stands in for its device holds beside the
    artefact. holds_caches: its programs hold KV caches for the whole context.
    """

    name: str
    libraries: tuple[tuple[str, ...], ...]
    distributions: tuple[str, ...]
    install: str
    describe: Callable[[], str]
    graphs: tuple[str, ...]
    storage: tuple[WeightStorage, ...]
    signed_scales: bool
    tied_twice: bool
    int8_cache: bool
    option: TargetOption | None
    lowering_bytes: tuple[int, float]
    unit: Literal["cpu", "gpu", "npu"] | None
    activations: Literal["float32", "float16", "int16", "int8"]
    exact: bool
    emulated_prompts: int | None
    stand_in_bytes: int
    holds_caches: bool

    @property
    def installed(self) -> bool:
        return any(all(importlib.util.find_spec(name) for name in modules) for modules in self.libraries)

    @property
    def version(self) -> str | None:
        """`name version` of the distribution that is installed, None where there is none."""
        for name in self.distributions:
            try:
                return f"{name} {importlib.metadata.version(name)}"
            except importlib.metadata.PackageNotFoundError:
                continue
        return None

    @property
    def missing(self) -> str:
        """The one line about a library that is not installed."""
        first = next((n for n in self.libraries[0] if importlib.util.find_spec(n) is None), self.libraries[0][0])
        return f"--format {self.name} needs {first}, which is not installed: {self.install}"

    def peak_bytes(self, stored: int) -> int:
        """About the anonymous memory of lowering an artefact whose weights are `stored` bytes."""
        return self.lowering_bytes[0] + int(self.lowering_bytes[1] * stored)


def extra(name: str) -> str:
    """The command that installs one of Edgewright's extras."""
    return f"pip install 'edgewright[{name}]'"
