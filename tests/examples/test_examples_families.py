"""The Dolphin and the DeltaNet example: their files, their tasks, and what the product makes of them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from helpers.requests import asking
from safetensors import safe_open
from tokenizers import Tokenizer

from edgewright import compiler
from edgewright.calibration.prompts import read_task
from edgewright.cli import main
from edgewright.verification.checking import VerifyOptions, verify_here

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
DOLPHIN, DELTANET = EXAMPLES / "dolphin-packages", EXAMPLES / "deltanet-g2p"
CHECKPOINT = {"config.json", "model.safetensors", "task.tsv", "tokenizer.json", "tokenizer_config.json"}
FILES = {
    DOLPHIN: CHECKPOINT | {"README.md", "records.py", "score.py", "train.py"},
    DELTANET: CHECKPOINT | {"README.md", "LICENSE.cmudict", "generation_config.json", "score.py", "train.py"},
}
PARAMETERS = {DOLPHIN: 3_581_312, DELTANET: 3_100_000}


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(request.param))
    yield importlib.import_module("train")
    for name in ("train", "score", "records"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("example", FILES, ids=lambda e: e.name)
def test_the_directory_is_complete_and_small(example: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in example.iterdir() if path.is_file()}
    assert set(sizes) == FILES[example]
    assert max(sizes.values()) < 16_000_000
    with safe_open(example / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert parameters == pytest.approx(PARAMETERS[example], rel=0.01)


def test_the_dolphin_s_task_has_a_context_in_every_line() -> None:
    task = read_task(DOLPHIN / "task.tsv", contexts=True)
    assert len(task.prompts) == len(task.contexts) == 899
    assert len(set(task.contexts)) == 899
    tokenizer = Tokenizer.from_file(str(DOLPHIN / "tokenizer.json"))
    config = json.loads((DOLPHIN / "config.json").read_text())
    assert max(len(tokenizer.encode(c).ids) for c in task.contexts) <= config["context_window"]


def test_the_deltanet_reads_and_is_asked_what_the_t5gemma_is() -> None:
    tokenizer = Tokenizer.from_file(str(DELTANET / "tokenizer.json"))
    assert tokenizer.encode("k n i g h t").tokens == ["k", "n", "i", "g", "h", "t", "<say>"]
    words = read_task(EXAMPLES / "t5gemma-g2p" / "task.tsv")
    assert read_task(DELTANET / "task.tsv").prompts == words.prompts


@pytest.mark.parametrize("train", [DOLPHIN], indirect=True)
def test_the_dolphin_s_script_makes_its_config(train: ModuleType) -> None:
    assert train.build_config() == json.loads((DOLPHIN / "config.json").read_text())


@pytest.mark.slow
def test_the_deltanet_spells_through_the_product(tmp_path: Path) -> None:
    report = compiler.export(asking(str(DELTANET)), tmp_path / "bundle").report
    assert report is not None
    assert report.passed
    result = CliRunner().invoke(main, ["run", str(tmp_path / "bundle"), "--prompt", "k n i g h t"])
    assert result.stdout == "N AY T\n"


@pytest.mark.slow
@pytest.mark.parametrize(("example", "right"), [(DOLPHIN, 580 / 899), (DELTANET, 0.645)], ids=["dolphin", "deltanet"])
def test_the_product_scores_what_the_readme_says(example: Path, right: float, tmp_path: Path) -> None:
    """At 8 bits everywhere, which the README's own rounding moves by no more than three words."""
    compiler.export(asking(str(example), widths=(8,), verify=False), tmp_path / "bundle")
    (target,) = verify_here(tmp_path / "bundle", VerifyOptions(task=example / "task.tsv")).targets
    assert target.task_accuracy == pytest.approx(right, abs=0.015)
