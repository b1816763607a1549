"""Tokenizers without tokenizer.json, against transformers' AutoTokenizer and the packages that made them."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from helpers import tiny
from helpers.requests import asking
from helpers.tiny_families import FAMILIES
from helpers.tokenizer_oracle import assert_like
from helpers.vocabularies import TEXTS, TRAINING
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from edgewright import compiler
from edgewright.bundle import Bundle
from edgewright.checkpoints.gguf_pretokenizers import PRE_TOKENIZERS
from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.checkpoints.vocabularies import byte_level, languages, sentencepiece_file
from edgewright.errors import UserError
from edgewright.runtimes.generate import generate
from edgewright.runtimes.registry import open_session
from edgewright.runtimes.text_generation import open_bundle

CUT = PRE_TOKENIZERS["llama-bpe"].expressions[0]


def spm(kind: str, **options: Any) -> bytes:
    """A SentencePiece model trained on TRAINING."""
    made = io.BytesIO()
    defaults = {"character_coverage": 1.0, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING * 4), model_writer=made, model_type=kind, **{**defaults, **options}
    )
    return made.getvalue()


def llama() -> bytes:
    return spm(
        "bpe", vocab_size=420, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
    )


def gemma() -> bytes:
    return spm(
        "bpe",
        vocab_size=430,
        byte_fallback=True,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        bos_piece="<bos>",
        eos_piece="<eos>",
        control_symbols=["<mask>"],
        user_defined_symbols=["▁▁", "▁▁▁", "▁▁▁▁", "<start_of_turn>"],
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
    )


def t5() -> bytes:
    return spm("unigram", vocab_size=140, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


def xlm(**options: Any) -> bytes:
    return spm("unigram", vocab_size=140, **options)


def nllb() -> bytes:
    return spm("bpe", vocab_size=200)


def pegasus() -> bytes:
    return spm("unigram", vocab_size=140, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


def trained(lines: list[str], kind: str = "unigram", **options: Any) -> bytes:
    """A SentencePiece model of some lines alone."""
    made = io.BytesIO()
    defaults = {"character_coverage": 1.0, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 12), model_writer=made, model_type=kind, **{**defaults, **options}
    )
    return made.getvalue()


def pieces_of(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def marian(kind: str = "unigram") -> dict[str, bytes]:
    """Two SentencePiece models and one vocab.json, whose ids are those of neither, as Opus-MT's folders have them."""
    source, target = trained(TRAINING[:2], kind, vocab_size=90), trained(TRAINING[2:4], kind, vocab_size=80)
    order = dict.fromkeys(["</s>", "<unk>", ">>fra<<", ">>deu<<", *sorted(pieces_of(source) + pieces_of(target))])
    texts = [text for text in order if text != "<s>"] + ["<pad>"]
    vocab = {text: i for i, text in enumerate(texts)}
    return {"source.spm": source, "target.spm": target, "vocab.json": json.dumps(vocab).encode()}


def m2m100(kind: str) -> dict[str, bytes]:
    model = spm(kind, vocab_size=140 if kind == "unigram" else 200)
    behind = [text for text in sorted(pieces_of(model)) if text not in ("<s>", "</s>", "<unk>")]
    vocab = {text: i for i, text in enumerate(["<s>", "<pad>", "</s>", "<unk>", *behind])}
    return {"sentencepiece.bpe.model": model, "vocab.json": json.dumps(vocab).encode()}


def ranked(expression: str = CUT) -> list[bytes]:
    """Byte-level tokens in the order of their ranks."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(expression_of(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        TRAINING, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    letters = {letter: byte for byte, letter in byte_level._LETTERS.items()}
    vocab = library.get_vocab()
    return [bytes(letters[c] for c in token) for token in sorted(vocab, key=lambda token: vocab[token])]


def expression_of(text: str) -> Any:
    from tokenizers import Regex

    return Regex(text)


def tiktoken_file() -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranked()))


def tekken(padding: int = 0) -> dict[str, Any]:
    words = ranked(PRE_TOKENIZERS["tekken"].expressions[0])
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
    return {
        "config": {
            "pattern": PRE_TOKENIZERS["tekken"].expressions[0],
            "num_vocab_tokens": len(words) + padding,
            "default_vocab_size": len(words) + 10,
            "default_num_special_tokens": 10,
            "version": "v3",
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(w).decode(), "token_str": None} for i, w in enumerate(words)
        ]
        + [{"rank": len(words) + i, "token_bytes": base64.b64encode(b"pad%d" % i).decode()} for i in range(padding)],
        "special_tokens": [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(special)],
    }


def two_files(special: list[str]) -> dict[str, bytes]:
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(TRAINING, trainer)
    model = json.loads(library.to_str())["model"]
    merges = "\n".join(["#version: 0.2", *(m if isinstance(m, str) else " ".join(m) for m in model["merges"])])
    return {"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": (merges + "\n").encode()}


def words() -> bytes:
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library.train_from_iterator(
        TRAINING, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    vocab = library.get_vocab()
    return ("\n".join(sorted(vocab, key=lambda token: vocab[token])) + "\n").encode()


def a_class(name: str, **more: Any) -> dict[str, Any]:
    return {"tokenizer_class": name, **more}


BOS = {"add_bos_token": True, "add_eos_token": False}
AS_TOKEN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
LLAMA3_ADDED = {
    str(400 + i): {"content": text, **AS_TOKEN} for i, text in enumerate(["<|begin_of_text|>", "<|end_of_text|>"])
}
M2M100_EXTRA = [f"__{code}__" for code in languages.M2M100]
NLLB_ADDED = {
    str(i): {"content": text, **AS_TOKEN, "lstrip": text == "<mask>"}
    for i, text in [
        *enumerate(["<s>", "<pad>", "</s>", "<unk>"]),
        *enumerate([*languages.NLLB, "<mask>"], len(pieces_of(nllb())) + 1),
    ]
}
"""As transformers writes it; without it transformers' class gives a text no language at all."""
CASES: dict[str, tuple[Callable[[], dict[str, bytes]], dict[str, Any] | None, str]] = {
    "llama": (lambda: {"tokenizer.model": llama()}, a_class("LlamaTokenizer", **BOS), "llama"),
    "llama legacy": (
        lambda: {"tokenizer.model": llama()},
        a_class("LlamaTokenizer", legacy=True, add_bos_token=True, add_eos_token=True),
        "llama",
    ),
    "llama no prefix": (
        lambda: {"tokenizer.model": llama()},
        a_class("LlamaTokenizerFast", add_prefix_space=False, pad_token="<unk>", **BOS),
        "mistral",
    ),
    "llama added": (
        lambda: {"tokenizer.model": llama(), "added_tokens.json": b'{"<|im_end|>": 421, "<|im_start|>": 420}'},
        a_class("LlamaTokenizer", additional_special_tokens=["<|im_start|>", "<|im_end|>"], **BOS),
        "llama",
    ),
    "gemma": (lambda: {"tokenizer.model": gemma()}, a_class("GemmaTokenizer", **BOS), "gemma2"),
    "t5": (lambda: {"spiece.model": t5()}, a_class("T5Tokenizer", extra_ids=100), "t5"),
    "mt5": (lambda: {"spiece.model": t5()}, a_class("T5Tokenizer", extra_ids=0), "mt5"),
    "t5 by its type": (lambda: {"spiece.model": t5()}, None, "t5"),
    "xlm-roberta": (lambda: {"sentencepiece.bpe.model": xlm()}, a_class("XLMRobertaTokenizer"), "xlm-roberta"),
    "mbart": (
        lambda: {"sentencepiece.bpe.model": xlm(normalization_rule_name="identity")},
        a_class("MBartTokenizer", src_lang="fr_XX"),
        "mbart",
    ),
    "mbart50": (
        lambda: {"sentencepiece.bpe.model": xlm()},
        a_class("MBart50Tokenizer", src_lang="fr_XX"),
        "mbart",
    ),
    "mbart50 without normalization": (
        lambda: {"sentencepiece.bpe.model": xlm(normalization_rule_name="identity")},
        a_class("MBart50Tokenizer"),
        "mbart",
    ),
    "nllb": (
        lambda: {"sentencepiece.bpe.model": nllb()},
        a_class("NllbTokenizer", src_lang="fra_Latn", added_tokens_decoder=NLLB_ADDED),
        "m2m_100",
    ),
    "nllb with its language behind": (
        lambda: {"sentencepiece.bpe.model": nllb()},
        a_class("NllbTokenizer", legacy_behaviour=True, added_tokens_decoder=NLLB_ADDED),
        "m2m_100",
    ),
    "m2m100 of bpe": (
        lambda: m2m100("bpe"),
        a_class("M2M100Tokenizer", src_lang="fr", additional_special_tokens=M2M100_EXTRA),
        "m2m_100",
    ),
    "m2m100 of unigram": (
        lambda: m2m100("unigram"),
        a_class("M2M100Tokenizer", additional_special_tokens=M2M100_EXTRA),
        "m2m_100",
    ),
    "pegasus": (lambda: {"spiece.model": pegasus()}, a_class("PegasusTokenizer"), "pegasus"),
    "pegasus by its type": (lambda: {"spiece.model": pegasus()}, None, "pegasus"),
    "tiktoken": (
        lambda: {"tokenizer.model": tiktoken_file()},
        a_class("PreTrainedTokenizerFast", added_tokens_decoder=LLAMA3_ADDED, bos_token="<|begin_of_text|>", **BOS),
        "llama",
    ),
    "tekken": (
        lambda: {"tekken.json": json.dumps(tekken()).encode()},
        a_class(
            "PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", **BOS
        ),
        "mistral",
    ),
    "tekken padded": (
        lambda: {"tekken.json": json.dumps(tekken(7)).encode()},
        a_class(
            "PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", **BOS
        ),
        "mistral",
    ),
    "gpt2": (lambda: two_files(["<|endoftext|>"]), a_class("GPT2Tokenizer"), "gpt2"),
    "gpt2 with a prefix": (
        lambda: two_files(["<|endoftext|>"]),
        a_class("GPT2Tokenizer", add_prefix_space=True, add_bos_token=True),
        "gpt2",
    ),
    "qwen2": (lambda: two_files(["<|endoftext|>"]), a_class("Qwen2Tokenizer"), "qwen2"),
    "roberta": (lambda: two_files(ROBERTA), a_class("RobertaTokenizer"), "roberta"),
    "bart": (lambda: two_files(ROBERTA), None, "bart"),
    "bert": (lambda: {"vocab.txt": words()}, a_class("BertTokenizer"), "bert"),
    "bert with case": (
        lambda: {"vocab.txt": words()},
        a_class("BertTokenizer", do_lower_case=False, strip_accents=False, tokenize_chinese_chars=False),
        "bert",
    ),
}


def written(folder: Path, case: str) -> Path:
    make, config, model_type = CASES[case]
    folder.mkdir(parents=True)
    for name, content in make().items():
        (folder / name).write_bytes(content)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.parametrize("case", sorted(CASES))
def test_it_is_transformers_tokenizer(tmp_path: Path, case: str) -> None:
    folder = written(tmp_path / "in", case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_dir(folder)
    tokenizer.save(tmp_path / "out")  # as a bundle keeps it
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    for ours in (tokenizer, Tokenizer.from_dir(tmp_path / "out")):
        assert_like(ours, theirs, TEXTS, trimmed=case.startswith("m2m100"))


MARIAN_TEXTS = [*TEXTS, *TRAINING, ">>fra<< hello world", ">>deu<<how are you?", "</s> hello", "\u00a0quick\u3000fox  "]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("declared", [True, False])
def test_marian_reads_with_one_file_and_the_ids_of_another(tmp_path: Path, kind: str, declared: bool) -> None:
    for name, content in marian(kind).items():
        (tmp_path / name).write_bytes(content)
    config = a_class("MarianTokenizer", source_lang="en", target_lang="fr")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config if declared else {}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "marian"}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_dir(tmp_path)
    pieces = set(pieces_of((tmp_path / "source.spm").read_bytes()))
    special = {"</s>", "<unk>", "<pad>", ">>fra<<", ">>deu<<"}
    # A run of characters that source.spm has not is one unknown piece there, and here each is looked up.
    runs = [
        text for text in MARIAN_TEXTS if any(len(p) > 1 and p not in pieces | special for p in theirs.tokenize(text))
    ]
    texts = [text for text in MARIAN_TEXTS if text not in runs]
    assert (len(texts), len(MARIAN_TEXTS)) == (26, 34)
    ours.save(tmp_path / "out")
    for each in (ours, Tokenizer.from_dir(tmp_path / "out")):
        assert_like(each, theirs, texts, trimmed=True)
        assert each.spelling(each.encode("好", special=False)[-1]) == "好" == theirs.tokenize("好")[-1]
        assert [each.spelling(i) for i in each.encode("你好", special=False)][-2:] == ["你", "好"]
    answer = [theirs.convert_tokens_to_ids(text) for text in pieces_of((tmp_path / "target.spm").read_bytes())[3:]]
    assert ours.decode(answer) == theirs.decode(answer, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.exports
def test_a_marian_bundle_reads_and_writes_text_as_transformers(tmp_path: Path) -> None:
    """Its folder as Opus-MT publishes it, exported; what `run` reads of a prompt and makes of tokens."""
    files = marian()
    size = len(json.loads(files["vocab.json"]))
    ends = {"eos_token_id": 0, "pad_token_id": size - 1, "decoder_start_token_id": size - 1}
    folder = tiny.write(tmp_path / "model", FAMILIES["marian"] | {"vocab_size": size, **ends})
    (folder / "generation_config.json").write_text(json.dumps({**ends, "max_new_tokens": 8}))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(folder)
    compiler.export(asking(str(folder), bits=8.0, max_context=48, verify=False), tmp_path / "bundle")
    opened = open_bundle(tmp_path / "bundle", "onnx", threads=1)
    for text in ("hello world", ">>fra<< the quick brown fox"):
        assert opened.read_prompt(text).ids == theirs(text)["input_ids"]
    answer = "".join(opened.generate(theirs("hello world")["input_ids"]))
    spec = Bundle.open(tmp_path / "bundle").manifest.generation
    session = open_session(Bundle.open(tmp_path / "bundle"), "onnx", 1)
    ids = list(generate(session, spec, theirs("hello world")["input_ids"], 8))
    assert len(ids) > 1
    assert answer.strip() == theirs.decode(ids, skip_special_tokens=True)


def test_marian_with_two_vocabularies_is_refused(tmp_path: Path) -> None:
    for name, content in marian().items():
        (tmp_path / name).write_bytes(content)
    config = a_class("MarianTokenizer", separate_vocabs=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert "separate_vocabs" in refused(tmp_path)


def test_a_piece_that_vocab_json_lacks_is_not_used(tmp_path: Path) -> None:
    files = marian()
    vocab = json.loads(files["vocab.json"])
    longest = max((p for p in pieces_of(files["source.spm"]) if p in vocab and "<" not in p), key=len)
    kept = {text: i for i, text in enumerate(text for text in vocab if text != longest)}
    for name, content in (files | {"vocab.json": json.dumps(kept).encode()}).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "marian"}))
    ours = Tokenizer.from_dir(tmp_path)
    ids = ours.encode(longest.replace("▁", " "), special=False)
    assert len(ids) > 1
    assert "".join(map(ours.spelling, ids)).lstrip("▁") == longest.lstrip("▁")


@pytest.mark.parametrize("file", ["source.spm", "sentencepiece.bpe.model"])
def test_the_file_with_the_ids_is_asked_for(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(nllb())
    kind = "MarianTokenizer" if file == "source.spm" else "M2M100Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    assert "vocab.json, which says what ids" in refused(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_token_sent": None}, "mask_token_sent None; <mask_1> is read"),
        ({"mask_token": {"content": "[MASK]"}}, "mask_token"),
        ({"offset": 0}, "offset 0; 2 to 4096 are read"),
        ({"offset": True}, "offset True"),
    ],
)
def test_a_pegasus_with_other_ids_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    (tmp_path / "spiece.model").write_bytes(pegasus())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PegasusTokenizer", **settings}))
    assert words in refused(tmp_path)


def test_nllb_has_its_languages_where_no_file_lists_them(tmp_path: Path) -> None:
    (tmp_path / "sentencepiece.bpe.model").write_bytes(nllb())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "m2m_100"}))
    ours = Tokenizer.from_dir(tmp_path)
    first = len(pieces_of(nllb())) + 1
    assert [ours.token_id(text) for text in ("ace_Arab", "zul_Latn", "<mask>")] == [first, first + 201, first + 202]
    assert ours.encode("") == [ours.token_id("eng_Latn"), 2]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (llama, "LlamaTokenizer"),
        (llama, None),
        (gemma, "GemmaTokenizer"),
        (t5, "T5Tokenizer"),
        (xlm, None),
        (lambda: spm("unigram", vocab_size=420, byte_fallback=True), None),
        (lambda: spm("bpe", vocab_size=420, byte_fallback=True, remove_extra_whitespaces=False), None),
    ],
    ids=["llama", "no class", "gemma", "t5", "unigram, no class", "unigram with bytes", "bpe with nfkc"],
)
def test_ids_are_those_of_sentencepiece(tmp_path: Path, make: Callable[[], bytes], kind: str | None) -> None:
    file = tmp_path / ("tokenizer.model" if kind != "T5Tokenizer" else "spiece.model")
    file.write_bytes(make())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} if kind else {}))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ours = Tokenizer.from_dir(tmp_path)
    compared = 0
    for text in TEXTS:
        # SentencePiece does not read control symbols in a text; Llama's class puts no mark before a space.
        if "<" in text or (kind == "LlamaTokenizer" and text[:1] == " "):
            continue
        ids = theirs.encode(text)
        assert ours.encode(text, special=False) == ids, text
        if theirs.unk_id() not in ids:
            assert ours.decode(ids) == theirs.decode(ids), text
            compared += 1
    assert compared > 5
    assert ours.token_id(theirs.id_to_piece(theirs.unk_id())) == theirs.unk_id()


def test_ids_are_those_of_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ranked()
    monkeypatch.setattr(byte_level, "_LLAMA3_IDS", len(words))
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_file())
    ours = Tokenizer.from_dir(tmp_path)
    special = {token: len(words) + i for i, token in enumerate(byte_level._LLAMA3)}
    theirs = tiktoken.Encoding(
        "llama3", pat_str=CUT, mergeable_ranks={word: i for i, word in enumerate(words)}, special_tokens=special
    )
    for text in [*TEXTS, *TRAINING, "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"]:
        ids = theirs.encode(text, allowed_special="all")
        assert ours.encode(text) == [len(words), *ids], text
        assert ours.decode(ids) == theirs.decode([i for i in ids if i < len(words)]), text
    assert len(special) == 256
    assert ours.token_id("<|eot_id|>") == len(words) + 9
    assert ours.vocab_size == len(words) + 256


def test_qwens_first_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ranked()
    monkeypatch.setattr(byte_level, "_QWEN_IDS", len(words))
    (tmp_path / "qwen.tiktoken").write_bytes(tiktoken_file())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer"}))
    ours = Tokenizer.from_dir(tmp_path)
    assert ours.encode("e\u0301") == ours.encode("\xe9")
    assert ours.encode("<|im_start|>") == [len(words) + 1]
    assert ours.eos_ids == {len(words)}
    assert ours.vocab_size == len(words) + 208


def test_bos_is_put_before_a_text_where_no_file_says_otherwise(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(llama())
    (tmp_path / "params.json").write_text("{}")
    assert Tokenizer.from_dir(tmp_path).encode("")[:1] == [1]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert Tokenizer.from_dir(tmp_path).encode("hello")[:1] != [1]


@pytest.mark.parametrize("declared", [True, False])
def test_qwen2_brings_a_text_to_nfc(tmp_path: Path, declared: bool) -> None:
    for name, content in two_files(["<|endoftext|>"]).items():
        (tmp_path / name).write_bytes(content)
    config = a_class("Qwen2Tokenizer" if declared else "PreTrainedTokenizerFast", eos_token="<|endoftext|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2" if declared else "granite"}))
    if declared:
        Tokenizer.from_dir(tmp_path).save(tmp_path)
        value = json.loads((tmp_path / "tokenizer.json").read_text())
        assert value["normalizer"] == {"type": "NFC"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        vocabulary = Library(models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
        vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        vocabulary.save(str(tmp_path / "tokenizer.json"))
        value = json.loads((tmp_path / "tokenizer.json").read_text())
    value["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_dir(tmp_path)
    assert ours.encode("e\u0301 \xe9") == theirs("e\u0301 \xe9")["input_ids"]
    assert (ours.encode("e\u0301") == ours.encode("\xe9")) is declared


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(llama())
    for name in ("sentencepiece", "sentencepiece.sentencepiece_model_pb2"):
        monkeypatch.setitem(sys.modules, name, None)
    line = refused(tmp_path)
    assert "pip install 'edgewright[tokenizers]'" in line


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Tokenizer.from_dir(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("BigBirdTokenizer", "spiece.model"),
        ("CLIPTokenizer", "vocab.json"),
        ("LayoutLMTokenizer", "vocab.txt"),
    ],
)
def test_classes_that_are_not_read_are_named(tmp_path: Path, name: str, file: str) -> None:
    for each in {file, "merges.txt"}:
        (tmp_path / each).write_bytes(b"{}")
    if file.endswith(".model"):
        (tmp_path / file).write_bytes(xlm())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    assert name in (line := refused(tmp_path))
    assert "save_pretrained" in line


def changed_proto(**fields: Any) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(llama())
    for key, value in fields.items():
        if key == "piece":
            proto.pieces[300].piece = value
        elif key == "score":
            proto.pieces[300].score = value
        elif key == "model_type":
            proto.trainer_spec.model_type = value
        elif key == "types":
            for piece in proto.pieces:
                piece.type = value
        else:
            setattr(proto.normalizer_spec, key, value)
    return bytes(proto.SerializeToString())


def tekken_with(**changes: Any) -> bytes:
    value = tekken()
    value["config"] |= changes.pop("config", {})
    return json.dumps(value | changes).encode()


MERGES = b"#version: 0.2\na b\n"
HOSTILE: list[tuple[dict[str, bytes], str]] = [
    ({"tokenizer.model": b""}, "neither a SentencePiece model"),
    ({"tokenizer.model": b"\n" + b"\xff" * 300}, "not a SentencePiece model"),
    ({"tokenizer.model": b"\n\x00" * 5}, "a piece '' of 0 characters"),
    ({"tokenizer.model": changed_proto(piece="a" * 1025)}, "of 1025 characters"),
    ({"tokenizer.model": changed_proto(piece="<unk>")}, "'<unk>' twice"),
    ({"tokenizer.model": changed_proto(score=float("nan"))}, "a score of nan"),
    ({"tokenizer.model": changed_proto(model_type=3)}, "LlamaTokenizer has BPE"),
    ({"tokenizer.model": changed_proto(types=1)}, "0 pieces for what is unknown"),
    ({"tokenizer.model": changed_proto(escape_whitespaces=False)}, "escape_whitespaces"),
    ({"tokenizer.model": changed_proto(precompiled_charsmap=b"\xff" * 40)}, "tokenizer.model: "),
    ({"tokenizer.model": b"YQ== 0\nYg== x\n"}, "not a token in base64"),
    ({"tokenizer.model": b"YQ== 0\nYg= 1\n"}, "is no base64"),
    ({"tokenizer.model": b"YQ== 0\nYg== 7\n"}, "no special tokens beside them"),
    (
        {"tokenizer.model": tiktoken_file(), "tokenizer_config.json": b'{"added_tokens_decoder": {"9999999": "x"}}'},
        "above",
    ),
    (
        {"tokenizer.model": b"YQ== 0\nYg== 7\n", "tokenizer_config.json": b'{"added_tokens_decoder": {"2": "x"}}'},
        "ranks from 0 on",
    ),
    (
        {"tokenizer.model": b"YQ== 0\nYg== 1\n", "tokenizer_config.json": b'{"added_tokens_decoder": {"2": "x"}}'},
        "256 bytes",
    ),
    ({"tekken.json": b"{}"}, "no config with a pattern"),
    ({"tekken.json": tekken_with(special_tokens=None)}, "an old tekken.json"),
    ({"tekken.json": tekken_with(special_tokens=[{"rank": 3, "token_str": "x"}])}, "ranks from 0 on"),
    ({"tekken.json": tekken_with(config={"default_num_special_tokens": 1 << 30})}, "default_num_special_tokens is"),
    ({"tekken.json": tekken_with(config={"default_vocab_size": -1})}, "default_vocab_size is -1"),
    ({"tekken.json": tekken_with(vocab=[{"token_bytes": 3}])}, "has no token_bytes"),
    ({"tekken.json": tekken_with(config={"pattern": "("})}, "tekken.json: "),
    ({"tekken.json": tekken_with(config={"pattern": "a" * 9000})}, "a string of 9000"),
    ({"sentencepiece.bpe.model": nllb(), "vocab.json": b'{"a": 0, "b": 2}'}, "do not have the ids from 0 on"),
    ({"sentencepiece.bpe.model": nllb(), "vocab.json": b'{"a": true}'}, "each with its id"),
    ({"sentencepiece.bpe.model": nllb(), "vocab.json": b'{"a": 0}'}, "no token '<s>'"),
    (
        {"sentencepiece.bpe.model": nllb(), "vocab.json": b'{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}'},
        "none of its",
    ),
    ({"sentencepiece.bpe.model": nllb(), "tokenizer_config.json": b'{"src_lang": "xx"}'}, "src_lang 'xx'"),
    ({"vocab.json": b'{"a": 0, "b": 0}', "merges.txt": MERGES}, "an id of its own"),
    ({"vocab.json": b'{"a": 0, "b": "x"}', "merges.txt": MERGES}, "an id of its own"),
    ({"vocab.json": b'{"a": 0, "b": 99999999}', "merges.txt": MERGES}, "an id of its own"),
    ({"vocab.json": b"{}", "merges.txt": MERGES}, "an id of its own|no tokens"),
    ({"vocab.json": b'{"a": 0, "b": 1}', "merges.txt": b"a b c\n"}, "line 1 of merges.txt is not two pieces"),
    ({"vocab.json": b'{"a": 0, "b": 1}', "merges.txt": MERGES}, "not a tokenizer the tokenizers library reads"),
    ({"vocab.txt": b"[PAD]\n"}, r"no token '\[UNK\]'"),
    ({"vocab.txt": b"[UNK]\n" + b"a" * 2000}, "of up to 1024 characters"),
    ({"vocab.txt": b"[UNK]\na\n", "tokenizer_config.json": b'{"do_lower_case": 3}'}, "do_lower_case is '3'"),
    ({"vocab.txt": b"[UNK]\n[SEP]\n", "tokenizer_config.json": b'{"cls_token": "$A"}'}, "cannot be put around"),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_files_that_are_broken_or_hostile_are_one_line(tmp_path: Path, number: int) -> None:
    files, reason = HOSTILE[number]
    fairseq = "sentencepiece.bpe.model" in files
    kind = "m2m_100" if fairseq else "gpt2" if "vocab.json" in files else "bert" if "vocab.txt" in files else "llama"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert re.search(reason, refused(tmp_path))


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.model").open("wb") as file:
        file.write(b"\n")
        file.truncate(33 << 20)
    assert "bytes, more than" in refused(tmp_path)


def test_more_pieces_than_a_vocabulary_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece_file, "MOST_TOKENS", 100)
    (tmp_path / "tokenizer.model").write_bytes(llama())
    assert "pieces, 1 to 100 are read" in refused(tmp_path)


def test_no_vocabulary_at_all(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    assert "no other file with a vocabulary" in refused(tmp_path)
