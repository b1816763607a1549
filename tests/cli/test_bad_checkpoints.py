"""Damaged and hostile checkpoints: one line on standard error, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli_runner import edgewright, only_error, process, refused
from helpers.tiny import write_tiny_t5gemma
from safetensors.torch import load_file, save_file


def _header(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def _config(directory: Path, *keys: str, value: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (directory / "config.json").write_text(json.dumps(config))


Q = "model.encoder.layers.0.self_attn.q_proj.weight"
EMBED = "model.decoder.embed_tokens.weight"
NORM = "model.decoder.norm.weight"


def truncated(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def long_header(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])


def overlapping(directory: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        names = [n for n in header if n != "__metadata__"]
        first = next(n for n in names if header[n]["data_offsets"][0] == 0)
        size = header[first]["data_offsets"][1]
        other = next(n for n in names if header[n]["data_offsets"][0] == size)
        header[other]["data_offsets"] = [0, header[other]["data_offsets"][1] - size]

    _header(directory, change)


def integers(directory: Path) -> None:
    _tensors(directory, lambda t: t.update({Q: t[Q].to(torch.int32)}))


def missing_tensor(directory: Path) -> None:
    _tensors(directory, lambda t: t.pop(Q))


def wrong_shape(directory: Path) -> None:
    _tensors(directory, lambda t: t.update({Q: t[Q].T.contiguous()}))


def _put(directory: Path, name: str, value: float) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    _tensors(directory, change)


def pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def not_json(directory: Path) -> None:
    (directory / "config.json").write_text("{model_type: t5gemma")


def deep_json(directory: Path) -> None:
    (directory / "config.json").write_text('{"a":' * 200_000)


def no_model(directory: Path) -> None:
    shutil.rmtree(directory)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "model.safetensors"),
    "header longer than the file": (long_header, "model.safetensors"),
    "overlapping offsets": (overlapping, "model.safetensors"),
    "integer weights": (integers, Q),
    "missing tensor": (missing_tensor, Q),
    "wrong shape": (wrong_shape, Q),
    "NaN in a layer": (lambda d: _put(d, Q, float("nan")), Q),
    "infinity in a layer": (lambda d: _put(d, Q, float("inf")), Q),
    "NaN in the embedding": (lambda d: _put(d, EMBED, float("nan")), EMBED),
    "infinity in a norm": (lambda d: _put(d, NORM, float("-inf")), NORM),
    "pickle only": (pickle_only, "pickle"),
    "config that is not JSON": (not_json, "config.json"),
    "config nested too deep": (deep_json, "config.json"),
    "unknown model_type": (lambda d: _config(d, "model_type", value="mamba9"), "mamba9"),
    "model_type that is a list": (lambda d: _config(d, "model_type", value=["t5gemma"]), "model_type"),
    "huge hidden size": (lambda d: _config(d, "encoder", "hidden_size", value=1 << 60), "hidden_size"),
    "negative layers": (lambda d: _config(d, "decoder", "num_hidden_layers", value=-1), "num_hidden_layers"),
    "a million layers": (lambda d: _config(d, "decoder", "num_hidden_layers", value=1_000_000), "num_hidden_layers"),
    "heads that do not divide": (lambda d: _config(d, "encoder", "num_key_value_heads", value=3), "key_value"),
    "zero heads": (lambda d: _config(d, "encoder", "num_attention_heads", value=0), "num_attention_heads"),
    "text for a number": (lambda d: _config(d, "encoder", "head_dim", value="16"), "head_dim"),
    "NaN for a number": (lambda d: _config(d, "decoder", "rms_norm_eps", value=float("nan")), "rms_norm_eps"),
    "list for a stack": (lambda d: _config(d, "encoder", value=[]), "encoder"),
    "unknown activation": (lambda d: _config(d, "decoder", "hidden_activation", value="swish9"), "swish9"),
    "no such directory": (no_model, "no model at"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_bad_checkpoint_is_one_line_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    damage, word = HOSTILE[kind]
    model = write_tiny_t5gemma(tmp_path / "model")
    damage(model)
    out = tmp_path / "out"
    out.mkdir()
    assert word in refused(edgewright("export", "-m", model, "-o", out / "bundle"))
    assert list(out.iterdir()) == []


@pytest.mark.slow
def test_a_bad_checkpoint_in_a_real_process(tmp_path: Path) -> None:
    model = write_tiny_t5gemma(tmp_path / "model")
    _put(model, EMBED, float("nan"))
    done = process("-m", "edgewright.cli", "export", "-m", str(model), "-o", str(tmp_path / "bundle"))
    assert done.returncode == 2
    assert EMBED in only_error(done.stdout, done.stderr)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
