"""`open_model`: what a user gives as a model, opened with the names and keys of the family that computes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.named_store import NamedStore
from ..checkpoints.opening import open_checkpoint
from ..errors import UserError
from ..system.reading import one_line, shown
from .embedding import described, pooled_by, poolings
from .language_model import LanguageModel
from .registry import architecture_of, build
from .user_module.checkpoint import open_module
from .user_module.module import is_factory
from .wrappers import text_model

_ROWS = 4096

_HEADS = (
    *("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForAudioClassification"),
    *("RewardModel", "ForReward"),
)


def open_model(model: str, adapter: str | None = None, pooling: Sequence[str] = ()) -> Checkpoint:
    """A directory, a .gguf file, a hub id, or `package.module:factory`, whose code the user asks to run by giving its name.

    adapter: the folder of a LoRA adapter, which is merged. pooling: of an embedding, in place of what the checkpoint says; given, a
    decoder or a masked language model is taken as the encoder of texts that it also is. The checkpoint's tensors have the model's
    names, its config is the text model's. Raises UserError for what cannot be opened, and for a head that scores texts.
    """
    if is_factory(model) and not Path(model).exists():
        if adapter is not None:
            raise UserError(
                f"--adapter goes with a checkpoint, and {one_line(model, 80)} is a module of your own; merge it there"
            )
        if pooling:
            raise UserError(
                f"--pooling is of text encoders, and {one_line(model, 80)} is a module of your own; leave it out"
            )
        return open_module(model)
    checkpoint = open_checkpoint(model, adapter)
    config, notes = text_model(checkpoint.config)
    _refuse_other_heads(config)
    config = _with_pooling(config, pooling, notes)
    built = build(config)
    named, left_out = _named(checkpoint, built)
    matched = built.matched(config, named.has)
    if matched != config:
        config, built = matched, build(matched)
        named, left_out = _named(checkpoint, built)
    if left_out:
        notes.append(
            f"left out, as no graph here uses them: {len(left_out)} tensors ({one_line(left_out[0])} and the like)"
        )
    config = _untied(named, config, built, notes)
    return named.changed(config=config, notes=(*checkpoint.notes, *notes))


def _with_pooling(config: dict[str, Any], pooling: Sequence[str], notes: list[str]) -> dict[str, Any]:
    """`config` with the description of an embedding, where the model is an encoder of texts or the user asks for one."""
    if pooling:
        if described(config) and poolings(config) != tuple(pooling):
            notes.append(f"--pooling {','.join(pooling)} takes the place of {', '.join(poolings(config))}")
        return pooled_by(config, pooling)
    own = architecture_of(config).own_pooling(config)
    if own is None or described(config):
        return config
    notes.append(
        f"no modules.json: a text's vector is the {own} of its tokens, not normalised; --pooling chooses another"
    )
    return pooled_by(config, (own,))


def _refuse_other_heads(config: dict[str, Any]) -> None:
    architectures = config.get("architectures")
    for name in architectures if isinstance(architectures, list) else []:
        if isinstance(name, str) and name.endswith(_HEADS):
            raise UserError(
                f"config.json: architectures has {shown(name, 60)}, a model with a head that scores texts; "
                "it has no trained head for tokens, so it cannot generate, and its vectors are not for search; give a language "
                "model or an embedding model"
            )


def _named(checkpoint: Checkpoint, model: LanguageModel) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint under the model's names, and the tensors of the file that it does not read."""
    wanted = {name for name, _ in model.named_parameters(remove_duplicate=False)} | set(model.tied)
    try:
        resolved = model.names.resolve(checkpoint.names(), wanted)
        store = NamedStore(checkpoint.store, resolved.pieces)
        zeros = [name for name in resolved.pieces if name not in wanted and _is_zero_bias(store, name)]
        if zeros:
            store = NamedStore(checkpoint.store, {n: p for n, p in resolved.pieces.items() if n not in set(zeros)})
    except UserError as error:
        raise UserError(f"{checkpoint.source}: {error}") from None
    return checkpoint.changed(store=store), (*resolved.left_out, *zeros)


def _is_zero_bias(store: NamedStore, name: str) -> bool:
    """Whether a tensor adds nothing: older GPTQ checkpoints have a bias of zeros for every linear."""
    info = store.infos[name]
    plain = name.endswith(".bias") and len(info.shape) == 1 and info.dtype.is_floating_point
    return plain and not bool(store.tensor(name).float().any())


def _untied(checkpoint: Checkpoint, config: dict[str, Any], model: LanguageModel, notes: list[str]) -> dict[str, Any]:
    """A head that the config ties to the table and the file holds with other values is read as transformers reads it."""
    for alias, stored in model.tied.items():
        both = (
            alias.endswith(("lm_head.weight", "proj_out.weight")) and checkpoint.has(alias) and checkpoint.has(stored)
        )
        if both and not _equal(checkpoint, alias, stored):
            notes.append(f"config.json ties {alias} to {stored}, but the file has another {alias}, which is used")
            return config | {"tie_word_embeddings": False}
    return config


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    a, b = checkpoint.info(one), checkpoint.info(other)
    if a.shape != b.shape:
        return False
    steps = range(0, a.shape[0], _ROWS)
    ends = [(start, min(start + _ROWS, a.shape[0])) for start in steps]
    return all(torch.equal(checkpoint.rows(one, *end), checkpoint.rows(other, *end)) for end in ends)
