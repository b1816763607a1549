"""GGUF files seen as a Hugging Face checkpoint: config, names and values as the original model had them.

`ARCHITECTURES` says what is known. llama.cpp's converter reorders the rows of queries and keys of Llamas and their kin, adds 1 to
norms of Gemma and Qwen3.5, and puts the multipliers of Falcon-H1 into the weights; all but the last is undone. Values are those
of the file's own quantization.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf.quants import dequantize

from ..errors import UserError
from ..system.reading import one_line, shown
from .checkpoint import Checkpoint
from .gguf_decoders import DECODERS
from .gguf_file import GgufFile
from .gguf_hybrids import HYBRIDS
from .gguf_keys import WAY_OUT, Keys
from .gguf_layout import Architecture, Config, Stored
from .gguf_parts import read_parts
from .gguf_store import GgufStore, Place, zeros
from .tokenizer import Tokenizer

ARCHITECTURES: dict[str, Architecture] = DECODERS | HYBRIDS
"""What a file calls its architecture -> what is known of it."""

_NOT_HERE = {
    "t5": "an encoder-decoder that no family here computes; give a T5Gemma, T5Gemma 2 or Mu checkpoint",
    "t5encoder": "an encoder, which cannot generate; give a decoder",
    "bert": "an encoder, which cannot generate; give a decoder",
    "clip": "an encoder of images, the companion of a language model; give that model's file",
}


def open_gguf(source: str, path: Path) -> Checkpoint:
    """Open a GGUF file, or all parts of a split one of which `path` is any. Only headers are read.

    Raises UserError if a file is corrupt, a part is missing, or the model is of a kind that is not known.
    """
    file, paths = read_parts(path)
    _check_kinds(source, file)
    name, architecture = _architecture(source, file)
    keys = Keys(file, name)
    config = architecture.describe(keys)
    places = _places(keys, architecture, config)
    for key, stem in {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}.items():
        token = file.metadata.get(f"tokenizer.ggml.{stem}_token_id")
        config[key] = token if isinstance(token, int) else None

    def load_tokenizer() -> Tokenizer | None:
        return Tokenizer.from_gguf(file.metadata) if "tokenizer.ggml.model" in file.metadata else None

    return Checkpoint(source, config, {}, GgufStore(paths, places), load_tokenizer, tuple(keys.notes))


def _architecture(source: str, file: GgufFile) -> tuple[str, Architecture]:
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise UserError(
            f"{source}: a GGUF of type {shown(kind, 40)}, which is no model by itself; give the model's file"
        )
    name = file.metadata.get("general.architecture")
    if isinstance(name, str) and name in _NOT_HERE:
        raise UserError(f"{source}: GGUF architecture {name!r} is {_NOT_HERE[name]}")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"{source}: GGUF architecture {shown(name, 40)} (known: {known}); {WAY_OUT}")
    return name, ARCHITECTURES[name]


def _places(keys: Keys, architecture: Architecture, config: Config) -> dict[str, Place]:
    """Name in the model -> place. Sets the config's flags of biases. Raises UserError if a tensor is missing or unknown."""
    file, layers = keys.file, range(config["num_hidden_layers"])
    wanted = {
        new: Stored(old, add=architecture.norm if "norm" in old else 0.0) for new, old in architecture.top.items()
    }
    if not config["tie_word_embeddings"]:
        wanted["lm_head.weight"] = Stored("output.weight")
    biases: dict[str, Stored] = {}
    for i in layers:
        block = architecture.block(config, i)
        wanted |= {f"model.layers.{i}.{new}": _in_layer(file, i, stored) for new, stored in block.items()}
    for flag, stems in architecture.biases.items():
        found = [f"model.layers.{i}.{stem}" for i in layers for stem in stems]
        of_flag = {f"{stem}.bias": _bias(wanted[f"{stem}.weight"]) for stem in found}
        if not flag or any(stored.name in file.tensors for stored in of_flag.values()):
            biases |= of_flag
            config.update({flag: True} if flag else {})
    places = {new: _place(file, new, stored) for new, stored in wanted.items()}
    for new, stored in biases.items():
        rows = places[new.removesuffix("bias") + "weight"].shape[0]
        places[new] = _place(file, new, stored, missing=rows)
    ahead = tuple(f"blk.{len(layers) + i}." for i in range(architecture.left_out(keys)))
    known = {place.tensor.name for place in places.values()} | set(architecture.factors)
    unknown = sorted(name for name in file.tensors.keys() - known if not name.startswith(ahead))
    if unknown:
        kind = config["model_type"]
        raise UserError(f"{file.path}: tensor {one_line(unknown[0], 60)} has no place in {kind}; {WAY_OUT}")
    return places


def _in_layer(file: GgufFile, layer: int, stored: Stored) -> Stored:
    """`stored` by its whole name; of one that the converter writes without `.weight` also by the other."""
    name = f"blk.{layer}.{stored.name}"
    if name not in file.tensors and f"{name}.weight" in file.tensors:
        name += ".weight"
    return replace(stored, name=name)


def _bias(weight: Stored) -> Stored:
    """The bias of a weight, whose rows it follows."""
    return Stored(weight.name.removesuffix("weight") + "bias", rows=weight.rows)


def _place(file: GgufFile, new: str, stored: Stored, missing: int = 0) -> Place:
    """missing: how many zeros stand for a tensor that the file does not have; 0: it must have it."""
    tensor = file.tensors.get(stored.name)
    if tensor is None and not missing:
        raise UserError(f"{file.path}: no tensor {stored.name}; is the file complete?")
    place = Place(zeros(stored.name, missing) if tensor is None else tensor, stored)
    try:
        place.shape  # noqa: B018
    except ValueError as error:
        raise UserError(
            f"{file.path}: {stored.name} has shape {list(place.tensor.shape)}, of which {new} cannot be ({error}); is it right?"
        ) from None
    return place


def _check_kinds(source: str, file: GgufFile) -> None:
    """Raises UserError if a tensor's type cannot be dequantized. Each type in use is tried on one block of zeros."""
    for tensor in {t.kind: t for t in file.tensors.values()}.values():
        try:
            dequantize(np.zeros_like(tensor.data[:1]), tensor.kind)
        except NotImplementedError:
            raise UserError(f"{source}: {tensor.name} is {tensor.kind.name}, not readable here; {WAY_OUT}") from None
