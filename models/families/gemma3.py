"""Gemma 1 to 3, text (arXiv 2403.08295, 2408.00118, 2503.19786).

Gemma 2 has norms before and behind each block, caps, and windows in every other layer; Gemma 3 QK-norm in place of the caps, and
five sliding layers to one full, with a RoPE base for each kind; EmbeddingGemma is a Gemma 3 without the causal mask.
"""

from __future__ import annotations

from typing import Any

from ..config import ConfigReader, StackKeys
from ..decoder import DecoderSpec, DescribedDecoder, attentions, plain
from ..layers.norm import NormSpec
from ..rope import read_rope
from .gemma import Gemma2Config, Gemma3Config, GemmaConfig


def describe(section: ConfigReader) -> DecoderSpec:
    """A Gemma by its config.json."""
    kind = section.text("model_type")
    if kind == "gemma":
        return _first(section)
    if kind == "gemma2":
        return _described(Gemma2Config(section), section)
    keys = Gemma3Config(section, 32768, "Gemma 3")
    if bidirectional(section) and keys.window:
        keys.window = keys.window // 2 + 1  # config.json counts both sides, a layer the own token and those of one side
    return _described(keys, section)


def bidirectional(section: ConfigReader) -> bool:
    """Whether it is an EmbeddingGemma (arXiv 2509.20354), whose tokens see those behind them, too."""
    return section.flag("use_bidirectional_attention", False)


def _first(section: ConfigReader) -> DecoderSpec:
    keys = StackKeys(section, positions=8192, head_dim=256)
    bias = section.flag("attention_bias", False)
    # Early configs say "gelu" and mean its tanh form, as transformers takes it.
    act = section.values.get("hidden_activation") or "gelu_pytorch_tanh"
    return plain(
        keys,
        section,
        attentions(keys, read_rope(section, 10000.0), bias=bias, out_bias=bias),
        norm=NormSpec(keys.eps, offset=1.0),
        act=act if isinstance(act, str) else section.text("hidden_activation"),
        embedding_scale=keys.hidden**0.5,
        tied=section.flag("tie_word_embeddings", True),
    )


def _described(keys: GemmaConfig, section: ConfigReader) -> DecoderSpec:
    return plain(
        keys,
        section,
        tuple(keys.attention(i) for i in range(keys.layers)),
        norm=NormSpec(keys.eps, offset=1.0),
        placement="sandwich",
        act=keys.act,
        embedding_scale=keys.hidden**0.5,
        final_softcap=keys.final_softcap,
        tied=section.flag("tie_word_embeddings", True),
        bidirectional=isinstance(keys, Gemma3Config) and bidirectional(section),
    )


class Model(DescribedDecoder):
    """A Gemma checkpoint's modules."""

    describe = staticmethod(describe)

    @classmethod
    def own_pooling(cls, config: dict[str, Any]) -> str | None:
        return "mean" if config.get("use_bidirectional_attention") else None
