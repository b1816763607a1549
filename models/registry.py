"""The table from `model_type` to architecture. A new family is a file in `families` and a line here."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ..errors import UserError
from ..system.reading import nearest, one_line, shown
from . import eugen
from .config import LONG_FACTORS, OURS
from .embedding import EmbeddingModel, described, embedding_model
from .language_model import LanguageModel

ARCHITECTURES = {
    "t5gemma": "families.t5gemma",
    "llama": "families.llama",
    "mistral": "families.mistral",
    "ministral": "families.mistral",
    "ministral3": "families.mistral",
    "qwen3": "families.qwen3",
    "gemma": "families.gemma3",
    "gemma2": "families.gemma3",
    "gemma3n_text": "families.gemma3n",
    "gemma4_text": "families.gemma4",
    "phi3": "families.phi3",
    "smollm3": "families.smollm3",
    "granite": "families.granite",
    "olmo2": "families.olmo2",
    "olmo3": "families.olmo2",
    "exaone4": "families.olmo2",
    "ernie4_5": "families.ernie4_5",
    "hunyuan_v1_dense": "families.hunyuan",
    "stablelm": "families.stablelm",
    "gpt2": "families.gpt",
    "gpt_neox": "families.gpt",
    "qwen3_5_text": "families.qwen3_5",
    "qwen3_next": "families.qwen3_5",
    "olmo_hybrid": "families.olmo_hybrid",
    "falcon_h1": "families.falcon_h1",
    "mamba2": "families.mamba2",
    "bamba": "families.bamba",
    "granitemoehybrid": "families.granite4",
    "nemotron_h": "families.nemotron_h",
    "recurrent_gemma": "families.recurrent_gemma",
    "zamba2": "families.zamba2",
    "rwkv7": "families.rwkv7",
    "lfm2": "families.lfm2",
    "hgrn2": "families.hgrn2",
    "gemma3_text": "families.gemma3",
    "qwen2": "families.qwen2",
    "dolphin": "families.dolphin",
    "phi4flash": "families.sambay",
    "t5gemma2": "families.t5gemma2",
    "mu": "families.mu",
    "t5": "families.t5",
    "mt5": "families.t5",
    "umt5": "families.t5",
    "bart": "families.bart",
    "mbart": "families.bart",
    "marian": "families.bart",
    "m2m_100": "families.bart",
    "pegasus": "families.bart",
    "whisper": "families.whisper",
    "moonshine": "families.moonshine",
    "modernbert": "families.modernbert",
    "modernbert-decoder": "families.modernbert_decoder",
    "arc_encoder": "families.arc_encoder",
    "bert": "families.bert",
    "roberta": "families.bert",
    "xlm-roberta": "families.bert",
    "distilbert": "families.distilbert",
    "module": "user_module.module",
}


def architecture_of(config: dict[str, Any]) -> type[LanguageModel]:
    """The family's `Model`. Raises UserError for a model_type that is not known."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = one_line(", ".join(sorted(ARCHITECTURES)), 450)  # docs/families.md has all
        near = nearest(kind, ARCHITECTURES) if isinstance(kind, str) else ""
        raise UserError(f"model_type {shown(kind, 60)} is not supported{near}; supported: {known}")
    architecture: type[LanguageModel] = importlib.import_module(f".{ARCHITECTURES[kind]}", __package__).Model
    return architecture


def build(config: dict[str, Any]) -> LanguageModel:
    """The family's `Model` of `config`, in eval mode, its parameters on the meta device. Raises UserError for a bad config."""
    with torch.device("meta"):
        model = _made(config)
        eugen.place(model, config)
        return model.eval()


def _made(config: dict[str, Any]) -> LanguageModel:
    """The family's model, or where config.json describes an embedding, the one that makes it."""
    architecture = architecture_of(config)
    model = architecture(config)
    return embedding_model(config, model) if described(config) and not isinstance(model, EmbeddingModel) else model


def stored_name(model: LanguageModel, name: str) -> str:
    """The name a parameter is stored under: its own, or that of the one it is tied to."""
    return model.stored_name(name)


def shorten(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """`config` with at most `layers` layers in each stack. Raises UserError for a bad config, or if layers is below 1."""
    if layers < 1:
        raise UserError(f"--num-layers {layers} is too few; give 1 or more")
    build(config)  # reports a bad config by its key
    short = architecture_of(config).shorten(config, layers)
    with torch.device("meta"):
        return eugen.kept_by(_made(short), short)


def lengthened(config: dict[str, Any], context: int) -> dict[str, Any]:
    """`config` for contexts of so many tokens: of longrope the long factors, where the short ones end before. Else as it is.

    The factors are chosen once, for every position: keys in a cache cannot be turned anew when a text has grown long. Raises
    UserError for a bad config.
    """
    ends = build(config).max_context
    longer = config | {OURS: dict(config.get(OURS) or {}) | {LONG_FACTORS: True}}
    return longer if ends < context and ends < build(longer).max_context else config
