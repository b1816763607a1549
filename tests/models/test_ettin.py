"""The Ettin pair, ModernBERT and its causal twin, against transformers: logits within 1e-4, tokens, padding, windows."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers as tf
from helpers.oracle import adopt, causal_logits, randomise
from helpers.tiny_families import FAMILIES

from edgewright.errors import UserError
from edgewright.models.layers.activations import gelu
from edgewright.models.layers.norm import LayerNorm
from edgewright.models.registry import build, shorten

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "vocab_size": 37,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
BIASES = ("attention_bias", "mlp_bias", "norm_bias", "decoder_bias", "classifier_bias")


def settings(window: int, biased: bool, tied: bool) -> dict:
    return SIZES | {
        "local_attention": window,
        "tie_word_embeddings": tied,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 16_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
        **dict.fromkeys(BIASES, biased),
    }


def pair(kind: type, config, seed: int):
    config._attn_implementation = "eager"
    oracle = randomise(kind(config), seed)
    oracle.tie_weights()
    return oracle, adopt(oracle, config.to_dict())


@pytest.mark.parametrize(
    ("window", "biased", "tied"), [*itertools.product([4, 7, 128], [False, True], [True]), (6, True, False)]
)
def test_encoder_logits_equal_transformers(window, biased, tied):
    oracle, model = pair(tf.ModernBertForMaskedLM, tf.ModernBertConfig(**settings(window, biased, tied)), 1)
    ids = torch.randint(3, 37, (3, 13), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 13, dtype=torch.bool)
    mask[1, 9:] = mask[2, 2:] = False
    with torch.no_grad():
        want = oracle(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        logits, hidden = model.graphs()[0].call([ids, mask])
    torch.testing.assert_close(logits[mask], want.logits[mask], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden[mask], want.hidden_states[-1][mask], atol=1e-4, rtol=1e-4)


def test_encoder_padding_does_not_reach_a_row():
    _, model = pair(tf.ModernBertForMaskedLM, tf.ModernBertConfig(**settings(4, True, True)), 3)
    (graph,) = model.graphs()
    ids = torch.randint(3, 37, (2, 13))
    mask = torch.arange(13).unsqueeze(0) < torch.tensor([[13], [8]])
    with torch.no_grad():
        padded, _ = graph.call([ids, mask])
        alone, _ = graph.call([ids[1:, :8], mask[1:, :8]])
    torch.testing.assert_close(padded[1:, :8], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("window", "biased", "tied"), [*itertools.product([4, 7, 128], [False, True], [True]), (6, True, False)]
)
def test_decoder_logits_and_generation_equal_transformers(window, biased, tied):
    oracle, model = pair(
        tf.ModernBertDecoderForCausalLM, tf.ModernBertDecoderConfig(**settings(window, biased, tied)), 4
    )
    ids = torch.randint(3, 37, (2, 11), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        want = oracle(ids).logits
        for chunks in ([11], [5, 1, 4, 1]):
            torch.testing.assert_close(causal_logits(model, ids, chunks), want, atol=1e-4, rtol=1e-4)
        tokens = oracle.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        mine = ids
        for _ in range(6):
            mine = torch.cat([mine, causal_logits(model, mine, [mine.shape[1]])[:, -1].argmax(-1, keepdim=True)], 1)
    assert mine.tolist() == tokens.tolist()


@pytest.mark.parametrize("name", ["modernbert", "modernbert-decoder"])
def test_the_older_keys_of_config_json_mean_the_same(name):
    """Released checkpoints have `global_attn_every_n_layers`, `global_rope_theta` and `local_rope_theta`."""
    classes = {
        "modernbert": (tf.ModernBertConfig, tf.ModernBertForMaskedLM),
        "modernbert-decoder": (tf.ModernBertDecoderConfig, tf.ModernBertDecoderForCausalLM),
    }
    old = SIZES | {
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 16_000.0,
        "local_rope_theta": 50.0,
        "local_attention": 4,
    }
    config = classes[name][0](**old)
    config._attn_implementation = "eager"
    oracle = randomise(classes[name][1](config), 6)
    oracle.tie_weights()
    model = adopt(oracle, old | {"model_type": name})
    ids = torch.randint(3, 37, (2, 11))
    with torch.no_grad():
        want = oracle(input_ids=ids).logits
        got = model.graphs()[0].call([ids, ids >= 0])[0] if name == "modernbert" else causal_logits(model, ids, [11])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["modernbert", "modernbert-decoder"])
def test_names_are_the_checkpoints(name):
    config = {"modernbert": tf.ModernBertConfig, "modernbert-decoder": tf.ModernBertDecoderConfig}[name](
        **settings(4, True, True)
    )
    kind = {"modernbert": tf.ModernBertForMaskedLM, "modernbert-decoder": tf.ModernBertDecoderForCausalLM}[name]
    model = build(config.to_dict())
    assert {n for n, _ in model.named_parameters(remove_duplicate=False)} == set(kind(config).state_dict())


@pytest.mark.parametrize("name", ["modernbert", "modernbert-decoder"])
def test_the_graph_exports_and_equals_its_module(name):
    model = build(FAMILIES[name])
    model.to_empty(device="cpu")
    randomise(model, 7)
    model = adopt(model, FAMILIES[name])  # the frequencies again, which to_empty lost
    (graph,) = model.graphs()
    args = graph.example_inputs()
    n = len(graph.inputs)
    with torch.no_grad():
        got = graph.export().module()(*args[:n], *([list(args[n:])] if graph.states else []))
        for a, b in zip(got, graph.call(args), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_gelu_and_layer_norm_equal_torch():
    x = torch.linspace(-6, 6, 4001)
    torch.testing.assert_close(gelu(x), torch.nn.functional.gelu(x), atol=1e-6, rtol=1e-6)
    norm = LayerNorm(16, 1e-5, bias=True)
    weight, bias, rows = torch.randn(16), torch.randn(16), torch.randn(7, 16) * 3 + 5
    norm.weight.data, norm.bias.data = weight, bias
    want = torch.nn.functional.layer_norm(rows, (16,), weight, bias, 1e-5)
    torch.testing.assert_close(norm(rows), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["modernbert", "modernbert-decoder"])
def test_shorten_keeps_the_first_layers(name):
    (stack,) = build(shorten(FAMILIES[name], 1)).stacks().values()
    assert len(stack) == 1


@pytest.mark.parametrize("name", ["modernbert", "modernbert-decoder"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads is 5"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_activation": "mish"}, "activation 'mish'"),
        ({"local_attention": None}, "local_attention"),
        ({"local_attention": -1}, "local_attention is -1"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
        ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers is 0"),
        ({"norm_bias": "yes"}, "norm_bias is 'yes'"),
    ],
)
def test_bad_configs_are_one_line(name, changes, words):
    with pytest.raises(UserError) as error:
        build(FAMILIES[name] | changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
