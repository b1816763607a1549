"""What the files beside tokenizer.json say, against transformers' AutoTokenizer: named and added tokens, ids, decoding, streams."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizer_oracle import assert_like
from helpers.vocabularies import TEXTS, TRAINING
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.errors import UserError

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


def byte_level(special: list[str] = SPECIAL) -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(TRAINING, trainer)
    return library


def around(library: Library, form: str) -> Library:
    library.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 1), ("</s>", 2)])
    return library


def word_pieces() -> Library:
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library.train_from_iterator(
        TRAINING, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return library


def unigram() -> Library:
    library = Library(models.Unigram())
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(TRAINING, trainer)
    library.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return library


def with_flags() -> Library:
    library = byte_level()
    library.add_tokens(
        [AddedToken("<fim>", lstrip=True, rstrip=True, special=True), AddedToken("two", single_word=True)]
    )
    return library


END = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
CASES: dict[str, tuple[Callable[[], Library], dict[str, Any] | None, dict[str, Any]]] = {
    "map alone": (byte_level, FAST, {"special_tokens_map.json": NAMED}),
    "map, no config": (byte_level, None, {"special_tokens_map.json": NAMED | {"eos_token": END}}),
    "map against config": (byte_level, FAST | NAMED | {"eos_token": "<s>"}, {"special_tokens_map.json": NAMED}),
    "bos asked, no processor": (byte_level, FAST | NAMED | {"add_bos_token": True}, {}),
    "bos not asked, processor": (lambda: around(byte_level(), "<s> $A"), FAST | NAMED | {"add_bos_token": False}, {}),
    "eos asked, no processor": (lambda: around(byte_level(), "<s> $A"), FAST | NAMED | {"add_eos_token": True}, {}),
    "both ends": (lambda: around(byte_level(), "<s> $A </s>"), FAST | NAMED, {}),
    "decoder tokens": (
        byte_level,
        FAST | NAMED | {"added_tokens_decoder": {"999": END | {"content": "<|im_start|>", "special": True}, "5": END}},
        {},
    ),
    "added_tokens.json": (byte_level, FAST | NAMED, {"added_tokens.json": {"<|im_end|>": 501, "<|im_start|>": 500}}),
    "additional": (byte_level, FAST | NAMED | {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}, {}),
    "own keys": (
        byte_level,
        FAST | NAMED | {"image_token": "<|im_start|>", "extra_special_tokens": {"a": "<fim>"}},
        {},
    ),
    "eos as an object": (byte_level, FAST | NAMED | {"eos_token": {"__type": "AddedToken"} | END}, {}),
    "eos beyond the vocabulary": (byte_level, FAST | NAMED | {"eos_token": "<|eot_id|>"}, {}),
    "flags": (with_flags, FAST | NAMED, {}),
    "word pieces": (word_pieces, FAST | {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}, {}),
    "unigram": (unigram, FAST | {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}, {}),
}


def written(folder: Path, case: str) -> Path:
    make, config, files = CASES[case]
    folder.mkdir(parents=True)
    make().save(str(folder / "tokenizer.json"))
    for name, content in ({} if config is None else {"tokenizer_config.json": config} | files).items():
        (folder / name).write_text(json.dumps(content))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.mark.parametrize("case", sorted(CASES))
def test_it_is_transformers_tokenizer(tmp_path: Path, case: str) -> None:
    folder = written(tmp_path / "in", case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_dir(folder)
    tokenizer.save(tmp_path / "out")  # as a bundle keeps it
    for ours in (tokenizer, Tokenizer.from_dir(tmp_path / "out")):
        assert_like(ours, theirs, TEXTS)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"-1": END}, "added_tokens_decoder has '-1'"),
        ({"99999999999": END}, "an id and its token are expected"),
        ({"7": {"no": "content"}}, "added_tokens_decoder has '7'"),
    ],
)
def test_added_tokens_that_are_none(tmp_path: Path, content: dict[str, Any], line: str) -> None:
    folder = written(tmp_path / "in", "flags")
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": content}))
    with pytest.raises(UserError, match=line):
        Tokenizer.from_dir(folder)
