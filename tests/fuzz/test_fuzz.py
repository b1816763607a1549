"""A minute of fuzzing: the same few thousand mutants each time. `make fuzz` runs many more."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgewright.errors import UserError
from fuzz.runner import Failure, fuzz
from fuzz.seeds import write_seeds
from fuzz.targets import COMMANDS, PARSERS, Fuzzed

MUTANTS = 200
MUTANTS_OF_A_COMMAND = 4
BUSY = 300.0
"""Seconds that a mutant may take here, beside other tests; `make fuzz` allows 20."""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    write_seeds(folder)
    return folder


@pytest.mark.parametrize("name", PARSERS)
def test_readers(seeds: Path, name: str) -> None:
    assert list(fuzz(name, PARSERS[name], seeds, range(MUTANTS), BUSY)) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(seeds: Path, name: str) -> None:
    assert list(fuzz(name, COMMANDS[name], seeds, range(MUTANTS_OF_A_COMMAND), BUSY)) == []


def _number(folder: Path) -> int:
    return int(json.loads((folder / "file").read_text())["number"])


def _breaks(folder: Path) -> None:
    match _number(folder):
        case 1:
            raise TypeError("a defect")
        case 2:
            os._exit(3)
        case 3:
            time.sleep(60)
        case 4:
            bytearray(3 << 30)
        case 5:
            (folder / "stray").write_text("")
        case 6:
            raise UserError("one line")
        case 7:
            raise UserError("two\nlines")


def test_a_broken_rule_is_seen(tmp_path: Path) -> None:
    """The suite can fail: each kind of fault is found, named, and does not stop those after it."""
    (tmp_path / "file").write_text("{}")
    counter: Iterator[int] = iter(())

    def mutate(data: bytes, rng: object) -> bytes:
        return json.dumps({"number": next(counter)}).encode()

    fuzzed = Fuzzed(_breaks, {"file": mutate})
    found: list[Failure] = []
    for start in range(9):
        counter = iter(range(start, 20))
        found += fuzz("any", fuzzed, tmp_path, range(start, start + 1), 2.0)
    assert [failure.number for failure in found] == [1, 2, 3, 4, 5, 7]
    kinds = ["TypeError: a defect", "crash: status 3", "hang", "MemoryError", "left behind: ['stray']", "several lines"]
    assert all(kind in failure.what for kind, failure in zip(kinds, found, strict=True)), found
