"""Quantized weights read back from ONNX files, as the runtime will find them.

Only the files are read: which weight a node holds is written on the node, its codes and scales lie in `weights.bin`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from ...errors import UserError
from ...ops.quantized import dequantize
from .nodes import LABEL, attr


def read_nbits(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, float32 [N, K]) of each weight in the MatMulNBits and GatherBlockQuantized nodes of a file.

    Raises UserError for a node without a label or whose label does not fit its weight.
    """
    for node in ir.load(path).graph:
        gather = node.op_type == "GatherBlockQuantized"
        if not gather and node.op_type != "MatMulNBits":
            continue
        packed, scales = (
            torch.from_numpy(stored_tensor(path, node, i).numpy().copy()) for i in (0 if gather else 1, 2)
        )
        rows = packed.shape[0]
        try:
            label = json.loads(node.metadata_props.get(LABEL, "[]"))
            parts = [(str(name), int(count)) for name, count in label]
        except (ValueError, TypeError):
            parts = []
        if not parts or sum(count for _, count in parts) != rows or min(count for _, count in parts) < 1:
            raise UserError(f"{path}: node {node.name} does not say which weights its {rows} rows are; export again")
        values = dequantize(packed.reshape(rows, -1), scales, int(attr(node, "bits")), int(attr(node, "block_size")))
        start = 0
        for name, count in parts:
            yield name, values[start : start + count]
            start += count


def stored_tensor(path: Path, node: ir.Node, index: int) -> Any:
    """The tensor that an input of `node` has in the file or beside it, wholly inside its file. Raises UserError."""
    value = node.inputs[index]
    stored = value.const_value if value is not None else None
    if stored is None:
        raise UserError(f"{path}: the weights of node {node.name} are not stored in the file; export again")
    if isinstance(stored, ir.ExternalTensor):
        if Path(stored.location).name != str(stored.location):
            raise UserError(f"{path}: the weights of node {node.name} lie outside the folder")
        file = path.parent / str(stored.location)
        end = (stored.offset or 0) + stored.nbytes
        if not file.is_file() or file.stat().st_size < end:
            raise UserError(f"{file}: shorter than the {end} bytes its weights take; export the bundle again")
        real = file.resolve()  # in the hub's cache it is a link, which the library does not follow
        return ir.ExternalTensor(
            real.name,
            stored.offset,
            stored.length,
            stored.dtype,
            shape=stored.shape,
            name=stored.name or "",
            base_dir=real.parent,
        )
    return stored
