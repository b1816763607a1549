"""Transformers models as GGUF files, by the rules of llama.cpp's converter, names from the gguf package's own map."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.quants import quantize

ARCHITECTURES = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
TURNED = ("llama", "smollm3", "granite")


def convert(oracle: torch.nn.Module, path: Path, architecture: str, kind: Kind = Kind.F32, **more: Any) -> Path:
    """Write `oracle` to `path`. more: further metadata, and where None what is left out."""
    writer = GGUFWriter(path, architecture)
    metadata = {f"{architecture}.{key}": value for key, value in _metadata(oracle.config, architecture).items()}
    metadata |= {key if key.startswith("tokenizer.") else f"{architecture}.{key}": v for key, v in more.items()}
    for key, value in metadata.items():
        _add(writer, key, value)
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], oracle.config.num_hidden_layers)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in oracle.state_dict().items():
        if name == "lm_head.weight" and oracle.config.tie_word_embeddings:
            continue
        values = _changed(parameter.detach().float().clone(), name, oracle.config, architecture)
        name = name.replace(".dt_bias", ".dt_proj.bias")
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        tensors[mapped] = values
    tensors |= _extra(oracle.config, architecture)
    for name, values in tensors.items():
        data = values.contiguous().numpy()
        if data.ndim == 2 and data.shape[1] % 32 == 0 and kind != Kind.F32 and "conv" not in name:
            writer.add_tensor(name, quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif value is not None:
        writer.add_uint32(key, value)


def _rope_of(config: Any) -> dict[str, Any]:
    block = dict(config.rope_parameters)
    return block.get("full_attention", block)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _metadata(config: Any, architecture: str) -> dict[str, Any]:
    rope = _rope_of(config)
    found: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None) or getattr(config, "norm_eps", None),
    }
    if architecture not in ("gemma", "gemma2"):
        found["rope.freq_base"] = float(rope["rope_theta"])
    if architecture not in ("phi3", "granite", "lfm2") and getattr(config, "head_dim", None):
        found |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if rope["rope_type"] in ("linear", "yarn") and architecture not in ("gemma", "gemma2"):
        found |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for old, new in (("attention_factor", "attn_factor"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow")):
            if rope.get(old) is not None:
                found[f"rope.scaling.yarn_{new}"] = float(rope[old])
    return found | _OF.get(architecture, lambda config: {})(config)


def _llama(config: Any) -> dict[str, Any]:
    return {"rope.dimension_count": _head_dim(config), "vocab_size": config.vocab_size}


def _granite(config: Any) -> dict[str, Any]:
    return _llama(config) | {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _gemma2(config: Any) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
        "attention.sliding_window": config.sliding_window,
    }


def _gemma3(config: Any) -> dict[str, Any]:
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
        "rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"]),
    }


def _phi3(config: Any) -> dict[str, Any]:
    rope = _rope_of(config)
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    found: dict[str, Any] = {
        "rope.scaling.original_context_length": original,
        "rope.dimension_count": int(rope.get("partial_rotary_factor", 1.0) * config.hidden_size)
        // config.num_attention_heads,
        "attention.sliding_window": config.sliding_window or 0,
    }
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        found["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return found


def _lfm2(config: Any) -> dict[str, Any]:
    kv = config.num_key_value_heads
    return {
        "attention.head_count_kv": [kv if kind == "full_attention" else 0 for kind in config.layer_types],
        "vocab_size": config.vocab_size,
        "shortconv.l_cache": config.conv_L_cache,
        "feed_forward_length": config.intermediate_size,
    }


def _falcon_h1(config: Any) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.inner_size": config.mamba_d_ssm,
        "ssm.state_size": config.mamba_d_state,
        "ssm.time_step_rank": config.mamba_n_heads,
        "ssm.group_count": config.mamba_n_groups,
        "vocab_size": config.vocab_size,
    }


def _qwen35(config: Any) -> dict[str, Any]:
    dims = int(_head_dim(config) * _rope_of(config).get("partial_rotary_factor", 0.25))
    return {
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
        "attention.recurrent_layers": [kind == "linear_attention" for kind in config.layer_types],
        "full_attention_interval": 4,
        "rope.dimension_count": dims,
        "rope.dimension_sections": [dims // 2 - 2, 1, 1, 0],  # of time, height and width, which are one in a text
    }


_OF = {
    "llama": _llama,
    "smollm3": _llama,
    "granite": _granite,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "lfm2": _lfm2,
    "falcon-h1": _falcon_h1,
    "qwen35": _qwen35,
}


def _changed(values: torch.Tensor, name: str, config: Any, architecture: str) -> torch.Tensor:
    if architecture in TURNED:
        if name.endswith(("q_proj.weight", "q_proj.bias")):
            return _turned(values, config.num_attention_heads)
        if name.endswith(("k_proj.weight", "k_proj.bias")):
            return _turned(values, config.num_key_value_heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    if architecture == "lfm2" and "conv.conv" in name:
        return values.squeeze(1)
    if architecture == "falcon-h1":
        return _falcon_values(values, name, config)
    if architecture == "qwen35":
        return _qwen35_values(values, name, config)
    return values


def _turned(values: torch.Tensor, heads: int) -> torch.Tensor:
    pairs = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _falcon_values(values: torch.Tensor, name: str, c: Any) -> torch.Tensor:
    into, out = c.attention_in_multiplier, c.attention_out_multiplier
    factors = {
        "down_proj": c.mlp_multipliers[1],
        "gate_proj": c.mlp_multipliers[0],
        "k_proj": c.key_multiplier * into,
        "q_proj": into,
        "v_proj": into,
        "o_proj": out,
        "mamba.out_proj": c.ssm_out_multiplier,
        "lm_head": c.lm_head_multiplier,
        "embed_tokens": c.embedding_multiplier,
    }
    for part, factor in factors.items():
        if part in name:
            return values * factor
    if "mamba.in_proj" in name:
        inner, state = c.mamba_d_ssm, c.mamba_n_groups * c.mamba_d_state
        counts = torch.tensor([inner, inner, state, state, c.mamba_n_heads])
        rows = torch.tensor(c.ssm_multipliers).repeat_interleave(counts)
        return values * c.ssm_in_multiplier * rows[:, None]
    if "conv1d.weight" in name:
        return values.squeeze(1)
    if name.endswith("mamba.norm.weight"):
        return values.reshape(c.mamba_n_groups, -1)
    if name.endswith(".A_log"):
        return -torch.exp(values).reshape(-1, 1)
    return values.reshape(-1, 1) if name.endswith(".D") else values


def _qwen35_values(values: torch.Tensor, name: str, c: Any) -> torch.Tensor:
    groups, width = c.linear_num_key_heads, c.linear_value_head_dim
    each = c.linear_num_value_heads // groups

    def tile(part: torch.Tensor, size: int) -> torch.Tensor:
        return part.reshape(groups, each, size, -1).swapaxes(0, 1).reshape(part.shape)

    keys = 2 * groups * c.linear_key_head_dim
    if "conv1d" in name:
        values = values.squeeze(1)
    if "in_proj_qkv" in name or "conv1d" in name:
        values = torch.cat((values[:keys], tile(values[keys:], width)))
    elif "in_proj_z" in name:
        values = tile(values, width)
    elif any(part in name for part in ("in_proj_a", "in_proj_b", ".A_log", ".dt_bias")):
        values = tile(values, 1)
    elif "linear_attn.out_proj" in name:
        values = tile(values.T.contiguous(), width).T
    if name.endswith(".A_log"):
        return -torch.exp(values)
    return values + 1 if name.endswith("norm.weight") and "linear_attn" not in name else values


def _extra(config: Any, architecture: str) -> dict[str, torch.Tensor]:
    rope = _rope_of(config)
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
            for kind in ("long", "short")
        }
    return {"rope_freqs.weight": _llama3_factors(rope, _head_dim(config))} if rope["rope_type"] == "llama3" else {}


def _llama3_factors(rope: dict[str, Any], dims: int) -> torch.Tensor:
    low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for exponent in np.arange(0, dims, 2) / dims:
        length = 2 * math.pi * rope["rope_theta"] ** exponent
        if length < original / high:
            factors.append(1.0)
        elif length > original / low:
            factors.append(rope["factor"])
        else:
            smooth = (original / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(factors, dtype=torch.float32)
