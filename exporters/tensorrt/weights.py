"""Weights of the ONNX files and engines, read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from ...errors import UserError
from ...targets.onnx.weights import stored_tensor

NAMES = "edgewright.names"
"""The metadata of a DequantizeLinear node: JSON, the checkpoint's names of its weight (several where they are alike)."""


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, float32 [N, K]) of every quantized weight that a graph's ONNX in `directory` holds.

    Raises UserError for a file whose weights do not fit together.
    """
    for path in sorted(directory.glob("*.onnx")):
        for names, node in _weights(path):
            signed, factors = (stored_tensor(path, node, i).numpy().astype(np.float32) for i in (0, 1))
            groups = factors.shape[-1] if factors.ndim == 2 else 1
            if signed.ndim != 2 or factors.shape[:1] != signed.shape[:1] or not groups or signed.shape[1] % groups:
                raise UserError(f"{path}: codes and scales of {names[0]} do not fit together; export again")
            grouped = signed.reshape(len(signed), groups, -1)
            grouped *= factors.reshape(len(signed), groups, 1)
            for name in names:
                yield name, torch.from_numpy(signed)


def codes_in_engine(network: Path, engine: Path) -> dict[str, bool]:
    """Weight (its first name) -> whether the engine has its codes byte for byte, as stored or transposed.

    TensorRT transposes INT8 codes, and INT4 codes of small matrices. Where it permutes codes in another way this is False
    although nothing is lost.
    """
    plan = engine.read_bytes()
    present: dict[str, bool] = {}
    for (name, *_), node in _weights(network):
        codes = stored_tensor(network, node, 0)
        present[name] = codes.tobytes() in plan or ir.tensor(np.ascontiguousarray(codes.numpy().T)).tobytes() in plan
    return present


def _weights(path: Path) -> Iterator[tuple[list[str], ir.Node]]:
    """(checkpoint names, DequantizeLinear node) of each weight in an ONNX file. Raises UserError for one without a name."""
    for node in ir.load(path).graph:
        if node.op_type == "DequantizeLinear":
            try:
                names = json.loads(node.metadata_props.get(NAMES, "[]"))
            except (ValueError, RecursionError):
                names = None
            if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
                raise UserError(f"{path}: node {node.name} does not say which weight it holds; export again")
            yield names, node
