"""Tiny checkpoints with every feature on, written to disk in the Hugging Face layout; the same seed gives the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgewright.models.layers.linear import Embedding
from edgewright.models.layers.norm import RMSNorm
from edgewright.models.registry import build

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "t5gemma-g2p"

_T5_STACK: dict[str, Any] = {
    "attention_bias": False,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 8.0,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "intermediate_size": 128,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 24,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "sliding_window": 4,
    "vocab_size": 70,
}
T5GEMMA: dict[str, Any] = {
    "model_type": "t5gemma",
    # Unbalanced: the encoder is wider and shallower than the decoder.
    "encoder": _T5_STACK
    | {"hidden_size": 96, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "decoder": _T5_STACK,
    "bos_token_id": 2,
    "decoder_start_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "vocab_size": 70,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "attention_bias": True,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "mlp_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": 80,
}
GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "intermediate_size": 128,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 20,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "sliding_window": 5,
    "tie_word_embeddings": True,
    "vocab_size": 80,
}


def write_tiny_t5gemma(directory: Path, *, tokenizer: bool = True, **changes: Any) -> Path:
    """A T5Gemma of 2 and 3 layers, windows of 4, softcaps; with the tokenizer of the example (70 tokens).

    `changes`: see `write`.
    """
    write(directory, T5GEMMA, **changes)
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(EXAMPLE / name, directory / name)
    return directory


def write_tiny_llama(directory: Path, **changes: Any) -> Path:
    """A Llama of 3 layers with biases and an untied head; no tokenizer. `changes`: see `write`."""
    return write(directory, LLAMA, **changes)


def write_tiny_gemma3(directory: Path, **changes: Any) -> Path:
    """A Gemma 3 of 3 layers with QK-norm, two RoPE bases, windows of 5; no tokenizer. `changes`: see `write`."""
    return write(directory, GEMMA3, **changes)


def write(
    directory: Path, base: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """config.json and model.safetensors of `base` with `changes` to config keys (dicts are merged), random weights.

    Returns `directory`, which is made if need be.
    """
    config = merged(base, changes)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "generation_config.json").write_text('{"eos_token_id": 1, "max_new_tokens": 16}')
    save_file(weights(config, seed, dtype), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {k: merged(base[k], v) for k, v in changes.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | changes | both


def weights(config: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random weights for `config` under the checkpoint's names; a tied head is left out."""
    model = build(config)
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in model.tied:
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        noise = torch.randn(parameter.shape, generator=generator)
        # Norms scale by about 1 whatever their form; matrices keep the size of activations about what it is; embeddings
        # are small, or a tied head would answer every token with itself.
        if isinstance(module, RMSNorm):
            value = noise * 0.2 + (1.0 - module.offset)
        elif parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
            value = noise * 0.2 + 1.0
        else:
            value = noise * (0.06 if isinstance(module, Embedding) else 0.15)
        made[name] = value.to(dtype)
    return made
