"""The original model, built on the meta device, its checkpoint checked against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from ..models.language_model import LanguageModel
from ..models.registry import build, lengthened, shorten
from ..quant.plan import Unit
from ..quant.units import quantizable_units
from ..system.reading import one_line
from .request import Progress, Request


@dataclass(frozen=True, eq=False)
class Original:
    """The model of a request. units: its quantizable weights; other: names of all its other tensors."""

    checkpoint: Checkpoint
    config: dict[str, Any]
    model: LanguageModel
    units: list[Unit]
    other: list[str]


def open_original(request: Request, checkpoint: Checkpoint, progress: Progress) -> Original:
    """The model that `checkpoint` holds, shortened where the request says so.

    Raises UserError for a bad config, a tensor that is missing, has another shape or no place in the model, a model that takes
    too few positions, or one without a weight that can be quantized.
    """
    for note in checkpoint.notes:
        progress(note)
    config = _of_context(checkpoint.config, request, progress)
    if request.num_layers is not None:
        config = shorten(config, request.num_layers)
    model: LanguageModel = build(config)
    _expect_tensors(model, checkpoint)
    if request.num_layers is None:
        _refuse_strays(model, checkpoint)
    model.check_lengths()
    units = quantizable_units(model)
    if not units:
        raise UserError(f"{request.model}: no weight can be quantized; the model's layers are narrower than 16")
    planned = {w.name for u in units for w in u.weights}
    return Original(checkpoint, config, model, units, [n for n in _stored(model) if n not in planned])


def _of_context(config: dict[str, Any], request: Request, progress: Progress) -> dict[str, Any]:
    """The config for the context that is asked for; says so where RoPE changes with it."""
    if request.max_context is None:
        return config
    longer = lengthened(config, request.max_context)
    if longer is not config:
        progress(
            f"longrope: a context of {request.max_context} tokens is more than the {build(config).max_context} of the "
            "training, so the factors for long texts are used, for short ones too"
        )
    return longer


def _stored(model: LanguageModel) -> list[str]:
    """Names of the model's parameters, without aliases."""
    return [n for n, _ in model.named_parameters(remove_duplicate=False) if n not in model.tied]


def _expect_tensors(model: LanguageModel, checkpoint: Checkpoint) -> None:
    shapes = dict(model.named_parameters(remove_duplicate=False))
    for name in _stored(model):
        checkpoint.expect(name, tuple(shapes[name].shape))


def _refuse_strays(model: LanguageModel, checkpoint: Checkpoint) -> None:
    """Raise UserError for a tensor that the model does not read.

    Without this, a bias that the config does not name would be missing in original, reference and artefact alike.
    """
    known = {n for n, _ in model.named_parameters(remove_duplicate=False)} | set(model.tied)
    stray = [n for n in checkpoint.names() if n not in known]
    if stray:
        kind = checkpoint.config.get("model_type")
        raise UserError(
            f"{checkpoint.source}: {len(stray)} tensors have no place in this {kind} (the first: {one_line(stray[0])}); "
            "is config.json the one of these weights?"
        )
