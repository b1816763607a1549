"""T5Gemma 2's text path against transformers: logits within 1e-4, generations token for token, padding, the end of an image."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers as tf
from helpers.oracle import adopt, randomise, run_step, seq2seq_start
from helpers.t5gemma2_step import step
from helpers.tiny_families import FAMILIES

from edgewright.errors import UserError
from edgewright.models.registry import build, shorten

END = 37  # the end-of-image token of these models


STACK = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "query_pre_attn_scalar": 24,
}


VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 16,
    "patch_size": 8,
}


def t5gemma2(seed: int, window: int, final_cap: float | None, linear: float, layers: tuple[int, int] = (7, 6)):
    """(the oracle, our model with its weights); the encoder has one layer more than the decoder."""
    scaled = {"rope_type": "linear", "factor": linear} if linear != 1.0 else {"rope_type": "default"}
    shared = STACK | {
        "sliding_window": window,
        "final_logit_softcapping": final_cap,
        "rope_parameters": {
            "full_attention": scaled | {"rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    encoder = {
        "text_config": shared | {"num_hidden_layers": layers[0]},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "eoi_token_index": END,
        "image_token_index": 39,
    }
    config = tf.T5Gemma2Config(
        encoder=encoder, decoder=shared | {"num_hidden_layers": layers[1]}, image_token_index=39, dropout_rate=0.0
    )
    config._attn_implementation = "eager"
    oracle = tf.T5Gemma2ForConditionalGeneration(config)
    oracle.tie_weights()
    randomise(oracle, seed)
    return oracle, adopt(oracle, config.to_dict())


def batch():
    torch.manual_seed(2)
    ids = torch.randint(3, 37, (3, 12))
    ids[0, 5] = ids[1, 0] = END
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 9:] = False  # some padding
    mask[2, 2:] = False  # much
    target = torch.randint(3, 37, (3, 7))
    target[0, 4] = END
    return torch.where(mask, ids, 0), mask, target


@pytest.mark.parametrize(
    ("window", "final_cap", "linear"), [*itertools.product([3, 4, 50], [None, 3.0], [1.0]), (4, None, 8.0)]
)
def test_logits_and_generation_equal_transformers(window, final_cap, linear):
    oracle, model = t5gemma2(1, window, final_cap, linear)
    ids, mask, target = batch()
    with torch.no_grad():
        want = oracle(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=target).logits
        for chunks in ((7,), (4, 1, 2)):
            decoder, states = seq2seq_start(model, ids, mask, capacity=9)
            got, past = [], 0
            for n in chunks:
                got.append(run_step(decoder, step(target[:, past : past + n], past, mask), states))
                past += n
            torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-4, rtol=1e-4)

        tokens = oracle.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            decoder_start_token_id=2,
        )
        decoder, states = seq2seq_start(model, ids, mask, capacity=9)
        mine = torch.full((3, 1), model.decoder_start)
        for past in range(8):
            logits = run_step(decoder, step(mine[:, -1:], past, mask), states)
            mine = torch.cat([mine, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert mine.tolist() == tokens.tolist()


def test_every_text_tensor_of_a_checkpoint_has_its_place_and_the_rest_is_vision():
    oracle, model = t5gemma2(3, 4, None, 1.0)
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    state = set(oracle.state_dict())
    assert names <= state
    assert set(model.names.resolve(state - names, names).left_out) == state - names


def test_padding_does_not_reach_a_row():
    _, model = t5gemma2(4, 4, None, 1.0)
    ids, mask, target = batch()
    with torch.no_grad():
        decoder, states = seq2seq_start(model, ids, mask, capacity=9)
        padded = run_step(decoder, step(target, 0, mask), states)[1]
        own = mask[1:2, :9]
        decoder, states = seq2seq_start(model, ids[1:2, :9], own, capacity=9)
        alone = run_step(decoder, step(target[1:2], 0, own), states)[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_the_graphs_export_and_equal_their_modules():
    _, model = t5gemma2(5, 4, 3.0, 1.0, layers=(2, 2))
    for graph in model.graphs():
        args = tuple(torch.rand_like(x) if x.is_floating_point() else x for x in graph.example_inputs())
        n = len(graph.inputs)
        with torch.no_grad():
            got = graph.export().module()(*args[:n], *([list(args[n:])] if graph.states else []))
            for a, b in zip(got, graph.call(args), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_flat_encoder_section_is_the_text_config():
    config = FAMILIES["t5gemma2"]
    flat = config | {"encoder": config["encoder"]["text_config"] | {"eoi_token_index": 70}}
    shapes = [(n, p.shape) for n, p in build(config).named_parameters()]
    assert shapes == [(n, p.shape) for n, p in build(flat).named_parameters()]


def test_shorten_keeps_the_first_layers():
    for config in (
        FAMILIES["t5gemma2"],
        FAMILIES["t5gemma2"] | {"encoder": FAMILIES["t5gemma2"]["encoder"]["text_config"]},
    ):
        short = build(shorten(config, 1))
        assert {name: len(stack) for name, stack in short.stacks().items()} == {"encoder": 1, "decoder": 1}


@pytest.mark.parametrize(
    ("where", "changes", "words"),
    [
        ("decoder", {"hidden_size": 64}, "hidden_size is 32, the decoder's 64"),
        ("decoder", {"vocab_size": 96}, "vocab_size is 80, the decoder's 96"),
        ("decoder", {"attn_logit_softcapping": 5.0}, "no attention soft-capping"),
        ("decoder", {"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ("decoder", {"hidden_size": 1 << 40}, "hidden_size is 1099511627776"),
        ("decoder", {"layer_types": ["full_attention"]}, "layer_types"),
        (None, {"encoder": "x"}, "encoder is 'x', expected an object"),
        (None, {"decoder": None}, "decoder is None, expected an object"),
        (None, {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    ],
)
def test_bad_configs_are_one_line(where, changes, words):
    config = FAMILIES["t5gemma2"]
    bad = config | (changes if where is None else {where: config[where] | changes})
    with pytest.raises(UserError) as error:
        build(bad)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
