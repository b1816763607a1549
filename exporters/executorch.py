"""ExecuTorch: all graphs as methods of one `model.pte`, for XNNPACK. What may enter: `ops`, `graph`, `bundle`.

Main path: export each graph for a batch of one with its KV cache as buffers -> rewrite (`executorch_rewriter`) ->
export again -> lower all methods together, so that weights are stored once.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UserError
from ..graph import Graph, Port, State
from ..runtimes.quiet import quiet_torchao
from ..untrusted import one_line, read_json_object
from .artefact import Artefact, Options, Progress

if TYPE_CHECKING:
    from .executorch_program import ProgramFile

PROGRAM = "model.pte"
NAMES = "weights.json"
CHUNK = 128
"""The most tokens that one call of the decoder takes; memory is planned for them. A session feeds more in pieces."""

SLOTS = "slots"
"""A last input of methods with a KV cache: int64 [tokens in the cache after this call], 0, 1, 2, …"""


def export(graphs: Sequence[Graph], directory: Path, options: Options, progress: Progress = lambda _: None) -> Artefact:
    """Write `model.pte` into `directory` (which must exist), one method a graph.

    `options.max_positions` is the capacity of the KV caches and the longest source. Raises UserError for a weight in a
    form that XNNPACK does not have.
    """
    quiet_torchao()
    from .executorch_program import ProgramFile, ops

    programs: dict[str, torch.export.ExportedProgram] = {}
    for graph in graphs:
        progress(f"executorch: {graph.name}")
        programs[graph.name] = method(graph, options.max_positions)
    progress("executorch: lowering to XNNPACK")
    with (directory / PROGRAM).open("wb") as file:
        lower(programs).write_to_file(file)
    progress("executorch: reading the weights back")
    written = ProgramFile(directory / PROGRAM)
    names = _names(graphs, written)
    (directory / NAMES).write_text(json.dumps(names, indent=1, sort_keys=True) + "\n")
    facts: dict[str, object] = {"weights read back bit for bit (measured)": len(names)}
    return Artefact((PROGRAM, NAMES), ops(written), facts)


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, float32 [N, K]) of every quantized weight as `model.pte` holds it.

    A weight that is stored more than once, such as the table of an embedding beside the matrix of the head tied to it, comes
    once for each. Raises UserError for a program that is damaged or is not the one that `weights.json` speaks of.
    """
    from .executorch_program import ProgramFile

    names = read_json_object(directory / NAMES)
    by_digest: dict[str, list[str]] = {}
    for name, digests in names.items():
        for digest in _strings(directory / NAMES, digests):
            by_digest.setdefault(digest, []).append(name)
    left = set(by_digest)
    for weight in ProgramFile(directory / PROGRAM).weights():
        if weight.digest not in by_digest:
            raise UserError(f"{one_line(directory / PROGRAM)} holds a weight that {NAMES} does not know; export again")
        if weight.digest in left:
            left.remove(weight.digest)
            for name in by_digest[weight.digest]:
                yield name, weight.values()
    if left:
        lost = one_line(by_digest[min(left)][0], 120)
        raise UserError(f"{one_line(directory / PROGRAM)} does not hold {lost} as {NAMES} knows it; export again")


def _strings(path: Path, value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise UserError(f"{one_line(path)}: a weight's digests are no list of strings; export again")
    return value


def _names(graphs: Sequence[Graph], written: ProgramFile) -> dict[str, list[str]]:
    """Weight -> digests of its bytes in the program. Raises ValueError if the program does not hold it bit for bit."""
    from .executorch_lowerings import container, table_bits
    from .executorch_program import fingerprint

    held: dict[tuple[str, bytes], set[str]] = {}
    for weight in written.weights():
        key = (weight.kind, fingerprint(weight.codes, weight.scales, weight.bits, weight.bits))
        held.setdefault(key, set()).add(weight.digest)
    stored: dict[int, str] = {}  # where a tensor lies -> the name it is stored under, which comes before one tied to it
    found: dict[str, set[str]] = {}
    seen: set[int] = set()
    for graph in graphs:
        for path, module in graph.module.named_modules():
            if not hasattr(module, "codes") or id(module) in seen:
                continue
            seen.add(id(module))
            part: Any = module
            name = stored.setdefault(part.codes.data_ptr(), graph.checkpoint_name(f"{path}.weight"))
            kind = "linear" if hasattr(module, "bias") else "embedding"
            columns = part.scales.shape[1] * part.group_size
            wide = container(part.bits, part.group_size, columns) if kind == "linear" else table_bits(part.bits)
            digests = held.get((kind, fingerprint(part.codes, part.scales, part.bits, wide)))
            if digests is None:
                raise ValueError(f"{PROGRAM} does not hold the codes and scales of {name}")
            found.setdefault(name, set()).update(digests)
    return {name: sorted(digests) for name, digests in found.items()}


class _Method(nn.Module):
    """A graph for a batch of one whose updated states are buffers [1, capacity, kv_heads, head_dim].

    This is the layout of the kernels that write them; `edgewright::cached_attention` only passes them through while the
    graph is traced and is then rewritten.
    """

    def __init__(self, graph: Graph, capacity: int) -> None:
        super().__init__()
        self.inner = graph.module
        self.inputs = len(graph.inputs)
        self.outputs = len(graph.outputs)
        self.states = graph.states
        for state in graph.states:
            if state.updated:
                _, heads, _, width = state.shape
                self.register_buffer(f"state_{state.name}", torch.zeros(1, capacity, int(heads), int(width)))

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(values[self.inputs :])  # the last, SLOTS, is for the rewriter
        states = [getattr(self, f"state_{s.name}") if s.updated else next(given) for s in self.states]
        out = self.inner(*values[: self.inputs], *([states] if states else []))
        return tuple(out[: self.outputs])


def method(graph: Graph, max_positions: int) -> torch.export.ExportedProgram:
    """The graph as a program over ATen, torchao, llama and quantized_decomposed ops alone."""
    from .executorch_rewriter import Rewriter

    limits = {"sequence": min(CHUNK, max_positions), "logits": min(CHUNK, max_positions)}
    bounds = {n: (low, min(high, limits.get(n, max_positions))) for n, (low, high) in graph.bounds.items()}
    example = {n: min(size, bounds[n][1]) for n, size in graph.example.items()} | {"batch": 1}
    single = replace(graph, example=example, bounds=bounds)
    given: list[Port | State] = [*graph.inputs, *(s for s in graph.states if not s.updated)]
    if any(s.updated for s in graph.states):
        given.append(Port(SLOTS, torch.int64, ("capacity",)))
    dims = {n: torch.export.Dim(n, min=low, max=high) for n, (low, high) in bounds.items()}
    shapes = [{i: dims[d] for i, d in enumerate(p.shape) if isinstance(d, str) and d != "batch"} for p in given]
    named = dict(zip(graph.input_names, single.example_inputs(), strict=True))
    named[SLOTS] = torch.arange(single.example.get("capacity", 0))
    args = tuple(named[p.name] for p in given)
    with torch.no_grad():
        wrapped = _Method(graph, max_positions).eval().requires_grad_(False)
        module = torch.export.export(wrapped, args, dynamic_shapes=(tuple(shapes),)).module(check_guards=False)
        assert isinstance(module, torch.fx.GraphModule)
        rewritten = Rewriter(module, max_positions).run().requires_grad_(False)
        return torch.export.export(rewritten, args, dynamic_shapes=tuple(shapes))


def lower(programs: dict[str, torch.export.ExportedProgram]) -> Any:
    """One ExecuTorch program of all methods. Empties `programs`."""
    from executorch.exir import ExecutorchBackendConfig

    from .executorch_delegates import edge_programs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return edge_programs(programs).to_executorch(ExecutorchBackendConfig())
