"""`inspect` and `doctor`: what a checkpoint or bundle holds, and what works on this machine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..bundle import MANIFEST, Bundle


def inspect(target: str) -> dict[str, Any]:
    """A bundle's manifest in short, or a checkpoint's architecture, tensors and quantizable weights.

    Raises UserError if it is neither.
    """
    if (Path(target) / MANIFEST).is_file():
        return _bundle(Bundle.open(target))
    return _checkpoint(target)


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
                "file_bytes": sum((bundle.path / f).stat().st_size for f in t.files if (bundle.path / f).exists()),
            }
            for t in m.targets
        },
        "tools": m.tools,
    }


def _checkpoint(target: str) -> dict[str, Any]:
    from ..models.registry import build
    from ..models.user_module.checkpoint import open_model
    from ..quant.units import quantizable_units

    checkpoint = open_model(target)
    infos = [checkpoint.info(n) for n in checkpoint.names()]
    model = build(checkpoint.config)
    units = quantizable_units(model)
    return {
        "kind": "checkpoint",
        "source": target,
        "model_type": checkpoint.config.get("model_type"),
        "tensors": len(infos),
        "parameters": sum(_count(i.shape) for i in infos),
        "dtypes": dict(Counter(str(i.dtype).removeprefix("torch.") for i in infos)),
        "stacks": {name: len(layers) for name, layers in model.stacks().items()},
        "graphs": [g.name for g in model.graphs()],
        "quantizable_weights": sum(u.numel for u in units),
        "units": len(units),
        "tied": model.tied,
        "tokenizer": checkpoint.tokenizer is not None,
    }


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def inspect_text(found: dict[str, Any]) -> str:
    """`inspect` as indented lines."""
    lines: list[str] = []

    def add(value: Any, depth: int) -> None:
        for key, item in value.items():
            if isinstance(item, dict) and item:
                lines.append(f"{'  ' * depth}{key}:")
                add(item, depth + 1)
            elif isinstance(item, list) and item and all(isinstance(x, str) for x in item) and len(str(item)) > 80:
                lines.append(f"{'  ' * depth}{key}:")
                lines.extend(f"{'  ' * (depth + 1)}{x}" for x in item)
            elif isinstance(item, list):
                lines.append(f"{'  ' * depth}{key}: {', '.join(map(str, item)) or 'none'}")
            else:
                shown = f"{item:,}" if isinstance(item, int) and not isinstance(item, bool) else item
                lines.append(f"{'  ' * depth}{key}: {shown if shown != {} else 'none'}")

    add(found, 0)
    return "\n".join(lines)
