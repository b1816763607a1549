"""ExecuTorch's own Python runtime as a `Session`; it takes torch's tensors.

States are mutable buffers of the program, and all methods loaded from one program share them. So each row of a batch has a
program of its own, from a pool, and rows run one after the other. A new stream needs no reset: kernels read the KV cache only
as far as the stream has written it, and at position 0 the program takes its other states as zero.
"""

from __future__ import annotations

import importlib.metadata
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...bundle import GraphSpec
from ...system.quiet import quiet_stderr, quiet_torchao
from ...targets.executorch.names import EXACT, POSITIONS, PROGRAM, STEP
from ...targets.executorch.plan_check import check_program, require_planned
from ..session import Array, PlacedSession, Placement, StateBuffers, place

HOST_OPS = {
    "llama::update_cache.out": "writes the KV cache in place",
    "llama::custom_sdpa.out": "attends to the filled part of the cache alone, heads grouped",
    "quantized_decomposed::embedding_2bit.dtype_out": "reads the rows it needs of a quantized table",
    "quantized_decomposed::embedding_4bit.dtype_out": "the same",
    "quantized_decomposed::embedding_byte.dtype_out": "the same",
    "aten::embedding.out": "the same of a table kept at 16 bits",
    "aten::slice_copy.Tensor_out": "hands on the filled part of a cache where scores are soft-capped or have a window",
    "aten::index_select.out": "hands the head the positions asked for",
    "executorch_prim::et_view.default": "gives a value another shape, copying nothing",
    "aten::copy_": "writes a state back",
    "aten::where.self_out": "picks one of two values; XNNPACK neither compares nor picks",
    "aten::lt.Tensor_out": "compares for it",
    "aten::amax.out": "finds the largest of a new token's keys and values, whose scale it is, where the cache is int8",
    "aten::clamp.out": "keeps that scale from zero",
    "aten::round.out": "makes codes of them",
    "aten::_to_copy.out": "between codes and floats",
    "aten::constant_pad_nd.out": "puts zeros behind a state, of which a new stream's first call takes those",
}
"""Kernels that the lowering leaves to ExecuTorch's optimised library, and what each does."""

_ROWS = "rows of "


class ExecuTorchSession:
    """The program of a bundle's `executorch` folder. Every delegated linear quantizes its input to int8."""

    activations = "int8"
    stand_in = False

    def __init__(self, directory: Path, graphs: Sequence[GraphSpec], threads: int = 0) -> None:
        quiet_torchao()
        self.how = f"executorch {importlib.metadata.version('executorch')} on this CPU, XNNPACK with int8 activations"
        self._path = directory / PROGRAM
        self._planned = check_program(self._path)
        with quiet_stderr():  # the library reports on the processor and on its threads
            import executorch.extension.llm.custom_ops.custom_ops  # registers the llama:: kernels
            import executorch.kernels.quantized  # noqa: F401  registers the embedding kernels
            from executorch.extension.pybindings import portable_lib

            wanted = threads or os.cpu_count() or 1
            if portable_lib._threadpool_get_thread_count() != wanted:  # the process has one pool of threads
                portable_lib._unsafe_reset_threadpool(wanted)
            self._load = portable_lib._load_program
            # by itself it takes every offset in the file for right
            checked = portable_lib.Verification.InternalConsistency
            self._program = self._load(str(self._path), program_verification=checked)
        self._graphs = {g.name: g for g in graphs}
        self._methods: dict[str, Any] = {}
        self._pool: dict[str, list[_Row]] = {g.name: [] for g in graphs}
        self._names = {self._program.get_method_name(i) for i in range(self._program.num_methods())}

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        """A stream for each row. The caches are as long as the program's, whatever `capacity` is."""
        pool = self._pool[graph]
        rows = [pool.pop() if pool else self._row_of(graph) for _ in range(batch)]
        state = _State({_ROWS + graph: rows})
        weakref.finalize(state, pool.extend, rows)
        return state

    def _row_of(self, graph: str) -> _Row:
        """The graph's methods from a program of their own."""
        require_planned(self._path, self._planned)
        program = self._load(str(self._path))
        step = program.load_method(graph + STEP) if graph + STEP in self._names else None
        return _Row(program, program.load_method(self._many(graph)), step)

    def _many(self, graph: str) -> str:
        return graph + EXACT if graph + EXACT in self._names else graph

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        spec = self._graphs[graph]
        rows = next((len(inputs[p.name]) for p in spec.inputs if p.shape[:1] == ("batch",)), 1)
        parts = [self._row(spec, row, inputs, state) for row in range(rows)]
        results: dict[str, Array] = {}
        held = {s.name for g in self._graphs.values() for s in g.states}
        for i, port in enumerate(spec.outputs):
            if port.name in held:
                state[port.name] = [part[i] for part in parts]
            else:
                results[port.name] = _joined([part[i] for part in parts], 0).numpy()
        return results

    def placement(self) -> Placement:
        """XNNPACK's nodes, the kernels that the lowering chose (HOST_OPS, POSITIONS), and all others as fallback."""
        from ...targets.executorch.program import DELEGATE, ProgramFile

        units = ProgramFile(self._path).placement()
        ours = {op for ops in units.values() for by_op in ops.values() for op in by_op if op.endswith(POSITIONS)}
        return place(units, (DELEGATE,), ours | set(HOST_OPS), "the program's own instructions and delegates")

    def _row(self, spec: GraphSpec, row: int, inputs: Mapping[str, Array], state: StateBuffers) -> list[torch.Tensor]:
        one = {p.name: _tensor(inputs[p.name], row if p.shape[:1] == ("batch",) else None) for p in spec.inputs}
        one |= {s.name: state[s.name][row] for s in spec.states if not s.updated}
        order = [p.name for p in spec.inputs] + [s.name for s in spec.states if not s.updated]
        if not spec.updated_states:
            if spec.name not in self._methods:
                self._methods[spec.name] = self._program.load_method(spec.name)
            return list(self._methods[spec.name]([one[n] for n in order]))
        return self._advance(spec, state[_ROWS + spec.name][row], one, order)

    def _advance(
        self, spec: GraphSpec, row: _Row, one: dict[str, torch.Tensor], order: list[str]
    ) -> list[torch.Tensor]:
        """Outputs at `logit_positions`; a long input is fed in pieces as large as the program takes."""
        past, positions = one["past_length"], one["logit_positions"]
        along = {p.name: p.shape.index("sequence") for p in spec.inputs if "sequence" in p.shape}
        length = one["input_ids"].shape[1]
        most, exact = self._bound(spec, "input_ids"), self._many(spec.name) != spec.name
        cached = any("capacity" in s.shape for s in spec.states)
        pieces: list[list[torch.Tensor]] = []
        at = 0
        while at < length:
            size = min(most, length - at)
            size = 1 if exact and size < most else size
            inside = positions[(positions >= at) & (positions < at + size)] - at
            wanted = inside if len(inside) else torch.zeros(1, dtype=torch.int64)
            values = one | {n: one[n].narrow(axis, at, size).contiguous() for n, axis in along.items()}
            values |= {"past_length": past + at, "logit_positions": wanted}
            # The last input of a program with caches: one position for each token so far.
            filled = [torch.arange(int(past) + at + size)] if cached else []
            single = row.step is not None and size == 1 and len(wanted) == 1
            outputs = (row.step if single else row.many)([*(values[n] for n in order), *filled])
            if len(inside):
                pieces.append(list(outputs))
            at += size
        return [_joined(list(parts), 1) for parts in zip(*pieces, strict=True)]

    def _bound(self, spec: GraphSpec, port: str) -> int:
        """The size of an input's last dimension in the program."""
        index = [p.name for p in spec.inputs].index(port)
        return int(self._program.method_meta(self._many(spec.name)).input_tensor_meta(index).sizes()[-1])


@dataclass
class _Row:
    """The methods of one stream: for many tokens, and for a single one where the program has such a method."""

    program: Any
    many: Any
    step: Any


class _State(dict[str, Any]):
    """A dict that can have a finalizer: when a stream is dropped, its methods return to the pool."""


def _joined(parts: list[torch.Tensor], axis: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _tensor(value: Array, row: int | None) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value if row is None else value[row : row + 1]))


def open_session(folder: Path, graphs: Sequence[GraphSpec], threads: int, exact: bool) -> PlacedSession:
    """As `runtimes.registry` asks for it. There is no exact one."""
    return ExecuTorchSession(folder, graphs, threads)
