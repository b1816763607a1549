"""Time by op and by layer, from ONNX Runtime's own profiler: a run apart, which is slower than those that rates are of."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

_KERNEL = "_kernel_time"
_HOLDERS = ("If", "Loop", "Scan")
_TOP_OPS = 12


class OpTime(TypedDict):
    """Kernel time of one op on one unit; share: of all kernel time of the graph."""

    op: str
    unit: str
    ms: float
    calls: int
    share: float


class LayerTime(TypedDict):
    """Kernel time of one layer in a call, the median of `calls`; share: of the time of all layers there."""

    layer: str
    ms: float
    calls: int
    share: float


@dataclass(frozen=True)
class Kernel:
    """A kernel that ran. node: its name in the file. call: of the graph, from 0. ms: its time."""

    node: str
    op: str
    unit: str
    call: int
    ms: float


def read_trace(trace: Path) -> list[Kernel]:
    """The kernels of a trace, but for those inside of another's body, whose time is in that of the other."""
    events = json.loads(trace.read_text())
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")
    found = [e for e in events if e.get("cat") == "Node" and str(e.get("name", "")).endswith(_KERNEL)]
    holders = [(e["ts"], e["ts"] + e["dur"]) for e in found if e["args"]["op_name"] in _HOLDERS]
    kernels = []
    for event in found:
        start, end = event["ts"], event["ts"] + event["dur"]
        if any(first <= start and end <= last and (first, last) != (start, end) for first, last in holders):
            continue
        call = next((i for i, (first, last) in enumerate(runs) if first <= start <= last), None)
        if call is not None:
            node = event["name"].removesuffix(_KERNEL).partition("/")[0]  # a fused node is named after its first part
            unit = event["args"].get("provider", "").removesuffix("ExecutionProvider")
            kernels.append(Kernel(node, event["args"]["op_name"], unit, call, event["dur"] / 1000))
    return kernels


def by_op(kernels: Sequence[Kernel]) -> list[OpTime]:
    """The slowest ops over all calls."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kernel in kernels:
        times[kernel.op, kernel.unit].append(kernel.ms)
    everything = sum(k.ms for k in kernels) or 1.0
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))[:_TOP_OPS]
    return [
        {"op": op, "unit": unit, "ms": sum(ms), "calls": len(ms), "share": sum(ms) / everything}
        for (op, unit), ms in ordered
    ]


def by_layer(kernels: Sequence[Kernel], layers: Mapping[str, str], calls: Sequence[int], other: str) -> list[LayerTime]:
    """Time by layer in one of the calls, in the order of work. layers: of each node by its name; `other` takes nodes without."""
    times: dict[str, dict[int, float]] = defaultdict(lambda: dict.fromkeys(calls, 0.0))
    for kernel in kernels:
        if kernel.call in calls:
            times[layers.get(kernel.node, other)][kernel.call] += kernel.ms
    medians = {layer: statistics.median(by_call.values()) for layer, by_call in times.items()}
    everything = sum(medians.values()) or 1.0
    return [
        {"layer": layer, "ms": medians[layer], "calls": len(calls), "share": medians[layer] / everything}
        for layer in _in_order(list(medians))
    ]


def _in_order(layers: list[str]) -> list[str]:
    """As they ran, but numbered ones by their numbers: what does not depend on each other runs in any order."""
    numbered = [layer for layer in layers if layer.rpartition(".")[2].isdecimal()]
    by_number = iter(sorted(numbered, key=lambda layer: (layer.rpartition(".")[0], int(layer.rpartition(".")[2]))))
    return [next(by_number) if layer in numbered else layer for layer in layers]
