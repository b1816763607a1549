"""Tiny tokenizers: a word-level one in a folder, and a SentencePiece vocabulary as a GGUF file's metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, processors

TRAINING = [
    "the quick brown fox jumps",
    "hello world, how are you today?",
    "café naïve 你好世界 🙂👍🏽",
    "user assistant",
] * 3
TEXTS = [
    *(
        "hello world",
        " hello",
        "  two spaces",
        "a\nb\n\n",
        "café 🎉👍🏽",
        "你好 世界",
        "<s>hi</s>",
        "tab\tx",
        "Hello , world !",
    ),
    *(
        "don't",
        "\u200bzero",
        "１２３",
        "\n",
        " ",
        "émigré e\u0301",
        "<|im_start|>user",
        "\U0001f468\u200d\U0001f469",
        "<fim> x",
    ),
]


def letters(directory: Path, template: list[str] | None = None, **settings: object) -> Path:
    """A word-level tokenizer like that of the T5Gemma example: letters, with `template` as its post-processor."""
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "k": 4, "n": 5, "t": 6}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<bos>", 2), ("<eos>", 1)]
        )
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>", **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def byte_fallback() -> dict[str, Any]:
    """GGUF metadata of a tiny SentencePiece vocabulary with byte pieces."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "\n\n", "  ", "   "]
    types = [3, 3, 3, 3, 4, 4, 4, 4]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [6] * 256
    normal = ["he", "ll", "llo", "hello", "▁hello", "▁h", *"▁hello"]
    normal = list(dict.fromkeys(normal))
    scores = [-1000.0] * len(pieces) + [-float(i) for i in range(len(normal))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + normal,
        "tokenizer.ggml.token_type": types + [1] * len(normal),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
    }


def changed(directory: Path, **parts: Any) -> Path:
    """Set parts of a folder's tokenizer.json."""
    file = directory / "tokenizer.json"
    value = json.loads(file.read_text())
    file.write_text(json.dumps({**value, **parts}))
    return directory
