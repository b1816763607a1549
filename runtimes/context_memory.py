"""A decoder-decoder's memory of a context, kept in a file so that later questions need not read the context again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from ..bundle import CHECKPOINT, Bundle, ContextSpec
from ..errors import UserError
from ..system.reading import one_line, require_regular
from ..system.writing import write_file
from .session import Array


def save_memory(path: Path, rows: Array, bundle: Bundle) -> None:
    """Write the memory [1, rows, hidden] of a context. Raises UserError if the file cannot be written."""
    data = safetensors.numpy.save({"memory": np.ascontiguousarray(rows, np.float32)}, _origin(bundle))
    write_file(path, data, "--save-memory")


def load_memory(path: Path, bundle: Bundle, spec: ContextSpec) -> Array:
    """The memory [1, rows, hidden] in a file, float32.

    Raises UserError if the file is damaged, or was made by another model or by other weights of this one.
    """
    require_regular(path)
    try:
        with safetensors.safe_open(path, "np") as file:
            origin: dict[str, str] = file.metadata() or {}
            rows: Array = file.get_tensor("memory")
    except Exception as error:
        raise UserError(
            f"{one_line(path)} is no memory of a context ({one_line(error, 80)}); make one with --save-memory"
        ) from None
    if origin != _origin(bundle):
        raise UserError(f"{path} was made by another model, or by other weights of this one; read the context again")
    if rows.ndim != 3 or rows.shape[0] != 1 or rows.shape[2] != spec.hidden or rows.dtype != np.float32:
        raise UserError(f"{path}: a memory of shape {list(rows.shape)} does not fit this model; read the context again")
    return rows


def _origin(bundle: Bundle) -> dict[str, str]:
    """The model and its weights; the second entry tells one model's bundles of different bits apart."""
    return {
        "edgewright.memory": bundle.manifest.source_fingerprint,
        "plan": bundle.manifest.files[f"{CHECKPOINT}/model.safetensors"],
    }
