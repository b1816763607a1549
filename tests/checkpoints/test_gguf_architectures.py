"""Each architecture of GGUF: a tiny transformers model, converted as llama.cpp does it and opened, has the model's logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from helpers.gguf_converter import convert
from helpers.oracle import causal_logits, randomise

from edgewright.checkpoints import gguf
from edgewright.checkpoints.gguf_file import GgufFile, read_gguf
from edgewright.errors import UserError
from edgewright.models.loading import load_original
from edgewright.models.opening import open_model
from edgewright.models.registry import build

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_PHI_ROPE = {"rope_type": "longrope", "rope_theta": 1000.0, "original_max_position_embeddings": 32}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}
_GRANITE = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 5.0,
}
_FALCON: dict[str, Any] = {
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 0.8,
    "embedding_multiplier": 2.0,
    "head_dim": 16,
    "key_multiplier": 0.6,
    "lm_head_multiplier": 0.7,
    "mamba_d_conv": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 24,
    "mamba_n_groups": 2,
    "mamba_n_heads": 4,
    "mamba_norm_before_gate": False,
    "mamba_rms_norm": True,
    "mlp_multipliers": [0.9, 1.1],
    "ssm_in_multiplier": 1.2,
    "ssm_multipliers": [0.7, 1.2, 0.9, 1.4, 0.8],
    "ssm_out_multiplier": 1.3,
}
_QWEN35: dict[str, Any] = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_value_head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}),
    "llama, tied, wide heads": ("llama", "Llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama, biases": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", "Llama", {"rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 32}}),
    "llama, linear": ("llama", "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0}}),
    "qwen2": ("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("qwen2", "Qwen2", {"rope_parameters": _YARN | {"beta_fast": 16.0, "attention_factor": 1.3}}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32, "rope_parameters": _YARN}),
    "gemma": ("gemma", "Gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", "Gemma2", {"head_dim": 32, "sliding_window": 5, "tie_word_embeddings": True}),
    "gemma3": ("gemma3", "Gemma3", {"head_dim": 32, "sliding_window": 5, "rope_parameters": _GEMMA3_ROPE}),
    "phi3": ("phi3", "Phi3", {}),
    "phi3, long": (
        "phi3",
        "Phi3",
        {"rope_parameters": _PHI_ROPE | {"short_factor": [1.0 + i / 9 for i in range(8)], "long_factor": [9.0] * 8}},
    ),
    "phi4, part of a head": (
        "phi3",
        "Phi3",
        {
            "rope_parameters": _PHI_ROPE
            | {"short_factor": [1.5] * 6, "long_factor": [9.0] * 6, "partial_rotary_factor": 0.75}
        },
    ),
    "smollm3": ("smollm3", "SmolLM3", {"no_rope_layers": [1, 1, 1, 0]}),
    "granite": ("granite", "Granite", _GRANITE),
    "lfm2": (
        "lfm2",
        "Lfm2",
        {"layer_types": ["conv", "full_attention", "conv", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    "falcon-h1": ("falcon-h1", "FalconH1", _FALCON),
    "qwen35": ("qwen35", "Qwen3_5", _QWEN35),
}


def oracle_of(name: str) -> torch.nn.Module:
    _, causal, changes = MODELS[name]
    text = "Text" if causal in ("Gemma3", "Qwen3_5") else ""
    values = {**_SIZES, **changes}
    if causal == "Gemma2":
        values |= {"query_pre_attn_scalar": values["head_dim"]}
    if causal == "Gemma3":
        values |= {
            "query_pre_attn_scalar": values["head_dim"],
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        }
    config = getattr(transformers, f"{causal}{text}Config")(**values)
    config._attn_implementation = "eager"
    return randomise(getattr(transformers, f"{causal}ForCausalLM")(config), 3)


def logits_of(path: Path, ids: torch.Tensor) -> torch.Tensor:
    checkpoint = open_model(str(path))
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    with torch.no_grad():
        return causal_logits(model, ids, [7, 3, 1, 1])


def expected(oracle: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return oracle(ids, use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    oracle = oracle_of(name)
    path = convert(oracle, tmp_path / "m.gguf", MODELS[name][0])
    ids = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(1))
    wanted = expected(oracle, ids)
    found = logits_of(path, ids)
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0])
@pytest.mark.parametrize("name", ["llama, biases", "qwen2", "gemma3", "phi3"])
def test_logits_of_a_quantized_file_are_those_of_its_values(tmp_path: Path, name: str, kind: Kind) -> None:
    oracle = oracle_of(name)
    path = convert(oracle, tmp_path / "m.gguf", MODELS[name][0], kind)
    with torch.no_grad():
        for weight in oracle.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind)))
    ids = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(1))
    wanted = expected(oracle, ids)
    assert float((logits_of(path, ids) - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


_STRANGE: tuple[Any, ...] = (0, 3, (1 << 32) - 1, float("nan"), "x", [1, 2], [0] * 4)


_UNREAD = ("vocab_size", "dimension_sections", "interval", "attention.scale", "nextn_predict_layers")
"""Keys that some architecture does not read."""


def problem(file: GgufFile) -> str | None:
    """What is wrong with a file when it is opened and all of it read; None if nothing is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "read_parts", lambda path: (file, (path,)))
        try:
            checkpoint = open_model(str(file.path))
            load_original(build(checkpoint.config), checkpoint)
        except UserError as error:
            return str(error)
    return None


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi3, long", "granite", "lfm2", "falcon-h1", "qwen35"])
def test_strange_metadata_open_or_end_in_one_line(tmp_path: Path, name: str) -> None:
    architecture = MODELS[name][0]
    whole = read_gguf(convert(oracle_of(name), tmp_path / "m.gguf", architecture))
    keys = [key for key in whole.metadata if key.startswith(f"{architecture}.")]
    more = ("rope.scaling.factor", "rope.scaling.type", "nextn_predict_layers", "attention.scale")
    for key in [*keys, *(f"{architecture}.{key}" for key in more)]:
        found = [problem(replace(whole, metadata={**whole.metadata, key: value})) for value in _STRANGE]
        lines = [line for line in found if line is not None]
        assert not [line for line in lines if "\n" in line]
        assert lines or key.endswith(_UNREAD)


@pytest.mark.parametrize("name", ["qwen35", "falcon-h1", "lfm2", "llama, biases"])
def test_tensors_of_another_shape_end_in_one_line(tmp_path: Path, name: str) -> None:
    whole = read_gguf(convert(oracle_of(name), tmp_path / "m.gguf", MODELS[name][0]))
    for key, tensor in whole.tensors.items():
        for shape in ((1,), (3, 32)):
            data = np.zeros((int(np.prod(shape[:-1])), 4 * shape[-1]), np.uint8)
            other = replace(tensor, shape=shape, data=data)
            line = problem(replace(whole, tensors={**whole.tensors, key: other}))
            assert line is not None, (key, shape)
            assert "\n" not in line
