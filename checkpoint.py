"""Opening a model where it lies: a Hugging Face directory or hub id (safetensors), or a GGUF file.

Top-level room: `tokenizer` and `gguf_checkpoint` enter, nothing of torch's model code does. Everything read here is
written by strangers, so every defect of a file becomes one `UserError` line. Weights are never loaded: `tensor` of a
safetensors checkpoint is a view of the mapped file, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from .errors import UserError
from .tokenizer import Tokenizer
from .untrusted import MEBIBYTE, one_line, read_json_object

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HUB_FILES = (
    *("*.safetensors", _INDEX, "config.json", "generation_config.json"),
    *("tokenizer*.json", "chat_template*", "tokenizer.model", "spiece.model", "vocab.*", "merges.txt"),
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_SAMPLE = 1024


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


class _Header(Protocol):
    def get_dtype(self) -> object: ...

    def get_shape(self) -> list[int]: ...


class _MappedFile(Protocol):
    """What is used of the library's `safe_open`, whose own stubs are untyped."""

    def offset_keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> _Header: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


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


def open_checkpoint(model: str) -> Checkpoint:
    """Open a directory, a .gguf file, or a hub id ("owner/name", from the cache when the hub cannot be reached).

    Only headers and configs are read. Raises UserError for anything missing, corrupt or unsafe.
    """
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return _open_directory(model, path)
        exists = path.exists()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"model {one_line(model)!r} cannot be opened ({one_line(error)})") from None
    if exists:
        if path.suffix.lower() == ".gguf":
            from .gguf_checkpoint import open_gguf

            return open_gguf(model, path)
        if path.suffix.lower() in _PICKLES:
            raise _pickle_error(model)
        raise UserError(f"{one_line(model)} is neither a directory nor a .gguf file; give the model's directory")
    if not _is_hub_id(model):
        raise UserError(f"no model at {one_line(model)!r}: give a directory, a .gguf file, or a hub id like owner/name")
    return _open_directory(model, _download(model))


def _is_hub_id(model: str) -> bool:
    looks_like_file = model.lower().endswith((".gguf", ".safetensors", ".json", *_PICKLES))
    return bool(_HUB_ID.fullmatch(model)) and ".." not in model and "--" not in model and not looks_like_file


def _download(model: str) -> Path:
    """Snapshot of a hub repository: configs, tokenizer and safetensors, never pickles or code."""
    import huggingface_hub  # only here: it takes a while to import and needs a network stack

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub's, the HTTP client's and the file system's errors share no base
        raise UserError(
            f"no directory {model!r}, and the hub gave nothing for that id ({one_line(error, 120)}); "
            "check the name and the network, or download the model and give its directory"
        ) from error


def _open_directory(source: str, directory: Path) -> Checkpoint:
    if not (directory / "config.json").exists():
        _explain_missing_config(source, directory)
    files = _weight_files(source, directory)
    config = read_json_object(directory / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UserError(f"{directory / 'config.json'}: no model_type, so the architecture is unknown; add it")
    optional = directory / "generation_config.json"
    generation = read_json_object(optional) if optional.exists() else {}
    return Checkpoint(
        source, config, generation, SafetensorsStore(directory, files), lambda: _read_tokenizer(directory)
    )


def _read_tokenizer(directory: Path) -> Tokenizer | None:
    # The older files count as a tokenizer: from_dir then says how to convert them, better than "there is none".
    kinds = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
    return Tokenizer.from_dir(directory) if any((directory / kind).exists() for kind in kinds) else None


def _explain_missing_config(source: str, directory: Path) -> None:
    entries = sorted(p.name for p in directory.iterdir())
    ggufs = [name for name in entries if name.lower().endswith(".gguf")]
    if ggufs:
        raise UserError(f"{source}: no config.json; to use a GGUF file give its path: {directory / one_line(ggufs[0])}")
    if not entries:
        raise UserError(f"{source}: the directory is empty; a config.json and *.safetensors are needed")
    if any(name.lower().endswith(_PICKLES) for name in entries):
        raise _pickle_error(source)
    raise UserError(f"{source}: no config.json; give the directory that save_pretrained wrote")


def _pickle_error(source: str) -> UserError:
    return UserError(
        f"{source}: weights as a pickle, which can run code when read, are refused; convert them where you trust them: "
        "transformers' AutoModel.from_pretrained(OLD).save_pretrained(NEW) writes safetensors"
    )


def _weight_files(source: str, directory: Path) -> dict[str, set[str]]:
    """Weight file name -> the tensors the index promises in it (empty without an index). Raises UserError."""
    present = sorted(p.name for p in directory.glob("*.safetensors"))
    if not (directory / _INDEX).exists():
        if present:
            return {name: set() for name in present}
        if any(p.suffix.lower() in _PICKLES for p in directory.iterdir()):
            raise _pickle_error(source)
        raise UserError(f"{source}: no *.safetensors in it; download the weights too")
    weight_map = read_json_object(directory / _INDEX, 64 * MEBIBYTE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{source}: {_INDEX} has no weight_map; delete it if the weights are one file")
    promised: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _stays_inside(file):
            raise UserError(f"{source}: {_INDEX} names {one_line(file, 80)!r}, not a safetensors file in the directory")
        promised.setdefault(file, set()).add(tensor)
    for file in sorted(promised):
        if not (directory / file).is_file():
            raise UserError(f"{source}: {file}, named in {_INDEX}, is missing; download it again")
    if "model.safetensors" in present and "model.safetensors" not in promised:
        raise UserError(f"{source}: both model.safetensors and an index that does not name it; remove the stale one")
    return promised


def _stays_inside(file: str) -> bool:
    # By name, not by resolve(): in the hub's cache the files are links that lead out of the snapshot by design.
    path = PurePosixPath(file)
    plain = not path.is_absolute() and ".." not in path.parts and file.isprintable() and not set(file) & set("\\:")
    return plain and file.endswith(".safetensors")


class SafetensorsStore:
    """The tensors of one or more safetensors files, each mapped once; the library has validated the headers.

    Args:
        directory: where the files are.
        files: file name -> names of the tensors that must be in it (an empty set: whatever is there).

    Raises UserError for a truncated, overlapping or otherwise corrupt file, an unknown dtype, a tensor two files have,
    or one the index promises and the file lacks.
    """

    def __init__(self, directory: Path, files: dict[str, set[str]]) -> None:
        self.files = tuple(directory / name for name in sorted(files))
        self.infos: dict[str, TensorInfo] = {}
        self._handles: dict[str, _MappedFile] = {}
        owner: dict[str, str] = {}
        for path in self.files:
            handle = _open_safetensors(path)
            for name in handle.offset_keys():
                if name in owner:
                    raise UserError(f"{path.parent}: {one_line(name)} is in both {owner[name]} and {path.name}")
                owner[name] = path.name
                self.infos[name] = _header_info(path, handle, name)
                self._handles[name] = handle
            lacking = sorted(files[str(path.relative_to(directory))] - set(handle.offset_keys()))
            if lacking:
                raise UserError(f"{path}: lacks {one_line(lacking[0])}, which {_INDEX} says it has; download it again")
        if not self.infos:
            raise UserError(f"{directory}: the safetensors files hold no tensors")

    def tensor(self, name: str) -> torch.Tensor:
        # get_tensor slices the storage torch mapped (MAP_PRIVATE): no anonymous memory; tests/test_checkpoint.py
        # holds the library to that.
        return self._handles[name].get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensor(name)[start:stop].float()

    def sample(self, name: str) -> bytes:
        data = self.tensor(name).reshape(-1).view(torch.uint8)
        middle = max(0, data.numel() - _SAMPLE) // 2
        return data[middle : middle + _SAMPLE].numpy().tobytes()


def _open_safetensors(path: Path) -> _MappedFile:
    try:
        return cast(_MappedFile, safe_open(path, framework="pt"))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = one_line(error, 120)
        raise UserError(f"{path}: not a whole safetensors file ({reason}); download it again") from None


def _header_info(path: Path, handle: _MappedFile, name: str) -> TensorInfo:
    header = handle.get_slice(name)
    kind = str(header.get_dtype())
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise UserError(f"{path}: {one_line(name)} has dtype {kind}, which is not supported; save it as float32")
    return TensorInfo(name, dtype, tuple(int(n) for n in header.get_shape()))
