"""Chat templates see what transformers shows them: its `apply_chat_template` is the oracle, for twelve families' templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.errors import UserError

FOLDER = Path(__file__).parent.parent / "helpers" / "chat_templates"
FAMILIES = {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.jinja"))}
"""Templates of twelve families, written anew from the documented shape of their prompts."""
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "sep_token": "[SEP]"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"z": "é", "a": [1, None, True]}}}]
DOCUMENTS = [{"title": "One", "text": "of a kind"}, {"title": "Two <b>", "text": "'quoted'"}]
ARGUMENTS = st.sampled_from(
    [{}, {"enable_thinking": False}, {"date_string": "1 Jan 2030"}, {"extra": [1, {"a": None}]}]
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
MESSAGES = st.tuples(
    st.lists(st.builds(lambda t: {"role": "system", "content": t}, TEXT | st.just("short /no_think")), max_size=1),
    st.lists(TEXT, min_size=1, max_size=5),
    st.none() | TEXT,
)


def write(folder: Path, **settings: Any) -> Path:
    """A tokenizer of words with these settings in tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    library = Library(
        models.WordLevel({"<unk>": 0, **{token: i for i, token in enumerate(NAMED.values(), 1)}}, "<unk>")
    )
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(list(NAMED.values()))
    library.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED, "extra_special_tokens": {"image_token": "<img>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, **settings}))
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Tokenizer]]:
    """Family -> transformers' tokenizer and ours."""
    root = tmp_path_factory.mktemp("chat")
    made = {}
    for name, template in FAMILIES.items():
        folder = write(root / name, chat_template=template)
        made[name] = PreTrainedTokenizerFast.from_pretrained(folder), Tokenizer.from_dir(folder)
    return made


def chat(system: list[dict[str, str]], texts: list[str], thoughts: str | None) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [*system]
    for i, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[i % 2], "content": text})
    messages[-1]["reasoning"] = thoughts
    return messages


@pytest.mark.parametrize("family", sorted(FAMILIES))
@settings(deadline=None, max_examples=25)
@given(parts=MESSAGES, answers=st.booleans(), tools=st.booleans(), documents=st.booleans(), arguments=ARGUMENTS)
def test_the_prompt_is_transformers(
    pairs: dict[str, tuple[Any, Tokenizer]],
    family: str,
    parts: Any,
    answers: bool,
    tools: bool,
    documents: bool,
    arguments: dict[str, Any],
) -> None:
    theirs, ours = pairs[family]
    messages = chat(*parts)
    shown = {"tools": TOOLS if tools else None, "documents": DOCUMENTS if documents else None}
    try:
        wanted = theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answers, **shown, **arguments
        )
    except jinja2.TemplateError:
        with pytest.raises(UserError, match="chat template"):
            ours.apply_chat(messages, answers, arguments=arguments, **shown)
        return
    assert ours.apply_chat(messages, answers, arguments=arguments, **shown) == wanted


@pytest.mark.parametrize("form", ["dict", "files", "list"])
def test_named_templates(tmp_path: Path, form: str) -> None:
    sources = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ tools | length }}", "rag": "R{{ documents }}"}
    if form == "files":
        folder = write(tmp_path, chat_template="never read")
        (folder / "chat_template.jinja").write_text(sources["default"])
        (folder / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(sources[name])
    else:
        as_list = [{"name": name, "template": source} for name, source in sources.items()]
        folder = write(tmp_path, chat_template=as_list if form == "list" else sources)
    hi = [{"role": "user", "content": "hi"}]
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = Tokenizer.from_dir(folder)
    tokenizer.save(tmp_path / "saved")
    for ours in (tokenizer, Tokenizer.from_dir(tmp_path / "saved")):
        assert ours.templates == ["default", "rag", "tool_use"]
        for name, tools in ((None, None), (None, TOOLS), ("rag", None)):
            wanted = theirs.apply_chat_template(hi, tokenize=False, tools=tools, chat_template=name)
            assert ours.apply_chat(hi, False, template=name, tools=tools) == wanted
        with pytest.raises(UserError, match="no chat template 'plan'; it has: default, rag, tool_use"):
            ours.apply_chat(hi, template="plan")


def test_without_a_default_one_must_be_chosen(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write(tmp_path, chat_template=[{"name": "chatml", "template": "x"}]))
    with pytest.raises(
        UserError, match="has the chat templates chatml, and none is its default; choose with --template"
    ):
        tokenizer.apply_chat([{"role": "user", "content": "hi"}])
    assert tokenizer.apply_chat([{"role": "user", "content": "hi"}], template="chatml") == "x"


def test_a_namespace_takes_no_private_name(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write(tmp_path, chat_template="{% set n = namespace(__class__=1) %}x"))
    with pytest.raises(UserError, match="chat template"):
        tokenizer.apply_chat([{"role": "user", "content": "hi"}])
