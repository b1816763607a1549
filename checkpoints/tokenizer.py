"""Text to token ids and back: one class over the `tokenizers` library, read from a checkpoint's files or built from GGUF.

tokenizer.json, chat templates and GGUF vocabularies come from strangers: a defect is a one-line UserError, what they ask for is
bounded (`tokenizer_checks.py`), and templates run in a process of their own (`chat_template.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream as _LibraryStream

from ..errors import UserError
from ..system.reading import one_line, shown
from .chat_template import ChatTemplate, start_early_for
from .tokenizer_backend import backend_of, encode, from_library, library_errors, read_backend
from .tokenizer_checks import MOST_BYTES, MOST_TOKENS, Limits
from .tokenizer_settings import Settings, ids_in, read_settings, settings_of
from .vocabularies.finding import read_vocabulary, tokenizer_class


class Tokenizer:
    """A tokenizer with the ids that start, end and pad a sequence.

    Args:
        backend: the library's tokenizer. Its truncation and padding are switched off.
        settings: named tokens, chat templates and end tokens.
        limits: what the backend may make of texts.

    Attributes:
        bos_id, pad_id, unk_id: the id, or None where the tokenizer has none.
        eos_ids: every id that ends generation.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: Settings, limits: Limits) -> None:
        backend.no_truncation()  # tokenizer.json may have limits of the training, which would cut prompts
        backend.no_padding()
        self._backend, self._limits, self._settings = backend, limits, settings
        self.bos_id = self._id("bos_token")
        self.pad_id = self._id("pad_token")
        self.unk_id = self._id("unk_token")
        self.eos_ids = set(settings.eos_ids | ids_in(self._id("eos_token")))
        self._templates = {name: ChatTemplate(source) for name, source in settings.templates.items()}

    @classmethod
    def from_dir(cls, path: str | Path, chat: bool = False) -> Tokenizer:
        """Read tokenizer.json, or else another file with a vocabulary (`vocabularies/finding.py`), and the files beside it:
        tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat templates, and eos ids from the model's configs.

        chat: whether a prompt will go through the chat template; its process starts while the rest is read. Raises UserError if
        there is no vocabulary, or any of them is corrupt.
        """
        directory = Path(path)
        settings = read_settings(directory)
        if chat:
            start_early_for(settings.templates)
        file = directory / "tokenizer.json"
        if file.is_file():
            normalize = tokenizer_class(directory, settings.values) == "Qwen2Tokenizer"
            backend, limits = read_backend(file, settings.added, settings.wanted, normalize)
        else:
            vocabulary = read_vocabulary(directory, settings.values)
            settings = read_settings(directory, vocabulary.named)
            backend, limits = backend_of(vocabulary, settings)
        return cls(backend, settings, limits)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer that a GGUF file's metadata describes. Raises UserError if it is of an unknown kind."""
        from .gguf_tokenizer import build

        backend, values, eos_ids, limits = build(metadata)
        return cls(backend, settings_of(values, eos_ids), limits)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, which `decode` leaves out."""
        return frozenset(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`. special: with the tokens that the post-processor adds (Gemma: bos; T5Gemma: eos).

        A text from `apply_chat` holds its special tokens already: encode it with special=False. Raises UserError for a text that
        is no Unicode, that becomes too long or takes too long, or that the library fails on.
        """
        return encode(self._backend, self._limits, text, special)

    def special_tokens(self) -> tuple[list[int], list[int]]:
        """The ids that it puts before and after a text, each maybe none (Gemma: bos before; T5Gemma: eos after)."""
        plain, special = self.encode("a", special=False), self.encode("a")
        for at in range(len(special) - len(plain) + 1):
            if plain and special[at : at + len(plain)] == plain:
                return special[:at], special[at + len(plain) :]
        return [], []

    def encode_within(self, text: str, most: int) -> tuple[list[int], int]:
        """`encode` cut to `most` ids, the special tokens at both ends kept, and how many were cut off."""
        ids = self.encode(text)
        if len(ids) <= most:
            return ids, 0
        before, after = self.special_tokens()
        room = max(0, most - len(before) - len(after))
        inner = ids[len(before) : len(ids) - len(after)]
        return [*before, *inner[:room], *after][:most], len(inner) - room

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens. Ids beyond the vocabulary are skipped. Raises UserError if the library fails."""
        with library_errors("tokens"):
            self.require_decodable(self.characters(ids))
            return self._backend.decode(list(ids), skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """The id of one token as the vocabulary spells it, or None."""
        with library_errors(f"token {ascii(token)[:40]}"):
            return self._backend.token_to_id(token)

    def spelling(self, token: int) -> str:
        """How the vocabulary writes a token; "" for one beyond it."""
        with library_errors("tokens"):
            return self._backend.id_to_token(token) or ""

    def stream(self) -> DecodeStream:
        """A new incremental decoder, for one generated sequence."""
        return DecodeStream(self)

    @property
    def templates(self) -> list[str]:
        """Names of the chat templates; a lone one is called "default"."""
        return sorted(self._templates)

    @property
    def chat_template(self) -> str | None:
        """The jinja source of the default chat template, or None."""
        return self._settings.templates.get("default")

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        template: str | ChatTemplate | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str | None:
        """The prompt that a chat template makes of `messages`, each {"role": …, "content": …}. None without a template.

        template: another one, or the name of one of the model's. Default: with tools the one named "tool_use", else "default".
        tools, documents: JSON schemas of functions, and texts, for templates that show them. arguments: further variables, such as
        enable_thinking. Raises UserError if there is no such template, or it is no valid jinja, refuses the messages, fails on
        them, or takes too much.
        """
        chosen = template if isinstance(template, ChatTemplate) else self._template(template, tools is not None)
        if chosen is None:
            return None
        variables = {**self._settings.named, "tools": tools, "documents": documents, **(arguments or {})}
        return chosen.render(messages, add_generation_prompt, variables)

    def _template(self, name: str | None, tools: bool) -> ChatTemplate | None:
        """The template called so; without a name the one that transformers would take, None if there is none at all."""
        if not self._templates and name is None:
            return None
        wanted = [name] if name is not None else ["tool_use"] * tools + ["default"]
        for each in wanted:
            if each in self._templates:
                return self._templates[each]
        there = ", ".join(one_line(each, 40) for each in self.templates) or "none"
        if name is None:
            raise UserError(
                f"the model has the chat templates {there}, and none is its default; choose with --template"
            )
        raise UserError(f"the model has no chat template {shown(name, 40)}; it has: {there}")

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into directory `path`; the latter has chat template and eos ids.

        Raises UserError for ids so high that the library, which counts up to them, would not end.
        """
        highest = max(self._backend.get_vocab(with_added_tokens=True).values(), default=0)
        if highest >= MOST_TOKENS:
            raise UserError(
                f"the tokenizer has a token with id {highest}, ids below {MOST_TOKENS} are saved; is it whole?"
            )
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self._settings.values}
        settings["eos_token_ids"] = sorted(self.eos_ids)
        sources = self._settings.templates
        if sources.keys() == {"default"}:
            settings["chat_template"] = sources["default"]
        elif sources:
            settings["chat_template"] = [{"name": name, "template": sources[name]} for name in sorted(sources)]
        text = _json(settings)
        with library_errors("being saved"):
            self._backend.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def _id(self, key: str) -> int | None:
        text = self._settings.named.get(key)
        return None if text is None else self.token_id(text)

    def characters(self, ids: Iterable[int]) -> int:
        """How many characters the vocabulary's spellings of `ids` have; one may have 100 million."""
        with library_errors("tokens"):
            return sum(len(self._backend.id_to_token(i) or "") for i in ids)

    def require_decodable(self, characters: int) -> None:
        """Raise UserError for more `characters` of tokens than any answer has."""
        if characters * self._limits.decoded > MOST_BYTES // 4:
            raise UserError(
                f"the tokenizer makes {characters} characters of few tokens; is its file from a trusted source?"
            )


class DecodeStream:
    """Text as tokens arrive: `put` each id, then `end`. The pieces joined are `decode` of all ids.

    A UTF-8 character that is not complete is held back until its other bytes come, or until `end`, which shows it as U+FFFD.
    Where byte tokens make no valid UTF-8, `decode` turns their whole run into U+FFFD; a stream keeps what it has returned.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._library = _LibraryStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._pieces: list[str] = []
        self._returned = 0  # how many ids the pieces stand for
        self._characters = 0

    def put(self, token_id: int) -> str:
        """The text that `token_id` completes; often empty. Raises UserError as `decode` does."""
        self._ids.append(token_id)
        self._characters += self._tokenizer.characters([token_id])
        self._tokenizer.require_decodable(self._characters)
        try:
            piece = self._library.step(self._tokenizer._backend, token_id) or ""
        except BaseException as error:
            if not from_library(error):
                raise
            # "Invalid prefix": byte tokens have turned text that was returned into U+FFFD.
            piece = self._tokenizer.decode(self._ids[self._returned :])
            self._library = _LibraryStream([token_id], skip_special_tokens=True)
        if piece:
            self._pieces.append(piece)
            self._returned = len(self._ids)
        return piece

    def end(self) -> str:
        """What was held back: an incomplete character, or nothing. The last call."""
        returned, text = "".join(self._pieces), self._tokenizer.decode(self._ids)
        return (
            text[len(returned) :] if text.startswith(returned) else self._tokenizer.decode(self._ids[self._returned :])
        )


def _json(settings: Mapping[str, Any]) -> str:
    """Settings as JSON, readable where they are Unicode. Raises UserError if they are too deep for that."""
    try:
        text = json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True)
        return text if _is_unicode(text) else json.dumps(settings, indent=2, sort_keys=True)
    except RecursionError:
        raise UserError("tokenizer_config.json has values within values, too deep to be written again") from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
