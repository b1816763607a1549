"""Example inputs in the bundle of a module, which has no generate loop, or of a model of sound. No torch is imported."""

from __future__ import annotations

import safetensors.numpy

from ..bundle import CHECKPOINT, EXAMPLES, Bundle
from ..errors import UserError
from ..system.reading import one_line, require_regular
from .session import Array

Call = tuple[str, dict[str, Array]]
"""(graph, its inputs by name)."""


def read_examples(bundle: Bundle) -> list[Call]:
    """(graph, inputs) of each example of a "module" bundle, or of one that reads sound.

    Raises UserError if they do not fit its graphs.
    """
    path = bundle.path / CHECKPOINT / EXAMPLES
    require_regular(path)
    try:
        stored = safetensors.numpy.load_file(path)
    except Exception as error:  # the library's and the file system's errors share no base
        raise UserError(f"{path} cannot be read ({one_line(error, 80)}); export the bundle again") from None
    graphs = {g.name: g for g in bundle.manifest.graphs}
    calls: dict[int, Call] = {}
    for key, value in sorted(stored.items()):
        number, _, rest = key.partition(".")
        graph, _, port = rest.partition(".")
        known = [p for p in graphs[graph].inputs if p.name == port] if graph in graphs else []
        if not number.isdecimal() or not known or len(known[0].shape) != value.ndim:
            raise UserError(f"{path}: {one_line(key, 80)} is no input of this bundle's graphs; export it again")
        calls.setdefault(int(number), (graph, {}))[1][port] = value
    for graph, inputs in calls.values():
        if set(inputs) != {p.name for p in graphs[graph].inputs}:
            raise UserError(f"{path}: an example lacks an input of {graph}; export the bundle again")
    return [calls[number] for number in sorted(calls)]
