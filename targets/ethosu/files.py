"""Reading an Ethos-U artefact back: the TOSA file that Vela was given, and the `.pte` around it.

Sizes, indices and names in the files are their own word: what does not fit together raises a UserError.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import UserError
from ...system.quiet import quiet_torchao
from ...system.reading import one_line

quiet_torchao()  # before ExecuTorch's modules load it

DELEGATE = "EthosUBackend"
_CONSTANTS = ("CONST", "CONST_SHAPE")
_LOOKUP = "quantized_decomposed::embedding_byte"


@dataclass(frozen=True)
class StoredLinear:
    """A linear as TOSA holds it: a convolution of 1x1 and the rescale of its sums.

    tensor: the name of its weight. codes: int8 [N, K]. factors: float64 [N], what a sum is multiplied by, which is input
    scale times weight scale over output scale.
    """

    tensor: str
    codes: torch.Tensor
    factors: torch.Tensor


class TosaFile:
    """A `.tosa` flatbuffer opened. Raises UserError if it is damaged."""

    def __init__(self, path: Path) -> None:
        from tosa.Op import Op
        from tosa.TosaGraph import TosaGraph

        self.path = path
        self._names = {value: name for name, value in vars(Op).items() if isinstance(value, int)}
        try:
            self.data = path.read_bytes()
            if not TosaGraph.TosaGraphBufferHasIdentifier(self.data, 0):
                raise ValueError("no TOSA flatbuffer")
            graph = TosaGraph.GetRootAs(self.data, 0)
            if graph.RegionsLength() != 1 or graph.Regions(0).BlocksLength() != 1:
                raise ValueError("more than one block")
            block = graph.Regions(0).Blocks(0)
            self._tensors = {t.Name().decode(): t for t in (block.Tensors(i) for i in range(block.TensorsLength()))}
            self._operators = [block.Operators(i) for i in range(block.OperatorsLength())]
            self.inputs = [block.Inputs(i).decode() for i in range(block.InputsLength())]
            self.outputs = [block.Outputs(i).decode() for i in range(block.OutputsLength())]
        except Exception as error:  # flatbuffers' and struct's own, wherever an offset leads
            raise self._damaged(error) from error

    def _damaged(self, error: object) -> UserError:
        return UserError(f"{one_line(self.path)} is no whole TOSA file ({one_line(error, 120)}); export again")

    def ops(self) -> dict[str, int]:
        """Op -> nodes, constants left out."""
        names = (self._names[o.Op()] for o in self._operators)
        return dict(Counter(name for name in names if name not in _CONSTANTS))

    def shape(self, tensor: str) -> tuple[int, ...]:
        return tuple(int(d) for d in self._tensors[tensor].ShapeAsNumpy())

    def linears(self) -> Iterator[StoredLinear]:
        """Every convolution, in the order of the file."""
        try:
            rescaled = {o.Inputs(0): o for o in self._operators if self._names[o.Op()] == "RESCALE"}
            for operator in self._operators:
                if self._names[operator.Op()] != "CONV2D":
                    continue
                name = operator.Inputs(1).decode()
                rows, *kernel, columns = self.shape(name)
                if kernel != [1, 1]:
                    raise ValueError(f"a kernel of {kernel}")
                codes = self._values(name, np.dtype(np.int8)).reshape(rows, columns)
                rescale = rescaled[operator.Outputs(0)]
                multipliers, shifts = (rescale.Inputs(i).decode() for i in (1, 2))
                width = np.dtype(np.int32 if self._tensors[multipliers].Type() == _int32() else np.int16)
                numerator = self._values(multipliers, width).astype(np.float64)
                exponents = self._values(shifts, np.dtype(np.int8)).astype(np.int32)
                if len(numerator) != rows or len(exponents) != rows:
                    raise ValueError(f"{len(numerator)} factors for {rows} channels")
                yield StoredLinear(name, _tensor(codes), _tensor(np.ldexp(numerator, -exponents)))
        except (KeyError, IndexError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise self._damaged(error) from error

    def _values(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        """The constant `name`. Raises ValueError if its bytes are not what its shape takes."""
        found = self._tensors[name]
        size = prod(self.shape(name)) * dtype.itemsize
        if found.DataIsNone() or not 0 < size == found.DataLength():
            raise ValueError(f"{found.DataLength()} bytes of {one_line(name, 60)} where its shape takes {size}")
        return np.frombuffer(found.DataAsNumpy().tobytes(), dtype)


def _int32() -> int:
    from tosa.DType import DType

    return int(DType.INT32)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.copy())


class Program:
    """A `.pte` of one method opened. Raises UserError if it is damaged or has not the one delegate it should have."""

    def __init__(self, path: Path) -> None:
        from executorch.exir._serialize._program import deserialize_pte_binary

        self.path = path
        try:
            with path.open("rb") as file:
                mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self.program = deserialize_pte_binary(mapped).program
            (self.plan,) = self.program.execution_plan
            self.calls = [i.instr_args for chain in self.plan.chains for i in chain.instructions]
            self.kernels = [self._kernel(call) for call in self.calls]
            delegates = [
                (d.id, bytes(self.program.backend_delegate_data[d.processed.index].data)) for d in self.plan.delegates
            ]
        except Exception as error:  # the deserialiser's many own types, and those of an absent or empty file
            raise self._damaged(error) from error
        if [name for name, _ in delegates] != [DELEGATE] or self.kernels.count(None) != 1:
            raise self._damaged(f"{len(delegates)} delegates where one is expected")
        self.delegate = delegates[0][1]

    def _damaged(self, error: object) -> UserError:
        return UserError(f"{one_line(self.path)} is no whole Ethos-U program ({one_line(error, 120)}); export again")

    def _kernel(self, call: Any) -> str | None:
        """`namespace::op.overload` of a kernel call; None for the call of a delegate. Raises ValueError for other calls."""
        kind = type(call).__name__
        if kind == "DelegateCall":
            return None
        if kind != "KernelCall":
            raise ValueError(f"a {kind}")
        operator = self.plan.operators[call.op_index]
        return f"{operator.name}.{operator.overload}" if operator.overload else str(operator.name)

    def host_ops(self) -> dict[str, int]:
        """Kernel of ExecuTorch -> nodes."""
        return dict(Counter(name for name in self.kernels if name is not None))

    def constant(self, value: int) -> torch.Tensor:
        """The tensor that the file holds as value `value`. Raises UserError if it holds none."""
        found = self.plan.values[value].val
        if type(found).__name__ != "Tensor" or found.data_buffer_idx == 0 or found.allocation_info is not None:
            raise self._damaged(f"value {value} is no constant")
        try:
            dtype = DTYPES[int(found.scalar_type)]
            data = self.program.constant_buffer[found.data_buffer_idx].storage
        except (KeyError, IndexError) as error:
            raise self._damaged(error) from error
        size = prod(found.sizes) * dtype.itemsize
        if min(found.sizes, default=1) < 1 or list(found.dim_order) != sorted(found.dim_order) or size > len(data):
            raise self._damaged(f"{len(data)} bytes where a constant takes {size}")
        return torch.frombuffer(bytearray(data[:size]), dtype=dtype).reshape(found.sizes)

    def table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(int8 [N, K], float32 [N]) of the embedding."""
        lookups = [c for c, name in zip(self.calls, self.kernels, strict=True) if (name or "").startswith(_LOOKUP)]
        if len(lookups) != 1:
            raise self._damaged(f"{len(lookups)} embeddings where one is expected")
        codes, scales = (self.constant(i) for i in lookups[0].args[:2])
        zeros = self.plan.values[lookups[0].args[2]].val
        if codes.dim() != 2 or scales.shape != codes.shape[:1] or type(zeros).__name__ != "Null":
            raise self._damaged("an embedding in another form")
        if codes.dtype != torch.int8 or scales.dtype != torch.float32:
            raise self._damaged(f"an embedding of {codes.dtype} and {scales.dtype}")
        return codes, scales


DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
}
"""ExecuTorch's scalar types."""
