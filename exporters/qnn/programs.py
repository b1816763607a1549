"""The static programs of a graph: the NPU takes no symbolic dimension."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...errors import UserError
from ...graph import Graph, Port, State
from ...targets.qnn.context import Program

SHORT = 32
"""Tokens of the shorter of an encoder's two programs."""

CHUNK = 128
"""Tokens of a decoder-only prompt that one call takes, as the generate loop feeds them."""

WHOLE = 32
"""The same where states would carry padding on: only full chunks are fed, and the rest of a prompt goes token by token."""

LOGITS = 32, 1 << 20
"""The most positions of a chunk with logits, and the most values of them: a large vocabulary takes several calls."""


def programs(graph: Graph, max_positions: int) -> dict[str, Program]:
    """File stem -> static program of a graph: batch 1, source and cache as long as the context, other dimensions at their bound.

    An encoder has a second, shorter program. A decoder-only graph has one for chunks of a prompt and one for a step; the decoder
    behind an encoder starts from one token and has a step alone. Each program stores its graph's weights again, so there are few.
    A graph without symbolic dimensions is one program. Raises UserError for a graph that cannot tell padding from tokens.
    """
    ports: list[Port | State] = [*graph.inputs, *graph.states]
    symbols = {d for p in ports for d in p.shape if isinstance(d, str)}
    if not symbols:
        return {graph.name: _program(graph, symbols, {})}
    source = min(max_positions, graph.bounds.get("source", (1, max_positions))[1])
    sizes = {name: most for name, (_, most) in graph.bounds.items()}
    sizes |= {"batch": 1, "source": source, "capacity": max_positions}
    if "sequence" not in symbols:
        encodes = any(p.dtype == torch.int64 for p in graph.inputs)
        if encodes and "source" in symbols and not any(p.dtype == torch.bool for p in graph.inputs):
            raise UserError(
                f"--format qnn: the graph {graph.name} takes no padding, and a program's length is fixed; leave this target out"
            )
        lengths = sorted({min(SHORT, source), source}) if encodes else [source]
        return {f"{graph.name}_{n}": _program(graph, symbols, sizes | {"source": n}) for n in lengths}
    static = {f"{graph.name}_step": _program(graph, symbols, sizes | {"sequence": 1, "logits": 1})}
    if "source" not in symbols:
        carries = any(s.updated and "capacity" not in s.shape for s in graph.states)
        chunk = min(WHOLE if carries else CHUNK, max_positions, graph.bounds.get("sequence", (1, CHUNK))[1])
        width = next(int(p.shape[-1]) for p in graph.outputs if "logits" in p.shape)
        logits = max(1, min(LOGITS[0], chunk, LOGITS[1] // width))
        static[f"{graph.name}_chunk"] = _program(graph, symbols, sizes | {"sequence": chunk, "logits": logits})
    return static


def _program(graph: Graph, symbols: set[str], sizes: dict[str, int]) -> Program:
    return Program.model_validate({"graph": graph.name, "sizes": {k: v for k, v in sizes.items() if k in symbols}})


def fixed(graph: Graph, stem: str, program: Program) -> Graph:
    """The graph with every symbolic dimension replaced."""
    sizes: dict[str, int] = {str(k): v for k, v in program.sizes.items()}

    def shape(port: Port | State) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else sizes[d] for d in port.shape)

    return replace(
        graph,
        name=stem,
        inputs=tuple(replace(p, shape=shape(p)) for p in graph.inputs),
        outputs=tuple(replace(p, shape=shape(p)) for p in graph.outputs),
        states=tuple(replace(s, shape=shape(s)) for s in graph.states),
        example={},
        bounds={},
    )
