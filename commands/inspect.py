"""`inspect`: what a checkpoint or a bundle holds."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from ..bundle import MANIFEST, Bundle
from ..errors import UserError


def inspect(target: str, adapter: str | None = None) -> dict[str, Any]:
    """A bundle's manifest in short, or a checkpoint's architecture, tensors and quantizable weights.

    adapter: the folder of a LoRA adapter, merged into the checkpoint. Raises UserError if it is neither, and for a checkpoint that
    `export` would refuse, with the same line.
    """
    if (Path(target) / MANIFEST).is_file():
        if adapter is not None:
            raise UserError(
                "--adapter goes with a checkpoint, and a bundle is given; its weights are quantized already"
            )
        return _bundle(Bundle.open(target))
    return _checkpoint(target, adapter)


def _bundle(bundle: Bundle) -> dict[str, Any]:
    m = bundle.manifest
    return {
        "kind": "bundle",
        "source": m.source,
        "model_type": m.model_type,
        "average_bits": m.average_bits,
        "weights": m.weights,
        "tuned_norms": m.tuned_norms.model_dump() if m.tuned_norms is not None else None,
        "task": m.generation.task,
        "max_context": m.generation.max_context,
        "graphs": {
            g.name: {
                "inputs": [f"{p.name} {p.dtype} {list(p.shape)}" for p in g.inputs],
                "outputs": [f"{p.name} {p.dtype} {list(p.shape)}" for p in g.outputs],
                "states": dict(Counter(s.kind for s in g.states)),
            }
            for g in m.graphs
        },
        "targets": {
            t.format: {
                "stored_bytes": t.stored_bytes,
                "facts": t.facts,
                "file_bytes": sum((bundle.path / f).stat().st_size for f in t.files if (bundle.path / f).exists()),
            }
            for t in m.targets
        },
        "tools": m.tools,
    }


def _checkpoint(target: str, adapter: str | None) -> dict[str, Any]:
    from ..models.opening import open_model
    from ..pipeline.original import open_original
    from ..pipeline.request import Request

    checkpoint = open_model(target, adapter)
    infos = [checkpoint.info(n) for n in checkpoint.names()]
    original = open_original(
        Request(target, adapter=adapter), checkpoint, lambda _: None
    )  # what export would refuse is refused
    model, units = original.model, original.units
    return {
        "kind": "checkpoint",
        "source": target,
        "model_type": checkpoint.config.get("model_type"),
        "notes": list(checkpoint.notes),
        "tensors": len(infos),
        "parameters": sum(math.prod(i.shape) for i in infos),
        "dtypes": dict(Counter(str(i.dtype).removeprefix("torch.") for i in infos)),
        "stacks": {name: len(layers) for name, layers in model.stacks().items()},
        "graphs": [g.name for g in model.graphs()],
        "quantizable_weights": sum(u.numel for u in units),
        "units": len(units),
        "tied": model.tied,
        "tokenizer": checkpoint.tokenizer is not None,
    }
