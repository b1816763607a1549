"""Encoder-decoders against transformers: what `save_pretrained` writes, opened from its file, in one call and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.oracle import randomise, run_step, seq2seq_start

from edgewright.models.language_model import LanguageModel
from edgewright.models.loading import load_original
from edgewright.models.opening import open_model
from edgewright.models.registry import build

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


CASES: dict[str, Callable[[], Any]] = {
    "t5": t5,
    "t5-wide-buckets": lambda: t5(relative_attention_num_buckets=32, relative_attention_max_distance=128),
    "t5-v1.1": lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "ul2": lambda: t5(feed_forward_proj="gated-silu", tie_word_embeddings=False),
    "mt5": lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**T5)),
    "umt5": lambda: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**T5)),
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


def written(case: str, folder: Path) -> Any:
    """transformers' model of a case with random weights, and its files."""
    torch.manual_seed(0)
    oracle = randomise(CASES[case](), seed=1)
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
