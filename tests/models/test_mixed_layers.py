"""Decoders of Mamba-2, RG-LRU and shared blocks against transformers: what `save_pretrained` writes, opened from its file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.family_table import SAVED
from helpers.oracle import causal_logits, randomise
from helpers.requests import asking
from helpers.saved import oracle as random_oracle
from helpers.saved import saved
from helpers.tiny_families import FAMILIES
from safetensors.torch import load_file, save_file

from edgewright import compiler
from edgewright.checkpoints.names import Names
from edgewright.errors import UserError
from edgewright.models.loading import load_original
from edgewright.models.opening import open_model
from edgewright.models.registry import build, shorten
from edgewright.verification.transformers_model import compare

LENGTH = 70  # more than a chunk of the recurrences
LINEAR, FULL = "linear_attention", "full_attention"

BASE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "vocab_size": 37,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
HEADS = {"intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128}
MAMBA2 = BASE | {"expand": 2, "head_dim": 24, "n_groups": 2, "num_heads": 4, "state_size": 8}
MIXER = {"mamba_d_head": 24, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_heads": 4}
BAMBA = BASE | HEADS | MIXER | {"attn_layer_indices": [1]}
GRANITE = BASE | HEADS | MIXER | {"num_local_experts": 0, "shared_intermediate_size": 56}
FACTORS = {
    "attention_multiplier": 0.1,
    "embedding_multiplier": 3.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.4,
}
NEMOTRON = (
    BASE | HEADS | {"head_dim": 16, "mamba_head_dim": 16, "mamba_num_heads": 4, "n_groups": 2, "ssm_state_size": 8}
)
ZAMBA = (
    BASE
    | HEADS
    | {"layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid", "hybrid"], "num_hidden_layers": 5}
    | {"adapter_rank": 8, "mamba_d_state": 8, "n_mamba_heads": 4, "num_key_value_heads": 6, "hidden_act": "gelu"}
)
GRIFFIN = BASE | HEADS | {"attention_window_size": 5, "block_types": ["recurrent", "attention"]}
ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4, "partial_rotary_factor": 0.5}}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("Mamba2", MAMBA2),
    "mamba2 tied, biased, one group": (
        "Mamba2",
        MAMBA2 | {"tie_word_embeddings": True, "use_bias": True, "n_groups": 1},
    ),
    "mamba2 bounded time steps, plain convolution": (
        "Mamba2",
        MAMBA2 | {"time_step_limit": [0.05, 0.9], "use_conv_bias": False, "conv_kernel": 3},
    ),
    "bamba": ("Bamba", BAMBA),
    "bamba biased, tied, in groups": (
        "Bamba",
        BAMBA
        | ROPE
        | {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False}
        | {"mamba_n_groups": 2, "tie_word_embeddings": True, "attn_layer_indices": [0, 2]},
    ),
    "bamba without attention": ("Bamba", BAMBA | {"attn_layer_indices": None, "num_key_value_heads": None}),
    "granite 4 H": ("GraniteMoeHybrid", GRANITE | FACTORS | {"layer_types": [LINEAR, FULL, LINEAR]}),
    "granite 4 dense": (
        "GraniteMoeHybrid",
        GRANITE
        | FACTORS
        | {"layer_types": [FULL] * 3, "position_embedding_type": "rope", "attention_bias": True}
        | {"tie_word_embeddings": True},
    ),
    "granite 4 of mixers alone": ("GraniteMoeHybrid", GRANITE | {"mamba_n_groups": 2, "mamba_proj_bias": True}),
    "nemotron-h": ("NemotronH", NEMOTRON | {"layers_block_type": [LINEAR, "mlp", FULL, "mlp", LINEAR]}),
    "nemotron-h by letters, biased": (
        "NemotronH",
        NEMOTRON
        | {"hybrid_override_pattern": "M-*M", "use_bias": True, "mlp_bias": True, "use_conv_bias": False}
        | {"time_step_min": 0.3, "mlp_hidden_act": "silu"},
    ),
    "zamba 2": ("Zamba2", ZAMBA),
    "zamba 2, two blocks, adapted attention": (
        "Zamba2",
        ZAMBA | {"num_mem_blocks": 2, "use_shared_attention_adapter": True, "use_mem_rope": True, "mamba_ngroups": 2},
    ),
    "zamba 2 biased, fewer key heads": (
        "Zamba2",
        ZAMBA | {"add_bias_linear": True, "num_key_value_heads": 2, "time_step_min": 0.2},
    ),
    "recurrent gemma": ("RecurrentGemma", GRIFFIN),
    "recurrent gemma, wider unit, biased, untied": (
        "RecurrentGemma",
        GRIFFIN
        | {"lru_width": 60, "attention_bias": True, "tie_word_embeddings": False, "num_hidden_layers": 4}
        | {"block_types": ["recurrent", "recurrent", "attention"], "conv1d_width": 3, "attention_window_size": 100},
    ),
}


def made(case: str) -> Any:
    """transformers' model of a case, its logits of about 2: its own float32 noise stays well below 1e-4."""
    family, config = CASES[case]
    kind = getattr(hf, f"{family}Config")(**config)
    kind._attn_implementation = "eager"
    oracle = randomise(getattr(hf, f"{family}ForCausalLM")(kind), 7)
    if kind.tie_word_embeddings:
        oracle.tie_weights()
    with torch.no_grad():
        oracle.lm_head.weight *= 0.3
    return oracle


def ours(folder: Path) -> Any:
    checkpoint = open_model(str(folder))
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    return model


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 37, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_whatever_the_chunks(case: str, tmp_path: Path) -> None:
    oracle = made(case)
    oracle.save_pretrained(tmp_path)
    model, ids = ours(tmp_path), tokens(2, LENGTH)
    with torch.no_grad():
        want = oracle(ids, use_cache=False).logits
    for chunks in ([LENGTH], [64, LENGTH - 64], [3] * 23 + [1], [1] * LENGTH, [33, 1, 36]):
        torch.testing.assert_close(causal_logits(model, ids, chunks), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", SAVED)
def test_the_comparison_with_transformers_reads_the_files(family: str, tmp_path: Path) -> None:
    found = compare(str(saved(tmp_path, FAMILIES[family])), lambda _: None)
    assert found.get("reason") is None, found
    assert found["max_relative_error"] < 1e-4
    assert (found["top1"], found["differs"]) == (1.0, None)


@pytest.mark.slow
@pytest.mark.exports
@pytest.mark.parametrize("family", SAVED)
def test_an_export_that_is_compared_with_transformers(family: str, tmp_path: Path) -> None:
    request = asking(str(saved(tmp_path / "model", FAMILIES[family])), bits=6.0, max_context=48, against="transformers")
    result = compiler.export(request, tmp_path / "bundle")
    assert result.report is not None
    assert result.report.passed
    assert result.report.independent is not None


# ---- names --------------------------------------------------------------------------------------------------------------


def renamed(folder: Path, change: dict[str, str], **config: Any) -> Path:
    """The checkpoint of `folder` under names of which each key is replaced by its value, with other keys of config.json."""
    tensors = load_file(folder / "model.safetensors")
    for old, new in change.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (values | config).items() if v is not None}))
    return folder


PUBLISHED: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "state-spaces/mamba2": ("mamba2", {"embeddings": "embedding"}, {}),
    "a Mamba-2 without head": ("mamba2", {"backbone.": ""}, {}),
    "Nemotron-H under model": ("nemotron-h", {"backbone.": "model."}, {}),
    "Nemotron-H with letters": ("nemotron-h", {}, {"layers_block_type": None, "hybrid_override_pattern": "M-*-M"}),
    "Nemotron-H with older keys": (
        "nemotron-h",
        {},
        {"n_groups": None, "mamba_n_groups": 2, "head_dim": None, "attention_head_dim": 16},
    ),
    "Granite 4 with older kinds": ("granite 4 H", {}, {"layer_types": ["mamba", "attention", "mamba"]}),
    "Zamba 2 with older kinds": (
        "zamba 2",
        {},
        {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid"]},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_names_and_keys_of_published_files(name: str, tmp_path: Path) -> None:
    case, change, config = PUBLISHED[name]
    oracle = made(case)
    oracle.save_pretrained(tmp_path)
    ids = tokens(1, 9)
    with torch.no_grad():
        want = oracle(ids, use_cache=False).logits
    model = ours(renamed(tmp_path, change, **config))
    torch.testing.assert_close(causal_logits(model, ids, [9]), want, atol=1e-4, rtol=1e-4)


SSM: dict[str, Any] = {
    "d_model": 64,
    "d_intermediate": 0,
    "n_layer": 3,
    "vocab_size": 77,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 24, "headdim": 32, "chunk_size": 64},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
"""config.json as mamba_ssm's save_pretrained writes it, with the keys of state-spaces/mamba2-130m."""


@pytest.mark.parametrize("change", [{}, {"tie_embeddings": False}, {"ngroups": 2, "conv_bias": False, "bias": True}])
def test_a_mamba_2_as_its_makers_publish_it(tmp_path: Path, change: dict[str, Any]) -> None:
    """Against transformers' Mamba-2 after its public rules of conversion: padded vocabulary, names, defaults."""
    top = SSM | {k: v for k, v in change.items() if k in SSM}
    inner = {k: v for k, v in change.items() if k not in SSM}
    config = {
        "model_type": "mamba2",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "vocab_size": 80,
        "state_size": 24,
        "head_dim": 32,
        "num_heads": 4,
        "n_groups": inner.get("ngroups", 1),
        "use_conv_bias": inner.get("conv_bias", True),
        "use_bias": inner.get("bias", False),
        "tie_word_embeddings": top["tie_embeddings"],
    }
    theirs = random_oracle(config)
    tensors = {k.replace("embeddings", "embedding"): v for k, v in theirs.state_dict().items()}
    if top["tie_embeddings"]:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()  # mamba_ssm writes both
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(top | {"ssm_cfg": top["ssm_cfg"] | inner}))
    ids = tokens(1, 21)
    with torch.no_grad():
        want = theirs(ids, use_cache=False).logits
    torch.testing.assert_close(causal_logits(ours(tmp_path), ids, [21]), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(causal_logits(ours(tmp_path), ids, [9, 1, 1, 10]), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("top", "inner", "words"),
    [
        ({}, {"layer": "Mamba1"}, "ssm_cfg.layer is 'Mamba1'"),
        ({"attn_layer_idx": [1]}, {}, "attention in some layers is not read"),
        ({"d_intermediate": 128}, {}, "a feed-forward in each layer is not read"),
        ({"rms_norm": False}, {}, "LayerNorm is not read"),
        ({"rms_norm": 1}, {}, "LayerNorm is not read"),
        ({"n_layer": 10**30}, {}, "n_layer is"),
        ({"tie_embeddings": "no"}, {}, "tie_embeddings is 'no'"),
        ({"mystery": 3}, {}, "this key is not known"),
        ({}, {"mystery": 3}, "ssm_cfg.mystery is 3"),
        ({}, {"headdim": 48}, "a divisor of 128"),
        ({}, {"d_ssm": 64}, "a feed-forward within the mixer"),
        ({}, {"D_has_hdim": True}, "a D for each channel"),
        ({}, {"norm_before_gate": True}, "the norm before the gate"),
        ({}, {"dt_limit": [3, 1]}, "time_step_limit"),
    ],
)
def test_what_a_mamba_ssm_config_may_not_ask_for(
    tmp_path: Path, top: dict[str, Any], inner: dict[str, Any], words: str
) -> None:
    save_file({"backbone.norm_f.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    values = SSM | top | {"ssm_cfg": SSM["ssm_cfg"] | inner}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=re.escape(words)):
        ours(tmp_path)


def test_copies_of_a_shared_block_are_left_out(tmp_path: Path) -> None:
    """Some files hold a block again in each layer that uses it."""
    case = "zamba 2, two blocks, adapted attention"
    made(case).save_pretrained(tmp_path)
    want = causal_logits(ours(tmp_path), tokens(1, 9), [9])
    tensors = load_file(tmp_path / "model.safetensors")
    first, again = "model.layers.1.shared_transformer.", "model.layers.4.shared_transformer."
    copies = {name.replace(first, again): tensor.clone() for name, tensor in tensors.items() if name.startswith(first)}
    save_file(copies | tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(causal_logits(ours(tmp_path), tokens(1, 9), [9]), want)


def test_time_steps_keep_16_bits() -> None:
    model = build(FAMILIES["granitemoehybrid"])
    assert model.protected_weights() == {f"model.layers.{i}.mamba.dt_proj.weight" for i in (0, 2)}
    assert model.names != Names()


# ---- configs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*SAVED, "rwkv7"])
def test_a_shortened_config_builds_with_fewer_layers(family: str) -> None:
    config = FAMILIES[family]
    short, whole = build(shorten(config, 2)), build(config)
    assert len(short.stacks()["decoder"]) == 2
    assert {n for n, _ in short.named_parameters()} <= {n for n, _ in whole.named_parameters()}
    assert {s.name for s in short.graphs()[0].states} <= {s.name for s in whole.graphs()[0].states}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("mamba2", {"num_heads": 5}, "num_heads is 5"),
    ("mamba2", {"n_groups": 3}, "n_groups"),
    ("mamba2", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("mamba2", {"time_step_limit": [0.5, 0.1]}, "time_step_limit"),
    ("mamba2", {"time_step_limit": [0.0, "inf"]}, "time_step_limit"),
    ("mamba2", {"hidden_act": "swishy"}, "swishy"),
    ("bamba", {"attn_layer_indices": [7]}, "attn_layer_indices"),
    ("bamba", {"attn_layer_indices": "all"}, "attn_layer_indices"),
    ("bamba", {"attn_rotary_emb": 12}, "attn_rotary_emb"),
    ("bamba", {"mamba_d_head": 9}, "mamba_n_heads"),
    ("granitemoehybrid", {"num_local_experts": 64}, "num_local_experts is 64"),
    ("granitemoehybrid", {"num_local_experts": None}, "num_local_experts is 8"),
    ("granitemoehybrid", {"layer_types": [LINEAR]}, "layer_types"),
    ("granitemoehybrid", {"layer_types": [LINEAR, [], LINEAR]}, "layer_types"),
    ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type"),
    ("granitemoehybrid", {"normalization_function": "layernorm"}, "normalization_function"),
    ("nemotron_h", {"layers_block_type": [LINEAR, "moe"]}, "layers_block_type is 'moe'.*layer 1"),
    ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "MEM*"}, "hybrid_override_pattern.*layer 1"),
    ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "MX"}, "hybrid_override_pattern"),
    ("nemotron_h", {"layers_block_type": None}, "hybrid_override_pattern"),
    ("nemotron_h", {"mamba_n_groups": 4}, "mamba_n_groups"),
    ("nemotron_h", {"attention_bias": True}, "attention_bias"),
    ("zamba2", {"use_long_context": True}, "use_long_context"),
    ("zamba2", {"layers_block_type": None}, "layers_block_type"),
    ("zamba2", {"num_key_value_heads": 2}, "num_attention_heads"),
    ("zamba2", {"n_mamba_heads": 7}, "n_mamba_heads"),
    ("zamba2", {"use_conv_bias": False}, "use_conv_bias"),
    ("zamba2", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ("recurrent_gemma", {"block_types": ["mamba"]}, "block_types"),
    ("recurrent_gemma", {"block_types": []}, "block_types"),
    ("recurrent_gemma", {"lru_width": 50}, "lru_width"),
    ("recurrent_gemma", {"attention_window_size": 1}, "attention_window_size"),
    ("recurrent_gemma", {"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale_by_sqrt_dim"),
]


@pytest.mark.parametrize(("family", "change", "word"), BAD)
def test_a_bad_config_is_one_line_naming_the_value(family: str, change: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        build(FAMILIES[family] | change)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
