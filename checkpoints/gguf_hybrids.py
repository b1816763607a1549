"""The hybrids that GGUF files hold: LFM2, Falcon-H1 and Qwen3.5. Facts: llama.cpp's converter and loader."""

from __future__ import annotations

from dataclasses import replace

from .gguf_keys import Keys
from .gguf_layout import Architecture, Config, Stored, common, decoder, rotated_share, weights
from .gguf_rope import rope
from .row_orders import Tiled

_FFN = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_ATTENTION = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}


def _lfm2(keys: Keys) -> Config:
    config = common(keys)
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise keys.error("attention.key_length", config["head_dim"])
    if keys.get("attention.sliding_window"):
        raise keys.error("attention.sliding_window", keys.get("attention.sliding_window"))
    heads = keys.sizes("attention.head_count_kv", config["num_hidden_layers"], config["num_attention_heads"])
    used = sorted(set(heads) - {0})
    if len(used) > 1 or any(config["num_attention_heads"] % count for count in used):
        raise keys.error("attention.head_count_kv", heads)
    block = rope(keys, config["head_dim"])
    return config | {
        "model_type": "lfm2",
        "architectures": ["Lfm2ForCausalLM"],
        "num_key_value_heads": used[0] if used else config["num_attention_heads"],
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "intermediate_size": keys.size("feed_forward_length"),
        "block_auto_adjust_ff_dim": False,
        "norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": keys.size("shortconv.l_cache"),
        "conv_bias": False,
        "rope_theta": block["rope_theta"],
        "rope_parameters": block,
    }


def _lfm2_block(config: Config, layer: int) -> dict[str, Stored]:
    feed_forward = {"ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2"}
    found = weights({**feed_forward, "attn_norm": "operator_norm", "ffn_norm": "ffn_norm"})
    if config["layer_types"][layer] == "full_attention":
        norms = {"attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm"}
        return found | weights({**_ATTENTION, **norms, "attn_output": "self_attn.out_proj"})
    found |= weights({"shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj"})
    return found | {"conv.conv.weight": Stored("shortconv.conv.weight", form="conv")}


def _falcon_h1(keys: Keys) -> Config:
    config = decoder(keys)
    heads, inner = keys.size("ssm.time_step_rank"), keys.size("ssm.inner_size")
    if inner % heads:
        raise keys.error("ssm.inner_size", inner)
    block = rope(keys, config["head_dim"])
    # The model's multipliers are in the file's weights, so here all are 1.
    return config | {
        "model_type": "falcon_h1",
        "architectures": ["FalconH1ForCausalLM"],
        "hidden_act": "silu",
        "mlp_bias": False,
        "projectors_bias": False,
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_d_ssm": inner,
        "mamba_d_state": keys.size("ssm.state_size"),
        "mamba_d_conv": keys.size("ssm.conv_kernel"),
        "mamba_n_groups": keys.size("ssm.group_count"),
        "mamba_conv_bias": "blk.0.ssm_conv1d.bias" in keys.file.tensors,
        "mamba_proj_bias": False,
        "mamba_rms_norm": "blk.0.ssm_norm.weight" in keys.file.tensors,
        "mamba_norm_before_gate": False,
        "rope_theta": block["rope_theta"],
        "rope_parameters": block,
    }


def _falcon_h1_block(config: Config, layer: int) -> dict[str, Stored]:
    feed_forward = {old: new.replace("mlp", "feed_forward") for old, new in _FFN.items()}
    attention = {**_ATTENTION, "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm"}
    found = weights({**feed_forward, **attention, "ssm_in": "mamba.in_proj", "ssm_out": "mamba.out_proj"})
    found |= {
        "pre_ff_layernorm.weight": Stored("ffn_norm"),  # the converter gives it no `.weight`
        "mamba.conv1d.weight": Stored("ssm_conv1d.weight", form="conv"),
        "mamba.dt_bias": Stored("ssm_dt.bias"),
        "mamba.A_log": Stored("ssm_a", log=True, form="flat"),
        "mamba.D": Stored("ssm_d", form="flat"),
    }
    if config["mamba_conv_bias"]:
        found["mamba.conv1d.bias"] = Stored("ssm_conv1d.bias")
    if config["mamba_rms_norm"]:
        found["mamba.norm.weight"] = Stored("ssm_norm.weight", form="flat")
    return found


def _qwen35(keys: Keys) -> Config:
    config = decoder(keys, partial=True)
    dims = keys.size("rope.dimension_count", config["head_dim"])
    key_heads, heads = keys.size("ssm.group_count"), keys.size("ssm.time_step_rank")
    inner = keys.size("ssm.inner_size")
    if inner % heads or heads % key_heads:
        raise keys.error("ssm.inner_size", f"{inner} for {heads} value heads and {key_heads} key heads")
    layers = config["num_hidden_layers"] - _predicting(keys)
    if layers < 1:
        raise keys.error("nextn_predict_layers", keys.get("nextn_predict_layers"))
    every = keys.size("full_attention_interval", 4)
    recurrent = [int((i + 1) % every != 0) for i in range(layers)]
    if keys.get("attention.recurrent_layers") is not None:
        recurrent = keys.sizes("attention.recurrent_layers", config["num_hidden_layers"], 0)[:layers]
    block = rope(keys, dims)
    return config | {
        "model_type": "qwen3_5_text",
        "architectures": ["Qwen3_5ForCausalLM"],
        "hidden_act": "silu",
        "num_hidden_layers": layers,
        "layer_types": ["linear_attention" if r else "full_attention" for r in recurrent],
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": keys.size("ssm.state_size"),
        "linear_value_head_dim": inner // heads,
        "linear_conv_kernel_dim": keys.size("ssm.conv_kernel"),
        "rope_theta": block["rope_theta"],
        "rope_parameters": block | {"partial_rotary_factor": rotated_share(dims, config["head_dim"])},
    }


def _predicting(keys: Keys) -> int:
    """How many of the blocks are heads for later tokens."""
    return keys.size("nextn_predict_layers", 0, least=0)


def _qwen35_block(config: Config, layer: int) -> dict[str, Stored]:
    found = weights(_FFN)
    found |= weights({"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}, add=-1.0)
    if config["layer_types"][layer] == "full_attention":
        norms = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
        return found | weights({**_ATTENTION, "attn_output": "self_attn.o_proj"}) | weights(norms, add=-1.0)
    delta = _delta_net(config)
    return found | {f"linear_attn.{name}": stored for name, stored in delta.items()}


def _delta_net(config: Config) -> dict[str, Stored]:
    """A Gated DeltaNet: the file has the value heads in another order, in rows and, of the output, in columns."""
    groups, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    each, width = heads // groups, config["linear_value_head_dim"]
    keys = 2 * groups * config["linear_key_head_dim"]
    behind, wide, single = Tiled(groups, each, width, keys), Tiled(groups, each, width), Tiled(groups, each, 1)
    found = {
        "in_proj_qkv.weight": Stored("attn_qkv.weight", rows=behind),
        "conv1d.weight": Stored("ssm_conv1d.weight", rows=behind, form="conv"),
        "in_proj_z.weight": Stored("attn_gate.weight", rows=wide),
        "in_proj_b.weight": Stored("ssm_beta.weight", rows=single),
        "in_proj_a.weight": Stored("ssm_alpha.weight", rows=single),
        "dt_bias": Stored("ssm_dt.bias", rows=single),
        "A_log": Stored("ssm_a", rows=single, log=True, form="flat"),
        "norm.weight": Stored("ssm_norm.weight"),
        "out_proj.weight": Stored("ssm_out.weight", columns=wide),
    }
    return found if each > 1 else {name: replace(s, rows=None, columns=None) for name, s in found.items()}


_EMBEDDING = {"model.embed_tokens.weight": "token_embd.weight"}

HYBRIDS = {
    "lfm2": Architecture(
        _lfm2, _lfm2_block, top=_EMBEDDING | {"model.embedding_norm.weight": "token_embd_norm.weight"}
    ),
    "falcon-h1": Architecture(
        _falcon_h1,
        _falcon_h1_block,
        top=_EMBEDDING | {"model.final_layernorm.weight": "output_norm.weight"},
        biases={"attention_bias": (*_ATTENTION.values(), "self_attn.o_proj")},
    ),
    "qwen35": Architecture(_qwen35, _qwen35_block, norm=-1.0, left_out=_predicting),
}
