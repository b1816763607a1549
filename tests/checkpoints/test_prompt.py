"""From text to token ids: one newline, one begin-of-text token, no end token before the answer, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, processors

from edgewright.checkpoints.chat_template import ChatTemplate
from edgewright.checkpoints.prompt import ChatOptions, cleaned, read_messages, read_prompt
from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.errors import UserError

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SHOW = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if t is defined %}{{ t }}{% endif %}"


def tokenizer(folder: Path, form: str = "<s> $A", **settings: Any) -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", "one", "two", "[", "]", "user", "system", "on"]
    library = Library(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 1), ("</s>", 2)])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMED | settings))
    return Tokenizer.from_dir(folder)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("\ufeffa", "a"), ("a", "a"), (" a ", " a "), ("\na", "\na")],
)
def test_an_editors_marks_go(text: str, wanted: str) -> None:
    assert cleaned(text) == wanted


def test_a_second_begin_of_text_goes(tmp_path: Path) -> None:
    prompt = read_prompt(tokenizer(tmp_path), "<s> one", continues=True)
    assert prompt.ids == [1, 3]
    assert "one is left out" in prompt.notes[0]
    chat = tokenizer(tmp_path, chat_template="{{ bos_token }}{{ bos_token }}one")
    assert read_prompt(chat, "x", continues=True).ids == [1, 3]


def test_no_end_token_before_the_answer(tmp_path: Path) -> None:
    ours = tokenizer(tmp_path, "<s> $A </s>")
    assert read_prompt(ours, "one", continues=True).ids == [1, 3]
    assert "end token" in read_prompt(ours, "one", continues=True).notes[0]
    assert read_prompt(ours, "one", continues=False).ids == [1, 3, 2]  # an encoder was trained so
    assert read_prompt(ours, "one </s>", continues=True).ids == [1, 3, 2, 2]  # the user's own


def test_unknown_symbols_alone_get_a_line(tmp_path: Path) -> None:
    assert "knows none" in read_prompt(tokenizer(tmp_path), "三 四", continues=True).notes[0]
    assert read_prompt(tokenizer(tmp_path), "三 one", continues=True).notes == ()


def test_options_of_the_template(tmp_path: Path) -> None:
    ours = tokenizer(tmp_path, chat_template=SHOW)
    asked = ChatOptions(system="two", arguments={"t": "on"})
    assert read_prompt(ours, "one", True, asked).text == "[system]two[user]oneon"
    other = ChatOptions(template=ChatTemplate("two {{ messages | length }}"))
    assert read_prompt(ours, "one", True, other).text == "two 1"
    assert read_prompt(ours, "one", True, ChatOptions(use=False)).ids == [1, 3]
    only = read_messages(ours, [{"role": "user", "content": "one"}])
    assert only is not None
    assert only.text == "[user]one"


@pytest.mark.parametrize(
    ("chat", "line"),
    [
        (ChatOptions(use=True), "--chat: the tokenizer has no chat template"),
        (ChatOptions(system="x"), "--system: the tokenizer has no chat template"),
        (ChatOptions(arguments={"a": 1}), "--template-arg: the tokenizer has no chat template"),
        (ChatOptions(use=False, tools=[{}]), "--tools: --no-chat leaves the chat template out"),
        (ChatOptions(template="x"), "no chat template 'x'; it has: none"),
    ],
)
def test_options_without_a_template(tmp_path: Path, chat: ChatOptions, line: str) -> None:
    with pytest.raises(UserError, match=line):
        read_prompt(tokenizer(tmp_path), "one", True, chat)


@pytest.mark.parametrize("text", ["", " \n", "\ufeff"])
def test_an_empty_prompt(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="the prompt is empty"):
        read_prompt(tokenizer(tmp_path), text, True)
