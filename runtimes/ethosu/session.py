"""The Ethos-U program, emulated on this machine, as a `Session`.

The `.pte` is followed call by call: torch runs the host's kernels, and Arm's TOSA reference model runs the delegate, from the
`.tosa` that it was compiled from. TOSA is exact integer arithmetic, so an NPU gives the same values, as far as Vela keeps to
TOSA. The artefact holds the encoder alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401  defines the embedding kernels
import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # defines the other quantized_decomposed ops

from ...bundle import GraphSpec
from ...errors import UserError
from ...system.reading import one_line
from ...targets.ethosu.files import DELEGATE, DTYPES, Program, TosaFile
from ...targets.ethosu.names import GRAPH, HOST_OPS
from ..session import Array, PlacedSession, Placement, StateBuffers, place

ATEN = torch.ops.aten
QD = torch.ops.quantized_decomposed
KERNELS = {
    "aten::logical_and.out": ATEN.logical_and.default,
    "aten::mul.out": ATEN.mul.Tensor,
    "aten::squeeze_copy.dims_out": ATEN.squeeze_copy.dims,
    "aten::unsqueeze_copy.out": ATEN.unsqueeze_copy.default,
    "aten::where.self_out": ATEN.where.self,
    "quantized_decomposed::dequantize_per_tensor.out": QD.dequantize_per_tensor.default,
    "quantized_decomposed::embedding_byte.dtype_out": QD.embedding_byte.dtype,
    "quantized_decomposed::quantize_per_tensor.out": QD.quantize_per_tensor.default,
}
"""Kernels of the host -> torch's of the same meaning."""


class EthosUSession:
    """The encoder of a bundle's `ethosu` folder.

    accelerator: the configuration to run; None is the first in the folder by name. Raises UserError if there is none, or its
    files are damaged.
    """

    activations = "int16"
    how = "Arm's TOSA reference model on this CPU (emulated) in place of the NPU, for which there is no simulator here"
    stand_in = True

    def __init__(self, directory: Path, graphs: Sequence[GraphSpec], accelerator: str | None = None) -> None:
        programs = sorted(p.name for p in directory.glob(f"{GRAPH}.{accelerator or '*'}.pte"))
        if not programs:
            raise UserError(f"no {GRAPH}.{accelerator or 'CONFIGURATION'}.pte in {one_line(directory)}; export it")
        path = directory / programs[0]
        self._program, self._tosa = Program(path), TosaFile(path.with_suffix(".tosa"))
        spec = next(g for g in graphs if g.name == GRAPH)
        self._inputs, self._output = [p.name for p in spec.inputs], spec.outputs[0].name
        self._length = int(self._program.plan.values[self._program.plan.inputs[0]].val.sizes[1])

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        return {}  # an encoder has none

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        """Run the rows of a batch one by one, padded to the program's length.

        Raises UserError for a longer source, and for another graph.
        """
        if graph != GRAPH:
            raise UserError(
                f"the ethosu artefact holds the encoder alone, and {graph} was asked for; run another --format"
            )
        batch, length = inputs[self._inputs[0]].shape
        if length > self._length:
            raise UserError(f"a source of {length} tokens; this program takes {self._length}")
        rows = []
        for row in range(batch):
            padded = [np.pad(inputs[n][row : row + 1], ((0, 0), (0, self._length - length))) for n in self._inputs]
            rows.append(self._row([torch.from_numpy(p) for p in padded])[:, :length])
        return {self._output: torch.cat(rows).numpy()}

    def placement(self) -> Placement:
        """The delegate's TOSA ops and the host's ExecuTorch kernels, from the files."""
        units = {GRAPH: {DELEGATE: self._tosa.ops(), "CPU": self._program.host_ops()}}
        return place(
            units, (DELEGATE,), HOST_OPS, "the program's own plan, and the TOSA that its one delegate was compiled from"
        )

    def _row(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        plan = self._program.plan
        values: dict[int, Any] = dict(zip(plan.inputs, inputs, strict=True))
        for call, kernel in zip(self._program.calls, self._program.kernels, strict=True):
            if kernel is None:
                operands = [values[i].numpy() for i in call.args[: len(self._tosa.inputs)]]
                values[call.args[-1]] = self._delegate(operands, plan.values[call.args[-1]].val.sizes)
            else:
                values[call.args[-1]] = self._kernel(kernel, call.args, values)
        result: torch.Tensor = values[plan.outputs[0]]
        return result

    def _delegate(self, inputs: list[Array], sizes: list[int]) -> torch.Tensor:
        import tosa_reference_model as reference

        (output,), status = reference.run(self._tosa.data, inputs)
        if status != reference.GraphStatus.TOSA_VALID:
            raise UserError(
                f"{one_line(self._tosa.path)}: the TOSA reference model refuses it ({status}); export again"
            )
        return torch.from_numpy(np.frombuffer(output.tobytes(), np.int16).reshape(sizes).copy())

    def _kernel(self, name: str, arguments: list[int], values: Mapping[int, Any]) -> torch.Tensor:
        if name not in KERNELS:
            raise UserError(f"{one_line(self._program.path)} calls {one_line(name, 60)}, which is not of this lowering")
        schema = KERNELS[name]._schema.arguments
        bound = [
            (a, self._value(i, values, "ScalarType" in str(a.real_type)))
            for i, a in zip(arguments, schema, strict=False)
        ]
        named = {a.name: value for a, value in bound if a.kwarg_only}
        result: torch.Tensor = KERNELS[name](*(value for a, value in bound if not a.kwarg_only), **named)
        return result

    def _value(self, index: int, values: Mapping[int, Any], is_type: bool) -> Any:
        if index in values:
            return values[index]
        held = self._program.plan.values[index].val
        kind = type(held).__name__
        if kind == "Tensor":
            return self._program.constant(index)
        if kind == "Null":
            return None
        if kind == "IntList":
            return [self._program.plan.values[i].val.int_val for i in held.items]
        number = next(v for n, v in vars(held).items() if n.endswith("_val"))
        return DTYPES[int(number)] if is_type else number


def open_session(folder: Path, graphs: Sequence[GraphSpec], threads: int, exact: bool) -> PlacedSession:
    """As `runtimes.registry` asks for it. There is no exact one."""
    return EthosUSession(folder, graphs)
