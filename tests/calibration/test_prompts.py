"""Task files, calibration text and random prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny import EXAMPLE

from edgewright.calibration.prompts import Task, random_prompts, read_task, text_windows
from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(EXAMPLE)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_task_is_prompts_and_accepted_answers(tmp_path: Path) -> None:
    text = "k n i g h t\tN AY T\n\n  r e a d \tR EH D | R IY D\nü b e r\tUW B ER |  | Y UW\n"
    task = read_task(write(tmp_path / "task.tsv", text))
    assert task == Task(["k n i g h t", "r e a d", "ü b e r"], [["N AY T"], ["R EH D", "R IY D"], ["UW B ER", "Y UW"]])
    assert read_task(tmp_path / "task.tsv", 2).prompts == task.prompts[:2]


def test_the_example_s_task_file_reads() -> None:
    task = read_task(EXAMPLE / "task.tsv")
    assert len(task.prompts) == len(task.answers) == 1000
    assert all(task.answers)


@pytest.mark.parametrize(("line", "number"), [("no tab here", 2), ("prompt\t", 2), ("\tanswer", 2), ("prompt\t | ", 2)])
def test_a_line_that_is_no_task_is_named(line: str, number: int, tmp_path: Path) -> None:
    file = write(tmp_path / "task.tsv", f"a\tb\n{line}\nc\td\n")
    with pytest.raises(UserError, match=rf"task\.tsv: line {number} is not"):
        read_task(file)
    assert read_task(file, 1).prompts == ["a"]  # what is beyond the limit is not judged


def test_a_task_file_without_prompts_absent_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prompts in it"):
        read_task(write(tmp_path / "empty.tsv", "\n \n"))
    with pytest.raises(UserError, match="cannot be read"):
        read_task(tmp_path / "absent.tsv")
    (tmp_path / "binary.tsv").write_bytes(b"\xff\xfe\x00a\tb")
    with pytest.raises(UserError, match="not UTF-8"):
        read_task(tmp_path / "binary.tsv")


def test_windows_are_the_text_in_order_each_after_begin_of_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = " ".join("abcdefghij" * 5)
    ids = tokenizer.encode(text, special=False)
    file = write(tmp_path / "text.txt", text)
    windows = text_windows(file, tokenizer, 8, 100)
    assert {window[0] for window in windows} == {tokenizer.bos_id}
    assert [token for window in windows for token in window[1:]] == ids
    assert {len(window) for window in windows[:-1]} == {8}
    assert 1 < len(windows[-1]) <= 8
    assert text_windows(file, tokenizer, 8, 3) == windows[:3]


def test_too_little_text_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for little in ("", " ", "\n"):
        with pytest.raises(UserError, match="too little text"):
            text_windows(write(tmp_path / "little.txt", little), tokenizer, 8, 4)


def test_random_prompts_are_the_same_every_time_and_in_the_vocabulary() -> None:
    prompts = random_prompts(70, 32)
    assert prompts == random_prompts(70, 32)
    assert prompts != random_prompts(70, 32, seed=1)
    assert len(prompts) == 32
    assert all(4 <= len(p) <= 24 for p in prompts)
    assert {t for p in prompts for t in p} <= set(range(4, 70))
    assert len({tuple(p) for p in prompts}) == 32
    for vocab in (1, 2, 4):
        assert all(0 <= t < vocab for p in random_prompts(vocab, 8) for t in p)
