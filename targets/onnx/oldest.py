"""The oldest ONNX Runtime that opens a graph, from what the file says of itself: opset, IR version, ops, attributes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ...errors import UserError
from ...system.reading import one_line
from .releases import ATTRIBUTES, CONTRIB, IR_VERSIONS, OLDEST, OPS, OPSETS, parse

FACT = "onnxruntime at least"
"""The name of this among an artefact's facts: graph -> `Oldest.to_json`."""


@dataclass(frozen=True)
class Oldest:
    """The oldest release that opens a graph, and what of the graph older ones lack. because: empty where nothing is known."""

    release: str
    because: str
    opset: int
    ir_version: int

    def to_json(self) -> dict[str, str | int]:
        return {
            "release": self.release,
            "because": self.because,
            "opset": self.opset,
            "ir_version": self.ir_version,
        }


def oldest(model: ir.Model) -> Oldest:
    """The oldest release that opens `model`. Raises UserError for an op of com.microsoft that no exporter here writes."""
    release, because = OLDEST, ""
    for needed, what in _needs(model):
        if parse(needed) > parse(release):
            release, because = needed, what
    return Oldest(release, because, model.opset_imports.get("", 0), int(model.ir_version))


def _needs(model: ir.Model) -> Iterator[tuple[str, str]]:
    """(release, what it first has) of all that a graph has and some release lacks."""
    for node in model.graph.all_nodes():
        if node.domain and node.op_type not in CONTRIB:
            raise UserError(
                f"{one_line(node.op_type, 60)} of {one_line(node.domain, 60)} is in no export; export again"
            )
        if node.op_type in OPS:
            yield OPS[node.op_type], node.op_type
        for name, attribute in node.attributes.items():
            for what in (name, f"{name}={attribute.value}"):
                if (node.op_type, what) in ATTRIBUTES:
                    yield ATTRIBUTES[node.op_type, what], f"{node.op_type} with {what}"
    opset, version = model.opset_imports.get("", 0), int(model.ir_version)
    yield from ((first, f"opset {opset}") for number, first in OPSETS.items() if opset >= number)
    yield from ((first, f"IR version {version}") for number, first in IR_VERSIONS.items() if version >= number)


def read_oldest(folder: Path) -> dict[str, dict[str, str | int]]:
    """`Oldest.to_json` of each graph in a folder, by its name."""
    return {path.stem: oldest(ir.load(path)).to_json() for path in sorted(folder.glob("*.onnx"))}
