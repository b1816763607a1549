"""Which of a model's layers each node of an ONNX file belongs to, by the weights' names: torch.onnx numbers the nodes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .nodes import LABEL

if TYPE_CHECKING:
    import onnx

INPUTS = "inputs"
"""The place of nodes that come before any weight: positions, masks, sizes of caches."""

_LAYER = re.compile(r"^(?:[^.+]+\.)+?\d+(?=\.)")
"""The shortest path that ends in a number: `model.decoder.layers.3` of `model.decoder.layers.3.mlp.up_proj.weight`."""

_STORED = re.compile(r"\.(?:weight|codes|q\d+|rows|scales|gamma|f32|bias)(?=\.|$)")


def place_of(weight: str) -> str:
    """The path of the layer that a weight lies in; outside the layers the path of its module."""
    layer = _LAYER.match(weight)
    return layer.group() if layer is not None else _STORED.split(weight, maxsplit=1)[0]


def nodes_by_layer(file: Path) -> dict[str, str]:
    """Name of a node -> path of its layer (`place_of`), or INPUTS.

    A node with a quantized weight bears its name, a matrix bears its own. Any other node between two such of one layer is that
    layer's; between two layers it is that of the vector it reads (a norm's), else that of what came before.
    """
    import onnx  # here: where a bundle is measured the package is not wanted

    graph = onnx.load(str(file), load_external_data=False).graph
    matrices, vectors = dict[str, str](), dict[str, str]()
    for tensor in graph.initializer:
        large = len([d for d in tensor.dims if d > 1]) > 1
        if _LAYER.match(tensor.name) or (large and tensor.name.endswith(".weight")):  # others are constants
            (matrices if large else vectors)[tensor.name] = place_of(tensor.name)
    own = [_own(node, matrices) for node in graph.node]
    before, after = _before(graph, own), _after(graph, own)
    places = {}
    for i, node in enumerate(graph.node):
        read = next((vectors[name] for name in node.input if name in vectors), None)
        places[node.name] = own[i] or _between(before[i], after[i], read)
    return places


def _own(node: onnx.NodeProto, matrices: Mapping[str, str]) -> str | None:
    for entry in node.metadata_props:
        if entry.key == LABEL:
            try:
                return place_of(str(json.loads(entry.value)[0][0]))
            except (ValueError, TypeError, LookupError):
                return None
    return next((matrices[name] for name in node.input if name in matrices), None)


def _between(before: str | None, after: str | None, read: str | None) -> str:
    if before is None:
        return read or INPUTS
    if after is None or before == after:
        return before
    return read if read in (before, after) else before


def _before(graph: onnx.GraphProto, own: list[str | None]) -> list[str | None]:
    """For each node the place of the last weight on the ways to it. Nodes are in the order of work."""
    last: list[int] = []
    maker: dict[str, int] = {}
    for i, node in enumerate(graph.node):
        last.append(i if own[i] else max((last[maker[name]] for name in node.input if name in maker), default=-1))
        maker.update((name, i) for name in node.output if name)
    return [own[i] if i >= 0 else None for i in last]


def _after(graph: onnx.GraphProto, own: list[str | None]) -> list[str | None]:
    """For each node the place of the first weight on the ways from it."""
    first = [len(own)] * len(own)
    wanted: dict[str, int] = {}
    for i in reversed(range(len(own))):
        node = graph.node[i]
        nearest = min((wanted[name] for name in node.output if name in wanted), default=len(own))
        first[i] = i if own[i] else nearest
        for name in node.input:
            wanted[name] = min(first[i], wanted.get(name, len(own)))
    return [own[i] if i < len(own) else None for i in first]
