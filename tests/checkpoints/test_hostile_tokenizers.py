"""Tokenizers that ask for too much, panic or never return end in one line; honest ones load as the library loads them."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from helpers.vocabularies import changed, letters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from edgewright.checkpoints import tokenizer as tokenizer_module
from edgewright.checkpoints import tokenizer_backend, tokenizer_checks
from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.checkpoints.tokenizer_backend import read_backend
from edgewright.checkpoints.tokenizer_settings import settings_of
from edgewright.errors import UserError
from edgewright.system.time_limit import OutOfTime, within

SLOW = "t*t*t*t*u"
RUN = "t" * 110 + "-u "
"""On each run of t the pattern backtracks for more than a second, and stays below the limit of the library."""


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(steps: list[dict[str, Any]], key: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", key: steps}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def template(single: list[Any], ids: list[int]) -> dict[str, Any]:
    tokens = {"<bos>": {"id": "<bos>", "ids": ids, "tokens": ["<bos>"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens}


def nested(depth: int) -> dict[str, Any]:
    return sequence([nested(depth - 1)]) if depth else {"type": "NFC"}


BOMB = sequence([replace("k", "kk")] * 20)
CHARSMAP = base64.b64encode((0).to_bytes(4, "little") + b"a\0" + b"x" * 90000 + b"\0").decode()
ADDED = {"id": 7, "content": "k", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
TEXT_A = {"Sequence": {"id": "A", "type_id": 0}}
BOS = {"SpecialToken": {"id": "<bos>", "type_id": 0}}


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"normalizer": BOMB}, r"1\.05e\+06 bytes of one"),
        ({"normalizer": BOMB, "added_tokens": [{**ADDED, "special": False}]}, "bytes of one"),
        ({"normalizer": {"normalizers": [{"pattern": {"String": "k"}, "content": "k" * 300}] * 2}}, "bytes of one"),
        ({"normalizer": sequence([replace("", "k" * 300)] * 2)}, "bytes of one"),
        ({"normalizer": sequence([replace("x*", "k" * 300, "Regex")] * 2)}, "bytes of one"),
        ({"normalizer": sequence([{"type": "Prepend", "prepend": "k" * 80}] * 3)}, "bytes of one"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}}, "bytes of one"),
        ({"normalizer": sequence([{"type": "ByteLevel"}] * 17)}, "bytes of one"),
        ({"normalizer": sequence([{"type": "NFC"}] * 65)}, "more than 64 steps"),
        ({"normalizer": nested(20)}, "within each other"),
        ({"normalizer": replace("k" * 9000, "n")}, "a string of 9000 characters"),
        (
            {"pre_tokenizer": sequence([{"type": "Digits", "individual_digits": True}] * 65, "pretokenizers")},
            "64 steps",
        ),
        ({"post_processor": template([BOS, TEXT_A], [2] * 1000)}, "adds more than 64 tokens"),
        ({"post_processor": template([TEXT_A] * 5, [])}, "repeats the text"),
        ({"decoder": sequence([replace("k", "kk")] * 20, "decoders")}, "its decoder may make"),
        ({"decoder": sequence([{"type": "BPEDecoder", "suffix": ""}] * 20, "decoders")}, "its decoder may make"),
        *[
            ({"decoder": replace(regex, "", "Regex")}, "its decoder has the regular expression")
            for regex in ("(k*)*n", "(?:k|kk)+n", "k*k*n", "(?:k|k)(?:k|k)n", "(?~k)(?~k)n", r"(?<a>|k\g<a>)\g<a>n")
        ],
        (
            {
                "normalizer": replace("k", "kk" * 500),
                "added_tokens": [{**ADDED, "content": "k" * 70, "special": False}],
            },
            "its added token 7 may become",
        ),
    ],
)
def test_what_no_tokenizer_needs_is_refused(tmp_path: Path, parts: dict[str, Any], reason: str) -> None:
    changed(letters(tmp_path), **parts)
    with pytest.raises(UserError, match=rf"tokenizer\.json: a tokenizer that is not loaded here: .*{reason}") as caught:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(caught.value)


def test_decoders_with_plain_regular_expressions(tmp_path: Path) -> None:
    steps = [
        replace("▁", " ", "Regex"),
        {"type": "Fuse"},
        replace(r"(?<!\n)^ ", "", "Regex"),
        replace(r"\s+", "_", "Regex"),
    ]
    model = {"type": "WordLevel", "vocab": {"▁k": 0, "a": 1}, "unk_token": "a"}
    changed(letters(tmp_path), model=model, added_tokens=[], decoder=sequence(steps, "decoders"))
    assert Tokenizer.from_dir(tmp_path).decode([0, 1, 0]) == "ka_k"


@pytest.mark.parametrize(
    ("pattern", "content", "growth"),
    [
        ({"String": " "}, "▁", 3),
        ({"String": "``"}, '"', 1),
        ({"Regex": " {2,}"}, "▁", 1.5),
        ({"Regex": r"\s+"}, " ", 1),
        ({"Regex": "[abc] d?"}, "xyz", 1.5),
        ({"Regex": "a*"}, "xyz", 7),
        ({"Regex": "(a|b)"}, "", 1),
        ({"Regex": "(?=a)"}, "xyz", 7),
        ({"String": ""}, "xyz", 7),
    ],
)
def test_what_a_replacement_makes_of_a_byte(pattern: dict[str, str], content: str, growth: float) -> None:
    part = {"type": "Replace", "pattern": pattern, "content": content}
    assert tokenizer_checks.check({"normalizer": part}).growth == growth


@pytest.mark.parametrize("place", ["before", "after", "twice", "escaped"])
def test_a_part_is_checked_wherever_it_stands(tmp_path: Path, place: str) -> None:
    file = letters(tmp_path) / "tokenizer.json"
    value = json.loads(file.read_text())
    model, rest = value.pop("model"), {**value, "normalizer": None}
    bomb, first, last = json.dumps(BOMB), json.dumps(rest)[1:-1], json.dumps(model)
    file.write_text(
        {
            "before": f'{{{first}, "normalizer": {bomb}, "model": {last}}}',
            "after": f'{{{first}, "model": {last}, "normalizer": {bomb}}}',
            "twice": f'{{{first}, "model": {last}, "normalizer": {bomb}, "model": {last}}}',
            "escaped": f'{{{first}, "model": {last}, "norm\\u0061lizer": {bomb}}}',
        }[place]
    )
    with pytest.raises(UserError, match="bytes of one"):
        Tokenizer.from_dir(tmp_path)


def test_a_file_whose_model_is_not_last_is_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = letters(tmp_path) / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True))
    assert Tokenizer.from_dir(tmp_path).encode("k n") == [4, 5]
    monkeypatch.setattr(tokenizer_backend, "_LARGEST_WHOLE", 100)
    with pytest.raises(UserError, match="its model is not the last of its parts"):
        Tokenizer.from_dir(tmp_path)


def test_padding_to_any_length_is_off_before_the_first_text(tmp_path: Path) -> None:
    padding = {"strategy": {"Fixed": 10**15}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    changed(letters(tmp_path), padding=padding)
    assert Tokenizer.from_dir(tmp_path).encode("k") == [4]


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"pre_tokenizer": split("(")},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": {"type": "WordLevel", "vocab": {"k": 0}, "unk_token": "<unk>"}},
        {"model": {"type": "WordLevel", "vocab": {"\ud800": 0}, "unk_token": "<unk>"}},
        {"added_tokens": [{"content": "k"}]},
        {"added_tokens": [3]},
        {"added_tokens": {"a": 1}},
        {"added_tokens": [{**ADDED, "content": "\ud800", "special": False}]},
    ],
)
def test_what_the_library_refuses_or_panics_on_at_once(
    tmp_path: Path, parts: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    changed(letters(tmp_path), **parts)
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer the tokenizers library reads") as caught:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_regular_expression_that_backtracks_is_a_panic_of_the_library(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(changed(letters(tmp_path), pre_tokenizer=split("(?:t|tt)+u")))
    assert tokenizer.encode("k") == [4]
    with pytest.raises(UserError, match=r"the tokenizer fails on text 'ttt.*retry-limit") as caught:
        tokenizer.encode("t" * 60 + "-u")
    assert "\n" not in str(caught.value)


def test_a_text_on_which_the_library_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_dir(changed(letters(tmp_path), pre_tokenizer=split(SLOW)))
    monkeypatch.setattr(tokenizer_backend, "ENCODE_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(UserError, match="takes too long on a text of"):
        tokenizer.encode(RUN * 2)
    assert time.monotonic() - start < 2
    monkeypatch.undo()
    assert tokenizer.encode("k") == [4]  # the thread that hangs is in nobody's way


def test_added_tokens_on_which_the_library_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = {**ADDED, "content": RUN * 2, "special": False}
    changed(letters(tmp_path), normalizer=replace(SLOW, "", "Regex"), added_tokens=[token])
    monkeypatch.setattr(tokenizer_backend, "ENCODE_SECONDS", 0.2)
    with pytest.raises(UserError, match="it takes too long on its own tokens"):
        Tokenizer.from_dir(tmp_path)


def test_ctrl_c_ends_a_call_that_hangs(tmp_path: Path) -> None:
    changed(letters(tmp_path), pre_tokenizer=split(SLOW))
    program = (
        "from edgewright.checkpoints.tokenizer import Tokenizer\n"
        f"t = Tokenizer.from_dir({str(tmp_path)!r}); print('ready', flush=True); t.encode({RUN!r} * 100)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(5) != 0
        finally:
            process.kill()
        assert b"KeyboardInterrupt" in process.stderr.read()


def test_a_word_that_the_vocabulary_cannot_spell(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"k": 4, "a": 5}, "unk_token": "<unk>"}
    tokenizer = Tokenizer.from_dir(changed(letters(tmp_path), model=model, added_tokens=[]))
    assert tokenizer.encode("k a") == [4, 5]
    with pytest.raises(UserError, match="the tokenizer fails on text 'n'"):
        tokenizer.encode("n")


def test_a_text_that_would_grow_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_dir(changed(letters(tmp_path), normalizer=replace("k", "k n ")))
    assert tokenizer.encode("kk") == [4, 5, 4, 5]
    monkeypatch.setattr(tokenizer_checks, "MOST_BYTES", 4000)
    assert len(tokenizer.encode("k" * 1000)) == 2000
    with pytest.raises(UserError, match="a text of 1001 bytes is too long for this tokenizer, which takes 1000"):
        tokenizer.encode("k" * 1001)
    with pytest.raises(UserError, match="a text of 1002 bytes"):
        tokenizer.encode("é" * 501)


def test_a_decoder_that_panics(tmp_path: Path) -> None:
    vocab = {"": 0, "<unk>": 1, "k": 2}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    decoder = {"type": "Strip", "content": " ", "start": 0, "stop": 1}
    tokenizer = Tokenizer.from_dir(changed(letters(tmp_path), model=model, decoder=decoder, added_tokens=[]))
    assert tokenizer.decode([2]) == "k"
    with pytest.raises(UserError, match="the tokenizer fails on tokens"):
        tokenizer.decode([2, 0])
    stream = tokenizer.stream()
    assert stream.put(2) == "k"
    with pytest.raises(UserError, match="the tokenizer fails on tokens"):
        stream.put(0)


def test_tokens_that_decode_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"type": "WordLevel", "vocab": {"k" * 500: 0, "<unk>": 1}, "unk_token": "<unk>"}
    tokenizer = Tokenizer.from_dir(changed(letters(tmp_path), model=model, added_tokens=[]))
    monkeypatch.setattr(tokenizer_module, "MOST_BYTES", 4000)
    assert len(tokenizer.decode([0, 0])) == 1001
    with pytest.raises(UserError, match="makes 1500 characters"):
        tokenizer.decode([0, 0, 0])
    stream = tokenizer.stream()
    assert len(stream.put(0) + stream.put(0)) == 1001
    with pytest.raises(UserError, match="makes 1500 characters"):
        stream.put(0)


def test_ids_to_which_the_library_would_count(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"k": 2**32 - 2, "<unk>": 1}, "unk_token": "<unk>"}
    tokenizer = Tokenizer.from_dir(changed(letters(tmp_path), model=model, added_tokens=[]))
    assert tokenizer.encode("k") == [2**32 - 2]
    with pytest.raises(UserError, match="a token with id 4294967294"):
        tokenizer.save(tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"bos_token": "\ud800"}, "token '.*ud800'"),
        ({"eos_token": {"content": "a\udfff"}}, "token 'a.*udfff'"),
    ],
)
def test_named_tokens_that_are_no_unicode(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Tokenizer.from_dir(letters(tmp_path, **config))


def test_settings_that_cannot_be_written_as_they_are(tmp_path: Path) -> None:
    letters(
        tmp_path,
        other="\ud800",
        chat_template=[{"name": [], "template": "x"}, {"name": "default", "template": "\ud800"}],
    )
    Tokenizer.from_dir(tmp_path).save(tmp_path / "out")
    assert Tokenizer.from_dir(tmp_path / "out").chat_template == "\ud800"
    deep: Any = []
    for _ in range(2000):
        deep = [deep]
    backend, limits = read_backend(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(backend, settings_of({"other": deep}), limits)
    with pytest.raises(UserError, match="too deep"):
        tokenizer.save(tmp_path / "deep" / "out")


def test_a_call_has_a_limit_of_time() -> None:
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
    with pytest.raises(OutOfTime):
        within(0.01, lambda: time.sleep(1))


NORMALIZERS = st.sampled_from(
    [
        normalizers.NFC(),
        normalizers.NFKD(),
        normalizers.Lowercase(),
        normalizers.StripAccents(),
        normalizers.Strip(),
        normalizers.Replace(" ", "▁"),
        normalizers.Replace(tokenizers.Regex(" {2,}"), "▁"),
        normalizers.Prepend("▁"),
        normalizers.BertNormalizer(),
    ]
)
SPLITTERS = st.sampled_from(
    [
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Whitespace(),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+|\s+(?!\S)|\s+"), "isolated"),
        pre_tokenizers.Punctuation(),
    ]
)
ADDED_TOKENS = st.lists(
    st.builds(
        lambda content, normalized, lstrip: tokenizers.AddedToken(content, normalized=normalized, lstrip=lstrip),
        st.sampled_from(["<x>", "Ké", '"model"', "  ", "model"]),
        st.booleans(),
        st.booleans(),
    ),
    max_size=3,
)


def outcome(encode: Callable[[str], list[int]], text: str) -> list[int] | None:
    """Ids, or None where the library fails: on some added tokens that strip spaces it panics."""
    try:
        return encode(text)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.lists(NORMALIZERS, max_size=3),
    splitters=st.lists(SPLITTERS, max_size=2),
    added=ADDED_TOKENS,
    texts=st.lists(st.text(max_size=40), min_size=1, max_size=3),
    pretty=st.booleans(),
)
def test_honest_tokenizers_load_as_the_library_loads_them(
    tmp_path: Path, before: list[Any], splitters: list[Any], added: list[Any], texts: list[str], pretty: bool
) -> None:
    alphabet = 'abcké▁ĠAB<x>"model 123'
    vocab = {"<unk>": 0, **{c: i + 1 for i, c in enumerate(dict.fromkeys(alphabet))}}
    vocab["ab"] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(before)  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.Sequence(splitters)  # type: ignore[assignment]
    backend.add_tokens(added)
    file = tmp_path / "tokenizer.json"
    backend.save(str(file), pretty=pretty)
    expected = tokenizers.Tokenizer.from_file(str(file))
    loaded, limits = read_backend(file)
    assert loaded.to_str() == expected.to_str()
    for text in [*texts, 'ab "model" <x> Ké  12']:
        for repeated in (text, text * 200):
            assert outcome(lambda t: tokenizer_backend.encode(loaded, limits, t, True), repeated) == outcome(
                lambda t: expected.encode(t).ids, repeated
            )
        normalized = expected.normalizer.normalize_str(text)
        grown = sum(len(piece.encode()) for piece, _ in expected.pre_tokenizer.pre_tokenize_str(normalized))
        assert grown <= limits.grown(text) + 8
