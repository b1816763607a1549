"""Calibration data side by side: samples in parts, sequences padded to one length, calls merged into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..models.language_model import LanguageModel
from .samples import Call, Sample

_LENGTHS: tuple[Callable[[Sample], int], ...] = (
    lambda s: s.read,
    lambda s: len(s.decoded),
    lambda s: len(s.context),
)


def parted(samples: Sequence[Sample], tokens: int) -> list[list[int]]:
    """The places of the samples in parts of about `tokens` tokens, padding counted; samples of like length are together."""
    parts: list[list[int]] = []
    for place in sorted(range(len(samples)), key=lambda i: samples[i].size, reverse=True):
        together = [samples[i] for i in (*parts[-1], place)] if parts else []
        padded_size = sum(max(of(s) for s in together) for of in _LENGTHS) if together else 0
        if not parts or padded_size * len(together) > tokens:
            parts.append([])
        parts[-1].append(place)
    return parts


def padded(
    sequences: Sequence[Sequence[int]], pad: int, length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64 [B, S] padded on the right to `length` or the longest, and where they are real, bool [B, S]."""
    longest = max(len(s) for s in sequences) if length is None else length
    ids = torch.full((len(sequences), longest), pad)
    real = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        real[row, : len(sequence)] = True
    return ids, real


def merged(model: LanguageModel, calls: Sequence[Call]) -> list[Call]:
    """One call a graph: those of the most common shapes side by side in a batch, or the first where there is no batch."""
    ports = {g.name: {p.name: p for p in g.inputs} for g in model.graphs()}
    groups: dict[str, dict[tuple[Any, ...], list[dict[str, torch.Tensor]]]] = {}
    for graph, inputs in calls:
        key = tuple((name, tuple(v.shape), v.dtype) for name, v in sorted(inputs.items()))
        groups.setdefault(graph, {}).setdefault(key, []).append(inputs)
    batches: list[Call] = []
    for graph, by_shape in groups.items():
        largest = max(by_shape.values(), key=len)
        batched = all(p.shape and p.shape[0] == "batch" for p in ports[graph].values())
        rows = largest if batched else largest[:1]
        inputs = {name: torch.cat([r[name] for r in rows]) for name in rows[0]} if batched else rows[0]
        batches.append((graph, inputs))
    return batches
