"""ExecuTorch's own Python runtime behind `Session`. What may enter: `bundle`; torch, whose tensors the runtime takes.

The KV cache lives in the decoder's mutable buffers, and a loaded program holds one stream: all methods loaded from one
program share its buffers, also two of the same name. A row of a batch therefore has a program of its own, lent from a
pool; rows run one after the other. A new stream needs no reset: it writes from position 0 on, and the kernels read no
further than what was written.
"""

from __future__ import annotations

import importlib.metadata
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..bundle import GraphSpec
from .quiet import quiet_stderr, quiet_torchao
from .session import Array, Placement, StateBuffers, place

PROGRAM = "model.pte"
HOST_OPS = {
    "llama::update_cache.out": "writes the KV cache in place",
    "llama::custom_sdpa.out": "attends to the filled part of the cache alone, heads grouped",
    "quantized_decomposed::embedding_2bit.dtype_out": "reads the rows it needs of a quantized table",
    "quantized_decomposed::embedding_4bit.dtype_out": "the same",
    "quantized_decomposed::embedding_byte.dtype_out": "the same",
    "aten::embedding.out": "the same of a table kept at 16 bits",
    "aten::slice_copy.Tensor_out": "hands on the filled part of a cache where scores are soft-capped or have a window",
    "aten::index_select.out": "hands the head the positions asked for",
}
"""What the lowering itself leaves to ExecuTorch's optimised kernels, and why."""
POSITIONS = " on positions"
"""Behind the name of a kernel that is given no activations, but the integers of positions, or a mask."""
_ROWS = "decoder rows"


class ExecuTorchSession:
    """The program of a bundle's `executorch` folder. Activations are quantized to int8 by every delegated linear."""

    activations = "int8"
    stand_in = False

    def __init__(self, directory: Path, graphs: Sequence[GraphSpec], threads: int = 0) -> None:
        quiet_torchao()
        self.how = f"executorch {importlib.metadata.version('executorch')} on this CPU, XNNPACK with int8 activations"
        self._path = directory / PROGRAM
        with quiet_stderr():  # it tells of the processor's files and of its threads
            import executorch.extension.llm.custom_ops.custom_ops  # registers the llama:: kernels
            import executorch.kernels.quantized  # noqa: F401  registers the embedding kernels
            from executorch.extension.pybindings import portable_lib

            wanted = threads or os.cpu_count() or 1
            if portable_lib._threadpool_get_thread_count() != wanted:  # one pool for all programs of the process
                portable_lib._unsafe_reset_threadpool(wanted)
            self._load = portable_lib._load_program
            self._program = self._load(str(self._path))
        self._graphs = {g.name: g for g in graphs}
        self._methods: dict[str, Any] = {}
        self._pool: list[Any] = []
        self._chunk = self._bound("decoder", "input_ids")

    def new_state(self, batch: int, capacity: int) -> StateBuffers:
        """A stream a row. The caches are as long as the program's, whatever `capacity` asks."""
        rows = [self._pool.pop() if self._pool else self._decoder() for _ in range(batch)]
        state = _State({_ROWS: rows})
        weakref.finalize(state, self._pool.extend, rows)
        return state

    def _decoder(self) -> Any:
        return self._load(str(self._path)).load_method("decoder")

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        spec = self._graphs[graph]
        rows = len(next(iter(inputs.values())))
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
        """XNNPACK's nodes, the kernels that the lowering chose (HOST_OPS, POSITIONS), and any other kernel as fallback."""
        from ..exporters.executorch_program import DELEGATE, ProgramFile

        units = ProgramFile(self._path).placement()
        ours = {op for ops in units.values() for by_op in ops.values() for op in by_op if op.endswith(POSITIONS)}
        return place(units, (DELEGATE,), ours | set(HOST_OPS), "the program's own instructions and delegates")

    def _row(self, spec: GraphSpec, row: int, inputs: Mapping[str, Array], state: StateBuffers) -> list[torch.Tensor]:
        one = {p.name: _tensor(inputs[p.name], row if p.shape[0] == "batch" else None) for p in spec.inputs}
        one |= {s.name: state[s.name][row] for s in spec.states if not s.updated}
        order = [p.name for p in spec.inputs] + [s.name for s in spec.states if not s.updated]
        if "past_length" not in one:
            if spec.name not in self._methods:
                self._methods[spec.name] = self._program.load_method(spec.name)
            return list(self._methods[spec.name]([one[n] for n in order]))
        return [self._decode(state[_ROWS][row], one, order)]

    def _decode(self, method: Any, one: dict[str, torch.Tensor], order: list[str]) -> torch.Tensor:
        """Logits [1, asked positions, vocab]; a long input goes in pieces of what the program takes."""
        ids, past, asked = one["input_ids"], one["past_length"], one["logit_positions"]
        found: list[torch.Tensor] = []
        for at in range(0, ids.shape[1], self._chunk):
            piece = ids[:, at : at + self._chunk].contiguous()
            here = asked[(asked >= at) & (asked < at + self._chunk)] - at
            wanted = here if len(here) else torch.zeros(1, dtype=torch.int64)
            values = one | {"input_ids": piece, "past_length": past + at, "logit_positions": wanted}
            slots = torch.arange(int(past) + at + piece.shape[1])  # see exporters/executorch.py
            (logits,) = method([*(values[n] for n in order), slots])
            if len(here):
                found.append(logits)
        return _joined(found, 1)

    def _bound(self, graph: str, port: str) -> int:
        """The most that the program takes of an input's last dimension."""
        index = [p.name for p in self._graphs[graph].inputs].index(port)
        return int(self._program.method_meta(graph).input_tensor_meta(index).sizes()[-1])


class _State(dict[str, Any]):
    """A dict that a finalizer can watch: when a stream is dropped its methods return to the pool."""


def _joined(parts: list[torch.Tensor], axis: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _tensor(value: Array, row: int | None) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value if row is None else value[row : row + 1]))
