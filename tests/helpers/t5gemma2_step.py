"""Inputs of a T5Gemma 2 decode step."""

from __future__ import annotations

import torch


def step(ids: torch.Tensor, past: int, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "input_ids": ids,
        "past_length": torch.tensor([past]),
        "encoder_mask": mask,
        "logit_positions": torch.arange(ids.shape[1]),
    }
