"""Random checkpoints of any architecture and size, written by streaming: for what depends on shapes and not on values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from edgewright.checkpoints.safetensors_writer import StreamingWriter
from edgewright.models.registry import build
from edgewright.system.dtypes import SAFETENSORS

ROWS = 4096
SHARD = 4 << 30  # bytes
AWQ_GROUP = 128

Entry = tuple[str, str, tuple[int, ...]]
"""Name, dtype as safetensors spells it, shape."""


def write_random(directory: Path, config: dict[str, Any], shard: int = SHARD) -> int:
    """config.json and bf16 shards of random weights under `directory`, made if need be. Returns the parameters."""
    shapes = _shapes(config)
    noise = _noise(shapes)
    values = _Floats(noise, "BF16")
    _write(directory, config, [(n, "BF16", shape) for n, shape in shapes.items()], values.of, shard)
    return sum(math.prod(shape) for shape in shapes.values())


def write_random_awq(directory: Path, config: dict[str, Any], shard: int = SHARD) -> int:
    """As `write_random`, the linears of the layers as AutoAWQ writes them: 4 bits in groups of 128, all else in float16."""
    shapes = _shapes(config)
    entries: list[Entry] = []
    for name, shape in shapes.items():
        if len(shape) == 2 and ".layers." in name:
            (out, width), stem = shape, name.removesuffix("weight")
            groups = width // AWQ_GROUP
            entries.append((f"{stem}qweight", "I32", (width, out // 8)))
            entries += [(f"{stem}qzeros", "I32", (groups, out // 8)), (f"{stem}scales", "F16", (groups, out))]
        else:
            entries.append((name, "F16", shape))
    block = {"quant_method": "awq", "bits": 4, "group_size": AWQ_GROUP, "version": "gemm", "zero_point": True}
    floats = _Floats(_noise(shapes), "F16")
    words = torch.randint(-(1 << 31), 1 << 31, (len(floats.noise),), dtype=torch.int64).to(torch.int32)

    def values(name: str, at: int, count: int) -> torch.Tensor:
        if name.endswith((".qweight", ".qzeros")):
            start = at % (len(words) - count + 1)
            return words[start : start + count]
        found = floats.of(name, at, count)
        return (found.abs() * 0.1 + 1e-3).to(torch.float16) if name.endswith(".scales") else found

    _write(directory, config | {"quantization_config": block}, entries, values, shard)
    return sum(math.prod(shape) for shape in shapes.values())


def write_zeros(directory: Path, config: dict[str, Any]) -> int:
    """As `write_random`, all zeros, in one file that is a hole: it has its size and takes no disk. For what reads no weight."""
    shapes = _shapes(config)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end // 2


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    model = build(config)
    return {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False) if n not in model.tied}


def _noise(shapes: dict[str, tuple[int, ...]]) -> torch.Tensor:
    """Random values that are used again at other offsets: fresh ones for billions of weights would take minutes."""
    torch.manual_seed(0)
    return torch.randn(2 * ROWS * max(shape[-1] for shape in shapes.values())).mul_(0.02)


class _Floats:
    """Random values of a dtype, those of norms near 1, so that activations stay finite through all layers."""

    def __init__(self, noise: torch.Tensor, kind: str) -> None:
        self._dtype = SAFETENSORS[kind]
        self.noise = noise.to(self._dtype)

    def of(self, name: str, at: int, count: int) -> torch.Tensor:
        start = at % (len(self.noise) - count + 1)
        values = self.noise[start : start + count]
        return (values + 1).to(self._dtype) if name.endswith("norm.weight") else values


def _write(
    directory: Path,
    config: dict[str, Any],
    entries: Iterable[Entry],
    values: Callable[[str, int, int], torch.Tensor],
    largest: int,
) -> None:
    """values: (name, a number that differs from call to call, how many) -> the next of a tensor."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    shards: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        size = SAFETENSORS[entry[1]].itemsize * math.prod(entry[2])
        if shards[-1] and held + size > largest:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        with StreamingWriter(directory / file, shard, {"format": "pt"}) as writer:
            for at, (name, _, shape) in enumerate(shard):
                rows, width = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])
                for start in range(0, rows, ROWS):
                    count = (min(rows, start + ROWS) - start) * width
                    writer.write(name, values(name, at * 79_999 + start * 7919, count))
                weight_map[name] = file
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
