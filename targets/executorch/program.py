"""Reading a `.pte` back: which kernels and delegates it calls, and the weights it holds.

ExecuTorch's own deserialiser opens the mapped file; each XNNPACK delegate is a flatbuffer behind a header, opened with the
schema that ships with the backend. Its constants lie in the program's named data, keyed by their SHA-256. Every size and
index is the file's word: what does not fit together raises a UserError.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import mmap
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError
from ...ops.packing import repack, swap_nibbles
from ...ops.quantized import dequantize
from ...system.quiet import quiet_torchao
from ...system.reading import one_line

quiet_torchao()  # before ExecuTorch's modules load it

DELEGATE = "XnnpackBackend"
KERNELS = "CPU"
POSITIONS = " on positions"
_LOOKUP = "quantized_decomposed::embedding_"
_TABLE_BITS = {"2bit": 2, "4bit": 4, "byte": 8}
_BITS = {"xnn_datatype_qbint4": 4, "xnn_datatype_qcint8": 8}
_ROWS = 4096  # of a table unpacked at a time


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight as the program holds it: packed `codes` and `scales` in `ops`' own form.

    digest: SHA-256 of its SHA-256s: of the codes and of the scales, as they lie in the file. graph: whose method reads it.
    kind: "linear" or "embedding".
    """

    graph: str
    kind: str
    digest: str
    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    group: int

    def values(self) -> torch.Tensor:
        """float32 [N, K]."""
        return dequantize(self.codes, self.scales, self.bits, self.group)


def fingerprint(codes: torch.Tensor, scales: torch.Tensor, bits: int, held: int) -> bytes:
    """SHA-256 of packed codes, moved into a container of `held` bits, and of their float32 scales."""
    columns = codes.shape[1] * 8 // bits
    found = hashlib.sha256(repr((held, len(codes), columns, scales.shape[1])).encode())
    for start in range(0, len(codes), _ROWS):
        found.update(repack(codes[start : start + _ROWS], bits, held, columns).contiguous().numpy().data)
    found.update(scales.to(torch.float32).contiguous().numpy().data)
    return found.digest()


class ProgramFile:
    """A `.pte` opened. Raises UserError if it is not one, or is damaged."""

    def __init__(self, path: Path) -> None:
        from executorch.exir._serialize._program import deserialize_pte_binary

        self.path = path
        try:
            with path.open("rb") as file:
                mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            opened = deserialize_pte_binary(mapped)  # slices of it stay mapped
        except Exception as error:  # the deserialiser's many own types, and those of an absent or empty file
            raise self._damaged(error) from error
        self.program = opened.program
        self._named = opened.named_data
        self._delegates: dict[int, dict[str, Any]] = {}

    def _damaged(self, error: object) -> UserError:
        return UserError(f"{one_line(self.path)} is no whole ExecuTorch program ({one_line(error, 120)}); export again")

    def named(self, key: str) -> Any:
        """Bytes of a delegate's constant."""
        entry = None if self._named is None else self._named.pte_data.get(key)
        if entry is None:
            raise self._damaged(f"no constant {one_line(key, 80)}")
        return self._named.buffers[entry.buffer_index]

    def delegate(self, plan: Any, index: int) -> dict[str, Any]:
        """XNNPACK's graph of the plan's delegate `index`, as the schema's JSON."""
        reference = plan.delegates[index]
        if reference.id != DELEGATE:
            raise self._damaged(f"a delegate of {one_line(reference.id, 40)}")
        place = reference.processed.index
        if place not in self._delegates:
            blob = self.program.backend_delegate_data[place].data
            try:
                self._delegates[place] = _xnnpack_graph(bytes(blob))
            except Exception as error:  # flatc's and the header's own
                raise self._damaged(error) from error
        return self._delegates[place]

    def placement(self) -> dict[str, dict[str, dict[str, int]]]:
        """Graph -> unit (`XnnpackBackend`, or `CPU` for a kernel of ExecuTorch) -> op -> nodes.

        Delegated nodes are counted by XNNPACK's own names. A kernel that is given no activations (floats of three
        dimensions and more) but positions or a mask has ` on positions` behind its name.
        """
        found: dict[str, dict[str, dict[str, int]]] = {}
        for plan in self.program.execution_plan:
            kernels: Counter[str] = Counter()
            delegated: Counter[str] = Counter()
            for instruction in (i.instr_args for chain in plan.chains for i in chain.instructions):
                kind = type(instruction).__name__
                if kind == "KernelCall":
                    operator = plan.operators[instruction.op_index]
                    name = f"{operator.name}.{operator.overload}" if operator.overload else operator.name
                    kernels[name if _on_activations(plan, instruction.args) else name + POSITIONS] += 1
                elif kind == "DelegateCall":
                    delegated["delegate"] += 1
                    nodes = self.delegate(plan, instruction.delegate_index)["xnodes"]
                    delegated.update(node["xnode_union_type"].removeprefix("XNN") for node in nodes)
            found[plan.name] = {DELEGATE: dict(delegated), KERNELS: dict(kernels)}
        return found

    def weights(self) -> Iterator[StoredWeight]:
        """Every quantized weight that a fully connected node or an embedding kernel reads, one for each reader."""
        try:
            yield from self._weights()
        except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise self._damaged(error) from error

    def _weights(self) -> Iterator[StoredWeight]:
        for plan in self.program.execution_plan:
            for index in range(len(plan.delegates)):
                graph = self.delegate(plan, index)
                values = [v["xvalue_union"] for v in graph["xvalues"]]
                by_id = {v.get("tensor_value", v)["id_out"]: v for v in values}
                for node in graph["xnodes"]:
                    if node["xnode_union_type"] == "XNNFullyConnected":
                        weight = by_id[node["xnode_union"]["filter_id"]]
                        if "quant_params" in weight:
                            yield self._linear(plan.name, graph, weight)
            for instruction in (i.instr_args for chain in plan.chains for i in chain.instructions):
                if type(instruction).__name__ == "KernelCall":
                    name = plan.operators[instruction.op_index].name
                    if name.startswith(_LOOKUP):
                        yield self._embedding(plan, _TABLE_BITS[name.removeprefix(_LOOKUP)], instruction.args)

    def _linear(self, graph: str, xnnpack: dict[str, Any], weight: dict[str, Any]) -> StoredWeight:
        tensor, quant = weight["tensor_value"], weight["quant_params"]
        rows, columns = tensor["dims"]
        bits = _BITS[tensor["datatype"]]
        raw_codes, raw_scales = (
            self.named(xnnpack["constant_data"][i]["named_key"])
            for i in (tensor["constant_buffer_idx"], quant["scale_buffer_idx"])
        )
        grouped = weight["quant_params_type"] == "PerChannelGroupQuant"
        group = quant["group_size"] if grouped else columns
        codes = _bytes(raw_codes, rows * columns * bits // 8).reshape(rows, -1)
        kind = torch.bfloat16 if grouped else torch.float32
        scales = _bytes(raw_scales, rows * columns // group * kind.itemsize).view(kind).reshape(rows, -1)
        if bits == 8:
            codes = codes ^ 0x80  # stored signed: flipping the top bit adds 128
        return StoredWeight(graph, "linear", _digest(raw_codes, raw_scales), codes, scales, bits, group)

    def _embedding(self, plan: Any, bits: int, args: list[int]) -> StoredWeight:
        tables = [plan.values[i].val for i in args[:2]]
        raw = [self.program.constant_buffer[t.data_buffer_idx].storage for t in tables]
        (rows, width), count = tables[0].sizes, prod(tables[1].sizes)
        codes = _bytes(raw[0], rows * width).reshape(rows, width)
        scales = _bytes(raw[1], count * 2).view(torch.float16).reshape(rows, -1)
        if bits == 4:
            codes = swap_nibbles(codes)  # stored with the first code in the high one
        elif bits == 8:
            codes = codes ^ 0x80
        group = width * 8 // bits // scales.shape[1]
        return StoredWeight(plan.name, "embedding", _digest(*raw), codes, scales, bits, group)


def ops(program: ProgramFile) -> dict[str, dict[str, int]]:
    """Graph -> `unit: op` -> nodes."""
    return {
        graph: {f"{unit}: {op}": n for unit, counts in units.items() for op, n in counts.items()}
        for graph, units in program.placement().items()
    }


def _on_activations(plan: Any, arguments: list[int]) -> bool:
    """Whether a kernel reads a table or floats of three dimensions and more; its last argument is its result.

    In a method without integers among its inputs there are no positions: any floats are activations.
    """
    from executorch.exir.schema import ScalarType

    given = [getattr(plan.values[i].val, "scalar_type", None) for i in plan.inputs]
    least = 3 if ScalarType.LONG in given else 0

    def large(index: int) -> bool:
        value = plan.values[index].val
        if hasattr(value, "items") and type(value).__name__ == "TensorList":
            return any(large(i) for i in value.items)
        kind = getattr(value, "scalar_type", None)
        constant = getattr(value, "data_buffer_idx", 0) > 0 and len(value.sizes) > 1
        return kind is not None and (constant or (kind == ScalarType.FLOAT and len(value.sizes) >= least))

    return any(large(i) for i in arguments if i != arguments[-1])


def _digest(codes: Any, scales: Any) -> str:
    return hashlib.sha256(hashlib.sha256(codes).digest() + hashlib.sha256(scales).digest()).hexdigest()


def _bytes(data: Any, count: int) -> torch.Tensor:
    """The first `count` bytes (the file pads what it stores). Raises ValueError if there are fewer."""
    if not 0 < count <= len(data):
        raise ValueError(f"{len(data)} bytes where {count} are needed")
    return torch.frombuffer(bytearray(data[:count]), dtype=torch.uint8)


def _xnnpack_graph(blob: bytes) -> dict[str, Any]:
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as xnnpack
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = xnnpack.XNNHeader.from_bytes(blob[: xnnpack.XNNHeader.EXPECTED_LENGTH])
    if not header.is_valid():
        raise ValueError("a delegate of the program is not XNNPACK's")
    flat = blob[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
    schema = importlib.resources.files("executorch.backends.xnnpack.serialization").joinpath("schema.fbs").read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "schema.fbs").write_bytes(schema)
        (folder / "graph.bin").write_bytes(flat)
        _flatc_decompile(scratch, str(folder / "schema.fbs"), str(folder / "graph.bin"), ["--raw-binary"])
        graph: dict[str, Any] = json.loads((folder / "graph.json").read_text())
        return graph
