"""Encoder-decoders against transformers: what `save_pretrained` writes, opened from its file, in one call and in chunks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from helpers.oracle import randomise, run_step, seq2seq_start
from safetensors.torch import load_file, save_file

from edgewright.errors import UserError
from edgewright.models.kv_cache import stored_as
from edgewright.models.language_model import LanguageModel
from edgewright.models.loading import load_original
from edgewright.models.opening import open_model
from edgewright.models.registry import build, shorten
from edgewright.pipeline.generation import decoder_prompt, generation_of
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.generate import generate

T5: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 80,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def t5(**changes: Any) -> Any:
    return hf.T5ForConditionalGeneration(hf.T5Config(**T5 | changes))


CASES: dict[str, Callable[..., Any]] = {
    "t5": t5,
    "t5-wide-buckets": lambda: t5(relative_attention_num_buckets=32, relative_attention_max_distance=128),
    "t5-v1.1": lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "ul2": lambda: t5(feed_forward_proj="gated-silu", tie_word_embeddings=False),
    "mt5": lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**T5)),
    "umt5": lambda **changes: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**T5 | changes)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
    "bart-scaled": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART, scale_embedding=True)),
    "mbart": lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**BART, scale_embedding=True)),
    "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**BART, scale_embedding=True, activation_function="swish")),
    "marian-apart": lambda: hf.MarianMTModel(
        hf.MarianConfig(**BART, share_encoder_decoder_embeddings=False, decoder_vocab_size=88)
    ),
    "m2m_100": lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**BART)),
    "m2m_100-unscaled": lambda: hf.M2M100ForConditionalGeneration(
        hf.M2M100Config(**BART | {"pad_token_id": 3}, scale_embedding=False, activation_function="gelu")
    ),
    "pegasus": lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**BART, activation_function="relu")),
}
UNTIED = {"t5-v1.1", "ul2", "mt5"}
"""They have a head of their own, as the published checkpoints do."""


def written(case: str, folder: Path, **changes: Any) -> Any:
    """transformers' model of a case with random weights, and its files. changes: to the config of a T5."""
    torch.manual_seed(0)
    oracle = randomise(CASES[case](**changes), seed=1)
    for module in oracle.modules():
        if hasattr(module, "create_weight"):  # sinusoids, which are not learned
            module.weight = torch.nn.Parameter(module.create_weight(), False)
    if case in UNTIED:
        oracle.lm_head.weight = torch.nn.Parameter(torch.randn_like(oracle.lm_head.weight) * 0.25)
    else:
        oracle.tie_weights()
    if hasattr(oracle, "final_logits_bias"):
        oracle.final_logits_bias.normal_()
    oracle.save_pretrained(folder)
    return oracle


def ours(folder: Path) -> LanguageModel:
    checkpoint = open_model(str(folder))
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    return model


def batch(vocab: int = 88) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source ids with a padded row, their mask, and target ids."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, vocab, (2, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    target = torch.randint(4, vocab, (2, 23), generator=generator)
    return ids, mask, target


def logits(model: LanguageModel, ids: torch.Tensor, mask: torch.Tensor, target: torch.Tensor, chunks: list[int]) -> Any:
    graph, states = seq2seq_start(model, ids, mask.bool(), target.shape[1] + 3)
    out, past = [], 0
    for n in chunks:
        inputs = {
            "input_ids": target[:, past : past + n],
            "past_length": torch.tensor([past]),
            "encoder_mask": mask.bool(),
            "logit_positions": torch.arange(n),
        }
        out.append(run_step(graph, inputs, states))
        past += n
    return torch.cat(out, 1)


@pytest.mark.parametrize("case", CASES)
def test_a_saved_encoder_decoder_is_what_transformers_computes(case: str, tmp_path: Path) -> None:
    oracle = written(case, tmp_path)
    ids, mask, target = batch()
    ids = torch.where(mask.bool(), ids, oracle.config.pad_token_id)
    with torch.no_grad():
        want = oracle(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
    model = ours(tmp_path)
    largest = want.abs().max()
    for chunks in ([23], [9, 1, 13]):
        got = logits(model, ids, mask, target, chunks)
        torch.testing.assert_close(got / largest, want / largest, atol=4e-6, rtol=0)


@pytest.mark.parametrize("case", ["t5", "umt5", "marian-apart", "m2m_100"])
def test_greedy_answers_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    """From the start token and a forced first token, as generation_config.json has them. An answer that is cut off ends without
    a forced last token."""
    # transformers' caches have as many layers as the encoder of a T5.
    oracle = written(case, tmp_path, **({"num_decoder_layers": 2} if "t5" in case else {}))
    oracle.generation_config.forced_eos_token_id = None
    oracle.generation_config.forced_bos_token_id = 7
    oracle.generation_config.decoder_start_token_id = 5
    oracle.generation_config.save_pretrained(tmp_path)
    ids, mask, _ = batch()
    ids, mask = ids[:1], mask[:1]
    want = oracle.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, num_beams=1)[0].tolist()
    checkpoint = open_model(str(tmp_path))
    model = ours(tmp_path)
    spec = generation_of(model, checkpoint, checkpoint.config)
    assert (spec.decoder_start, spec.forced) == (5, (7,))
    got = list(generate(EagerSession(model.graphs()), spec, ids[0].tolist(), 8))
    answer = [5, 7, *got]
    assert len(got) > 0
    assert answer == want[: len(answer)]
    assert len(answer) == len(want) or want[len(answer)] in spec.eos_ids


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({}, {}, (2, ())),
        ({}, {"forced_bos_token_id": 9}, (2, (9,))),
        ({"forced_bos_token_id": None}, {"forced_bos_token_id": 9}, (2, ())),
        ({"forced_bos_token_id": 8, "decoder_start_token_id": 6}, {"forced_bos_token_id": 9}, (6, (8,))),
    ],
)
def test_the_generation_config_says_how_an_answer_begins(
    generation: dict[str, Any], config: dict[str, Any], expected: object
) -> None:
    config = BART | {"model_type": "bart"} | config
    assert decoder_prompt(build(config), generation, config) == expected


@pytest.mark.parametrize("case", ["t5", "umt5", "mbart"])
def test_int8_caches_keep_the_logits(case: str, tmp_path: Path) -> None:
    written(case, tmp_path)
    model = ours(tmp_path)
    sessions = [EagerSession(graphs) for graphs in (model.graphs(), stored_as(model.graphs(), "int8"))]
    ids, mask, target = batch()
    outputs = []
    for session in sessions:
        state = session.new_state(2, 30)
        encoded = session.run("encoder", {"input_ids": ids.numpy(), "encoder_mask": mask.bool().numpy()}, state)
        session.run("cross_kv", {"encoder_hidden": encoded["encoder_hidden"]}, state)
        rows = []
        for start, end in ((0, 9), (9, 23)):
            inputs = {
                "input_ids": target[:, start:end].numpy(),
                "past_length": np.array([start]),
                "encoder_mask": mask.bool().numpy(),
                "logit_positions": np.arange(end - start),
            }
            rows.append(session.run("decoder", inputs, state)["logits"])
        outputs.append(np.concatenate(rows, 1))
    exact, coarse = outputs
    error = np.sqrt(((exact - coarse) ** 2).mean() / (exact**2).mean())
    assert 0 < error < 0.03


def test_a_file_without_a_logits_bias_has_zeros(tmp_path: Path) -> None:
    oracle = written("bart", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["final_logits_bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    oracle.final_logits_bias.zero_()
    ids, mask, target = batch()
    with torch.no_grad():
        want = oracle(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
    torch.testing.assert_close(logits(ours(tmp_path), ids, mask, target, [23]), want, atol=1e-4, rtol=1e-4)


def test_an_old_file_with_copies_of_its_embedding_is_read(tmp_path: Path) -> None:
    """`encoder.embed_tokens` and the like, and positions that are computed here."""
    oracle = written("m2m_100", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors["model.shared.weight"]
    tensors |= {f"model.{stack}.embed_tokens.weight": table.clone() for stack in ("encoder", "decoder")}
    tensors["lm_head.weight"] = table.clone()
    tensors["model.encoder.embed_positions.weights"] = torch.zeros(42, 64)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids, mask, target = batch()
    with torch.no_grad():
        want = oracle(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
    torch.testing.assert_close(logits(ours(tmp_path), ids, mask, target, [23]), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("tie", "head", "scaled", "tied"),
    [(None, False, True, True), (False, True, False, False), (False, False, False, True), (True, True, True, False)],
)
def test_the_head_of_a_t5_is_what_file_and_config_say(
    tie: bool | None, head: bool, scaled: bool, tied: bool, tmp_path: Path
) -> None:
    """T5 v1.1 says by `tie_word_embeddings` that its head reads unscaled states; which head there is, says the file."""
    written("t5-v1.1" if head else "t5", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["scale_decoder_outputs"], config["tie_word_embeddings"]
    config |= {} if tie is None else {"tie_word_embeddings": tie}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model: Any = build(open_model(str(tmp_path)).config)
    assert bool(model.tied) == tied
    assert (model.spec.output_scale != 1.0) == scaled


def test_a_rehearsal_has_fewer_layers_in_both_stacks() -> None:
    for config in (T5 | {"model_type": "t5", "num_decoder_layers": None}, BART | {"model_type": "bart"}):
        with torch.device("meta"):
            model = build(shorten(config, 1))
        assert [len(layers) for layers in model.stacks().values()] == [1, 1]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (T5 | {"model_type": "t5", "d_kv": 12}, "d_kv is 12, expected a multiple of 8"),
        (T5 | {"model_type": "t5", "relative_attention_max_distance": 4}, "relative_attention_max_distance is 4"),
        (T5 | {"model_type": "t5", "feed_forward_proj": "gated-mish"}, "activation 'mish' is not supported"),
        (T5 | {"model_type": "longt5"}, "model_type 'longt5' is not supported"),
        (BART | {"model_type": "bart", "encoder_attention_heads": 3}, "encoder_attention_heads is 3"),
        (BART | {"model_type": "bart", "decoder_attention_heads": 16}, "decoder_attention_heads is 16"),
        (BART | {"model_type": "marian", "max_position_embeddings": 1 << 24}, "max_position_embeddings is 16777216"),
    ],
)
def test_a_bad_config_is_refused_by_its_key(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(config)
