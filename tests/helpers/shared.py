"""Bundles of tiny models that many tests read: exported once in a run, whichever worker comes first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from edgewright.compiler import export

from . import tiny
from .requests import asking

CONTEXT = 64
ONE_LAYER: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 1},
    "t5gemma": {
        stack: {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]} for stack in ("encoder", "decoder")
    },
}
"""Of the models that are shared. Each has the examples' tokenizer."""


def write_model(name: str, folder: Path) -> Path:
    """A checkpoint of one layer a stack, with a tokenizer."""
    write: Callable[..., Path] = getattr(tiny, f"write_tiny_{name}")
    model = write(folder, **ONE_LAYER[name])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.EXAMPLE / file, model / file)
    return model


def shared_bundle(run: Path, name: str, folder: Path) -> tuple[Path, Path]:
    """(checkpoint, bundle for ONNX) in `folder`, which is new: copies of those that were made once in this run.

    run: a folder that all workers have. The bundle has 6 bits a weight and a context of 64, and was not verified.
    """
    made = run / f"shared-{name}"
    with FileLock(f"{made}.lock"):
        if not made.is_dir():
            shutil.rmtree(half := made.with_suffix(".half"), ignore_errors=True)
            request = asking(
                str(write_model(name, half / "model")), bits=6.0, importance="zd", max_context=CONTEXT, verify=False
            )
            export(request, half / "bundle")
            half.rename(made)
    shutil.copytree(made, folder)
    return folder / "model", folder / "bundle"
