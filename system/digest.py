"""SHA-256 of texts and of tensors, as hexadecimal text. File names and keys of plans are made of them: they must not change."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def of_text(text: str) -> str:
    """Of the text in UTF-8; half a surrogate pair counts as what UTF-8 would make of it."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def of_tensor(tensor: torch.Tensor) -> str:
    """Of a tensor's bytes alone: not of its name, dtype, shape or address."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements in row-major order as bytes; a view where the tensor is contiguous."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
