"""Opening a model where it lies: a Hugging Face directory or hub id (safetensors), or a GGUF file.

Top-level room: `tokenizer` and `gguf_checkpoint` enter, nothing of torch's model code does. Everything read here is
written by strangers, so every defect of a file becomes one `UserError` line. Weights are never loaded: `tensor` of a
safetensors checkpoint is a view of the mapped file, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import UserError
from .tokenizer import Tokenizer

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor is, from the file's header alone."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorStore(Protocol):
    """Where a checkpoint's tensors lie: safetensors files (below) or a GGUF file (`gguf_checkpoint`)."""

    @property
    def infos(self) -> dict[str, TensorInfo]: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    def tensor(self, name: str) -> torch.Tensor: ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor: ...

    def sample(self, name: str) -> bytes: ...


class Checkpoint:
    """A model's config, tokenizer and tensors by name, in the Hugging Face layout whatever the file format is.

    Attributes:
        source: what the user gave (path or hub id).
        config: the contents of config.json (for GGUF: built from its metadata).
        generation: the contents of generation_config.json, {} where there is none.
        files: the weight files.
    """

    def __init__(
        self,
        source: str,
        config: dict[str, Any],
        generation: dict[str, Any],
        store: TensorStore,
        load_tokenizer: Callable[[], Tokenizer | None],
    ) -> None:
        self.source = source
        self.config = config
        self.generation = generation
        self._store = store
        self._load_tokenizer = load_tokenizer

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, read at first use; None where the checkpoint has none. Raises UserError if it is corrupt."""
        return self._load_tokenizer()

    @property
    def files(self) -> tuple[Path, ...]:
        return self._store.files

    def names(self) -> list[str]:
        """The names of all tensors, in file order."""
        return list(self._store.infos)

    def has(self, name: str) -> bool:
        return name in self._store.infos

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor. Raises UserError if there is none of that name."""
        found = self._store.infos.get(name)
        if found is None:
            model_type = self.config.get("model_type")
            raise UserError(f"{self.source}: no tensor {name}, which a {model_type} checkpoint has; is it complete?")
        return found

    def expect(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """`info(name)`, once it is a floating weight of this shape.

        Raises UserError if the tensor is missing, has another shape, or has a dtype that is not a plain floating one
        (integer and float8 weights need scales this reader does not know).
        """
        found = self.info(name)
        if found.shape != tuple(shape):
            raise UserError(
                f"{self.source}: {name} has shape {list(found.shape)}, but config.json asks for {list(shape)}"
            )
        if found.dtype not in WEIGHT_DTYPES:
            dtype = str(found.dtype).removeprefix("torch.")
            raise UserError(
                f"{self.source}: {name} is {dtype}, a float weight is needed; give the model before it was quantized"
            )
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, in the file's dtype as a view of the mapped file (GGUF: dequantized fp32).

        Do not write into it: a view's pages are shared with the file until then. Raises UserError if it is missing.
        """
        self.info(name)
        return self._store.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the first axis as fp32 [stop - start, ...]; only these are read (GGUF: dequantized).

        Raises UserError if the tensor is missing, IndexError if the rows are not within it.
        """
        shape = self.info(name).shape
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name}, which has shape {list(shape)}")
        return self._store.rows(name, start, stop)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over config, file sizes, tensor headers and up to 1 KiB of each tensor's bytes.

        Cheap (a page a tensor), yet it tells two fine-tunes of one model apart, which sizes and headers do not.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        digest.update(repr(sorted(path.stat().st_size for path in self.files)).encode())
        for name, found in sorted(self._store.infos.items()):
            digest.update(f"{name}\0{found.dtype}\0{found.shape}\0".encode("utf-8", "surrogatepass"))
            digest.update(self._store.sample(name))
        return digest.hexdigest()


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise UserError naming the tensor if any element (floating, any shape) is NaN or infinite. Allocates nothing."""
    if tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)  # NaN wins both, so two numbers tell
    if not (bool(torch.isfinite(low)) and bool(torch.isfinite(high))):
        raise UserError(f"{name} holds NaN or infinite weights; the checkpoint is corrupt or its training diverged")
