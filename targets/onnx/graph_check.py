"""An ONNX file looked through before ONNX Runtime gets it. No library of ONNX is imported.

Refused is what no exporter here writes and what would let a graph run for ever, take any size, or reach out of its folder: loops,
functions, ops of unknown domains, weights in other places than a regular file beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from ...errors import UserError
from ...system.reading import one_line, read_bytes, require_regular
from .wire import fields, varints

_LARGEST_FILE = 1 << 30
_MOST_NODES = 500_000
_MOST_ELEMENTS = 1 << 40
_DOMAINS = ("", "ai.onnx", "com.microsoft")
_BODIES = ("Scan", "If")
"""Ops that may hold a graph: both end, as a Scan goes over an input that is there. A graph inside holds no other."""

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
_TENSOR_DIMS, _TENSOR_EXTERNAL = 1, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


def check_graph(path: Path) -> None:
    """Raise UserError unless the file is a graph that an exporter of ours could have written, as far as can be seen."""
    data = memoryview(read_bytes(path, _LARGEST_FILE))
    try:
        for number, value in fields(data):
            if number in (_MODEL_FUNCTIONS, _MODEL_TRAINING):
                raise _Refused("functions of its own")
            if number == _MODEL_GRAPH:
                _Looking(path).graph(_message(value), inside=False)
    except ValueError as error:
        raise UserError(f"{one_line(path)}: not a whole ONNX file ({error}); export the bundle again") from None
    except _Refused as error:
        raise UserError(f"{one_line(path)}: it has {error}, as no export has; export the bundle again") from None


class _Refused(Exception):
    """What the file has and must not have."""


class _Looking:
    """One look through a file's graphs."""

    def __init__(self, path: Path) -> None:
        self._path, self._nodes = path, 0
        self._sizes: dict[str, int] = {}

    def graph(self, data: memoryview, inside: bool) -> None:
        """inside: whether it is the body of a node."""
        for number, value in fields(data):
            if number == _GRAPH_NODE:
                self._node(_message(value), inside)
            elif number == _GRAPH_INITIALIZER:
                self._tensor(_message(value))
            elif number == _GRAPH_SPARSE:
                raise _Refused("sparse weights")

    def _node(self, data: memoryview, inside: bool) -> None:
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            raise _Refused(f"more than {_MOST_NODES} nodes")
        op = ""
        bodies: list[memoryview] = []
        for number, value in fields(data):
            if number == _NODE_OP:
                op = _text(value)
            elif number == _NODE_DOMAIN:
                if _text(value) not in _DOMAINS:
                    raise _Refused(f"ops of the domain {one_line(_text(value), 60)!r}")
            elif number == _NODE_ATTRIBUTE:
                bodies += self._bodies(_message(value))
        if bodies and (op not in _BODIES or inside):
            raise _Refused(f"a graph inside {one_line(op, 60)!r}" + (" inside another" if inside else ""))
        for body in bodies:
            self.graph(body, inside=True)

    def _bodies(self, attribute: memoryview) -> Iterator[memoryview]:
        """The graphs of an attribute."""
        for number, value in fields(attribute):
            if number in _ATTRIBUTE_GRAPHS and isinstance(value, memoryview):
                yield value
            elif number in _ATTRIBUTE_TENSORS and isinstance(value, memoryview):
                self._tensor(value)
            elif number in _ATTRIBUTE_SPARSE:
                raise _Refused("sparse constants")

    def _tensor(self, data: memoryview) -> None:
        elements = 1
        external: dict[str, str] = {}
        for number, value in fields(data):
            if number == _TENSOR_DIMS:
                elements *= math.prod(varints(value))
                if elements > _MOST_ELEMENTS:
                    raise _Refused("a tensor of more elements than any file holds")
            elif number == _TENSOR_EXTERNAL:
                entry = {key: _text(text) for key, text in fields(_message(value)) if isinstance(text, memoryview)}
                if (key := entry.get(_ENTRY_KEY, "")) in external:
                    raise _Refused(f"two entries {one_line(key, 60)!r} for where its weights lie")
                external[key] = entry.get(_ENTRY_VALUE, "")
        if external:
            self._beside(external)

    def _beside(self, external: dict[str, str]) -> None:
        """Weights in another file: a regular one in the same folder, as long as it must be."""
        name = external.get("location", "")
        if name in ("", ".", "..") or "/" in name or "\\" in name or ":" in name or not name.isprintable():
            raise _Refused(f"weights in {one_line(name, 60)!r}, outside its folder")
        if name not in self._sizes:
            self._sizes[name] = require_regular(self._path.parent / name)
        try:
            offset, length = (int(external.get(key, "0")) for key in ("offset", "length"))
        except ValueError:
            raise _Refused(f"no numbers for where its weights lie in {name}") from None
        if min(offset, length) < 0 or offset + length > self._sizes[name]:
            raise _Refused(f"weights beyond the end of {name}")


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message is expected")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode("utf-8", "replace")
