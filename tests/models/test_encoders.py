"""Encoders for search against transformers, from what `save_pretrained` writes: hidden states, vectors, padding, windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.oracle import randomise
from helpers.sentence_models import FLAGS, describe, linear, vectors
from helpers.tiny_families import EMBEDDERS, FAMILIES
from safetensors.torch import load_file, save_file

from edgewright.errors import UserError
from edgewright.models.embedding import EmbeddingModel
from edgewright.models.loading import load_original
from edgewright.models.opening import open_model
from edgewright.models.registry import build, shorten

_BERT = {
    "vocab_size": 56,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
_DISTIL = {
    "vocab_size": 56,
    "dim": 64,
    "hidden_dim": 96,
    "n_layers": 3,
    "n_heads": 4,
    "max_position_embeddings": 48,
    "sinusoidal_pos_embds": True,
}
_DECODER = _BERT | {"num_key_value_heads": 2, "head_dim": 16}
_GEMMA = _DECODER | {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 6,
    "query_pre_attn_scalar": 24,
}

CASES: dict[str, tuple[type, Any]] = {
    "bert": (hf.BertModel, hf.BertConfig(**_BERT)),
    "bert without a pooler": (hf.BertForMaskedLM, hf.BertConfig(**_BERT, hidden_act="gelu_new")),
    "roberta": (hf.RobertaModel, hf.RobertaConfig(**_BERT, pad_token_id=1, type_vocab_size=1)),
    "roberta with a head": (hf.RobertaForMaskedLM, hf.RobertaConfig(**_BERT, pad_token_id=3)),
    "xlm-roberta": (hf.XLMRobertaModel, hf.XLMRobertaConfig(**_BERT, pad_token_id=1, type_vocab_size=1)),
    "distilbert": (hf.DistilBertModel, hf.DistilBertConfig(**_DISTIL)),
    "distilbert with a head": (hf.DistilBertForMaskedLM, hf.DistilBertConfig(**_DISTIL, activation="relu")),
    "modernbert": (hf.ModernBertModel, hf.ModernBertConfig(**_BERT, local_attention=6, pad_token_id=0)),
    "embeddinggemma": (hf.Gemma3TextModel, hf.Gemma3TextConfig(**_GEMMA, use_bidirectional_attention=True)),
    "gemma 3": (hf.Gemma3TextModel, hf.Gemma3TextConfig(**_GEMMA)),
    "qwen3-embedding": (hf.Qwen3Model, hf.Qwen3Config(**_DECODER)),
    "qwen3 with a head": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**_DECODER, tie_word_embeddings=False)),
    "gpt2": (hf.GPT2Model, hf.GPT2Config(vocab_size=56, n_embd=64, n_head=4, n_layer=2, n_positions=48)),
}


def saved(name: str, folder: Path, seed: int = 1) -> torch.nn.Module:
    """transformers' model, written to the folder, as it reads it again: without its head."""
    kind, config = CASES[name]
    randomise(kind(config), seed).save_pretrained(folder)
    oracle = hf.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return oracle.eval()


def opened(folder: Path, *pooling: str) -> EmbeddingModel:
    checkpoint = open_model(str(folder), pooling=pooling)
    model = build(checkpoint.config)
    assert isinstance(model, EmbeddingModel)
    load_original(model, checkpoint)
    return model


def texts(seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 56, (n,), generator=generator).tolist() for n in (17, 1, 9, 30)]


def batch(rows: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, torch.arange(ids.shape[1]).unsqueeze(0) < torch.tensor([[len(row)] for row in rows])


def embedded(model: EmbeddingModel, rows: list[list[int]]) -> torch.Tensor:
    (graph,) = model.graphs()
    with torch.no_grad():
        (vector,) = graph.call(list(batch(rows)))
    return vector


@pytest.mark.parametrize("name", CASES)
def test_hidden_states_equal_transformers(name: str, tmp_path: Path) -> None:
    oracle = saved(name, tmp_path)
    describe(tmp_path)
    model = opened(tmp_path)
    ids, mask = batch(texts(), pad=5)
    with torch.no_grad():
        got = model.model.hidden_states(ids, mask)
        for row, want in enumerate(texts()):
            alone = oracle(input_ids=torch.tensor([want])).last_hidden_state[0]
            torch.testing.assert_close(got[row, : len(want)], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooling", [*((name,) for name in FLAGS), tuple(FLAGS)], ids=lambda p: "+".join(p))
def test_every_pooling_of_a_padded_batch_is_that_of_each_text_alone(pooling: tuple[str, ...], tmp_path: Path) -> None:
    oracle = saved("bert", tmp_path)
    describe(tmp_path, pooling, normalize=False)
    model = opened(tmp_path)
    assert model.size == 64 * len(pooling)
    want = vectors(oracle, texts(), pooling, normalize=False)
    torch.testing.assert_close(embedded(model, texts()), want, atol=1e-4, rtol=1e-4)
    for text, row in zip(texts(), want, strict=True):
        torch.testing.assert_close(embedded(model, [text])[0], row, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["distilbert", "embeddinggemma", "modernbert", "qwen3-embedding"])
def test_linears_behind_the_pooling_and_length_one(name: str, tmp_path: Path) -> None:
    oracle = saved(name, tmp_path)
    linears = [linear(128, 96, "linear.Identity", bias=False), linear(96, 40, "activation.GELU"), linear(40, 32)]
    describe(tmp_path, ("cls", "last"), linears)
    acts = (lambda x: x, torch.nn.functional.gelu, torch.tanh)
    dense = [(load_file(tmp_path / f"{i + 2}_Dense" / "model.safetensors"), act) for i, act in enumerate(acts)]
    model = opened(tmp_path)
    got = embedded(model, texts())
    torch.testing.assert_close(got, vectors(oracle, texts(), ("cls", "last"), dense), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.norm(dim=-1), torch.ones(4), atol=1e-6, rtol=0)


def test_the_window_of_an_embeddinggemma_is_of_both_sides(tmp_path: Path) -> None:
    """config.json's window of 6 is 3 tokens on each side: a token farther away changes a sliding layer's output by nothing."""
    saved("embeddinggemma", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["sliding_window"], config["use_bidirectional_attention"]) == (6, True)
    model = opened(tmp_path)
    layer, ids = model.model.layers[0], torch.tensor([[7] * 12])
    positions, mask = torch.arange(12), torch.ones(1, 12, dtype=torch.bool)
    seen = model.model._mask(positions, mask, model.model.windows[0])
    with torch.no_grad():
        h = model.model.embed(ids)
        before = layer(h, positions, seen)
        h[0, 8] += 1.0
        moved = (layer(h, positions, seen) - before).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [5, 6, 7, 8, 9, 10, 11]


def test_the_first_bert_files_call_a_norms_parameters_gamma_and_beta(tmp_path: Path) -> None:
    oracle = saved("bert", tmp_path)
    file = tmp_path / "model.safetensors"
    older = {f"bert.{n}".replace("LayerNorm.weight", "LayerNorm.gamma"): v for n, v in load_file(file).items()}
    older = {n.replace("LayerNorm.bias", "LayerNorm.beta"): v for n, v in older.items()}
    older["bert.embeddings.position_ids"] = torch.arange(48).unsqueeze(0)
    save_file(older, file)
    want = vectors(oracle, texts(), ("mean",), normalize=False)
    torch.testing.assert_close(embedded(opened(tmp_path), texts()), want, atol=1e-4, rtol=1e-4)


NOTE = "no modules.json: a text's vector is the {} of its tokens, not normalised; --pooling chooses another"


@pytest.mark.parametrize(
    ("name", "pooling"),
    [("bert", "mean"), ("distilbert", "mean"), ("embeddinggemma", "mean"), ("modernbert", "cls"), ("roberta", "mean")],
)
def test_without_modules_json_a_line_says_how_a_vector_is_made(name: str, pooling: str, tmp_path: Path) -> None:
    """ModernBERT's config.json has a convention of its own."""
    oracle = saved(name, tmp_path)
    assert NOTE.format(pooling) in open_model(str(tmp_path)).notes
    want = vectors(oracle, texts(), (pooling,), normalize=False)
    torch.testing.assert_close(embedded(opened(tmp_path), texts()), want, atol=1e-4, rtol=1e-4)
    chosen = open_model(str(tmp_path), pooling=("max",))
    assert not any("modules.json" in note for note in chosen.notes)
    assert chosen.fingerprint() != open_model(str(tmp_path)).fingerprint()


def test_a_pooling_that_is_given_takes_the_place_of_the_files(tmp_path: Path) -> None:
    oracle = saved("bert", tmp_path)
    describe(tmp_path)
    assert "--pooling last takes the place of mean" in open_model(str(tmp_path), pooling=("last",)).notes
    want = vectors(oracle, texts(), ("last",))
    torch.testing.assert_close(embedded(opened(tmp_path, "last"), texts()), want, atol=1e-4, rtol=1e-4)


def test_a_decoder_generates_unless_it_is_said_to_embed(tmp_path: Path) -> None:
    oracle = saved("qwen3 with a head", tmp_path)
    assert build(open_model(str(tmp_path)).config).task == "causal"
    want = vectors(oracle, texts(), ("last",), normalize=False)
    torch.testing.assert_close(embedded(opened(tmp_path, "last"), texts()), want, atol=1e-4, rtol=1e-4)
    notes = open_model(str(tmp_path), pooling=("last",)).notes
    assert any(note.startswith("left out, as no graph here uses them: 1 tensors (lm_head.weight") for note in notes)


def test_a_masked_language_model_stays_one_without_modules_json(tmp_path: Path) -> None:
    config = hf.ModernBertConfig(**_BERT, local_attention=6, pad_token_id=0)
    randomise(hf.ModernBertForMaskedLM(config), 2).save_pretrained(tmp_path)
    assert build(open_model(str(tmp_path)).config).task == "module"
    describe(tmp_path)
    assert build(open_model(str(tmp_path)).config).task == "embed"


def test_a_family_without_a_text_encoder_is_refused(tmp_path: Path) -> None:
    config = hf.T5Config(vocab_size=56, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    randomise(hf.T5ForConditionalGeneration(config), 2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model_type 't5' makes no embeddings here; leave --pooling out"):
        open_model(str(tmp_path), pooling=("mean",))


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    randomise(hf.BertForSequenceClassification(hf.BertConfig(**_BERT)), 2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"BertForSequenceClassification.*its vectors are not for search"):
        open_model(str(tmp_path))


EMBED = {**{name: FAMILIES[name] for name in ("bert", "distilbert", "roberta", "xlm-roberta")}, **EMBEDDERS}


@pytest.mark.parametrize("name", EMBED)
def test_the_graph_exports_and_equals_its_module(name: str) -> None:
    model = build(EMBED[name]).to_empty(device="cpu")
    fresh = build(EMBED[name])
    for path, buffer in fresh.named_buffers():  # the frequencies, which to_empty lost
        model.get_submodule(path.rpartition(".")[0]).register_buffer(path.rpartition(".")[2], buffer, persistent=False)
    randomise(model, 7)
    (graph,) = model.graphs()
    ids, mask = torch.randint(4, 80, (3, 11)), torch.arange(11).unsqueeze(0) < torch.tensor([[11], [4], [1]])
    with torch.no_grad():
        (got,) = graph.export().module()(ids, mask)
        torch.testing.assert_close(got, graph.call([ids, mask])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EMBED)
def test_shorten_keeps_the_first_layers(name: str) -> None:
    (stack,) = build(shorten(EMBED[name], 1)).stacks().values()
    assert len(stack) == 1


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
        ("bert", {"num_attention_heads": 5}, "num_attention_heads is 5"),
        ("bert", {"hidden_act": "mish"}, "activation 'mish'"),
        ("bert", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("roberta", {"pad_token_id": 65}, "pad_token_id is 65"),
        ("distilbert", {"n_heads": 16}, "n_heads is 16"),
        ("distilbert", {"dim": 0}, "dim is 0"),
        ("modernbert", {"classifier_pooling": "attention", "edgewright": {}}, ""),
        ("qwen3", {"edgewright": {"embedding": 3}}, "edgewright.embedding is 3"),
        ("qwen3", {"edgewright": {"embedding": {"pooling": []}}}, "edgewright.embedding.pooling is []"),
        ("qwen3", {"edgewright": {"embedding": {"pooling": ["most"]}}}, "pooling is ['most']"),
        ("qwen3", {"edgewright": {"embedding": {"pooling": ["cls"], "behind": [3]}}}, "behind is [3]"),
        ("qwen3", {"edgewright": {"embedding": {"pooling": ["cls"], "behind": [{"kind": "lstm"}]}}}, "kind is 'lstm'"),
        ("qwen3", {"edgewright": {"embedding": {"pooling": ["cls"], "prompts": {"a": 1}}}}, "prompts is"),
    ],
)
def test_bad_configs_are_one_line(name: str, changes: dict[str, Any], words: str) -> None:
    if not words:  # without a description it is the masked language model, which pools nothing
        assert build(EMBED[name] | changes).task == "module"
        return
    with pytest.raises(UserError) as error:
        build(EMBED[name] | changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_linears_that_do_not_fit_are_one_line() -> None:
    config = json.loads(json.dumps(EMBED["distilbert"]))
    config["edgewright"]["embedding"]["behind"][1]["in"] = 64
    with pytest.raises(UserError, match="takes 64 numbers, and 96 come"):
        build(config)
