"""One tiny config a model family, for the tests of exporters and runtimes: widths of 32 and up, about 80 tokens."""

from __future__ import annotations

from typing import Any

FAMILIES: dict[str, dict[str, Any]] = {}
"""Name -> config.json. Weights: `tiny.write(directory, FAMILIES[name])`."""

_T5GEMMA2_STACK: dict[str, Any] = {
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 24,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "sliding_window": 4,
    "vocab_size": 80,
}
FAMILIES["t5gemma2"] = {
    "model_type": "t5gemma2",
    "encoder": {
        "eoi_token_index": 70,
        "text_config": _T5GEMMA2_STACK
        | {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
    },
    "decoder": _T5GEMMA2_STACK
    | {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        "bos_token_id": 2,
    },
    "decoder_start_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}

_MODERNBERT: dict[str, Any] = {
    "attention_bias": False,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "decoder_bias": True,
    "eos_token_id": 1,
    "hidden_activation": "gelu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "local_attention": 6,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "tie_word_embeddings": True,
    "vocab_size": 80,
}
FAMILIES["modernbert"] = _MODERNBERT | {"model_type": "modernbert"}
FAMILIES["modernbert-decoder"] = _MODERNBERT | {"model_type": "modernbert-decoder"}

FAMILIES["mu"] = {
    "model_type": "mu",
    "d_ff": 64,
    "d_kv": 16,
    "d_model": 32,
    "decoder_start_token_id": 2,
    "eos_token_id": 1,
    "layer_norm_epsilon": 1e-06,
    "n_positions": 64,
    "num_decoder_layers": 2,
    "num_heads": 6,
    "num_key_value_heads": 3,
    "num_layers": 3,
    "pad_token_id": 0,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 80,
}

FAMILIES["t5"] = {
    "model_type": "t5",
    "d_ff": 64,
    "d_kv": 16,
    "d_model": 32,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-06,
    "n_positions": 64,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_layers": 3,
    "pad_token_id": 0,
    "relative_attention_max_distance": 12,
    "relative_attention_num_buckets": 8,
    "tie_word_embeddings": True,
    "vocab_size": 80,
}
_SMALL_T5 = {"num_layers": 1, "num_decoder_layers": 1}  # the kin of T5 and BART differ from them in keys, not in depth
FAMILIES["mt5"] = FAMILIES["t5"] | _SMALL_T5 | {"model_type": "mt5", "tie_word_embeddings": False}
FAMILIES["umt5"] = FAMILIES["mt5"] | {"model_type": "umt5", "feed_forward_proj": "relu", "num_layers": 2}
_BART: dict[str, Any] = {
    "activation_function": "gelu",
    "d_model": 64,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "decoder_layers": 2,
    "decoder_start_token_id": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "encoder_layers": 3,
    "eos_token_id": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "scale_embedding": True,
    "tie_word_embeddings": True,
    "vocab_size": 80,
}
FAMILIES["bart"] = _BART | {"model_type": "bart", "forced_bos_token_id": 2}
FAMILIES["m2m_100"] = _BART | {"model_type": "m2m_100", "activation_function": "relu"}
_SMALL = {"encoder_layers": 1, "decoder_layers": 1}
FAMILIES["mbart"] = _BART | _SMALL | {"model_type": "mbart", "scale_embedding": False}
FAMILIES["marian"] = (
    _BART | _SMALL | {"model_type": "marian", "activation_function": "swish", "share_encoder_decoder_embeddings": False}
)
FAMILIES["pegasus"] = _BART | _SMALL | {"model_type": "pegasus", "activation_function": "relu"}

FAMILIES["whisper"] = {
    "model_type": "whisper",
    "activation_function": "gelu",
    "d_model": 64,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "decoder_layers": 2,
    "decoder_start_token_id": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "encoder_layers": 3,
    "eos_token_id": 1,
    "max_source_positions": 20,
    "max_target_positions": 48,
    "num_mel_bins": 16,
    "pad_token_id": 0,
    "vocab_size": 80,
}
FAMILIES["moonshine"] = {
    "model_type": "moonshine",
    "bos_token_id": 3,
    "decoder_hidden_act": "silu",
    "decoder_num_attention_heads": 4,
    "decoder_num_hidden_layers": 2,
    "decoder_start_token_id": 3,
    "encoder_hidden_act": "gelu",
    "encoder_num_attention_heads": 4,
    "encoder_num_hidden_layers": 3,
    "eos_token_id": 1,
    "hidden_size": 48,  # heads of 12, which have 4 zeros behind
    "intermediate_size": 96,
    "max_position_embeddings": 48,
    "rope_parameters": {"partial_rotary_factor": 0.9, "rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": 80,
}

_QWEN2: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 80,
}
FAMILIES["qwen2"] = _QWEN2 | {
    "model_type": "qwen2",
    "max_window_layers": 1,
    "sliding_window": 5,
    "use_sliding_window": True,
}
FAMILIES["dolphin"] = _QWEN2 | {
    "model_type": "dolphin",
    "context_window": 40,
    "encoder_config": _QWEN2 | {"hidden_size": 32, "num_hidden_layers": 2},
    "memory_token_ids": [72, 73, 74, 75],
    "num_memory_tokens": 4,
    "projector": "mlp",
    "prompt_prefix": [3],
    "splice": "released",
}

FAMILIES["phi4flash"] = {
    "model_type": "phi4flash",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-05,
    "mamba_d_state": 8,
    "mamba_dt_rank": 32,
    "max_position_embeddings": 128,
    "mb_per_layer": 2,
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "num_key_value_heads": 4,
    "sliding_window": 5,
    "tie_word_embeddings": True,
    "vocab_size": 80,
}

_ARC_STACK: dict[str, Any] = {
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "vocab_size": 80,
}
FAMILIES["arc_encoder"] = _ARC_STACK | {
    "model_type": "arc_encoder",
    "bridge_hidden_size": 32,
    "context_window": 32,
    "encoder_config": _ARC_STACK
    | {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3},
    "eos_token_id": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "pooling_factor": 4,
    "prompt_prefix": [2],
    "tie_word_embeddings": False,
}

_DELTA: dict[str, Any] = {
    "attention_bias": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 24,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "vocab_size": 80,
}
_QWEN3: dict[str, Any] = _DELTA | {
    "head_dim": 16,
    "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_type": "default"},
}
FAMILIES["qwen3_5_text"] = _QWEN3 | {"model_type": "qwen3_5_text", "tie_word_embeddings": True}
FAMILIES["qwen3_next"] = _QWEN3 | {"model_type": "qwen3_next", "num_experts": 0, "tie_word_embeddings": False}
FAMILIES["olmo_hybrid"] = _DELTA | {
    "model_type": "olmo_hybrid",
    "linear_allow_neg_eigval": True,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
}
FAMILIES["falcon_h1"] = {
    "model_type": "falcon_h1",
    "attention_bias": True,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 0.8,
    "bos_token_id": 2,
    "embedding_multiplier": 2.0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "key_multiplier": 0.6,
    "lm_head_multiplier": 0.7,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 24,
    "mamba_n_groups": 2,
    "mamba_n_heads": 4,
    "mamba_norm_before_gate": False,
    "mamba_rms_norm": True,
    "max_position_embeddings": 128,
    "mlp_multipliers": [0.9, 1.1],
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "ssm_in_multiplier": 1.2,
    "ssm_multipliers": [0.7, 1.2, 0.9, 1.4, 0.8],
    "ssm_out_multiplier": 1.3,
    "tie_word_embeddings": False,
    "vocab_size": 80,
}
_MAMBA: dict[str, Any] = {
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "vocab_size": 80,
}
FAMILIES["mamba2"] = _MAMBA | {
    "model_type": "mamba2",
    "expand": 2,
    "head_dim": 32,
    "n_groups": 2,
    "num_heads": 4,
    "state_size": 24,
    "tie_word_embeddings": True,
}
_ATTENDING: dict[str, Any] = {
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_MIXER: dict[str, Any] = {
    "mamba_d_head": 32,
    "mamba_d_state": 24,
    "mamba_expand": 2,
    "mamba_n_groups": 2,
    "mamba_n_heads": 4,
}
FAMILIES["bamba"] = _MAMBA | _ATTENDING | _MIXER | {"model_type": "bamba", "attn_layer_indices": [1]}
FAMILIES["granitemoehybrid"] = (
    _MAMBA
    | _ATTENDING
    | _MIXER
    | {
        "model_type": "granitemoehybrid",
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "logits_scaling": 2.0,
        "num_local_experts": 0,
        "position_embedding_type": "nope",
        "residual_multiplier": 0.5,
        "shared_intermediate_size": 96,
        "tie_word_embeddings": True,
    }
)
FAMILIES["nemotron_h"] = (
    _MAMBA
    | _ATTENDING
    | {
        "model_type": "nemotron_h",
        "head_dim": 16,
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention"],
        "mamba_head_dim": 32,
        "mamba_num_heads": 4,
        "n_groups": 2,
        "num_hidden_layers": 4,
        "ssm_state_size": 24,
    }
)
FAMILIES["zamba2"] = (
    _MAMBA
    | _ATTENDING
    | {
        "model_type": "zamba2",
        "adapter_rank": 32,
        "hidden_act": "gelu",
        "layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"],
        "mamba_d_state": 24,
        "mamba_ngroups": 2,
        "n_mamba_heads": 4,
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "num_mem_blocks": 2,
        "use_mem_rope": True,
        "use_shared_attention_adapter": True,
    }
)
FAMILIES["recurrent_gemma"] = (
    _MAMBA
    | _ATTENDING
    | {
        "model_type": "recurrent_gemma",
        "attention_window_size": 6,
        "block_types": ["recurrent", "attention"],
        "intermediate_size": 192,
        "logits_soft_cap": 30.0,
        "lru_width": 96,
    }
)
FAMILIES["rwkv7"] = _MAMBA | {
    "model_type": "rwkv7",
    "a_low_rank_dim": 32,
    "decay_low_rank_dim": 32,
    "gate_low_rank_dim": 32,
    "head_dim": 16,
    "hidden_act": "sqrelu",
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "norm_bias": True,
    "norm_eps": 1e-05,
    "norm_first": True,
    "tie_word_embeddings": False,
    "v_low_rank_dim": 32,
}
FAMILIES["lfm2"] = {
    "model_type": "lfm2",
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 32,
    "bos_token_id": 2,
    "conv_L_cache": 3,
    "conv_bias": True,
    "eos_token_id": 1,
    "hidden_size": 64,
    "intermediate_size": 144,
    "layer_types": ["conv", "full_attention", "conv"],
    "max_position_embeddings": 128,
    "norm_eps": 1e-05,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": 80,
}
FAMILIES["hgrn2"] = {
    "model_type": "hgrn2",
    "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 5},
    "bos_token_id": 2,
    "eos_token_id": 1,
    "expand_ratio": 16,
    "hidden_act": "swish",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "norm_eps": 1e-06,
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,
    "use_lower_bound": True,
    "vocab_size": 80,
}


# ---- plain decoders, which one module computes

_PLAIN: dict[str, Any] = {
    "eos_token_id": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 80,
}
_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}

FAMILIES["mistral"] = _PLAIN | {"model_type": "mistral", "sliding_window": 6}
FAMILIES["ministral"] = _PLAIN | _KINDS | {"model_type": "ministral", "head_dim": 32}
FAMILIES["ministral3"] = _PLAIN | {
    "model_type": "ministral3",
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "llama_4_scaling_beta": 0.1,
    },
}
FAMILIES["qwen3"] = _PLAIN | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True}
FAMILIES["gemma"] = _PLAIN | {"model_type": "gemma", "head_dim": 32}
FAMILIES["gemma2"] = _PLAIN | _KINDS | {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 24}
FAMILIES["gemma3n_text"] = _PLAIN | {
    "model_type": "gemma3n_text",
    "activation_sparsity_pattern": [0.9, 0.0, 0.0],
    "altup_num_inputs": 3,
    "head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": [96, 64, 64],
    "laurel_rank": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_hidden_layers": 3,
    "num_kv_shared_layers": 1,
    "sliding_window": 6,
    "vocab_size_per_layer_input": 80,
}
FAMILIES["gemma4_text"] = _PLAIN | {
    "model_type": "gemma4_text",
    "final_logit_softcapping": 30.0,
    "global_head_dim": 32,
    "head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": 6,
    "use_double_wide_mlp": True,
    "vocab_size_per_layer_input": 80,
}
FAMILIES["phi3"] = _PLAIN | {
    "model_type": "phi3",
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "attention_factor": 1.1,
    },
}
FAMILIES["smollm3"] = _PLAIN | {"model_type": "smollm3", "no_rope_layer_interval": 2}
FAMILIES["granite"] = _PLAIN | {
    "model_type": "granite",
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
}
FAMILIES["olmo2"] = _PLAIN | {"model_type": "olmo2"}
FAMILIES["olmo3"] = _PLAIN | _KINDS | {"model_type": "olmo3"}
FAMILIES["exaone4"] = _PLAIN | _KINDS | {"model_type": "exaone4"}
FAMILIES["ernie4_5"] = _PLAIN | {"model_type": "ernie4_5", "head_dim": 32, "use_bias": True}
FAMILIES["hunyuan_v1_dense"] = _PLAIN | {
    "model_type": "hunyuan_v1_dense",
    "head_dim": 16,
    "rope_scaling": {"type": "dynamic", "alpha": 100.0, "factor": 1.0},
}
FAMILIES["stablelm"] = _PLAIN | {"model_type": "stablelm", "partial_rotary_factor": 0.25, "use_qkv_bias": True}
FAMILIES["gpt2"] = {
    "eos_token_id": 1,
    "model_type": "gpt2",
    "n_embd": 64,
    "n_head": 4,
    "n_inner": 96,
    "n_layer": 2,
    "n_positions": 64,
    "vocab_size": 80,
}
FAMILIES["gpt_neox"] = _PLAIN | {"model_type": "gpt_neox", "rotary_pct": 0.5}


# ---- encoders for search

_BERT: dict[str, Any] = {
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 80,
}


def _embedding(*pooling: str, **more: Any) -> dict[str, Any]:
    """The description of an embedding in config.json."""
    return {"edgewright": {"embedding": {"pooling": list(pooling)} | more}}


_UNIT = [{"kind": "normalize"}]
_LINEARS = [
    {"kind": "dense", "in": 64, "out": 96, "bias": False, "act": "identity"},
    {"kind": "dense", "in": 96, "out": 32, "bias": True, "act": "tanh"},
    *_UNIT,
]
FAMILIES["bert"] = _BERT | {"model_type": "bert"} | _embedding("mean", behind=_UNIT)
FAMILIES["roberta"] = (
    _BERT
    | {"model_type": "roberta", "max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1}
    | _embedding("max", "mean_sqrt_len")
)
FAMILIES["xlm-roberta"] = (
    FAMILIES["roberta"] | {"model_type": "xlm-roberta"} | _embedding("weighted_mean", behind=_LINEARS)
)
FAMILIES["distilbert"] = {
    "model_type": "distilbert",
    "activation": "gelu",
    "dim": 64,
    "hidden_dim": 96,
    "max_position_embeddings": 64,
    "n_heads": 4,
    "n_layers": 2,
    "pad_token_id": 0,
    "vocab_size": 80,
} | _embedding("cls", behind=_LINEARS)
EMBEDDERS: dict[str, dict[str, Any]] = {
    "modernbert": FAMILIES["modernbert"] | _embedding("cls", behind=_UNIT),
    "gemma3_text": _PLAIN
    | _KINDS
    | {"model_type": "gemma3_text", "head_dim": 16, "use_bidirectional_attention": True}
    | _embedding("mean", behind=_LINEARS),
    "qwen3": FAMILIES["qwen3"] | _embedding("last", behind=_UNIT),
}
"""Families that also do something else, as models of embeddings: EmbeddingGemma is a Gemma 3."""
