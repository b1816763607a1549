"""ExecuTorch: all graphs as methods of one `model.pte`, for XNNPACK.

Export each graph for a batch of one, with its KV caches as buffers -> rewrite (`passes`) -> export again -> lower all methods
together (`partition`), so that weights are stored once.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import UserError
from ...graph import Graph, Port, State
from ...system.quiet import quiet_torchao
from ...system.reading import one_line, read_json_object
from ...targets.executorch.libraries import FACT, libraries
from ...targets.executorch.names import EXACT, POSITIONS, STEP
from ..artefact import Artefact, Options, Progress

if TYPE_CHECKING:
    from ...targets.executorch.program import ProgramFile

PROGRAM = "model.pte"
NAMES = "weights.json"
CHUNK, SHORT = 128, 16
"""The most tokens of one call of the decoder; memory is planned for them, and a session feeds more in pieces. Recurrences with a
decay for each key dimension take the shorter chunk: their work grows with the square of it."""
TOKEN_BY_TOKEN = ("selective_scan", "diagonal_scan", "generalized_delta_rule")
"""Recurrences whose tokens follow each other one by one, as many as the program says."""

_NO_VARIANT = re.compile(r"Missing out variants: \{'([\w:.]+)'")

FILLED = "filled"
"""The last input of a method with a KV cache: int64 0, 1, 2, …, as long as the tokens in the cache after this call."""


def export(graphs: Sequence[Graph], directory: Path, options: Options, progress: Progress = lambda _: None) -> Artefact:
    """Write `model.pte` into `directory` (which must exist), one method a graph.

    `options.max_positions` is the capacity of the KV caches and the longest source. Raises UserError for a weight in a form that
    XNNPACK lacks, and for an op without a kernel.
    """
    quiet_torchao()
    from ...targets.executorch.program import ProgramFile, ops

    programs: dict[str, torch.export.ExportedProgram] = {}
    for graph in graphs:
        progress(f"executorch: {graph.name}")
        programs |= methods(graph, options.max_positions)
    progress("executorch: lowering to XNNPACK")
    with (directory / PROGRAM).open("wb") as file:
        lower(programs).write_to_file(file)
    progress("executorch: reading the weights back")
    written = ProgramFile(directory / PROGRAM)
    _require_kernels(written)
    names = _names(graphs, written)
    (directory / NAMES).write_text(json.dumps(names, indent=1, sort_keys=True) + "\n")
    facts: dict[str, object] = {"weights read back bit for bit (measured)": len(names)}
    return Artefact((PROGRAM, NAMES), ops(written), facts | _libraries(written))


def read_facts(directory: Path) -> dict[str, object]:
    """The fact that `model.pte` bears itself: which of ExecuTorch's libraries it needs. Raises UserError for a damaged program."""
    from ...targets.executorch.program import ProgramFile

    return _libraries(ProgramFile(directory / PROGRAM))


def _libraries(written: ProgramFile) -> dict[str, object]:
    from ...targets.executorch.program import DELEGATE, KERNELS

    units = written.placement().values()
    kernels = {op.removesuffix(POSITIONS) for unit in units for op in unit[KERNELS]}
    return {FACT: libraries(kernels, [DELEGATE] if any(unit[DELEGATE] for unit in units) else [])}


def _require_kernels(written: ProgramFile) -> None:
    """Raise UserError for an op that ExecuTorch's own kernels do not compute."""
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401  both register kernels

    from ...targets.executorch.program import KERNELS
    from .internals import kernel_names
    from .lowerings import no_kernel

    registered = kernel_names()
    for graph, units in written.placement().items():
        lacking = {op.removesuffix(POSITIONS) for op in units[KERNELS]} - registered
        if lacking:
            raise no_kernel(graph, min(lacking))


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, float32 [N, K]) of every quantized weight as `model.pte` holds it.

    A weight that is stored twice, such as an embedding's table and the matrix of the tied head, comes twice. Raises UserError for
    a program that is damaged or is not the one of `weights.json`.
    """
    from ...targets.executorch.program import ProgramFile

    names = read_json_object(directory / NAMES)
    by_digest: dict[str, list[str]] = {}
    for name, digests in names.items():
        for digest in _strings(directory / NAMES, digests):
            by_digest.setdefault(digest, []).append(name)
    missing = set(by_digest)
    for weight in ProgramFile(directory / PROGRAM).weights():
        if weight.digest not in by_digest:
            raise UserError(f"{one_line(directory / PROGRAM)} holds a weight that {NAMES} does not know; export again")
        if weight.digest in missing:
            missing.remove(weight.digest)
            for name in by_digest[weight.digest]:
                yield name, weight.values()
    if missing:
        name = one_line(by_digest[min(missing)][0], 120)
        raise UserError(f"{one_line(directory / PROGRAM)} does not hold {name} as {NAMES} knows it; export again")


def _strings(path: Path, value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise UserError(f"{one_line(path)}: a weight's digests are no list of strings; export again")
    return value


def _names(graphs: Sequence[Graph], written: ProgramFile) -> dict[str, list[str]]:
    """Weight -> digests of its bytes in the program. Raises ValueError for a weight that is not there bit for bit."""
    from ...targets.executorch.program import fingerprint
    from .lowerings import container, table_bits

    written_digests: dict[tuple[str, bytes], set[str]] = {}
    for weight in written.weights():
        key = (weight.kind, fingerprint(weight.codes, weight.scales, weight.bits, weight.bits))
        written_digests.setdefault(key, set()).add(weight.digest)
    stored: dict[int, str] = {}  # address of a tensor -> the name it is stored under, which comes before a tied name
    by_name: dict[str, set[str]] = {}
    visited: set[int] = set()
    for graph in graphs:
        for path, module in graph.module.named_modules():
            if not hasattr(module, "codes") or id(module) in visited:
                continue
            visited.add(id(module))
            part: Any = module
            name = stored.setdefault(part.codes.data_ptr(), graph.checkpoint_name(f"{path}.weight"))
            kind = "linear" if hasattr(module, "bias") else "embedding"
            columns = part.scales.shape[1] * part.group_size
            wide = container(part.bits, part.group_size, columns) if kind == "linear" else table_bits(part.bits)
            digests = written_digests.get((kind, fingerprint(part.codes, part.scales, part.bits, wide)))
            if digests is None:
                raise ValueError(f"{PROGRAM} does not hold the codes and scales of {name}")
            by_name.setdefault(name, set()).update(digests)
    return {name: sorted(digests) for name, digests in by_name.items()}


class _Method(nn.Module):
    """A graph for a batch of one whose updated states are buffers.

    A KV cache is [1, capacity, kv_heads, head_dim], as the kernels that write it want. While the graph is traced,
    `edgewright::cached_attention` only passes it through; then it is rewritten. Other states have the graph's own shape. Where a
    stream begins they count as zero, whatever the stream before has written there.
    """

    def __init__(self, graph: Graph, capacity: int) -> None:
        super().__init__()
        self.inner = graph.module
        self.inputs = len(graph.inputs)
        self.outputs = len(graph.outputs)
        self.states = graph.states
        self.carried = [s for s in graph.states if _is_carried(s)]
        self.past_length = [p.name for p in graph.inputs].index("past_length") if self.carried else 0
        for state in graph.states:
            if state.updated:
                _, heads, _, width = state.shape if "capacity" in state.shape else (1, 1, 1, 1)
                shape = (1, *state.shape[1:]) if _is_carried(state) else (1, capacity, heads, width)
                self.register_buffer(f"state_{state.name}", torch.zeros([int(d) for d in shape], dtype=state.dtype))

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The graph's outputs, then the new values of the carried states."""
        constant_states = iter(values[self.inputs :])  # the last, FILLED, is for the passes
        begins = _begins(values[self.past_length]) if self.carried else 0
        states: list[torch.Tensor] = []
        for state in self.states:
            held = getattr(self, f"state_{state.name}") if state.updated else next(constant_states)
            states.append(_held_or_zero(held, begins) if _is_carried(state) else held)
        out = self.inner(*values[: self.inputs], *([states] if states else []))
        updated = [s for s in self.states if s.updated]
        carried = [v for s, v in zip(updated, out[self.outputs :], strict=True) if _is_carried(s)]
        return (*out[: self.outputs], *carried)


class _Carrying(nn.Module):
    """A rewritten method that writes its last outputs back into the buffers of those names."""

    def __init__(self, rewritten: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.rewritten, self.names = rewritten, tuple(names)

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.rewritten(*values)
        outputs = len(out) - len(self.names)
        for name, value in zip(self.names, out[outputs:], strict=True):
            self.rewritten.get_buffer(name).copy_(value)
        return tuple(out[:outputs])


def _begins(past_length: torch.Tensor) -> int:
    """1 where a stream begins, else 0, as a size known at run time only."""
    from .internals import check

    begins = (past_length == 0).to(torch.int64)[0].item()
    check(begins >= 0)
    check(begins <= 1)
    assert isinstance(begins, int | torch.SymInt)
    return begins


def _held_or_zero(held: torch.Tensor, begins: int) -> torch.Tensor:
    """A buffer [1, …], or zeros where `begins` is 1. No product with zero: a buffer may hold NaN. No `where`: it is slower."""
    padding = [0, 0] * (held.dim() - 1) + [0, 1]
    return nn.functional.pad(held, padding).narrow(0, begins, 1)


def _is_carried(state: State) -> bool:
    """Whether a state is read and written as a whole. A KV cache is not: it is written where it is used."""
    return state.updated and "capacity" not in state.shape


def methods(graph: Graph, max_positions: int) -> dict[str, torch.export.ExportedProgram]:
    """Name -> program of a graph's methods: one, and for a graph with recurrent states a second one for a single token.

    The first takes any number of tokens up to a limit. Where it has a recurrence that goes token by token, it takes exactly
    `SHORT`.
    """
    if not any(s.kind == "recurrent" for s in graph.states):
        return {graph.name: method(graph, max_positions)}
    targets = {n.target for n in graph.export().graph.nodes}
    step = {graph.name + STEP: method(graph, max_positions, exactly=1)}
    if not targets.isdisjoint(getattr(torch.ops.edgewright, name).default for name in TOKEN_BY_TOKEN):
        exactly = min(SHORT, max_positions, graph.bounds["sequence"][1])
        return {graph.name + EXACT: method(graph, max_positions, exactly=exactly)} | step
    most = SHORT if torch.ops.edgewright.linear_attention.default in targets else CHUNK
    return {graph.name: method(graph, max_positions, most=most)} | step


def method(graph: Graph, max_positions: int, most: int = 0, exactly: int = 0) -> torch.export.ExportedProgram:
    """The graph as a program of ATen, llama and quantized_decomposed ops, and the private ops that a delegate computes.

    most: the most tokens of one call, `CHUNK` if 0. exactly: the number of tokens of every call, if not 0.
    """
    from .passes import decompose, rewrite

    chunk = exactly or min(most or CHUNK, max_positions)
    limits = {"sequence": chunk, "logits": chunk, "capacity": max_positions, "source": max_positions}
    bounds = {n: (low, min(high, limits.get(n, high))) for n, (low, high) in graph.bounds.items()}
    fixed = {"batch"} | ({"sequence"} if exactly else set()) | ({"logits"} if exactly == 1 else set())
    example = {n: min(size, bounds[n][1]) for n, size in graph.example.items()} | {"batch": 1}
    example |= {"sequence": exactly} if exactly else {}
    single = replace(graph, example=example, bounds=bounds)
    ports: list[Port | State] = [*graph.inputs, *(s for s in graph.states if not s.updated)]
    named = dict(zip(graph.input_names, single.example_inputs(), strict=True))
    args = [named[p.name] for p in ports]
    if "capacity" in graph.bounds:
        ports.append(Port(FILLED, torch.int64, ("capacity",)))
        args.append(torch.arange(single.example["capacity"]))
    dims = {n: torch.export.Dim(n, min=low, max=high) for n, (low, high) in bounds.items() if n not in fixed}
    shapes = [{i: dims[d] for i, d in enumerate(p.shape) if isinstance(d, str) and d not in fixed} for p in ports]
    with torch.no_grad():
        wrapped = _Method(graph, max_positions).eval().requires_grad_(False)
        traced = decompose(torch.export.export(wrapped, tuple(args), dynamic_shapes=(tuple(shapes),)))
        module = traced.module(check_guards=False)
        assert isinstance(module, torch.fx.GraphModule)
        rewritten: nn.Module = rewrite(module, max_positions)
        if wrapped.carried:
            rewritten = _Carrying(rewritten, [f"state_{s.name}" for s in wrapped.carried])
        rewritten.requires_grad_(False)
        return torch.export.export(
            rewritten, tuple(args), dynamic_shapes=(tuple(shapes),) if wrapped.carried else tuple(shapes)
        )


def lower(programs: dict[str, torch.export.ExportedProgram]) -> Any:
    """One ExecuTorch program of all methods. Empties `programs`."""
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass

    from .lowerings import no_kernel
    from .partition import edge_programs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The methods of a graph for many tokens and for one work on the same states.
        shared = any(name.endswith(STEP) for name in programs)
        config = ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=shared))
        names = ", ".join(programs)
        try:
            return edge_programs(programs).to_executorch(config)
        except RuntimeError as error:
            variant = _NO_VARIANT.search(str(error))
            if variant is None:
                raise
            raise no_kernel(names, variant[1]) from error
