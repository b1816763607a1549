"""Random checkpoints of any architecture and size, written by streaming: for what depends on shapes and not on values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from edgewright.checkpoints.safetensors_writer import StreamingWriter
from edgewright.models.registry import build

ROWS = 4096
SHARD = 4 << 30  # bytes


def write_random(directory: Path, config: dict[str, Any]) -> int:
    """config.json and bf16 shards of random weights under `directory`, made if need be. Returns the parameters."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    model = build(config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False) if n not in model.tied}
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        if shards[-1] and held + 2 * math.prod(shape) > SHARD:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += 2 * math.prod(shape)
    widest = max(shape[-1] for shape in shapes.values())
    torch.manual_seed(0)
    # Reused at other offsets: fresh normals for billions of weights would take minutes.
    noise = torch.randn(2 * ROWS * widest).mul_(0.02).to(torch.bfloat16)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        layout = [(n, "BF16", shapes[n]) for n in names]
        with StreamingWriter(directory / file, layout, {"format": "pt"}) as writer:
            for at, name in enumerate(names):
                shape = shapes[name]
                rows, width = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])
                for start in range(0, rows, ROWS):
                    count = (min(rows, start + ROWS) - start) * width
                    offset = (at * 79_999 + start * 7919) % (len(noise) - count + 1)
                    # Norms near 1, so that activations stay finite through all layers.
                    values = noise[offset : offset + count] + (1 if len(shape) == 1 and "norm" in name else 0)
                    writer.write(name, values.to(torch.bfloat16))
                weight_map[name] = file
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(math.prod(shape) for shape in shapes.values())
