"""End tokens and sampling as the makers' files say them, and the lines about what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from edgewright.bundle import SamplingSpec
from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.errors import UserError
from edgewright.pipeline.answering import end_tokens, sampling_of

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(folder: Path, template: str | None = None) -> Tokenizer:
    words = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>", "answer", "question", "end", "user", "assistant"]
    library = Library(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(words[:4])
    library.save(str(folder / "tokenizer.json"))
    settings = {"unk_token": "<unk>"} | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_dir(folder)


@pytest.mark.parametrize(
    ("template", "given", "wanted", "line"),
    [
        (CHATML, {1}, {1, 3}, "ends a turn with <|im_end|> (token 3); it is not among the end tokens [1]"),
        (CHATML, set(), {3}, "none is named, so it is one now"),
        (CHATML, {3}, {3}, None),
        (None, {1}, {1}, None),
        (None, set(), set(), "no end token is named"),
        ("{% for m in messages %}{{ m.content }} end {% endfor %}</s>", {3}, {3}, None),
        ("{% for m in messages %}{{ m.content }}</s>{% endfor %}", {3}, {1, 3}, "ends a turn with </s>"),
        ("{{ raise_exception('roles must alternate') }}", {1}, {1}, None),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}", {1}, {1}, None),
    ],
)
def test_the_token_that_closes_a_turn_ends_an_answer(
    tmp_path: Path, template: str | None, given: set[int], wanted: set[int], line: str | None
) -> None:
    lines: list[str] = []
    assert end_tokens(tokenizer(tmp_path, template), given, lines.append) == wanted
    assert (line is None and not lines) or (line is not None and line in lines[0])


@pytest.mark.parametrize(
    ("generation", "wanted"),
    [
        ({}, None),
        ({"temperature": 0.6, "top_p": 0.9}, None),  # without do_sample transformers takes the best token
        ({"do_sample": False, "repetition_penalty": 1.1}, SamplingSpec(repetition_penalty=1.1)),
        ({"do_sample": True}, SamplingSpec(temperature=1.0, top_k=50)),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
            SamplingSpec(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05),
        ),
        ({"no_repeat_ngram_size": 3, "num_beams": 1}, SamplingSpec(no_repeat_ngram=3)),
    ],
)
def test_sampling(generation: dict[str, Any], wanted: SamplingSpec | None) -> None:
    lines: list[str] = []
    assert sampling_of(generation, lines.append) == wanted
    assert lines == []


def test_what_is_not_done_is_said() -> None:
    lines: list[str] = []
    assert sampling_of({"num_beams": 4, "bad_words_ids": [[1]], "sequence_bias": None}, lines.append) is None
    assert "num_beams 4, bad_words_ids [[1]]" in lines[0]


@pytest.mark.parametrize(
    ("generation", "line"),
    [
        ({"do_sample": True, "temperature": -1}, "temperature is -1"),
        ({"do_sample": True, "top_p": "all"}, "top_p is 'all'"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"no_repeat_ngram_size": [1]}, r"no_repeat_ngram_size is \[1\]"),
    ],
)
def test_sampling_that_means_nothing(generation: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        sampling_of(generation, print)
