"""A prompt as a model is to read it: the one way from text or messages to token ids, for running, scoring and serving alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from .chat_template import ChatTemplate
from .tokenizer import Tokenizer

_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class ChatOptions:
    """How messages become a text.

    Attributes:
        use: whether a prompt goes through the chat template; None: where the tokenizer has one.
        template: another template, or the name of one of the model's; None: its default.
        system: what a system message before the prompt says; None: there is none.
        tools: JSON schemas of the functions that the model may call.
        arguments: further variables of the template, such as enable_thinking.
    """

    use: bool | None = None
    template: str | ChatTemplate | None = None
    system: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> list[str]:
        """Flags of what only a template can heed."""
        given = {
            "--chat": self.use is True,
            "--template": self.template is not None,
            "--system": self.system is not None,
            "--tools": self.tools is not None,
            "--template-arg": bool(self.arguments),
        }
        return [flag for flag, is_given in given.items() if is_given]


AS_IT_IS = ChatOptions()


@dataclass(frozen=True)
class Prompt:
    """What a model reads.

    Attributes:
        ids: its tokens.
        text: what was encoded, special tokens as they are written.
        notes: a line for each thing that was put right, or that looks wrong.
    """

    ids: list[int]
    text: str
    notes: tuple[str, ...] = ()


def cleaned(text: str) -> str:
    """`text` without a byte order mark in front, and without one final newline: an editor's, not the author's."""
    text = text.removeprefix(_BYTE_ORDER_MARK)
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def read_prompt(tokenizer: Tokenizer, text: str, continues: bool, chat: ChatOptions = AS_IT_IS) -> Prompt:
    """The prompt that `text` makes, as a user's message where there is a chat template.

    continues: whether the model goes on from the prompt, as a decoder-only one does; then no end token stands behind it. Raises
    UserError for an empty text, and as `read_messages` and `Tokenizer.encode` do.
    """
    text = cleaned(text)
    if not text.strip():
        raise UserError("the prompt is empty; give some text")
    if chat.use is not False:
        message = {"role": "user", "content": text}
        system = [] if chat.system is None else [{"role": "system", "content": chat.system}]
        prompt = read_messages(tokenizer, [*system, message], chat)
        if prompt is not None:
            return prompt
    if flags := chat.asked:
        why = "--no-chat leaves the chat template out" if chat.use is False else "the tokenizer has no chat template"
        raise UserError(f"{flags[0]}: {why}; leave {flags[0]} out")
    return _plain(tokenizer, text, continues)


def read_messages(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], chat: ChatOptions = AS_IT_IS, answers: bool = True
) -> Prompt | None:
    """The prompt that the chat template makes of `messages`; None where the tokenizer has no template.

    answers: whether the assistant speaks next. Raises UserError as `Tokenizer.apply_chat` and `Tokenizer.encode` do.
    """
    text = tokenizer.apply_chat(messages, answers, template=chat.template, tools=chat.tools, arguments=chat.arguments)
    if text is None:
        return None
    ids = tokenizer.encode(text, special=False)  # the template writes its own
    notes: list[str] = []
    bos = tokenizer.bos_id
    if bos is not None and ids[:2] == [bos, bos]:
        notes.append("the chat template writes the begin-of-text token twice; one is left out")
        ids = ids[1:]
    return Prompt(ids, text, (*notes, *_strange(tokenizer, ids)))


def _plain(tokenizer: Tokenizer, text: str, continues: bool) -> Prompt:
    """The prompt of a text without a template, with the special tokens that the tokenizer puts around it."""
    ids, notes, bos = tokenizer.encode(text), list[str](), tokenizer.bos_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
        notes.append("the prompt begins with the begin-of-text token, which the tokenizer puts there; one is left out")
    if (
        continues
        and len(ids) > 1
        and ids[-1] in tokenizer.eos_ids
        and tokenizer.encode(text, special=False)[-1:] != ids[-1:]
    ):
        ids = ids[:-1]
        notes.append("the tokenizer ends a text with its end token; it is left out, as the model is to go on")
    return Prompt(ids, text, (*notes, *_strange(tokenizer, ids)))


def _strange(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """A line where nothing of the text reached the model."""
    special = tokenizer.special_ids
    said = [i for i in ids if i not in special]
    if not said and any(i == tokenizer.unk_id for i in ids):
        return ["the tokenizer knows none of the prompt's symbols: the model reads unknown tokens alone"]
    return []
