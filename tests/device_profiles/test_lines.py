"""The line of a key: TOML written in every form, whose lines are known; and faulty profiles, whose errors name them."""

from __future__ import annotations

import random
import re
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.device_profiles.lines import line_of
from edgewright.device_profiles.profile import load, parse, to_toml
from edgewright.errors import UserError

Place = tuple[str | int, ...]

_key = st.one_of(
    st.text("abcdefgh_-0123456789", min_size=1, max_size=4),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=4),
)
_tree = st.recursive(
    st.one_of(st.integers(-9, 9), st.booleans(), st.text(st.characters(codec="utf-8"), max_size=6)),
    lambda deeper: st.one_of(
        st.dictionaries(_key, deeper, max_size=4),
        st.lists(deeper, max_size=3),
        st.lists(st.dictionaries(_key, deeper, max_size=3), min_size=1, max_size=3),
    ),
    max_leaves=14,
)
_document = st.dictionaries(_key, _tree, max_size=5)


class _Writer:
    """Writes a document with headers, dotted keys, inline tables and arrays over lines, as chance has it, and notes the lines."""

    def __init__(self, chance: random.Random) -> None:
        self.chance, self.text = chance, ""
        self.lines: dict[Place, int] = {}

    def document(self, tree: dict[str, Any]) -> str:
        self.table(tree, ())
        return self.text

    def here(self, place: Place) -> None:
        self.lines[place] = self.text.count("\n") + 1

    def table(self, tree: dict[str, Any], place: Place) -> None:
        """Values first, then what has a header of its own."""
        below = []
        for key, value in tree.items():
            if (isinstance(value, dict) or _tables(value)) and self.chance.random() < 0.6:
                below.append((key, value))
                continue
            self.pair(key, value, place)
            self.text += self.chance.choice(["\n", "\n\n", "  # a = 1\n", "\r\n"])
        for key, value in below:
            header = ".".join(self.key(str(part)) for part in (*place, key) if isinstance(part, str))
            for index, item in enumerate(value if isinstance(value, list) else [None]):
                inner = (*place, key) if item is None else (*place, key, index)
                if isinstance(value, list) and index == 0:
                    self.here((*place, key))
                self.here(inner)
                self.text += f"[{header}]\n" if item is None else f"[[ {header} ]] # [x]\n"
                self.table(value if item is None else item, inner)

    def pair(self, key: str, value: Any, place: Place) -> None:
        self.here((*place, key))
        self.text += self.key(key)
        place = (*place, key)
        while isinstance(value, dict) and len(value) == 1 and self.chance.random() < 0.5:
            ((key, value),) = value.items()
            self.here((*place, key))
            self.text += self.chance.choice([".", " . "]) + self.key(key)
            place = (*place, key)
        self.text += self.chance.choice(["=", " = "])
        self.value(value, place)

    def value(self, value: Any, place: Place) -> None:
        if isinstance(value, dict):
            self.text += "{ "
            for i, (key, item) in enumerate(value.items()):
                self.text += ", " if i else ""
                self.pair(key, item, place)
            self.text += " }"
        elif isinstance(value, list):
            # A line may end inside an array, but not if an inline table is around it.
            self.text += "["
            for i, item in enumerate(value):
                self.text += "," if i else ""
                self.here((*place, i))
                self.value(item, (*place, i))
            self.text += "]"
        elif isinstance(value, str):
            self.text += self.string(value)
        else:
            self.text += str(value).lower()

    def string(self, value: str) -> str:
        escaped = "".join(f"\\U{ord(c):08x}" if c in '\\"' or not c.isprintable() else c for c in value)
        return f'"""\n{escaped}"""' if self.chance.random() < 0.3 else f'"{escaped}"'

    def key(self, key: str) -> str:
        if re.fullmatch("[A-Za-z0-9_-]+", key) and self.chance.random() < 0.8:
            return key
        if "'" not in key and key.isprintable() and self.chance.random() < 0.5:
            return f"'{key}'"
        return '"' + "".join(f"\\U{ord(c):08x}" if c in '\\"' or not c.isprintable() else c for c in key) + '"'


def _tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


@given(_document, st.randoms(use_true_random=False))
@settings(max_examples=120, deadline=None)
def test_every_key_of_a_document_is_found_on_its_line(tree: dict[str, Any], chance: random.Random) -> None:
    writer = _Writer(chance)
    text = writer.document(tree)
    assert tomllib.loads(text) == tree
    for place, line in writer.lines.items():
        assert line_of(text, place) == (line, len(place)), (text, place)
        assert line_of(text, (*place, "\x00absent")) == (line, len(place))


def test_arrays_over_lines_and_what_looks_like_a_key() -> None:
    text = 'a = """\nb = 1\n"""\n# b = 2\nc = [\n  1, # b = 3\n  [ "]", \'b = 4\' ],\n  { b = 5 },\n]\nb = 6\n'
    assert tomllib.loads(text)["b"] == 6
    assert line_of(text, ("b",)) == (10, 1)
    assert line_of(text, ("c", 1, 1)) == (7, 3)
    assert line_of(text, ("c", 2, "b")) == (8, 3)
    assert line_of(text, ("d",)) == (1, 0)
    assert line_of("", ("d",)) == (1, 0)


_BREAKAGES = {
    "value": ("value = [0-9.]+", 'value = "much"'),
    "unit": ('unit = "[^"]*"', 'unit = "furlongs"'),
    "kind": ('kind = "[a-z]*"', 'kind = "guess"'),
    "confidence": ('confidence = "[a-z]*"', 'confidence = "sure"'),
    "source": ('(value = .*)source = "[^"]*"', r'\1source = "I think"'),
    "bits": (r"bits = \[", "bits = [99, "),
    "cores": ("cores = ", "coars = "),
    "name": ('^name = "[^"]*"', 'name = ""'),
}


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_broken_line_is_the_line_that_is_named(data: st.DataObject) -> None:
    """A shipped profile with one line broken: the error names that line, and the key that it names stands on it."""
    name = data.draw(st.sampled_from(["samsung-galaxy-s25", "jetson-agx-orin", "mac-m4-max", "raspberry-pi-5"]))
    before = to_toml(load(name)).split("\n")
    kind = data.draw(st.sampled_from(sorted(_BREAKAGES)))
    pattern, broken = _BREAKAGES[kind]
    candidates = [i for i, line in enumerate(before) if re.search(pattern, line)]
    index = data.draw(st.sampled_from(candidates))
    lines = [*before]
    lines[index] = re.sub(pattern, broken, lines[index], count=1)
    with pytest.raises(UserError) as caught:
        parse("\n".join(lines), "the file.toml")
    found = re.match(r"the file\.toml, line (\d+): not a device profile \(([^:]+): ", str(caught.value))
    assert found is not None, str(caught.value)
    where = found[2].split(".")
    named = lines[int(found[1]) - 1]
    if (
        kind == "cores"
    ):  # the key that is needed is absent: its table is named, or the key that is there and should not be
        assert int(found[1]) - 1 == index or named in ("[[units.clusters]]", "[[units]]")
        return
    assert int(found[1]) - 1 == index
    key = next(part for part in reversed(where) if not part.isdigit())
    assert re.search(rf"(^|[ {{.]){re.escape(key)}[ \]]", named), (named, key)


def test_an_absent_key_names_its_table() -> None:
    text = 'name = "thing"\nkind = "board"\n\n[[units]]\nname = "a"\nkind = "cpu"\n\n[[units]]\nname = "b"\n'
    with pytest.raises(UserError, match=r"^x\.toml, line 8: not a device profile \(units\.1\.kind: Field required\)"):
        parse(text, "x.toml")
    with pytest.raises(UserError, match=r"^x\.toml: not valid TOML \(.* \(at line 2, column 1\)\)"):
        parse('name = "thing"\n= 1\n', "x.toml")
    with pytest.raises(UserError, match=r"^x\.toml, line 2: thousands of dots"):
        parse("a = 1\n" + "b." * 3000 + "c = 1", "x.toml")
