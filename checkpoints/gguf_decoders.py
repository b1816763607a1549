"""The plain decoders that GGUF files hold. Facts: llama.cpp's converter and loader (github.com/ggml-org/llama.cpp)."""

from __future__ import annotations

from typing import Any

from .gguf_keys import Keys
from .gguf_layout import Architecture, Config, decoder, plain_block, rotated_share
from .gguf_rope import FREQUENCIES, LONG, SHORT, rope

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_LINEARS = {**_ATTENTION, "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PHI_LINEARS = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QKV = tuple(_ATTENTION.values())[:3]
_BIASES = {"attention_bias": tuple(_ATTENTION.values()), "mlp_bias": tuple(_LINEARS.values())[4:]}
_FACTORS = (FREQUENCIES, LONG, SHORT)

_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62


def _named(kind: str, causal: str, config: Config) -> Config:
    return {"model_type": kind, "architectures": [f"{causal}ForCausalLM"], **config}


def _with_rope(keys: Keys, config: Config, tensors: tuple[str, ...] = ()) -> Config:
    block = rope(keys, config["head_dim"], tensors)
    return config | {"rope_theta": block["rope_theta"], "rope_parameters": block, "hidden_act": "silu"}


def _llama(keys: Keys) -> Config:
    return _named("llama", "Llama", _with_rope(keys, decoder(keys), _FACTORS)) | {"mlp_bias": False}


def _qwen2(keys: Keys) -> Config:
    return _named("qwen2", "Qwen2", _with_rope(keys, decoder(keys))) | {"use_sliding_window": False}


def _qwen3(keys: Keys) -> Config:
    return _named("qwen3", "Qwen3", _with_rope(keys, decoder(keys))) | {"use_sliding_window": False}


def _smollm3(keys: Keys) -> Config:
    config = _named("smollm3", "SmolLM3", _with_rope(keys, decoder(keys)))
    # In GGUF the layers without RoPE are not named: each fourth.
    rotated = [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]
    return config | {"mlp_bias": False, "no_rope_layers": rotated, "use_sliding_window": False}


def _granite(keys: Keys) -> Config:
    if keys.get("rope.scaling.finetuned") is False:  # so llama.cpp marks a Granite without RoPE
        raise keys.error("rope.scaling.finetuned", False)
    stacked = keys.get("deepstack_mapping")
    if isinstance(stacked, list) and any(value != -1 for value in stacked):
        raise keys.error("deepstack_mapping", stacked)  # embeddings of images are added behind layers
    config = _named("granite", "Granite", _with_rope(keys, decoder(keys), _FACTORS))
    scaled = keys.get("attention.scale")
    return config | {
        "mlp_bias": False,
        "attention_multiplier": keys.real("attention.scale") if scaled else config["head_dim"] ** -0.5,
        "embedding_multiplier": keys.factor("embedding_scale"),
        "residual_multiplier": keys.factor("residual_scale"),
        "logits_scaling": keys.real("logit_scale"),
    }


def _phi3(keys: Keys) -> Config:
    config = decoder(keys, partial=True)
    dims = keys.size("rope.dimension_count", config["head_dim"])
    block = rope(keys, dims, (LONG, SHORT))
    if keys.get("attention.sliding_window"):
        keys.notes.append(
            f"attention.sliding_window of {keys.size('attention.sliding_window')} tokens is not applied, as in llama.cpp"
        )
    return _named("phi3", "Phi3", config) | {
        "hidden_act": "silu",
        "rope_theta": block["rope_theta"],
        "rope_parameters": block | {"partial_rotary_factor": rotated_share(dims, config["head_dim"])},
        "sliding_window": None,
    }


def _gemma(keys: Keys) -> Config:
    config = decoder(keys)
    block = rope(keys, config["head_dim"])
    return _named("gemma", "Gemma", config) | {
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": block["rope_theta"],
        "rope_parameters": block,
    }


def _gemma2(keys: Keys) -> Config:
    config = decoder(keys)
    block = rope(keys, config["head_dim"])
    local = keys.real("rope.freq_base_swa", block["rope_theta"])
    if local != block["rope_theta"]:
        raise keys.error("rope.freq_base_swa", local)
    return _named("gemma2", "Gemma2", config) | {
        "tie_word_embeddings": True,
        **_gemma_attention(keys, config, _GEMMA2_27B_LAYERS),
        "sliding_window": keys.size("attention.sliding_window", 4096),
        "layer_types": _layer_types(keys, 2),
        "attn_logit_softcapping": keys.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.real("final_logit_softcapping", 30.0),
        "rope_theta": block["rope_theta"],
        "rope_parameters": block,
    }


def _gemma3(keys: Keys) -> Config:
    config = decoder(keys)
    block = rope(keys, config["head_dim"])
    if block["rope_type"] not in ("default", "linear"):
        raise keys.error("rope.scaling.type", keys.get("rope.scaling.type"))
    slides = keys.size("attention.sliding_window", 0, least=0)
    local = keys.real("rope.freq_base_swa", 10000.0)
    capped = keys.get("final_logit_softcapping")
    full = ["full_attention"] * config["num_hidden_layers"]
    return _named("gemma3_text", "Gemma3", config) | {
        **_gemma_attention(keys, config, _GEMMA3_27B_LAYERS),
        "sliding_window": slides or None,
        "layer_types": _layer_types(keys, 6) if slides else full,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": keys.real("final_logit_softcapping") if capped else None,
        "rope_theta": block["rope_theta"],
        "rope_local_base_freq": local,
        "rope_parameters": {
            "full_attention": block,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _gemma_attention(keys: Keys, config: Config, layers_of_27b: int) -> dict[str, Any]:
    """Gemmas scale queries by head_dim, their 27B by hidden / heads. In GGUF only the depth tells which one it is."""
    is_27b = config["num_hidden_layers"] == layers_of_27b
    scalar = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    return {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scalar}


def _layer_types(keys: Keys, period: int) -> list[str]:
    """Which layers slide: a list in the file, or all but each N-th."""
    key, layers = "attention.sliding_window_pattern", keys.layers()
    if isinstance(keys.get(key), list):
        slides = [bool(value) for value in keys.sizes(key, layers, 0)]
    else:
        period = keys.size(key, period, least=0)
        slides = [period == 0 or i % period < period - 1 for i in range(layers)]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


_TURNED = plain_block(_LINEARS, _NORMS, turned=True)
_PLAIN = plain_block(_LINEARS, _NORMS)

DECODERS = {
    "llama": Architecture(_llama, _TURNED, biases=_BIASES, factors=_FACTORS),
    "qwen2": Architecture(_qwen2, _PLAIN, biases={"": _QKV}),
    "qwen3": Architecture(
        _qwen3,
        plain_block(_LINEARS, _NORMS | _HEAD_NORMS),
        biases={"attention_bias": tuple(_ATTENTION.values())},
    ),
    "gemma": Architecture(_gemma, plain_block(_LINEARS, _NORMS, norm=-1.0), norm=-1.0),
    "gemma2": Architecture(_gemma2, plain_block(_LINEARS, _SANDWICH, norm=-1.0), norm=-1.0),
    "gemma3": Architecture(_gemma3, plain_block(_LINEARS, _SANDWICH | _HEAD_NORMS, norm=-1.0), norm=-1.0),
    "phi3": Architecture(_phi3, plain_block(_PHI_LINEARS, _NORMS), factors=(LONG, SHORT)),
    "smollm3": Architecture(_smollm3, _TURNED, biases=_BIASES),
    "granite": Architecture(_granite, _TURNED, biases=_BIASES, factors=_FACTORS),
}
