"""A model of embeddings beside another program's: sentence-transformers where it is installed, else transformers.

Where transformers alone is there, its hidden states are pooled here row by row, with no code of `models.embedding`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.sentence_transformers import read_sentence_transformer
from ..models.embedding import EmbeddingModel, EmbeddingSpec
from ..models.loading import load_original
from ..system.stages import Stage
from ..system.subprocesses import Progress
from .report import TOLERANCE
from .transformers_reading import (
    Unknown,
    difference,
    first_difference,
    load_theirs,
    random_tokens,
    stack_of,
    their_work,
    watched,
)

_TEXTS, _LENGTH = 4, 24
_PACKAGE = "sentence_transformers"

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def compare_vectors(
    model: str, ours: EmbeddingModel, checkpoint: Checkpoint, progress: Progress, pooling: Sequence[str]
) -> dict[str, Any]:
    """The fields of an `Independent` about the vectors of some texts, or the `reason` why there is nothing to compare with.

    pooling: given by the user in place of what the files say. Of texts of one length, and of the same cut to several.
    """
    described = read_sentence_transformer(Path(model).expanduser())
    length = min(_LENGTH, ours.max_context)
    ids = random_tokens(ours.vocab, checkpoint.config, _TEXTS, length)
    cut = torch.arange(length).unsqueeze(0) < torch.arange(length, length - _TEXTS, -1).clamp(min=1).unsqueeze(1)
    full = torch.ones_like(ids, dtype=torch.bool)
    try:
        with their_work("load the checkpoint"):
            own = described is not None and list(pooling or ours.embedding.pooling) == described.embedding["pooling"]
            whole = own and importlib.util.find_spec(_PACKAGE) is not None
            theirs = _sentence_transformer(model) if whole else _transformer(model, ours, checkpoint)
        progress(f"comparing the checkpoint's reading with {theirs.version}")
        layers = {"encoder": stack_of(theirs.model, len(ours.model.layers), "encoder")}
        with their_work("compute the model"), torch.no_grad():
            want, their_layers = watched(layers, lambda: theirs.vectors(ids, full))
            want = torch.cat((want, theirs.vectors(ids, cut)))
    except Unknown as unknown:
        return {"reason": str(unknown)}
    load_original(ours, checkpoint)
    (graph,) = ours.graphs()
    with Stage("computing the checkpoint's model"), torch.no_grad():
        got, our_layers = watched({"encoder": list(ours.model.layers)}, lambda: graph.call([ids, full])[0])
        got = torch.cat((got, graph.call([ids, cut])[0]))
    if not bool(torch.isfinite(want).all()):
        return {"reason": "the vectors of its model are not finite"}
    off = difference(got, want)
    fits = got.shape == want.shape
    return {
        "version": theirs.version,
        "max_relative_error": off,
        "top1": 1.0,
        "positions": len(want),
        "tokens": 0,
        "differs": None if off <= TOLERANCE else first_difference(our_layers, their_layers),
        "cosine": float(F.cosine_similarity(got, want, dim=-1).min()) if fits else -1.0,
    }


@dataclass(frozen=True)
class _Theirs:
    """Another program's model. vectors: ids int64 [B, T] and mask bool [B, T] -> [B, D]."""

    model: nn.Module
    version: str
    vectors: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _sentence_transformer(folder: str) -> _Theirs:
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    library = importlib.import_module(_PACKAGE)
    model = library.SentenceTransformer(folder, device="cpu", local_files_only=True, trust_remote_code=False)
    model = model.float().eval()

    def vectors(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model({"input_ids": ids, "attention_mask": mask.long()})["sentence_embedding"]
        return out

    return _Theirs(model, f"sentence-transformers {library.__version__}", vectors)


def _transformer(folder: str, ours: EmbeddingModel, checkpoint: Checkpoint) -> _Theirs:
    root = Path(folder).expanduser()
    described = read_sentence_transformer(root)
    model, version = load_theirs(str(root if described is None else described.transformer), "AutoModel", (), "pooler.")
    names = [(n, checkpoint.tensor(n).float()) for n in checkpoint.names() if n.startswith("dense.")]
    dense, spec = dict(names), ours.embedding

    def vectors(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        rows = [_pooled(h[real], spec.pooling) for h, real in zip(hidden, mask, strict=True)]
        return _behind(torch.stack(rows), spec, dense)

    return _Theirs(model, f"transformers {version}", vectors)


def _pooled(h: torch.Tensor, pooling: Sequence[str]) -> torch.Tensor:
    """One vector of the hidden states [T, hidden] of a text without padding."""
    numbers = torch.arange(1, len(h) + 1).unsqueeze(-1)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "cls": lambda: h[0],
        "max": lambda: h.amax(0),
        "mean": lambda: h.mean(0),
        "mean_sqrt_len": lambda: h.sum(0) / len(h) ** 0.5,
        "weighted_mean": lambda: (h * numbers).sum(0) / numbers.sum(),
        "last": lambda: h[-1],
    }
    return torch.cat([ways[kind]() for kind in pooling])


def _behind(x: torch.Tensor, spec: EmbeddingSpec, dense: Mapping[str, torch.Tensor]) -> torch.Tensor:
    count = 0
    for step in spec.behind:
        if step is None:
            x = F.normalize(x, dim=-1)
            continue
        x = _ACTIVATIONS[step.act](F.linear(x, dense[f"dense.{count}.weight"], dense.get(f"dense.{count}.bias")))
        count += 1
    return x
