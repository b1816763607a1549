"""Linear-attention and state-space hybrids against transformers (HGRN-2, which it lacks: test_hgrn2).

Logits within 1e-4 whatever the chunks of prefill, generations token for token, hostile configs in one line, and a trained
checkpoint's held-out perplexity.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers.oracle import causal_logits, randomise, run_step, states_of
from helpers.tiny_families import FAMILIES

from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError
from edgewright.models.families.gated_delta import GatedDelta
from edgewright.models.layers.activations import softplus
from edgewright.models.layers.linear import Embedding, Linear
from edgewright.models.loading import fill, load_original
from edgewright.models.opening import open_model
from edgewright.models.registry import build, shorten
from edgewright.ops import DECOMPOSITIONS

PROSE = Path(os.environ.get("EDGEWRIGHT_TEST_MODELS", "models")) / "gated-delta-prose"
HYBRIDS = ("qwen3_5_text", "qwen3_next", "olmo_hybrid", "falcon_h1", "lfm2", "hgrn2")
LENGTH = 70  # more than a chunk of the recurrences

BASE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 37,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
DELTA: dict[str, Any] = BASE | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
QWEN = DELTA | {"head_dim": 16}
MAMBA: dict[str, Any] = BASE | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8}
MULTIPLIED: dict[str, Any] = {
    "embedding_multiplier": 1.7,
    "lm_head_multiplier": 0.6,
    "key_multiplier": 0.4,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.7,
    "ssm_in_multiplier": 0.8,
    "ssm_out_multiplier": 1.3,
    "mlp_multipliers": [0.9, 1.1],
    "ssm_multipliers": [0.7, 1.2, 0.9, 1.4, 0.8],
}
CONV = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
MIXED = {"layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"]}
LINEAR = {"layer_types": ["linear_attention"] * 4}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
SCALED = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5, "partial_rotary_factor": 0.5}}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5": ("Qwen3_5Text", QWEN),
    "qwen3.5 tied, biased, own layer types": (
        "Qwen3_5Text",
        QWEN | MIXED | {"attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3.5 as many key heads, taps of 2": (
        "Qwen3_5Text",
        QWEN | {"linear_num_key_heads": 4, "linear_conv_kernel_dim": 2},
    ),
    "qwen3.5 linear layers alone, tanh-GELU": ("Qwen3_5Text", QWEN | LINEAR | {"hidden_act": "gelu_pytorch_tanh"}),
    "qwen3.5 half of a head rotates, scaled": ("Qwen3_5Text", QWEN | SCALED),
    "qwen3-next": ("Qwen3Next", QWEN | {"num_experts": 0}),
    "qwen3-next with experts in no layer, tied": (
        "Qwen3Next",
        QWEN | MIXED | {"mlp_only_layers": [0, 1, 2, 3], "tie_word_embeddings": True, "attention_bias": True},
    ),
    "qwen3-next with one key head": ("Qwen3Next", QWEN | {"num_experts": 0, "linear_num_key_heads": 1}),
    "olmo without positions": ("OlmoHybrid", DELTA | {"rope_parameters": None}),
    "olmo with rotary, biased, tied": (
        "OlmoHybrid",
        DELTA | MIXED | THETA | {"attention_bias": True, "tie_word_embeddings": True},
    ),
    "olmo without negative eigenvalues": ("OlmoHybrid", DELTA | {"linear_allow_neg_eigval": False}),
    "olmo with the sizes of its defaults": ("OlmoHybrid", BASE | {"num_key_value_heads": None}),
    "falcon without norm": ("FalconH1", MAMBA),
    "falcon with multipliers, groups, norm before the gate": (
        "FalconH1",
        MAMBA | MULTIPLIED | {"mamba_n_groups": 2, "mamba_rms_norm": True, "tie_word_embeddings": True},
    ),
    "falcon with norm after the gate, biases, own rotary": (
        "FalconH1",
        MAMBA
        | THETA
        | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_proj_bias": True, "projectors_bias": True}
        | {"attention_bias": True, "mlp_bias": True, "mamba_conv_bias": False, "mamba_n_groups": 4},
    ),
    "falcon with bounded time steps": ("FalconH1", MAMBA | {"time_step_limit": [0.05, 0.9]}),
    "falcon of no d_ssm": ("FalconH1", MAMBA | {"mamba_d_ssm": None, "mamba_expand": 1, "mamba_d_conv": 3}),
    "lfm2": ("Lfm2", BASE | CONV),
    "lfm2 with bias, untied, width as given": (
        "Lfm2",
        BASE
        | {"full_attn_idxs": [1, 2], "conv_bias": True, "tie_word_embeddings": False}
        # as the first releases spell it
        | {"block_ff_dim": 56, "block_auto_adjust_ff_dim": False, "conv_L_cache": 4},
    ),
    "lfm2 with its own rounding": (
        "Lfm2",
        BASE | CONV | {"block_multiple_of": 8, "block_ffn_dim_multiplier": 1.3, "intermediate_size": 100},
    ),
}


def both(case: str, folder: Path) -> tuple[Any, Any]:
    """transformers' model of a case, and ours of the files that it writes."""
    family, config = CASES[case]
    made = getattr(tf, f"{family}Config")(**config)
    oracle = randomise(getattr(tf, f"{family.removesuffix('Text')}ForCausalLM")(made), 7)
    if made.tie_word_embeddings:
        oracle.tie_weights()
    with torch.no_grad():
        oracle.lm_head.weight *= 0.3  # logits of about 2: transformers' own float32 noise stays well below 1e-4
    oracle.save_pretrained(folder)
    checkpoint = open_model(str(folder))
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    return oracle, model


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_whatever_the_chunks(case, tmp_path):
    oracle, model = both(case, tmp_path)
    torch.manual_seed(2)
    ids = torch.randint(0, 37, (2, LENGTH))
    with torch.no_grad():
        want = oracle(ids, use_cache=False).logits
        for chunks in ([LENGTH], [64, LENGTH - 64], [3] * 23 + [1], [1] * LENGTH, [33, 1, 36]):
            torch.testing.assert_close(causal_logits(model, ids, chunks), want, atol=1e-4, rtol=1e-4)


# transformers' cache cannot generate without an attention layer, and its decode step does not bound the time step
@pytest.mark.parametrize("case", [c for c in CASES if "alone" not in c and "bounded" not in c])
def test_greedy_tokens_equal_transformers(case, tmp_path):
    oracle, model = both(case, tmp_path)
    torch.manual_seed(3)
    ids = torch.randint(0, 37, (2, 9))
    (graph,) = model.graphs()
    states = states_of(graph, {"batch": 2, "capacity": 21})
    mine, pending = ids, ids
    with torch.no_grad():
        for _ in range(12):
            inputs = {
                "input_ids": pending,
                "past_length": torch.tensor([mine.shape[1] - pending.shape[1]]),
                "logit_positions": torch.tensor([pending.shape[1] - 1]),
            }
            pending = run_step(graph, inputs, states)[:, -1].argmax(-1, keepdim=True)
            mine = torch.cat([mine, pending], 1)
        want = oracle.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert mine.tolist() == want.tolist()


# ---- gates ----------------------------------------------------------------------------------------------------------


def test_softplus_is_exact_and_keeps_small_steps_in_half_precision():
    x = torch.linspace(-60, 60, 24001)
    assert (softplus(x) - torch.nn.functional.softplus(x.double())).abs().max() <= 2e-6
    near = x[x.abs() <= 9]
    want = torch.nn.functional.softplus(near.half().double())
    assert ((softplus(near.half()) - want) / want).abs().max() <= 6e-3
    rounded = torch.relu(near.half()) + torch.log(1 + torch.exp(-near.half().abs()))
    assert ((rounded - want) / want).abs().max() > 0.5  # what the obvious form loses


# ---- what every family keeps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HYBRIDS)
def test_every_matrix_is_a_linear_and_gates_are_protected(family):
    model = build(FAMILIES[family])
    kept = ("lower_bounds", "conv1d.weight", "conv.weight")
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(f"{path}", recurse=False):
            assert parameter.dim() < 2 or isinstance(module, Linear | Embedding) or name.endswith(kept), name
        protected = getattr(module, "protected", ())
        assert all(isinstance(getattr(module, child), Linear) for child in protected)
        assert protected or not isinstance(module, GatedDelta)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [f if f in ("qwen3_5_text", "falcon_h1") else pytest.param(f, marks=pytest.mark.slow) for f in HYBRIDS]
)
def test_the_graph_exports_with_dynamic_lengths_and_decomposes(family):
    config = shorten(FAMILIES[family], 2)  # a layer of each kind
    model = build(config)
    generator = torch.Generator().manual_seed(0)
    fill(model, object(), lambda name, shape: torch.randn(shape, generator=generator) * 0.2)
    (graph,) = model.graphs()
    program = graph.export().run_decompositions(DECOMPOSITIONS)
    assert not [n for n in program.graph.nodes if "edgewright" in str(n.target)]
    run = program.module(check_guards=False)
    for batch, length in ((1, 1), (2, 5), (3, min(64, graph.bounds["sequence"][1]))):
        inputs = {
            "input_ids": torch.randint(0, config["vocab_size"], (batch, length), generator=generator),
            "past_length": torch.tensor([0]),
            "logit_positions": torch.arange(length),
        }
        states = states_of(graph, {"batch": batch, "capacity": 64})
        values = [{**inputs, **states}[n] for n in graph.input_names]
        with torch.no_grad():
            for got, want in zip(run(*values[:3], values[3:]), graph.call(values), strict=True):
                torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_shortened_config_builds_with_fewer_layers(family):
    config = FAMILIES[family]
    short = build(shorten(config, 2))
    assert len(short.stacks()["decoder"]) == 2
    names = {name for name, _ in build(config).named_parameters()}
    assert {name for name, _ in short.named_parameters()} <= names
    (graph,) = short.graphs()
    assert {s.name for s in graph.states} <= {s.name for s in build(config).graphs()[0].states}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_5_text", {"linear_num_value_heads": 3}, "linear_num_value_heads"),
    ("qwen3_5_text", {"linear_key_head_dim": 10**9}, "linear_key_head_dim"),
    ("qwen3_5_text", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim"),
    ("qwen3_5_text", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("qwen3_5_text", {"layer_types": ["linear_attention", "mamba"]}, "layer_types"),
    ("qwen3_5_text", {"layer_types": "linear_attention"}, "layer_types"),
    ("qwen3_5_text", {"full_attention_interval": 0}, "full_attention_interval"),
    ("qwen3_5_text", {"rope_parameters": {"partial_rotary_factor": 0.01}}, "partial_rotary_factor"),
    ("qwen3_5_text", {"rope_parameters": {"partial_rotary_factor": "all"}}, "partial_rotary_factor"),
    ("qwen3_5_text", {"rope_parameters": {"rope_type": "by parts"}}, "by parts"),
    ("qwen3_5_text", {"hidden_act": "swishy"}, "swishy"),
    ("qwen3_next", {"num_experts": 512}, "num_experts is 512: layer 0 is a mixture of experts"),
    ("qwen3_next", {"num_experts": None}, "num_experts is 512"),
    ("qwen3_next", {"num_experts": 4, "mlp_only_layers": [0]}, "layer 1 is a mixture"),
    ("qwen3_next", {"num_experts": 4, "mlp_only_layers": 7}, "mlp_only_layers"),
    ("olmo_hybrid", {"linear_allow_neg_eigval": "yes"}, "linear_allow_neg_eigval"),
    ("olmo_hybrid", {"linear_num_key_heads": -4}, "linear_num_key_heads"),
    ("olmo_hybrid", {"rope_parameters": [1e4]}, "rope_parameters"),
    ("olmo_hybrid", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("falcon_h1", {"mamba_d_ssm": 33}, "mamba_d_ssm"),
    ("falcon_h1", {"mamba_d_ssm": 1 << 40}, "mamba_d_ssm"),
    ("falcon_h1", {"mamba_d_head": 7}, "mamba_d_head"),
    ("falcon_h1", {"mamba_n_groups": 3}, "mamba_n_groups"),
    ("falcon_h1", {"ssm_multipliers": [1.0]}, "ssm_multipliers"),
    ("falcon_h1", {"mlp_multipliers": [1.0, "x"]}, "mlp_multipliers"),
    ("falcon_h1", {"key_multiplier": math.inf}, "key_multiplier"),
    ("falcon_h1", {"time_step_limit": [0.1, 0.001]}, "time_step_limit"),
    ("falcon_h1", {"time_step_limit": 0.1}, "time_step_limit"),
    ("lfm2", {"full_attn_idxs": "all", "layer_types": None}, "full_attn_idxs"),
    ("lfm2", {"conv_L_cache": 1 << 20}, "conv_L_cache"),
    ("lfm2", {"layer_types": ["conv"]}, "layer_types"),
    ("lfm2", {"block_multiple_of": 0}, "block_multiple_of"),
    ("hgrn2", {"use_short_conv": True}, "use_short_conv"),
    ("hgrn2", {"elementwise_affine": False}, "elementwise_affine"),
    ("hgrn2", {"expand_ratio": 7}, "expand_ratio"),
    ("hgrn2", {"attn": {"layers": [99], "num_heads": 4}}, "attn.layers"),
    ("hgrn2", {"attn": {"layers": [1], "num_heads": 64}}, "attn.num_heads"),
    ("hgrn2", {"attn": {"layers": [1], "num_heads": 4, "qk_norm": True}}, "attn.qk_norm"),
    ("hgrn2", {"edgewright": {"lower_bounds": 1}}, "edgewright.lower_bounds"),
]


@pytest.mark.parametrize(("family", "change", "word"), BAD)
def test_a_bad_config_is_one_line_naming_the_value(family, change, word):
    build(FAMILIES[family])
    with pytest.raises(UserError, match=word) as caught:
        build(FAMILIES[family] | change)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


# ---- a trained model ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PROSE.is_dir(), reason="the trained Gated DeltaNet checkpoint is not here")
def test_a_trained_gated_deltanet_has_its_held_out_perplexity():
    checkpoint = open_checkpoint(str(PROSE))
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    assert checkpoint.tokenizer is not None
    ids = torch.tensor(checkpoint.tokenizer.encode((PROSE / "heldout.txt").read_text(), special=False))
    windows = ids[: 32 * 512].view(32, 512)  # its README's 27.9 is of the first 32 windows of 512 tokens
    loss = []
    with torch.no_grad():
        for part in windows.split(8):
            logits = causal_logits(model, part, [64] * 8)[:, :-1]
            loss.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:]))
    assert abs(math.exp(torch.stack(loss).mean()) - 27.9) < 0.05
