"""Writes a Whisper of CTranslate2 as a checkpoint in transformers' layout.

    python benchmarks/whisper_ctranslate2.py FOLDER TARGET

FOLDER holds model.bin, config.json and tokenizer.json, as faster-whisper reads them. model.bin is a list of named arrays (version
6 of CTranslate2's format); it is parsed here, and nothing of it runs. Every size is checked before it is used.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Arrays = dict[str, NDArray[Any]]

VERSION, SPEC = 6, "WhisperSpec"
DTYPES = {0: np.dtype("<f4"), 1: np.dtype("i1"), 2: np.dtype("<i2"), 3: np.dtype("<i4"), 4: np.dtype("<f2")}
MOST_ARRAYS, MOST_DIMENSIONS = 1 << 16, 8


class Reader:
    """The bytes of a file, read from front to back. Raises ValueError where they end too early."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> memoryview:
        if count > len(self._data) - self._at:
            raise ValueError(f"{count} bytes are wanted at {self._at}, the file has {len(self._data)}")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, kind: str) -> int:
        value: int = struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]
        return value

    def text(self) -> str:
        raw = bytes(self.take(self.number("H")))
        if not raw.endswith(b"\0") or not raw[:-1].isascii():
            raise ValueError(f"{raw[:40]!r} is no name")
        return raw[:-1].decode()

    @property
    def left(self) -> int:
        return len(self._data) - self._at


def read_model(path: Path) -> Arrays:
    """The arrays of a model.bin, mapped, by name; aliases as the arrays that they stand for. Raises ValueError."""
    reader = Reader(memoryview(np.memmap(path, np.uint8, "r")))
    version, spec = reader.number("I"), reader.text()
    if (version, spec) != (VERSION, SPEC):
        raise ValueError(f"version {version} of a {spec}, expected {VERSION} of a {SPEC}")
    reader.number("I")  # the revision of the spec
    arrays: Arrays = {}
    count = reader.number("I")
    if count > MOST_ARRAYS:
        raise ValueError(f"{count} arrays, at most {MOST_ARRAYS}")
    for _ in range(count):
        name, rank = reader.text(), reader.number("B")
        if rank > MOST_DIMENSIONS or name in arrays:
            raise ValueError(f"{name} of {rank} dimensions, or twice")
        shape = [reader.number("I") for _ in range(rank)]
        kind, size = reader.number("B"), reader.number("I")
        if kind not in DTYPES:
            raise ValueError(f"{name} has the unknown type {kind}")
        dtype = DTYPES[kind]
        wanted = dtype.itemsize
        for dimension in shape:
            wanted *= dimension
        if size != wanted:
            raise ValueError(f"{name} of {shape} {dtype} has {size} bytes, expected {wanted}")
        arrays[name] = np.frombuffer(reader.take(size), dtype).reshape(shape)
    for _ in range(reader.number("I")):
        alias, name = reader.text(), reader.text()
        if name not in arrays or alias in arrays:
            raise ValueError(f"{alias} stands for {name}, which is not there, or is there itself")
        arrays[alias] = arrays[name]
    if reader.left:
        raise ValueError(f"{reader.left} bytes behind the end")
    return arrays


def transformers_names(arrays: Arrays) -> Arrays:
    """The arrays under transformers' names. Raises KeyError for one that is missing, ValueError for one that is left."""
    left = {n: v for n, v in arrays.items() if v.ndim}  # without options, which are single numbers
    named: Arrays = {}

    def put(name: str, value: NDArray[Any]) -> None:
        named[f"model.{name}"] = np.ascontiguousarray(value, np.float32)

    def both(theirs: str, ours: str, gamma: bool = False) -> None:
        for one, other in (("gamma", "weight"), ("beta", "bias")) if gamma else (("weight",) * 2, ("bias",) * 2):
            put(f"{ours}.{other}", left.pop(f"{theirs}/{one}"))

    def parts(theirs: str, ours: list[str]) -> None:
        """Linears that lie in one, one below the other. A key has no bias, or one of zeros."""
        for leaf in ("weight", "bias"):
            for name, value in zip(ours, np.split(left.pop(f"{theirs}/{leaf}"), len(ours)), strict=True):
                if leaf == "bias" and name.endswith("k_proj"):
                    if value.any():
                        raise ValueError(f"{name} has a bias")
                    continue
                put(f"{name}.{leaf}", value)

    for stack in ("encoder", "decoder"):
        layers = {
            n.split("/")[1]
            for n in arrays
            if n.startswith(f"{stack}/layer_") and not n.startswith(f"{stack}/layer_norm")
        }
        for at in range(len(layers)):
            theirs, ours = f"{stack}/layer_{at}", f"{stack}.layers.{at}"
            own = f"{ours}.self_attn"
            parts(f"{theirs}/self_attention/linear_0", [f"{own}.{n}_proj" for n in "qkv"])
            both(f"{theirs}/self_attention/linear_1", f"{own}.out_proj")
            both(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm", gamma=True)
            if stack == "decoder":
                cross = f"{ours}.encoder_attn"
                both(f"{theirs}/attention/linear_0", f"{cross}.q_proj")
                parts(f"{theirs}/attention/linear_1", [f"{cross}.{n}_proj" for n in "kv"])
                both(f"{theirs}/attention/linear_2", f"{cross}.out_proj")
                both(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm", gamma=True)
            both(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            both(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            both(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm", gamma=True)
        both(f"{stack}/layer_norm", f"{stack}.layer_norm", gamma=True)
        put(f"{stack}.embed_positions.weight", left.pop(f"{stack}/position_encodings/encodings"))
    for name in ("conv1", "conv2"):
        both(f"encoder/{name}", f"encoder.{name}")
    table = left.pop("decoder/embeddings/weight")
    put("decoder.embed_tokens.weight", table)
    head = left.pop("decoder/projection/weight", table)
    if head is not table and not np.array_equal(head, table):
        raise ValueError("the head is not the embedding")
    if left:
        raise ValueError(f"arrays without a place: {', '.join(sorted(left)[:8])}")
    return named


def configs(arrays: Arrays, tensors: Arrays, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json. Token ids are the tokenizer's own."""
    own = json.loads((folder / "config.json").read_text())
    tokens = {t["content"]: t["id"] for t in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    vocab, hidden = tensors["model.decoder.embed_tokens.weight"].shape

    def layers(stack: str) -> int:
        return len({n.split(".")[3] for n in tensors if n.startswith(f"model.{stack}.layers.")})

    heads = {stack: int(arrays[f"{stack}/num_heads"]) for stack in ("encoder", "decoder")}
    end, start = tokens["<|endoftext|>"], tokens["<|startoftranscript|>"]
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "dtype": "float32",
        "activation_function": "gelu",
        "d_model": hidden,
        "vocab_size": vocab,
        "num_mel_bins": tensors["model.encoder.conv1.weight"].shape[1],
        "max_source_positions": len(tensors["model.encoder.embed_positions.weight"]),
        "max_target_positions": len(tensors["model.decoder.embed_positions.weight"]),
        "encoder_layers": layers("encoder"),
        "decoder_layers": layers("decoder"),
        "encoder_ffn_dim": len(tensors["model.encoder.layers.0.fc1.bias"]),
        "decoder_ffn_dim": len(tensors["model.decoder.layers.0.fc1.bias"]),
        "encoder_attention_heads": heads["encoder"],
        "decoder_attention_heads": heads["decoder"],
        "decoder_start_token_id": start,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "tie_word_embeddings": True,
    }
    several = vocab >= 51865  # the vocabulary of the English models is one smaller
    generation: dict[str, Any] = {
        "decoder_start_token_id": start,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "no_timestamps_token_id": tokens["<|notimestamps|>"],
        "max_initial_timestamp_index": 50,
        "max_length": config["max_target_positions"],
        "suppress_tokens": own.get("suppress_ids", []),
        "begin_suppress_tokens": own.get("suppress_ids_begin", []),
        "is_multilingual": several,
        "return_timestamps": False,
    }
    if several:
        ids = own["lang_ids"]
        generation["lang_to_id"] = {name: i for name, i in tokens.items() if i in ids}
        generation["task_to_id"] = {task: tokens[f"<|{task}|>"] for task in ("transcribe", "translate")}
    return config, generation


def convert(folder: Path, target: Path) -> None:
    """Write `target`, which must not exist. Raises ValueError or KeyError for a file that is not what it should be."""
    arrays = read_model(folder / "model.bin")
    tensors = transformers_names(arrays)
    config, generation = configs(arrays, tensors, folder)
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (target / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    shutil.copyfile(folder / "tokenizer.json", target / "tokenizer.json")
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (target / "tokenizer_config.json").write_text(json.dumps(tokens) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    convert(options.folder, options.target)
