"""Plain decoders against transformers: what `save_pretrained` writes, opened from its file, in one call and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.oracle import causal_logits, randomise

from edgewright.models.loading import load_original
from edgewright.models.opening import open_model
from edgewright.models.registry import build, lengthened

B: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
    "long_factor": [1.0, 2, 3, 4, 5, 6],
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
}


def neox(**changes: Any) -> Any:
    kept = {k: v for k, v in B.items() if k != "num_key_value_heads"}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**kept | changes))


def gemma4(**changes: Any) -> Any:
    sizes = {"head_dim": 16, "global_head_dim": 32, "sliding_window": 5, "hidden_size_per_layer_input": 16}
    sizes |= {"vocab_size_per_layer_input": 96, "layer_types": KINDS[:2] + KINDS[1:2]}
    if "layer_types" in changes:
        sizes["num_hidden_layers"] = len(changes["layer_types"])
    model = hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**B | sizes | changes))
    for i, layer in enumerate(model.model.layers):
        layer.layer_scalar.fill_(1.0 + 0.1 * i)
    return model


def gemma3n(**changes: Any) -> Any:
    sizes = {"head_dim": 16, "sliding_window": 5, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96}
    sizes |= {"laurel_rank": 16, "num_kv_shared_layers": 0, "layer_types": KINDS}
    return hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**B | sizes | changes))


CASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**B, tie_word_embeddings=True)),
    "llama-biases": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**B, attention_bias=True, mlp_bias=True)),
    "llama3": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**B, rope_parameters=dict(LLAMA3))),
    "llama-yarn": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**B, rope_parameters=dict(YARN))),
    "llama-yarn-mscale": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**B, rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False})
    ),
    "llama-dynamic": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**B, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**B, sliding_window=5)),
    "mistral-full": lambda: hf.MistralForCausalLM(hf.MistralConfig(**B, sliding_window=None, head_dim=32)),
    "ministral": lambda: hf.MinistralForCausalLM(
        hf.MinistralConfig(**B, head_dim=16, sliding_window=5, layer_types=KINDS)
    ),
    "ministral3": lambda: hf.Ministral3ForCausalLM(
        hf.Ministral3Config(**B, head_dim=16, rope_parameters=YARN | {"llama_4_scaling_beta": 0.1})
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**B)),
    "qwen2-windows": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**B, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**B, head_dim=16, tie_word_embeddings=True)),
    "qwen3-windows": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(
            **B, head_dim=32, attention_bias=True, use_sliding_window=True, sliding_window=5, max_window_layers=2
        )
    ),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**B, head_dim=32)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**B, head_dim=16, sliding_window=5, query_pre_attn_scalar=24)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**B, head_dim=16, sliding_window=5, query_pre_attn_scalar=24, layer_types=KINDS)
    ),
    "gemma3n": lambda: gemma3n(
        num_hidden_layers=6,
        layer_types=[*KINDS, *KINDS[:2], "full_attention"],
        num_kv_shared_layers=3,
        intermediate_size=[96, 96, 64, 64, 128, 128],
        activation_sparsity_pattern=[0.95, 0.8, 0.0, 0.0, 0.0, 0.5],
    ),
    "gemma3n-other-stream": lambda: gemma3n(
        altup_num_inputs=2, altup_active_idx=1, altup_correct_scale=False, vocab_size_per_layer_input=80
    ),
    "gemma4": lambda: gemma4(
        num_hidden_layers=6, layer_types=[*KINDS, *KINDS[:2], "full_attention"], num_kv_shared_layers=3
    ),
    "gemma4-values-are-keys": lambda: gemma4(
        attention_k_eq_v=True, num_global_key_value_heads=1, use_double_wide_mlp=True, layer_types=KINDS[1:] + KINDS[:2]
    ),
    "gemma4-no-inputs": lambda: gemma4(hidden_size_per_layer_input=0, final_logit_softcapping=20.0),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**B)),
    "phi3-window": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**B, sliding_window=5)),
    "phi4-mini": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(**B, rope_parameters=dict(LONG), original_max_position_embeddings=32, tie_word_embeddings=True)
    ),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**B, no_rope_layer_interval=2)),
    "smollm3-windows": lambda: hf.SmolLM3ForCausalLM(
        hf.SmolLM3Config(**B, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=5)
    ),
    "granite": lambda: hf.GraniteForCausalLM(
        hf.GraniteConfig(
            **B,
            embedding_multiplier=3.0,
            residual_multiplier=0.4,
            attention_multiplier=0.1,
            logits_scaling=4.0,
            attention_bias=True,
            tie_word_embeddings=True,
        )
    ),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**B)),
    "olmo3": lambda: hf.Olmo3ForCausalLM(hf.Olmo3Config(**B, sliding_window=5, layer_types=KINDS)),
    "olmo3-yarn": lambda: hf.Olmo3ForCausalLM(
        hf.Olmo3Config(
            **B,
            sliding_window=5,
            layer_types=KINDS,
            rope_parameters={
                "full_attention": dict(YARN),
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        )
    ),
    "exaone4": lambda: hf.Exaone4ForCausalLM(hf.Exaone4Config(**B, sliding_window=5, sliding_window_pattern=2)),
    "exaone4-full": lambda: hf.Exaone4ForCausalLM(
        hf.Exaone4Config(**B, sliding_window=None, layer_types=["full_attention"] * 3, rope_parameters=dict(LLAMA3))
    ),
    "ernie4_5": lambda: hf.Ernie4_5ForCausalLM(hf.Ernie4_5Config(**B, head_dim=32, use_bias=True)),
    "hunyuan": lambda: hf.HunYuanDenseV1ForCausalLM(
        hf.HunYuanDenseV1Config(
            **B,
            head_dim=16,
            rope_parameters={"rope_type": "dynamic", "alpha": 100.0, "factor": 1.0, "rope_theta": 10000.0},
        )
    ),
    "stablelm": lambda: hf.StableLmForCausalLM(
        hf.StableLmConfig(**B, use_qkv_bias=True, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})
    ),
    "stablelm-parallel": lambda: hf.StableLmForCausalLM(
        hf.StableLmConfig(
            **B, use_parallel_residual=True, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25}
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    ),
    "gpt-neox": neox,
    "gpt-neox-in-turn": lambda: neox(
        use_parallel_residual=False,
        attention_bias=False,
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 1.0, "rope_type": "default"},
    ),
}


def ours(folder: Path) -> Any:
    checkpoint = open_model(str(folder))
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    return model


def expected(oracle: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = oracle(ids).logits
    return logits


@pytest.mark.parametrize("case", CASES)
def test_a_saved_decoder_is_what_transformers_computes(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    oracle = randomise(CASES[case](), seed=1)
    oracle.tie_weights()
    oracle.save_pretrained(tmp_path)
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(2))
    want = expected(oracle, ids)
    model = ours(tmp_path)
    largest = want.abs().max()
    for chunks in ([24], [9, 1, 14]):
        torch.testing.assert_close(causal_logits(model, ids, chunks) / largest, want / largest, atol=2e-6, rtol=0)


def test_long_factors_of_longrope(tmp_path: Path) -> None:
    """A text longer than the training's: transformers takes the long factors at every position, as ours does in all calls."""
    torch.manual_seed(0)
    oracle = randomise(CASES["phi4-mini"](), seed=1)
    oracle.tie_weights()
    oracle.save_pretrained(tmp_path)
    ids = torch.randint(0, 96, (2, 60), generator=torch.Generator().manual_seed(2))
    want = expected(oracle, ids)
    checkpoint = open_model(str(tmp_path))
    assert build(checkpoint.config).max_context == 32
    for context in (16, 32):
        assert lengthened(checkpoint.config, context) == checkpoint.config
    model = build(lengthened(checkpoint.config, 33))
    load_original(model, checkpoint)
    assert model.max_context == 128
    for chunks in ([60], [20, 1, 39]):
        got = causal_logits(model, ids, chunks) / want.abs().max()
        torch.testing.assert_close(got, want / want.abs().max(), atol=2e-6, rtol=0)
    short = causal_logits(
        ours(tmp_path), ids, [60]
    )  # what the choice is about: with the short factors it is another model
    assert float((short - want).abs().max() / want.abs().max()) > 1e-3


def test_no_other_rope_changes_with_the_context() -> None:
    for rope in (LLAMA3, YARN, {"rope_type": "default", "rope_theta": 1e4}):
        config = {k: v for k, v in B.items() if v is not None} | {"model_type": "llama", "rope_parameters": rope}
        assert lengthened(config, 10_000) is config
