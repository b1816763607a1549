"""What a checkpoint says of its tokenizer beside tokenizer.json: named and added tokens, chat templates, ids that end generation.

Five files say it, written by transformers 3 to 5; where two speak of one thing, the one that transformers reads last counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..system.reading import MEBIBYTE, read_json_object, read_text, shown

STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Keys of the tokens that every tokenizer may name."""

MOST_TEMPLATES = 64

_TEMPLATES = "additional_chat_templates"
_MOST_IDS = 1 << 32  # the library's ids have 32 bits
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Settings:
    """What the files say.

    Attributes:
        values: tokenizer_config.json, as it is written again.
        named: key -> text of each named token, such as bos_token; a model's own keys (image_token) too.
        added: tokens that the files add to the vocabulary or describe anew, each as an entry of tokenizer.json's added_tokens.
        wanted: the tokens they name, which are added only where the tokenizer has none that is written so.
        templates: name -> jinja source; a lone template is named "default".
        eos_ids: every id that ends generation, but for `named`'s eos_token.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    added: tuple[dict[str, Any], ...] = ()
    wanted: tuple[dict[str, Any], ...] = ()
    templates: Mapping[str, str] = field(default_factory=dict)
    eos_ids: frozenset[int] = frozenset()


def read_settings(directory: Path, named: Mapping[str, str] | None = None) -> Settings:
    """The settings that the files in `directory` give; named: tokens for the keys that they do not have.

    Raises UserError for a file that is corrupt.
    """
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
    files = {name: _object(directory / name) for name in (*names, "config.json")}
    values = files["tokenizer_config.json"]
    if "added_tokens_decoder" not in values:  # transformers 4.34 and later write all of it there
        values = values | files["special_tokens_map.json"]
    else:
        files["added_tokens.json"] = {}
    if (templates := _template_files(directory)) is not None:
        values["chat_template"] = templates
    values = {**(named or {}), **values}
    eos = ids_in(files["generation_config.json"].get("eos_token_id")) | _config_eos(files["config.json"])
    return settings_of(values, eos, files["added_tokens.json"])


def settings_of(
    values: Mapping[str, Any], eos_ids: Iterable[int] = (), added_tokens: Mapping[str, Any] | None = None
) -> Settings:
    """Settings of the contents of tokenizer_config.json; added_tokens: those of added_tokens.json, token -> id."""
    own = values.get("extra_special_tokens")
    keys = {key: value for key, value in values.items() if key in STANDARD or key.endswith("_token")}
    keys |= {key: value for key, value in own.items() if isinstance(key, str)} if isinstance(own, Mapping) else {}
    named = {key: text for key, value in keys.items() if (text := _text(value)) is not None}
    extra = [own, values.get("additional_special_tokens")]
    extras = [token for tokens in extra if isinstance(tokens, list) for token in tokens if _text(token) is not None]
    special = {*named.values(), *map(_text, extras)}
    added = [
        entry | {"special": entry["special"] or entry["content"] in named.values()}
        for entry in _decoder_tokens(values.get("added_tokens_decoder"))
    ]
    added += _old_tokens(added_tokens or {}, special)
    wanted = [
        _entry(_text(value), value if isinstance(value, Mapping) else {}, special=True)
        for value in [*(keys[key] for key in named), *extras]
    ]
    ids = frozenset(eos_ids) | ids_in(values.get("eos_token_ids"))
    templates = _templates(values.get("chat_template"))
    return Settings(dict(values), named, tuple(added), tuple(wanted), templates, ids)


def ids_in(value: object) -> frozenset[int]:
    """The ids in a config's eos_token_id: an int, a list of ints, or nothing."""
    values = value if isinstance(value, list) else [value]
    return frozenset(v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < _MOST_IDS)


def _object(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.exists() else {}


def _config_eos(config: Mapping[str, Any]) -> frozenset[int]:
    """eos ids of config.json: those at its top, else those of the part that generates text."""
    for part in (config, config.get("decoder"), config.get("text_config")):
        if isinstance(part, Mapping) and (ids := ids_in(part.get("eos_token_id"))):
            return ids
    return frozenset()


def _template_files(directory: Path) -> list[dict[str, str]] | None:
    """The templates in files of their own, which replace those of tokenizer_config.json; None if there are none."""
    files = {"default": directory / "chat_template.jinja"}
    more = sorted((directory / _TEMPLATES).glob("*.jinja")) if (directory / _TEMPLATES).is_dir() else []
    if len(more) > MOST_TEMPLATES:
        raise UserError(f"{directory / _TEMPLATES}: {len(more)} chat templates, {MOST_TEMPLATES} are read")
    files |= {file.stem: file for file in more}
    found = [{"name": name, "template": read_text(file, MEBIBYTE)} for name, file in files.items() if file.exists()]
    return found or None


def _templates(value: object) -> dict[str, str]:
    """Name -> source of `chat_template`: a text, a list of objects with name and template, or an object. Raises UserError."""
    if isinstance(value, list):
        pairs = [(e.get("name"), e.get("template")) for e in value if isinstance(e, Mapping)]
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        pairs = [("default", value)]
    found = {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str) and text}
    if len(found) > MOST_TEMPLATES:
        raise UserError(f"tokenizer_config.json: {len(found)} chat templates, {MOST_TEMPLATES} are read")
    return found


def _text(value: object) -> str | None:
    """A token: a string, or an object with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _decoder_tokens(value: object) -> list[dict[str, Any]]:
    """The tokens of added_tokens_decoder, id -> token, in the order of their ids."""
    if not isinstance(value, Mapping):
        return []
    tokens = []
    for key, token in value.items():
        if not str(key).isdecimal() or len(str(key)) > 10 or _text(token) is None:
            raise UserError(
                f"tokenizer_config.json: added_tokens_decoder has {shown(key, 40)}: {shown(token, 60)}; "
                "an id and its token are expected"
            )
        tokens.append((int(str(key)), _entry(_text(token), token if isinstance(token, Mapping) else {}, special=False)))
    return [entry for _, entry in sorted(tokens, key=lambda pair: pair[0])]


def _old_tokens(value: Mapping[str, Any], special: set[str | None]) -> list[dict[str, Any]]:
    """The tokens of added_tokens.json, token -> id, in the order of their ids."""
    ids = {text: i for text, i in value.items() if isinstance(i, int) and not isinstance(i, bool)}
    return [_entry(text, {}, special=text in special) for text in sorted(ids, key=lambda text: ids[text])]


def _entry(text: str | None, flags: Mapping[str, Any], special: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens, without its id. Raises UserError for a text that is no Unicode."""
    if text is not None and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"tokenizer_config.json: token {ascii(text)[:40]} is not valid Unicode; mend it")
    given = {key: flags[key] for key in _FLAGS if isinstance(flags.get(key), bool)}
    special = given.get("special", special) or special
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"content": text, **plain, **given, "special": special}
