"""Encoder-decoders made of decoder-only checkpoints: they open here and in transformers, and agree with what they stem from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from helpers.gguf_files import write_gguf
from helpers.oracle import causal_logits, randomise, run_step, seq2seq_start
from helpers.t5gemma2_step import step
from helpers.tiny import EXAMPLE
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError
from edgewright.models.loading import load_original
from edgewright.models.registry import build
from edgewright.rewrites import adapt as module
from edgewright.rewrites.adapt import adapt

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 70,
    "max_position_embeddings": 64,
    "query_pre_attn_scalar": 24,
    "sliding_window": 4,
    "bos_token_id": 2,
}
GEMMA2 = (tf.Gemma2Config, tf.Gemma2ForCausalLM)
GEMMA3 = (tf.Gemma3TextConfig, tf.Gemma3ForCausalLM)


def write(kind, directory: Path, seed: int, dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    """A decoder-only model with random weights, saved; returns it."""
    config = kind[0](**(SIZES | changes))
    config._attn_implementation = "eager"
    oracle = randomise(kind[1](config), seed).to(dtype)
    oracle.tie_weights()
    oracle.save_pretrained(directory)
    return oracle


def opened(directory: Path):
    checkpoint = open_checkpoint(str(directory))
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    return model


IDS = torch.tensor([[5, 9, 33, 21, 40, 8, 17, 61, 2], [7, 6, 5, 4, 3, 60, 0, 0, 0]])
MASK = torch.arange(9).unsqueeze(0) < torch.tensor([[9], [6]])
TARGET = torch.tensor([[2, 11, 12, 13, 14, 15], [2, 31, 45, 50, 62, 9]])


def our_logits(model, mask: torch.Tensor = MASK) -> torch.Tensor:
    decoder, states = seq2seq_start(model, IDS, mask, capacity=8)
    return run_step(decoder, step(TARGET, 0, mask), states)


def assert_transformers_agrees(directory: Path, kind: type) -> None:
    oracle = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        want = oracle(input_ids=IDS, attention_mask=MASK.long(), decoder_input_ids=TARGET).logits
        torch.testing.assert_close(our_logits(opened(directory)), want, atol=1e-4, rtol=1e-4)


def silenced(model) -> None:
    """T5Gemma without what cross-attention adds: its last norm multiplies by 1 + weight."""
    for layer in model.model.decoder.layers:
        layer.post_cross_attn_layernorm.weight.data.fill_(-1.0)


def test_gemma2_becomes_t5gemma(tmp_path):
    source = write(GEMMA2, tmp_path / "g2", 1)
    report = adapt(str(tmp_path / "g2"), None, tmp_path / "out", 0)
    assert (report.model_type, report.drawn, report.zeros, report.train_first) == ("t5gemma", (), (), None)
    assert_transformers_agrees(tmp_path / "out", tf.T5GemmaForConditionalGeneration)
    model = opened(tmp_path / "out")
    layer = model.model.decoder.layers[1]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        own = source.model.layers[1].self_attn.get_submodule(name).weight
        assert torch.equal(layer.cross_attn.get_submodule(name).weight, own)
    norms = {"pre_cross_attn_layernorm": "input_layernorm", "post_cross_attn_layernorm": "post_attention_layernorm"}
    for new, old in norms.items():
        own = source.model.layers[1].get_submodule(old).weight
        assert torch.equal(layer.get_submodule(new).weight, own)
    with torch.no_grad():
        (hidden,) = model.graphs()[0].call([IDS[:, :1], MASK[:, :1]])  # a single token sees itself, mask or no mask
        want = source.model(IDS[:, :1]).last_hidden_state
        torch.testing.assert_close(hidden, want, atol=1e-4, rtol=1e-4)
        silenced(model)
        torch.testing.assert_close(our_logits(model), source(TARGET).logits, atol=1e-4, rtol=1e-4)


def test_gemma3_becomes_t5gemma2(tmp_path):
    source = write(GEMMA3, tmp_path / "g3", 2)
    report = adapt(str(tmp_path / "g3"), None, tmp_path / "out", 0)
    assert (report.model_type, report.drawn, report.train_first) == ("t5gemma2", (), None)
    assert report.zeros == ("model.encoder.text_model.embed_tokens.eoi_embedding",)
    assert_transformers_agrees(tmp_path / "out", tf.T5Gemma2ForConditionalGeneration)
    model = opened(tmp_path / "out")
    with torch.no_grad():
        (hidden,) = model.graphs()[0].call([IDS[:, :1], MASK[:, :1]])
        want = source.model(IDS[:, :1]).last_hidden_state
        torch.testing.assert_close(hidden, want, atol=1e-4, rtol=1e-4)
        alone = our_logits(model, torch.zeros_like(MASK))  # no encoder token is seen: the decoder-only model
        torch.testing.assert_close(alone, source(TARGET).logits, atol=1e-4, rtol=1e-4)


def test_the_end_of_image_row_is_what_the_source_sees(tmp_path, monkeypatch):
    source = write(GEMMA3, tmp_path / "g3", 3)
    monkeypatch.setattr(module, "END_OF_IMAGE", 13)
    adapt(str(tmp_path / "g3"), None, tmp_path / "out", 0)
    model = opened(tmp_path / "out")
    assert model.decoder_config.end_of_image == 13
    assert 13 in TARGET
    with torch.no_grad():
        alone = our_logits(model, torch.zeros_like(MASK))
        torch.testing.assert_close(alone, source(TARGET).logits, atol=1e-4, rtol=1e-4)


def test_an_unbalanced_pair_has_random_cross_attention_to_train_first(tmp_path):
    write(GEMMA2, tmp_path / "large", 4, hidden_size=64, num_hidden_layers=4, head_dim=8)
    small = write(GEMMA2, tmp_path / "small", 5, initializer_range=0.05)
    lines: list[str] = []
    report = adapt(str(tmp_path / "large"), str(tmp_path / "small"), tmp_path / "out", 7, lines.append)
    assert len(report.drawn) == 3 * 4
    assert report.train_first == "cross_attn"
    assert all("cross_attn" in name for name in report.drawn)
    assert any("alone for 1000 steps" in line for line in lines)
    assert_transformers_agrees(tmp_path / "out", tf.T5GemmaForConditionalGeneration)
    model = opened(tmp_path / "out")
    layer = model.model.decoder.layers[0].cross_attn
    assert layer.k_proj.weight.shape == (32, 64)
    drawn = torch.cat([p.reshape(-1) for n, p in model.named_parameters() if n in report.drawn])
    assert abs(float(drawn.std()) - 0.05) < 0.002
    with torch.no_grad():
        silenced(model)
        torch.testing.assert_close(our_logits(model), small(TARGET).logits, atol=1e-4, rtol=1e-4)
    again = adapt(str(tmp_path / "large"), str(tmp_path / "small"), tmp_path / "again", 7)
    other = adapt(str(tmp_path / "large"), str(tmp_path / "small"), tmp_path / "other", 8)
    files = [(r.path / "model.safetensors").read_bytes() for r in (report, again, other)]
    assert files[0] == files[1] != files[2]
    assert report.bytes == len(files[0])


def test_two_gemma3_of_one_width_share_the_decoders_embedding(tmp_path):
    deep = write(GEMMA3, tmp_path / "deep", 6, num_hidden_layers=5)
    shallow = write(GEMMA3, tmp_path / "shallow", 7, num_hidden_layers=2)
    adapt(str(tmp_path / "deep"), str(tmp_path / "shallow"), tmp_path / "out", 0)
    assert_transformers_agrees(tmp_path / "out", tf.T5Gemma2ForConditionalGeneration)
    model = opened(tmp_path / "out")
    encoder = model.model.encoder.text_model
    assert torch.equal(encoder.layers[4].mlp.up_proj.weight, deep.model.layers[4].mlp.up_proj.weight)
    assert torch.equal(encoder.embed_tokens.weight, shallow.model.embed_tokens.weight)


def test_bfloat16_stays_to_the_bit_and_large_tensors_go_in_pieces(tmp_path, monkeypatch):
    source = write(GEMMA3, tmp_path / "g3", 8, torch.bfloat16)
    monkeypatch.setattr(module, "_ELEMENTS", 100)
    adapt(str(tmp_path / "g3"), None, tmp_path / "out", 0)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in source.state_dict().items():
        if name.startswith("model.layers."):
            new = name.replace("input_layernorm", "pre_self_attn_layernorm").replace("post_attention", "post_self_attn")
            for where in ("model.decoder.", "model.encoder.text_model."):
                assert torch.equal(weights[where + new.removeprefix("model.")], value)
    assert causal_logits(opened(tmp_path / "g3"), TARGET, [6]).isfinite().all()


def test_a_gguf_is_a_source(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "gemma3", **{"attention.sliding_window": 16})
    adapt(str(path), None, tmp_path / "out", 0)
    checkpoint = open_checkpoint(str(path))
    source = build(checkpoint.config)
    load_original(source, checkpoint)
    target = TARGET % source.vocab
    model = opened(tmp_path / "out")
    decoder, states = seq2seq_start(model, IDS % source.vocab, torch.zeros_like(MASK), capacity=8)
    with torch.no_grad():
        alone = run_step(decoder, step(target, 0, torch.zeros_like(MASK)), states)
        torch.testing.assert_close(alone, causal_logits(source, target, [6]), atol=1e-4, rtol=1e-4)


def test_the_tokenizer_goes_along(tmp_path):
    write(GEMMA2, tmp_path / "g2", 9)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "g2" / name).write_bytes((EXAMPLE / name).read_bytes())
    adapt(str(tmp_path / "g2"), None, tmp_path / "out", 0)
    old, new = (open_checkpoint(str(tmp_path / name)).tokenizer for name in ("g2", "out"))
    assert new is not None
    assert new.encode("hello") == old.encode("hello")


def test_bad_sources_are_one_line_and_leave_nothing(tmp_path):
    write(GEMMA2, tmp_path / "g2", 10)
    write(GEMMA3, tmp_path / "g3", 11)
    write(GEMMA3, tmp_path / "wide", 12, hidden_size=64)
    write(GEMMA2, tmp_path / "other", 13, vocab_size=80)
    write(GEMMA2, tmp_path / "stray", 14)
    weights = load_file(tmp_path / "stray" / "model.safetensors")
    save_file(weights | {"model.layers.0.odd": torch.ones(1)}, tmp_path / "stray" / "model.safetensors")
    write(GEMMA2, tmp_path / "short", 15)
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4, "layer_types": None}))
    write(GEMMA2, tmp_path / "nan", 16)
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors")
    (tmp_path / "there").mkdir()
    cases = {
        ("g2", "g3", "out"): "both have to be of one family",
        ("g3", "wide", "out"): "hidden_size is 32, the decoder's 64",
        ("g2", "other", "out"): "the vocabularies differ",
        ("stray", None, "out"): "model.layers.0.odd",
        ("short", None, "out"): "no tensor model.layers.3",
        ("nan", None, "out"): "NaN or infinite",
        ("g2", None, "there"): "exists already",
    }
    for (encoder, decoder, out), words in cases.items():
        with pytest.raises(UserError) as error:
            adapt(str(tmp_path / encoder), None if decoder is None else str(tmp_path / decoder), tmp_path / out, 0)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob(".out*"))


def test_the_file_holds_no_alias(tmp_path):
    write(GEMMA3, tmp_path / "g3", 17)
    adapt(str(tmp_path / "g3"), None, tmp_path / "out", 0)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    model = build(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert names == {n for n, _ in model.named_parameters(remove_duplicate=False)} - set(model.tied)
