"""What the quality benchmarks compute: scores against plain fp64 formulas, and the search for the last layer that fits."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gguf_files import write_gguf
from helpers.tiny import EXAMPLE, write_tiny_llama

from edgewright.checkpoints.gguf_file import read_gguf
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.models.loading import load_original
from edgewright.models.registry import build

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    sys.path.insert(0, str(BENCHMARKS))
    yield load
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = write_tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, directory / name)
    (tmp_path / "text.txt").write_text("a word and another one with letters only " * 20)
    return directory


def loaded(directory: Path) -> Any:
    checkpoint = open_checkpoint(str(directory))
    built = build(checkpoint.config)
    load_original(built, checkpoint)
    return built


def test_scores_are_those_of_plain_formulas(benchmark: Any, model: Path, tmp_path: Path) -> None:
    quality = benchmark("quality_text")
    reference = quality.Reference(model, tmp_path / "text.txt", 3, 16, cache=tmp_path / "cache")
    same = reference.score(loaded(model))
    assert same.kl == pytest.approx(0, abs=1e-5)
    assert (same.top1, same.positions) == (1.0, 45)
    assert same.perplexity == pytest.approx(reference.perplexity, rel=1e-6)

    changed = loaded(model)
    for parameter in changed.model.layers.parameters():
        parameter.data = parameter.data + 0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(0))
    original, kl, loss, agreed = quality.session_of(open_checkpoint(str(model))), 0.0, 0.0, 0
    for window in reference.windows:
        p = quality.predictions(original, window).double().log_softmax(-1)
        q = quality.predictions(quality.EagerSession(changed.graphs()), window).double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        loss -= float(q[torch.arange(15), torch.tensor(window[1:])].sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    score = reference.score(changed)
    assert score.kl == pytest.approx(kl / 45, rel=1e-3)
    assert score.perplexity == pytest.approx(np.exp(loss / 45), rel=1e-6)
    assert score.top1 == agreed / 45
    assert score.kl > 0.01


def test_the_reference_is_computed_once(
    benchmark: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality = benchmark("quality_text")
    first = quality.Reference(model, tmp_path / "text.txt", 3, 16, cache=tmp_path / "cache")
    monkeypatch.setattr(quality.Reference, "_compute", lambda *_: pytest.fail("computed again"))
    second = quality.Reference(model, tmp_path / "text.txt", 3, 16, cache=tmp_path / "cache")
    assert second.score(loaded(model)) == first.score(loaded(model))
    with pytest.raises(pytest.fail.Exception):  # another text is another reference
        quality.Reference(model, tmp_path / "text.txt", 2, 16, cache=tmp_path / "cache")


def test_a_gguf_copied_to_safetensors(benchmark: Any, tmp_path: Path) -> None:
    quality = benchmark("quality_text")
    write_gguf(tmp_path / "m.gguf", "gemma3")
    quality.write_checkpoint(tmp_path / "m.gguf", tmp_path / "copy")
    source, copy = open_checkpoint(str(tmp_path / "m.gguf")), open_checkpoint(str(tmp_path / "copy"))
    assert sorted(copy.names()) == sorted(source.names())
    assert copy.config == source.config
    for name in source.names():
        assert torch.equal(copy.tensor(name), source.tensor(name))


def test_true_sizes_of_a_gguf(benchmark: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama")
    found = benchmark("peers_quality").sizes(tmp_path / "m.gguf")
    matrices = [t for t in read_gguf(tmp_path / "m.gguf").tensors.values() if len(t.shape) == 2]
    assert found["weights"] == sum(t.shape[0] * t.shape[1] for t in matrices)
    assert found["bytes"] == sum(t.data.nbytes for t in matrices) < found["file_bytes"]
    assert sum(sum(kinds.values()) for kinds in found["tensors"].values()) == len(matrices)


class Curve:
    """Perplexity by the number of lowered layers alone."""

    def __init__(self, rise: list[float]) -> None:
        self.rise, self.asked = rise, set[int]()

    def at(self, lowered: frozenset[int]) -> dict[str, float]:
        self.asked.add(len(lowered))
        return {"perplexity": 10 * self.rise[len(lowered)]}


@pytest.mark.parametrize("last", range(31))
def test_the_crossing_is_found_with_few_measurements(benchmark: Any, last: int) -> None:
    curve = Curve([1.0 + 0.05 * n / (last + 0.5) for n in range(31)])
    assert benchmark("bench_layerwise").crossing(curve, list(range(30)), 6) == last
    assert len(curve.asked) <= 9


def test_orders_lower_the_least_important_first(benchmark: Any) -> None:
    scores = {
        "lim": {0: -0.1, 1: -0.9, 2: -0.5},
        "zd": {0: 0.1, 1: 0.3, 2: 0.2},
        "fisher": {0: 3e-3, 1: 1e-3, 2: 2e-3},
    }
    found = benchmark("bench_layerwise").orders(scores, 3, 2)
    assert found["lim"] == [1, 2, 0]  # higher LIM: more important
    assert found["zd"] == [1, 2, 0]  # lower ZD: more important
    assert found["fisher"] == [1, 2, 0]
    assert found["lim reversed"] == [0, 2, 1]
    assert sorted(found["random 1"]) == [0, 1, 2]


@pytest.mark.slow
def test_plans_are_measured_once_and_as_asked(
    benchmark: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole benchmark on a tiny model: every method's rows, within their budgets, and none measured again."""
    room, quality = benchmark("bench_quality"), benchmark("quality_text")
    monkeypatch.setattr(room, "Reference", lambda *a: quality.Reference(*a, length=16, cache=tmp_path / "cache"))
    (tmp_path / "other.txt").write_text("letters only and words that follow another word " * 40)

    def rows(norms: str) -> dict[tuple[str, float], dict[str, Any]]:
        command = ["bench_quality.py", str(model), "--text", str(tmp_path / "text.txt"), "--windows", "3"]
        command += ["--calibration", str(tmp_path / "other.txt"), "--tokens", "400", "--budgets", "3", "5"]
        command += ["--part-tokens", "32", "--fisher-windows", "6"]
        monkeypatch.setattr(sys, "argv", [*command, "--norms", norms, "--output", str(tmp_path / f"{norms}.json")])
        room.main()
        found = json.loads((tmp_path / f"{norms}.json").read_text())["rows"]
        return {(row["method"], row["budget"]): row for row in found}

    kept, tuned = rows("kept"), rows("tuned")
    assert {m for m, _ in kept} == {"fisher gptq", "uniform gptq", "uniform rtn", "zd gptq", "lim gptq"}
    for (method, budget), row in kept.items():
        assert row["bits"] <= budget
        assert row["positions"] == 45
        assert method != "uniform rtn" or tuned[method, budget]["kl"] == row["kl"]
    assert any(tuned[key]["kl"] < row["kl"] for key, row in kept.items())
    assert all(kept[m, 5.0]["kl"] < kept[m, 3.0]["kl"] for m, budget in kept if budget == 3.0)
    with monkeypatch.context() as patched:
        patched.setattr(room, "rounded", lambda *_: pytest.fail("measured again"))
        assert rows("kept") == kept
    (tmp_path / "kept.json").rename(tmp_path / "tuned.json")
    with pytest.raises(SystemExit, match=r"tuned.json holds points of .*: give another --output"):
        rows("tuned")
