"""Codes packed as the formats' papers and pages say it, one integer at a time, to compare the readers with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ: nibble i of a word holds output AWQ_ORDER[i] of its eight."""


def packed(codes: Iterable[int], bits: int) -> list[int]:
    """32-bit words, signed, of one run of codes, the first in the lowest bits."""
    values = [int(code) for code in codes]
    run = sum(code << (bits * i) for i, code in enumerate(values))
    words = [(run >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(values) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def packed_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, words] of codes [rows, n]."""
    return torch.tensor([packed(row, bits) for row in codes.tolist()], dtype=torch.int32)


def gptq(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bits: int, minus: int
) -> dict[str, torch.Tensor]:
    """GPTQ's parts of codes [in, out], zero points and scales [groups, out]; zero points are stored less `minus`."""
    stored = (zeros - minus) % (1 << bits)
    return {"qweight": packed_rows(codes.t(), bits).t(), "qzeros": packed_rows(stored, bits), "scales": scales}


def awq(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """AWQ's parts of codes [in, out], zero points and scales [groups, out]."""

    def words(values: torch.Tensor) -> torch.Tensor:
        order = [8 * word + i for word in range(values.shape[1] // 8) for i in AWQ_ORDER]
        return packed_rows(values[:, order], 4)

    return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales}


def dequantized(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, groups: Sequence[int]) -> torch.Tensor:
    """Weights [out, in] of codes [in, out]: input i has the zero points and scales of group groups[i]."""
    rows = [(codes[i].double() - zeros[g].double()) * scales[g].double() for i, g in enumerate(groups)]
    return torch.stack(rows, 1).float()


def write_checkpoint(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A folder with config.json and model.safetensors; a Llama, if `config` does not say otherwise."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors", metadata={"format": "pt"}
    )
    return directory
