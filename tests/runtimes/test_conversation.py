"""What was read is not read again: counts of tokens fed, and answers equal to those of a fresh start."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.token_formula import VOCAB, Formula, causal
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from edgewright.bundle import Generation
from edgewright.checkpoints.prompt import ChatOptions
from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.errors import UserError
from edgewright.runtimes.answer import Stops
from edgewright.runtimes.conversation import Conversation, PrefixCache
from edgewright.runtimes.generate import generate
from edgewright.runtimes.sampling import GREEDY
from edgewright.runtimes.session import Array, StateBuffers

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
TRIMS = TEMPLATE.replace("m.content", "m.content | replace('w', '')")


class Remembering(Formula):
    """A `Formula` whose state can go back: what lies behind `past_length` is written anew, as in a KV cache."""

    def run(self, graph: str, inputs: Any, state: StateBuffers) -> dict[str, Array]:
        if graph == "decoder":
            for row in state["tokens"]:
                del row[int(inputs["past_length"][0]) :]
        return super().run(graph, inputs, state)


def opened(folder: Path, kind: str = "kv", template: str | None = TEMPLATE, **changes: Any) -> Any:
    """What a `Conversation` needs of a bundle; `kind`: of its state."""
    words = ["<unk>", "</>", "<s>", "<u>", "<a>", *"hijklmnopqrstuvw"][:VOCAB]
    library = Library(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    library.add_special_tokens(words[:5])
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    settings = {"unk_token": "<unk>"} | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    graph = SimpleNamespace(updated_states=[SimpleNamespace(kind=kind)])
    spec: Generation = causal(**({"eos_ids": (1,), "max_new_tokens": 6} | changes))
    return SimpleNamespace(
        tokenizer=Tokenizer.from_dir(folder),
        require_generator=lambda: None,
        session=Remembering() if kind == "kv" else Formula(),
        bundle=SimpleNamespace(manifest=SimpleNamespace(generation=spec), graph=lambda _: graph),
    )


def fresh(model: Any, ids: Sequence[int], count: int) -> list[int]:
    return list(generate(type(model.session)(), model.bundle.manifest.generation, ids, count))


def said(cache: PrefixCache, ids: Sequence[int], count: int = 4) -> list[int]:
    answer = cache.answer(ids, count)
    "".join(answer)
    return answer.ids


@pytest.mark.parametrize("kind", ["kv", "recurrent"])
def test_a_prompt_that_goes_on_is_fed_its_rest(tmp_path: Path, kind: str) -> None:
    model = opened(tmp_path, kind)
    cache = PrefixCache(model)
    prompt = [5, 6, 7]
    for turn in range(5):
        assert said(cache, prompt) == fresh(model, prompt, 4)
        if turn:
            assert (cache.fed, cache.reused) == (3, len(prompt) - 3)  # the answer's last token, and two new ones
        prompt = [*prompt, *fresh(model, prompt, 4), 8, 9]


def test_a_kv_cache_goes_back_to_where_prompts_part(tmp_path: Path) -> None:
    model = opened(tmp_path)
    cache = PrefixCache(model)
    said(cache, [5, 6, 7, 8])
    assert said(cache, [5, 6, 9, 9, 9]) == fresh(model, [5, 6, 9, 9, 9], 4)
    assert (cache.reused, cache.fed) == (2, 3)
    assert said(cache, [5, 6, 9, 9, 9]) == fresh(model, [5, 6, 9, 9, 9], 4)
    assert (cache.reused, cache.fed) == (4, 1)  # the last token gives the logits


def test_a_recurrent_state_begins_anew(tmp_path: Path) -> None:
    model = opened(tmp_path, "recurrent")
    cache = PrefixCache(model)
    said(cache, [5, 6, 7, 8])
    assert said(cache, [5, 6, 9]) == fresh(model, [5, 6, 9], 4)
    assert (cache.reused, cache.fed) == (0, 3)


def test_a_state_that_was_interrupted_is_not_used_again(tmp_path: Path) -> None:
    model = opened(tmp_path, "recurrent")
    cache = PrefixCache(model)
    said(cache, [5, 6, 7])
    run = model.session.run

    def interrupted(*arguments: Any) -> Any:
        run(*arguments)
        raise KeyboardInterrupt

    model.session.run = interrupted
    with pytest.raises(KeyboardInterrupt):
        said(cache, [*cache._stream.read, 4])  # type: ignore[union-attr]
    model.session.run = run
    assert said(cache, [5, 6, 7]) == fresh(model, [5, 6, 7], 4)
    assert cache.reused == 0


def test_a_prompt_beyond_the_context(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the prompt has 20 tokens, the bundle's context is 20"):
        PrefixCache(opened(tmp_path, max_context=20)).answer([5] * 20, 4)


@pytest.mark.parametrize("kind", ["kv", "recurrent"])
def test_the_tenth_turn_reads_its_new_text_alone(tmp_path: Path, kind: str) -> None:
    model = opened(tmp_path, kind, eos_ids=(99,))
    chat = Conversation(model, ChatOptions(system="hi"))
    for turn in range(10):
        answer = chat.say("mno", GREEDY)
        wanted = fresh(model, chat._last.ids, 6)  # type: ignore[union-attr]
        chat.heard(answer, "".join(answer))
        assert answer.ids == wanted
        if turn:
            # the answer's last token, its end, <u>mno</><a>
            assert chat.cache.fed == 1 + 1 + 6
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 10]


def test_a_template_that_changes_earlier_turns(tmp_path: Path) -> None:
    model = opened(tmp_path, template=TRIMS, eos_ids=(99,))
    chat = Conversation(model)
    for _ in range(4):
        answer = chat.say("mno", GREEDY)
        assert answer.prompt_tokens == len(model.tokenizer.encode(chat._last.text, special=False))  # type: ignore[union-attr]
        wanted = fresh(model, chat._last.ids, 6)  # type: ignore[union-attr]
        chat.heard(answer, "".join(answer) + "w")
        assert answer.ids == wanted


def test_the_oldest_turn_goes_where_the_context_is_full(tmp_path: Path) -> None:
    model = opened(tmp_path, max_context=48, eos_ids=(99,))
    chat = Conversation(model, ChatOptions(system="hi"))
    for _ in range(8):
        answer = chat.say("mnop", GREEDY)
        chat.heard(answer, "".join(answer))
    assert "oldest turn is left out" in chat.notes[0]
    assert chat.messages[0]["role"] == "system"
    assert len(chat.messages) < 8


def test_a_stop_string_and_an_answer_that_was_left(tmp_path: Path) -> None:
    model = opened(tmp_path, eos_ids=(99,))
    chat = Conversation(model)
    whole = "".join(chat.say("mno", GREEDY))
    chat = Conversation(model)
    answer = chat.say("mno", GREEDY, Stops((whole[2],)))
    text = "".join(answer)
    assert text == whole[: whole.index(whole[2])]
    chat.heard(answer, text)
    left = chat.say("mno", GREEDY)
    first = next(left)
    left.close()
    chat.heard(left, first)
    answer = chat.say("m", GREEDY)
    assert "".join(answer) == "".join(model.tokenizer.decode(fresh(model, chat._last.ids, 6)))  # type: ignore[union-attr]
