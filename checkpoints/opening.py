"""A directory, a GGUF file or a hub id opened as a `Checkpoint`."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ..errors import UserError
from ..system.dtypes import dtype_name
from ..system.reading import MEBIBYTE, one_line, read_json_object
from . import adapter as adapters
from . import mamba_layout, mistral_layout
from .checkpoint import Checkpoint, TensorStore
from .hub import PICKLES, download, is_hub_id
from .mlx_layout import without_mlx_layout
from .prequantized.block import Block
from .prequantized.opening import dequantized
from .safetensors_reader import INDEX, SafetensorsStore
from .sentence_transformers import read_sentence_transformer
from .tokenizer import Tokenizer
from .vocabularies.finding import has_vocabulary


def open_checkpoint(model: str, adapter: str | None = None) -> Checkpoint:
    """Open a directory, a .gguf file, or a hub id ("owner/name", of GGUF files "owner/name:Q4_K_M"; from the cache when the hub
    cannot be reached).

    adapter: the folder of a LoRA adapter, which is merged. Only headers and configs are read. Weights that were quantized are
    seen as the values that they mean. Raises UserError for anything missing, corrupt or unsafe.
    """
    opened = _open(model, tell_adapter=adapter is None)
    return opened if adapter is None else adapters.adapted(opened, adapter)


def read_config(model: str) -> dict[str, Any]:
    """The config of a checkpoint; of a folder without weights, its config.json as it is. Raises UserError as `open_checkpoint`."""
    directory = Path(model)
    if not (directory / "config.json").exists() or _has_weights(directory):
        return open_checkpoint(model).config
    return read_json_object(directory / "config.json")


def _open(model: str, tell_adapter: bool) -> Checkpoint:
    """tell_adapter: a line tells of an adapter in the model's folder, which is not applied."""
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return _open_directory(model, path, tell_adapter)
        exists = path.exists()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"model {one_line(model)!r} cannot be opened ({one_line(error)})") from None
    if exists:
        if path.suffix.lower() == ".gguf":
            return _open_gguf(model, path)
        if path.suffix.lower() in PICKLES:
            raise _pickle_error(model)
        raise UserError(f"{one_line(model)} is neither a directory nor a .gguf file; give the model's directory")
    if not is_hub_id(model):
        raise UserError(f"no model at {one_line(model)!r}: give a directory, a .gguf file, or a hub id like owner/name")
    found = download(model)
    return _open_directory(model, found, tell_adapter) if found.is_dir() else _open_gguf(model, found)


def _open_gguf(source: str, path: Path) -> Checkpoint:
    from .gguf import open_gguf  # here, as the gguf package's import is slow

    return open_gguf(source, path)


def _open_directory(source: str, directory: Path, tell_adapter: bool) -> Checkpoint:
    described = read_sentence_transformer(directory)
    if described is None:
        return _open_model(source, directory, tell_adapter)
    return described.joined(_open_model(source, described.transformer, tell_adapter))


def _open_model(source: str, directory: Path, tell_adapter: bool) -> Checkpoint:
    """A folder as one model, whatever lies beside it."""
    if not any(directory.glob("*.safetensors")) and not (directory / INDEX).exists():
        from .gguf_parts import gguf_in

        if (gguf := gguf_in(directory)) is not None:
            return _open_gguf(source, gguf)
    native = mistral_layout.weight_files(directory)
    own_layout = bool(native) and sorted(_safetensors(directory)) == native and not (directory / INDEX).exists()
    line = adapters.explain_adapter(source, directory, own_layout or _has_weights(directory))
    notes = [line] if line is not None and tell_adapter else []
    store: TensorStore
    if own_layout:
        config, store, lines = mistral_layout.open_mistral(directory)
        notes += lines
    else:
        if not (directory / "config.json").exists():
            _explain_missing_config(source, directory)
        files = _weight_files(source, directory)
        config = read_json_object(directory / "config.json")
        if mamba_layout.is_mamba_ssm(config):
            config = mamba_layout.as_transformers(directory / "config.json", config)
            notes.append("the checkpoint's config.json is of mamba_ssm (state-spaces)")
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or not model_type:
            raise UserError(f"{directory / 'config.json'}: no model_type, so the architecture is unknown; add it")
        try:
            config, store, quantized = dequantized(config, SafetensorsStore(directory, files), _block_beside(directory))
            store = without_mlx_layout(model_type, store)
        except UserError as error:
            raise UserError(error if str(directory) in str(error) else f"{one_line(source)}: {error}") from None
        notes += quantized
    _refuse_unreadable(source, store)
    optional = directory / "generation_config.json"
    generation = read_json_object(optional) if optional.exists() else {}
    return Checkpoint(source, config, generation, store, lambda: _read_tokenizer(directory), tuple(notes))


def _block_beside(directory: Path) -> Block | None:
    """What AutoGPTQ, AutoAWQ and ModelOpt write beside config.json, which older versions of them write there alone."""
    for file, method in (
        ("quantize_config.json", "gptq"),
        ("quant_config.json", "awq"),
        ("hf_quant_config.json", "modelopt"),
    ):
        if (directory / file).is_file():
            values = read_json_object(directory / file)
            inner = values.get("quantization")
            values = inner if method == "modelopt" and isinstance(inner, dict) else values
            return Block({"quant_method": method, **values}, file)
    return None


def _refuse_unreadable(source: str, store: TensorStore) -> None:
    for name, info in store.infos.items():
        if info.dtype in (torch.uint32, torch.float8_e8m0fnu):
            raise UserError(
                f"{one_line(source)}: {one_line(name)} has dtype {dtype_name(info.dtype)}, which no weight has here; is it "
                "quantized, and config.json says not how (quantization_config, or quantization of mlx-lm)?"
            )


def _read_tokenizer(directory: Path) -> Tokenizer | None:
    return Tokenizer.from_dir(directory) if has_vocabulary(directory) else None


def _explain_missing_config(source: str, directory: Path) -> None:
    entries = sorted(p.name for p in directory.iterdir())
    metas = [name for name in entries if name.startswith("consolidated.") and name.endswith(".pth")]
    if metas:
        raise UserError(
            f"{source}: Meta's own layout: {one_line(metas[0], 60)} is a pickle, which can run code when read; give the same model "
            "in transformers' layout (config.json and model.safetensors), which the hub has beside this one"
        )
    if not entries:
        raise UserError(f"{source}: the directory is empty; a config.json and *.safetensors are needed")
    if any(name.lower().endswith(PICKLES) for name in entries):
        raise _pickle_error(source)
    raise UserError(f"{source}: no config.json; give the directory that save_pretrained wrote")


def _pickle_error(source: str) -> UserError:
    return UserError(
        f"{source}: weights as a pickle, which can run code when read, are refused; convert them where you trust them: "
        "transformers' AutoModel.from_pretrained(OLD).save_pretrained(NEW) writes safetensors"
    )


def _safetensors(directory: Path) -> list[str]:
    """Names of the safetensors files of a model; those of an adapter are none."""
    return sorted(p.name for p in directory.glob("*.safetensors") if p.name not in adapters.WEIGHTS)


def _has_weights(directory: Path) -> bool:
    return (directory / INDEX).exists() or bool(_safetensors(directory))


def _weight_files(source: str, directory: Path) -> dict[str, set[str]]:
    """Weight file name -> the tensors that must be in it by the index; an empty set without an index. Raises UserError."""
    present = _safetensors(directory)
    if not (directory / INDEX).exists():
        if "model.safetensors" in present:  # the same weights in Mistral's layout may lie beside it
            present = [name for name in present if not name.startswith("consolidated")]
        if present:
            return {name: set() for name in present}
        if any(p.suffix.lower() in PICKLES for p in directory.iterdir()):
            raise _pickle_error(source)
        raise UserError(f"{source}: no *.safetensors in it; download the weights too")
    weight_map = read_json_object(directory / INDEX, 64 * MEBIBYTE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{source}: {INDEX} has no weight_map; delete it if the weights are one file")
    promised: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _stays_inside(file):
            raise UserError(f"{source}: {INDEX} names {one_line(file, 80)!r}, not a safetensors file in the directory")
        promised.setdefault(file, set()).add(tensor)
    for file in sorted(promised):
        if not (directory / file).is_file():
            raise UserError(f"{source}: {file}, named in {INDEX}, is missing; download it again")
    if "model.safetensors" in present and "model.safetensors" not in promised:
        raise UserError(f"{source}: both model.safetensors and an index that does not name it; remove the stale one")
    return promised


def _stays_inside(file: str) -> bool:
    # By name, not by resolve(): in the hub's cache the files are links that lead out of the snapshot.
    path = PurePosixPath(file)
    plain = not path.is_absolute() and ".." not in path.parts and file.isprintable() and not set(file) & set("\\:")
    return plain and file.endswith(".safetensors")
