"""A model's config, tokenizer and tensors by name, whatever the file format.

The files come from strangers, so every defect of a file becomes one `UserError` line, and nothing is unpickled. Weights are
not loaded: `tensor` of a safetensors checkpoint is a view of the mapped file.
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
from ..system.dtypes import dtype_name
from ..system.reading import one_line
from .tokenizer import Tokenizer

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes of a weight that can be quantized."""


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of a tensor, from the header of its file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorStore(Protocol):
    """What holds a checkpoint's tensors: safetensors files, a GGUF file, or a user's module."""

    @property
    def infos(self) -> dict[str, TensorInfo]: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    def tensor(self, name: str) -> torch.Tensor: ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor: ...

    def sample(self, name: str) -> bytes: ...


class Checkpoint:
    """A model's config, tokenizer and tensors, with the names and keys of Hugging Face's layout.

    Attributes:
        source: the path or hub id that the user gave.
        config: the contents of config.json (for GGUF: built from its metadata).
        generation: the contents of generation_config.json, {} where there is none.
        files: the weight files.
        notes: lines for the user about how the checkpoint is read.
        adapter: the folder of an adapter that is merged, None without one.
    """

    def __init__(
        self,
        source: str,
        config: dict[str, Any],
        generation: dict[str, Any],
        store: TensorStore,
        load_tokenizer: Callable[[], Tokenizer | None],
        notes: tuple[str, ...] = (),
        adapter: str | None = None,
    ) -> None:
        self.source = source
        self.config = config
        self.generation = generation
        self.notes, self.adapter = notes, adapter
        self.store = store
        self._load_tokenizer = load_tokenizer
        self._states = {path: _state(path) for path in store.files}

    def changed(
        self,
        config: dict[str, Any] | None = None,
        store: TensorStore | None = None,
        notes: tuple[str, ...] | None = None,
        adapter: str | None = None,
    ) -> Checkpoint:
        """The checkpoint with some of its fields replaced."""
        return Checkpoint(
            self.source,
            self.config if config is None else config,
            self.generation,
            self.store if store is None else store,
            self._load_tokenizer,
            self.notes if notes is None else notes,
            self.adapter if adapter is None else adapter,
        )

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, read at first use; None where the checkpoint has none. Raises UserError if it is corrupt."""
        return self._load_tokenizer()

    @property
    def files(self) -> tuple[Path, ...]:
        return self.store.files

    def names(self) -> list[str]:
        """The names of all tensors, in file order."""
        return list(self.store.infos)

    def has(self, name: str) -> bool:
        return name in self.store.infos

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor. Raises UserError if there is none of that name."""
        info = self.store.infos.get(name)
        if info is None:
            model_type = self.config.get("model_type")
            raise UserError(f"{self.source}: no tensor {name}, which a {model_type} checkpoint has; is it complete?")
        return info

    def expect(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """`info(name)` of a weight that must have this shape and a plain floating dtype.

        Raises UserError if it is missing, has another shape or another dtype: integer and float8 weights need scales, which
        this reader does not know.
        """
        info = self.info(name)
        if info.shape != tuple(shape):
            raise UserError(
                f"{self.source}: {name} has shape {list(info.shape)}, but config.json asks for {list(shape)}"
            )
        if info.dtype not in WEIGHT_DTYPES:
            raise UserError(
                f"{self.source}: {name} is {dtype_name(info.dtype)}, a float weight is needed; "
                "give the model before it was quantized"
            )
        return info

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in the file's dtype, as a view of the mapped file; from GGUF a dequantized float32 copy.

        Do not write into it: a written page of the view is copied into memory. Raises UserError if it is missing.
        """
        self.info(name)
        return self.store.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the first axis, float32 [stop - start, ...]. Only these are read.

        Raises UserError if the tensor is missing, IndexError if the rows are not within it.
        """
        shape = self.info(name).shape
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name}, which has shape {list(shape)}")
        return self.store.rows(name, start, stop)

    def require_unchanged(self) -> None:
        """Raise UserError if a weight file was written, replaced or removed since it was opened."""
        for path, state in self._states.items():
            if _state(path) != state:
                raise UserError(
                    f"{one_line(path)} was changed while it was read; run the command again on a file that stays"
                )

    def fingerprint(self) -> str:
        """SHA-256 (hex) over config, file sizes, tensor headers and up to 1 KiB of each tensor's bytes.

        The bytes tell two fine-tunes of one model apart, which sizes and headers do not.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        digest.update(repr(sorted(path.stat().st_size for path in self.files)).encode())
        for name, info in sorted(self.store.infos.items()):
            digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode("utf-8", "surrogatepass"))
            digest.update(self.store.sample(name))
        return digest.hexdigest()


def _state(path: Path) -> tuple[int, int, int] | None:
    """Inode, size and time of a file; None where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises UserError if an element of the floating tensor, of any shape, is NaN or infinite. Allocates nothing."""
    if tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)  # a NaN is both the least and the greatest
    if not (bool(torch.isfinite(low)) and bool(torch.isfinite(high))):
        raise UserError(f"{name} holds NaN or infinite weights; the checkpoint is corrupt or its training diverged")
