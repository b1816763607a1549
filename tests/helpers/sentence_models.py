"""Tiny models in sentence-transformers' layout, a WordPiece tokenizer, and the vectors restated text by text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import models, normalizers, pre_tokenizers, processors

FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weighted_mean": "pooling_mode_weightedmean_tokens",
    "last": "pooling_mode_lasttoken",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = (
    "the keeper lit the lamp",
    "a ship turned from the rocks at last",
    "bread is baked before dawn",
    "snow",
    "why do cats sleep so long in the sun",
    "the lamp of the ship was lit by a keeper who baked bread before dawn and slept in the sun",
)


def wordpiece(folder: Path) -> Path:
    """A tokenizer of 56 tokens in the folder: letters, alone and within a word; [CLS] before a text and [SEP] behind it."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    backend = tokenizers.Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    backend.post_processor = processors.TemplateProcessing(
        single=["[CLS]", "$A", "[SEP]"], special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.enable_truncation(5)  # as files have it from their training; texts are not cut by it
    backend.save(str(folder / "tokenizer.json"))
    config = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def describe(
    folder: Path,
    pooling: Sequence[str] = ("mean",),
    dense: Sequence[dict[str, Any]] = (),
    normalize: bool = True,
    settings: dict[str, Any] | None = None,
    limits: dict[str, Any] | None = None,
    seed: int = 5,
) -> Path:
    """modules.json and the files that it names, beside a model. dense: the config.json of each, its weights random."""
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), *(("Dense", f"{i + 2}_Dense") for i in range(len(dense)))]
    kinds += [("Normalize", f"{len(kinds)}_Normalize")] if normalize else []
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {flag: name in pooling for name, flag in FLAGS.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **flags}))
    generator = torch.Generator().manual_seed(seed)
    for i, config in enumerate(dense):
        own = folder / f"{i + 2}_Dense"
        own.mkdir(exist_ok=True)
        (own / "config.json").write_text(json.dumps(config))
        weight = torch.randn(config["out_features"], config["in_features"], generator=generator) * 0.2
        tensors = {"linear.weight": weight}
        if config.get("bias", True):
            tensors["linear.bias"] = torch.randn(config["out_features"], generator=generator) * 0.2
        save_file(tensors, own / "model.safetensors")
    if settings is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    if limits is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps(limits))
    return folder


def linear(inputs: int, outputs: int, act: str = "activation.Tanh", bias: bool = True) -> dict[str, Any]:
    """The config.json of a Dense."""
    name = f"torch.nn.modules.{act}"
    return {"in_features": inputs, "out_features": outputs, "bias": bias, "activation_function": name}


def pooled(h: torch.Tensor, pooling: Sequence[str]) -> torch.Tensor:
    """The vector of hidden states [T, hidden] of one text, as the library's Pooling says it."""
    weights = torch.arange(1, len(h) + 1).unsqueeze(-1) / (len(h) * (len(h) + 1) / 2)
    ways = {
        "cls": h[0],
        "max": h.max(0).values,
        "mean": h.sum(0) / len(h),
        "mean_sqrt_len": h.sum(0) / len(h) ** 0.5,
        "weighted_mean": (h * weights).sum(0),
        "last": h[len(h) - 1],
    }
    return torch.cat([ways[name] for name in FLAGS if name in pooling])


def vectors(
    oracle: torch.nn.Module,
    texts: Sequence[Sequence[int]],
    pooling: Sequence[str],
    dense: Sequence[tuple[dict[str, torch.Tensor], Any]] = (),
    normalize: bool = True,
) -> torch.Tensor:
    """What transformers' model makes of texts, each read alone. dense: tensors and activation of each linear."""
    rows = []
    with torch.no_grad():
        for ids in texts:
            h = oracle(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
            x = pooled(h.last_hidden_state[0], pooling)
            for tensors, act in dense:
                x = act(F.linear(x, tensors["linear.weight"], tensors.get("linear.bias")))
            rows.append(F.normalize(x, dim=-1) if normalize else x)
    return torch.stack(rows)
