"""Architectures against transformers: logits within 1e-4, generations token for token, features on and off."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
import transformers as tf
from helpers.family_table import CONFIGS
from helpers.oracle import adopt, causal_logits, randomise, run_step, seq2seq_start

from edgewright.errors import UserError
from edgewright.models.language_model import LanguageModel, Task
from edgewright.models.layers.block import Block
from edgewright.models.registry import build, shorten

T5 = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "query_pre_attn_scalar": 24,
}


def t5gemma(seed: int, window: int, attn_cap: float | None, final_cap: float | None, unbalanced: bool, tied: bool):
    shared = T5 | {"sliding_window": window, "attn_logit_softcapping": attn_cap, "final_logit_softcapping": final_cap}
    encoder = shared | ({"hidden_size": 24, "num_hidden_layers": 2, "head_dim": 8} if unbalanced else {})
    config = tf.T5GemmaConfig(encoder=encoder, decoder=shared, tie_word_embeddings=tied, vocab_size=40)
    config._attn_implementation = "eager"
    oracle = randomise(tf.T5GemmaForConditionalGeneration(config), seed)
    if tied:
        oracle.tie_weights()
    return oracle, adopt(oracle, config.to_dict())


@pytest.mark.parametrize(
    ("window", "attn_cap", "final_cap", "unbalanced", "tied"),
    [*itertools.product([3, 50], [None, 5.0], [None, 3.0], [False, True], [True]), (3, 5.0, 3.0, True, False)],
)
def test_t5gemma_logits_and_generation_equal_transformers(window, attn_cap, final_cap, unbalanced, tied):
    oracle, model = t5gemma(1, window, attn_cap, final_cap, unbalanced, tied)
    torch.manual_seed(2)
    ids = torch.randint(3, 40, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 9:] = False  # some padding
    mask[2, 2:] = False  # much
    ids = torch.where(mask, ids, 0)
    target = torch.randint(3, 40, (3, 7))
    with torch.no_grad():
        want = oracle(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=target).logits
        decoder, states = seq2seq_start(model, ids, mask, capacity=9)
        got, past = [], 0
        for n in (4, 1, 2):
            inputs = {
                "input_ids": target[:, past : past + n],
                "past_length": torch.tensor([past]),
                "encoder_mask": mask,
                "logit_positions": torch.arange(n),
            }
            got.append(run_step(decoder, inputs, states))
            past += n
        torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-4, rtol=1e-4)

        tokens = oracle.generate(
            input_ids=ids, attention_mask=mask.long(), max_new_tokens=8, do_sample=False, eos_token_id=None, num_beams=1
        )
        decoder, states = seq2seq_start(model, ids, mask, capacity=9)
        mine = torch.full((3, 1), model.decoder_start)
        for past in range(8):
            inputs = {
                "input_ids": mine[:, -1:],
                "past_length": torch.tensor([past]),
                "encoder_mask": mask,
                "logit_positions": torch.tensor([0]),
            }
            mine = torch.cat([mine, run_step(decoder, inputs, states)[:, -1].argmax(-1, keepdim=True)], 1)
    assert mine.tolist() == tokens.tolist()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 4), (6, 3)])
def test_llama_logits_equal_transformers(tied, bias, heads, kv_heads):
    config = tf.LlamaConfig(
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        vocab_size=37,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    oracle = randomise(tf.LlamaForCausalLM(config), 3)
    model = adopt(oracle, config.to_dict())
    ids = torch.randint(0, 37, (2, 11))
    with torch.no_grad():
        want = oracle(ids).logits
        torch.testing.assert_close(causal_logits(model, ids, [11]), want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(causal_logits(model, ids, [6, 1, 3, 1]), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [3, 40])
@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("linear", [1.0, 8.0])
def test_gemma3_logits_equal_transformers(window, cap, linear):
    rope = {"rope_type": "linear", "factor": linear} if linear != 1.0 else {"rope_type": "default"}
    config = tf.Gemma3TextConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=37,
        query_pre_attn_scalar=20,
        sliding_window=window,
        final_logit_softcapping=cap,
        rope_parameters={
            "full_attention": rope | {"rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    oracle = randomise(tf.Gemma3ForCausalLM(config), 4)
    model = adopt(oracle, config.to_dict())
    ids = torch.randint(0, 37, (2, 11))
    with torch.no_grad():
        want = oracle(ids).logits
        torch.testing.assert_close(causal_logits(model, ids, [5, 1, 5]), want, atol=1e-4, rtol=1e-4)
        tokens = oracle.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        mine = ids
        for _ in range(6):
            mine = torch.cat([mine, causal_logits(model, mine, [mine.shape[1]])[:, -1].argmax(-1, keepdim=True)], 1)
    assert mine.tolist() == tokens.tolist()


def test_a_shortened_config_builds_with_fewer_layers():
    config = tf.T5GemmaConfig(encoder=T5, decoder=T5).to_dict()
    short = build(shorten(config, 2))
    assert [len(s) for s in short.stacks().values()] == [2, 2]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "albert"}, "albert"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_act": "swishy"}, "swishy"),
        ({"rope_parameters": {"rope_type": "by parts"}}, "by parts"),
    ],
)
def test_a_bad_config_is_one_line_naming_the_value(change, word):
    good = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 10,
    }
    build(good)
    with pytest.raises(UserError, match=word) as caught:
        build(good | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_a_language_model_that_declares_roles_in_blocks(family):
    model = build(CONFIGS[family])
    assert isinstance(model, LanguageModel)
    assert model.task in get_args(Task)
    assert (model.decoder_start is not None) == (model.task == "seq2seq")
    assert (model.context_spec() is not None) == (model.task == "memory")
    model.check_lengths()
    for path, module in model.named_modules():
        roles = {"fused", "protected", "key_value"} & set(dir(type(module)))
        assert not roles or isinstance(module, Block), path
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert model.key_value_weights() | model.protected_weights() | set(model.tied.values()) <= parameters.keys()
    for graph in model.graphs():
        assert graph.parameters() <= parameters.keys()
