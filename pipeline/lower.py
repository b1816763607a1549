"""One target's artefact from the quantized checkpoint, in this process or in one of its own (`system.subprocesses`).

Several targets get a process each. The memory that one backend's library keeps does not count for the next, and a crash ends
as one line.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..exporters.artefact import Artefact, Options, Progress
from ..models.language_model import LanguageModel
from ..system.subprocesses import ChildFailed, run_child, serve
from ..targets.registry import TARGETS


def lower(format: str, checkpoint: Path, directory: Path, options: Options, progress: Progress) -> Artefact:
    """Write the artefact of `format` into `directory`, from the quantized checkpoint. Raises UserError as exporters do."""
    from ..checkpoints.opening import open_checkpoint
    from ..exporters.registry import exporter
    from ..models.kv_cache import stored_as
    from ..models.loading import load_quantized
    from ..models.registry import build

    quantized = open_checkpoint(str(checkpoint))
    model = build(quantized.config)
    load_quantized(model, quantized)
    _refuse_signed(format, model)
    graphs = stored_as(model.graphs(), options.kv_cache)
    return exporter(format).export(graphs, directory, options, progress)


def _refuse_signed(format: str, model: LanguageModel) -> None:
    """Raise UserError for a checkpoint of another plan: its scales may be negative where the target does not hold such."""
    from ..models.layers.linear import QuantizedEmbedding, QuantizedLinear

    if TARGETS[format].signed_scales:
        return
    for path, module in model.named_modules():
        if (
            isinstance(module, QuantizedLinear | QuantizedEmbedding)
            and float(torch.as_tensor(module.scales).min()) < 0.0
        ):
            raise UserError(
                f"--format {format}: {path} has negative scales, which it does not hold; export the model again"
            )


def lower_apart(
    format: str, checkpoint: Path, directory: Path, options: Options, progress: Progress, code: str | None = None
) -> Artefact:
    """`lower` in a process of its own. code: the factory whose code the user lets run there (`models.module`).

    Raises UserError for what `lower` raises, and if the process dies.
    """
    job = {"format": format, "checkpoint": str(checkpoint.resolve()), "directory": str(directory.resolve())}
    try:
        result = run_child(__name__, job | {"code": code, "options": asdict(options)}, progress)
    except ChildFailed as error:
        raise UserError(
            f"--format {format}: lowering {error}; leave this target out, or ask for it alone to see more"
        ) from None
    return Artefact(tuple(result["files"]), result["ops"], result["facts"])


def _lower_job(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """`lower` in the process of its own."""
    if job["code"] is not None:
        from ..models.user_module.module import allow

        allow(job["code"])
    options = Options(**{key: _tuple(value) for key, value in job["options"].items()})
    return asdict(lower(job["format"], Path(job["checkpoint"]), Path(job["directory"]), options, progress))


def _tuple(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value


if __name__ == "__main__":
    serve(_lower_job)
