"""Tiny checkpoints as `save_pretrained` writes them, so with the names and keys of published files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers


def oracle(config: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """transformers' model of `config` with random weights, in float32."""
    kind = transformers.AutoConfig.for_model(**config)
    kind._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(kind)
    generator = torch.Generator().manual_seed(seed)
    offset = 0.0 if config["model_type"] == "recurrent_gemma" else 1.0  # of its norms, which hold weight - 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and parameter.dim() == 1 and name.endswith("weight"):
                parameter.copy_(noise * 0.2 + offset)
            elif name.endswith(".D"):
                parameter.copy_(noise * 0.2 + 1.0)
            elif name.endswith((".A_log", "conv1d.weight", "conv_1d.weight")):
                parameter.copy_(noise * 0.5)
            else:
                parameter.copy_(noise * (0.06 if "embed" in name else 0.15))
    model.tie_weights()
    return model.eval()


def saved(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Writes `oracle(config)` to `folder`, in bfloat16, and returns it."""
    oracle(config, seed).to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "max_new_tokens": 16}))
    return folder
