"""ExecuTorch: all graphs as methods of one `model.pte`, for XNNPACK. What may enter: `ops`, `graph`, `bundle`.

Main path: export each graph for a batch of one with its KV cache as buffers -> rewrite (`executorch_rewriter`) ->
export again -> lower all methods together, so that weights are stored once.
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
from ...targets.executorch.names import EXACT, POSITIONS, STEP
from ..artefact import Artefact, Options, Progress

if TYPE_CHECKING:
    from ...targets.executorch.program import ProgramFile

PROGRAM = "model.pte"
NAMES = "weights.json"
CHUNK, SHORT = 128, 16
"""The most tokens that one call of the decoder takes; memory is planned for them. A session feeds more in pieces. Recurrences
with a decay for each key dimension take the shorter ones: what they compute grows with the square."""

_NO_VARIANT = re.compile(r"Missing out variants: \{'([\w:.]+)'")

FILLED = "filled"
"""A last input of methods with a KV cache: int64 [tokens in the cache after this call], 0, 1, 2, …"""


def export(graphs: Sequence[Graph], directory: Path, options: Options, progress: Progress = lambda _: None) -> Artefact:
    """Write `model.pte` into `directory` (which must exist), one method a graph.

    `options.max_positions` is the capacity of the KV caches and the longest source. Raises UserError for a weight in a
    form that XNNPACK does not have.
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
    return Artefact((PROGRAM, NAMES), ops(written), facts)


def _require_kernels(written: ProgramFile) -> None:
    """Raise UserError for an op that ExecuTorch's own kernels do not compute."""
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401  both register kernels
    from executorch.extension.pybindings import portable_lib

    from ...targets.executorch.program import KERNELS
    from .lowerings import no_kernel

    registered = set(portable_lib._get_operator_names())
    for graph, units in written.placement().items():
        lacking = {op.removesuffix(POSITIONS) for op in units[KERNELS]} - registered
        if lacking:
            raise no_kernel(graph, min(lacking))


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, float32 [N, K]) of every quantized weight as `model.pte` holds it.

    A weight that is stored more than once, such as the table of an embedding beside the matrix of the head tied to it, comes
    once for each. Raises UserError for a program that is damaged or is not the one that `weights.json` speaks of.
    """
    from ...targets.executorch.program import ProgramFile

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
    from ...targets.executorch.program import fingerprint
    from .lowerings import container, table_bits

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
    """A graph for a batch of one whose updated states are buffers.

    A KV cache lies [1, capacity, kv_heads, head_dim], as the kernels that write it want; `edgewright::cached_attention` only
    passes it through while the graph is traced and is then rewritten. Other states have the graph's own shape; where a
    stream begins they count as zero, whatever the stream before has left there.
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
        """The graph's outputs, then what is to be carried on."""
        given = iter(values[self.inputs :])  # the last, FILLED, is for the rewriter
        begins = _begins(values[self.past_length]) if self.carried else 0
        states: list[torch.Tensor] = []
        for state in self.states:
            held = getattr(self, f"state_{state.name}") if state.updated else next(given)
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
        given = len(out) - len(self.names)
        for name, value in zip(self.names, out[given:], strict=True):
            self.rewritten.get_buffer(name).copy_(value)
        return tuple(out[:given])


def _begins(past_length: torch.Tensor) -> int:
    """1 where a stream begins, else 0, as a size known only at run time."""
    begins = (past_length == 0).to(torch.int64)[0].item()
    torch._check(begins >= 0)  # type: ignore[no-untyped-call]
    torch._check(begins <= 1)  # type: ignore[no-untyped-call]
    assert isinstance(begins, int | torch.SymInt)
    return begins


def _held_or_zero(held: torch.Tensor, begins: int) -> torch.Tensor:
    """A buffer [1, …], or zeros. Never a product with zero: a buffer may hold NaN. Copies alone: `where` is 20 times slower."""
    padding = [0, 0] * (held.dim() - 1) + [0, 1]
    return nn.functional.pad(held, padding).narrow(0, begins, 1)


def _is_carried(state: State) -> bool:
    """Whether a state is a buffer of its own shape, read and written whole; a KV cache is written where it is used."""
    return state.updated and "capacity" not in state.shape


def methods(graph: Graph, max_positions: int) -> dict[str, torch.export.ExportedProgram]:
    """Name -> program of a graph's methods: one; of a graph with recurrent states a second one for a single token.

    The first takes any number of tokens up to a limit; where it has a selective scan, exactly `SHORT`.
    """
    if not any(s.kind == "recurrent" for s in graph.states):
        return {graph.name: method(graph, max_positions)}
    found = {n.target for n in graph.export().graph.nodes}
    step = {graph.name + STEP: method(graph, max_positions, exactly=1)}
    if torch.ops.edgewright.selective_scan.default in found:
        exactly = min(SHORT, max_positions, graph.bounds["sequence"][1])
        return {graph.name + EXACT: method(graph, max_positions, exactly=exactly)} | step
    most = SHORT if torch.ops.edgewright.linear_attention.default in found else CHUNK
    return {graph.name: method(graph, max_positions, most=most)} | step


def method(graph: Graph, max_positions: int, most: int = 0, exactly: int = 0) -> torch.export.ExportedProgram:
    """The graph as a program over ATen, torchao, llama and quantized_decomposed ops alone.

    most: tokens of one call, `CHUNK` if 0; exactly: all calls have so many, if not 0.
    """
    from .rewrite_pass import Rewriter, decomposed

    chunk = exactly or min(most or CHUNK, max_positions)
    limits = {"sequence": chunk, "logits": chunk, "capacity": max_positions, "source": max_positions}
    bounds = {n: (low, min(high, limits.get(n, high))) for n, (low, high) in graph.bounds.items()}
    fixed = {"batch"} | ({"sequence"} if exactly else set()) | ({"logits"} if exactly == 1 else set())
    example = {n: min(size, bounds[n][1]) for n, size in graph.example.items()} | {"batch": 1}
    example |= {"sequence": exactly} if exactly else {}
    single = replace(graph, example=example, bounds=bounds)
    given: list[Port | State] = [*graph.inputs, *(s for s in graph.states if not s.updated)]
    named = dict(zip(graph.input_names, single.example_inputs(), strict=True))
    args = [named[p.name] for p in given]
    if "capacity" in graph.bounds:
        given.append(Port(FILLED, torch.int64, ("capacity",)))
        args.append(torch.arange(single.example["capacity"]))
    dims = {n: torch.export.Dim(n, min=low, max=high) for n, (low, high) in bounds.items() if n not in fixed}
    shapes = [{i: dims[d] for i, d in enumerate(p.shape) if isinstance(d, str) and d not in fixed} for p in given]
    with torch.no_grad():
        wrapped = _Method(graph, max_positions).eval().requires_grad_(False)
        traced = decomposed(torch.export.export(wrapped, tuple(args), dynamic_shapes=(tuple(shapes),)))
        module = traced.module(check_guards=False)
        assert isinstance(module, torch.fx.GraphModule)
        rewritten: nn.Module = Rewriter(module, max_positions).run()
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
            found = _NO_VARIANT.search(str(error))
            if found is None:
                raise
            raise no_kernel(names, found[1]) from error
