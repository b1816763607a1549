"""What runs on the device: its loop gives the product's tokens, it has rows of every kind of bundle, it needs nothing else."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny, tiny_speech
from helpers.requests import asking
from helpers.tiny_families import FAMILIES

from edgewright.bundle import Bundle
from edgewright.commands.profile import ProfileLengths
from edgewright.commands.profile_devices import profile_devices
from edgewright.compiler import export
from edgewright.measuring import on_device
from edgewright.measuring.measure import DeviceResult, Settings
from edgewright.measuring.on_device.model import Model, greedy
from edgewright.measuring.on_device.rows import examples
from edgewright.measuring.runner import runner
from edgewright.runtimes.example_inputs import read_examples
from edgewright.runtimes.generate import generate, read_context
from edgewright.runtimes.registry import open_session

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted(Path(on_device.__file__).parent.glob("*.py"))
MAY_IMPORT = set(sys.stdlib_module_names) | {"numpy", "onnxruntime"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_it_needs_numpy_and_onnxruntime_alone(source: Path) -> None:
    tree = ast.parse(source.read_text(), feature_version=(3, 9))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= MAY_IMPORT
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 or (node.level == 0 and str(node.module).partition(".")[0] in MAY_IMPORT)


def test_the_runner_is_one_file_of_the_same_bytes(tmp_path: Path) -> None:
    assert runner() == runner()
    file = tmp_path / "runner.pyz"
    file.write_bytes(runner())
    with zipfile.ZipFile(file) as archive:
        assert {f"edgewright_runner/{s.name}" for s in SOURCES} | {"__main__.py"} == set(archive.namelist())
    done = subprocess.run(
        [sys.executable, "-I", str(file), "about", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["python"] == sys.version.split()[0]


def same_tokens(path: Path, prompts: list[list[int]], contexts: list[list[int]], new: int) -> None:
    bundle = Bundle.open(path)
    session, spec, model = open_session(bundle, "onnx", 1), bundle.manifest.generation, Model(path, 1)
    answers = []
    for index, prompt in enumerate(prompts):
        context = contexts[index] if contexts else []
        memory = read_context(session, spec, context) if context else None
        wanted = list(generate(session, spec, prompt, new, memory=memory))
        assert greedy(model, prompt, new, context) == wanted
        answers.append(tuple(wanted))
    assert len(set(answers)) > 1


@pytest.mark.exports
@pytest.mark.parametrize("name", ["qwen3_5_text", "t5gemma"])
def test_its_tokens_are_the_products(
    name: str, tmp_path: Path, tiny_bundle: Callable[[str], tuple[Path, Path]]
) -> None:
    """Prompts of several lengths, one longer than a prefill chunk; a hybrid's states change places at each call."""
    if name == "t5gemma":
        path = tiny_bundle(name)[1]
    else:
        model = tiny.write(tmp_path / "model", FAMILIES[name], max_position_embeddings=256)
        asked = asking(str(model), bits=6.0, importance="zd", max_context=200, verify=False)
        path = export(asked, tmp_path / "bundle").path
    draw = np.random.default_rng(1)
    prompts = [[int(t) for t in draw.integers(4, 70, n)] for n in (1, 7, 30, 150 if name != "t5gemma" else 50)]
    same_tokens(path, prompts, [], 12)


@pytest.mark.slow
@pytest.mark.exports
@pytest.mark.parametrize("name", ["deltanet-g2p", "dolphin-packages", "t5gemma-g2p"])
def test_its_tokens_are_the_products_of_every_example(name: str, tmp_path: Path) -> None:
    request = asking(str(ROOT / "examples" / name), bits=4.5, importance="zd", max_context=320, verify=False)
    path = export(request, tmp_path / "bundle").path
    manifest = Bundle.open(path).manifest
    same_tokens(path, [list(p) for p in manifest.prompts[:8]], [list(c) for c in manifest.contexts[:8]], 24)


def profiled(bundle: Path, device: Path, **lengths: Any) -> DeviceResult:
    """With the files of the runner on this machine, in a process of its own."""
    settings = Settings(threads=1, python=sys.executable, cool_within=0.0)
    (result,) = profile_devices(bundle, [f"local://{device}"], ProfileLengths(repeats=2, **lengths), settings)
    assert result.not_measured == {}
    assert all(row.rate is not None and row.rate > 0 for row in result.rows if row.answer is None)
    return result


@pytest.mark.slow
@pytest.mark.exports
def test_the_rows_of_speech(tmp_path: Path) -> None:
    model = tiny_speech.write(tmp_path / "model", "whisper")
    path = export(asking(str(model), bits=6.0, importance="zd", verify=False), tmp_path / "bundle").path
    result = profiled(path, tmp_path / "device", new=4)
    assert [(row.test, row.unit) for row in result.rows] == [
        ("seconds of sound a second", "seconds of sound"),
        ("tg4", "tokens"),
    ]


@pytest.mark.exports
def test_the_rows_of_a_module(tmp_path: Path) -> None:
    path = export(asking("helpers.user_modules:speech", bits=6.0, verify=False), tmp_path / "bundle").path
    result = profiled(path, tmp_path / "device")
    assert [(row.test, row.unit, row.n) for row in result.rows] == [("calls a second", "calls", 2)]
    bundle = Bundle.open(path)
    found, wanted = examples(path / "checkpoint" / "examples.safetensors"), read_examples(bundle)
    assert [graph for graph, _ in found] == [graph for graph, _ in wanted]
    for (_, ours), (_, theirs) in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.exports
def test_the_rows_of_a_decoder_decoder(tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "model", FAMILIES["dolphin"])
    path = export(asking(str(model), bits=6.0, importance="zd", max_context=48, verify=False), tmp_path / "bundle").path
    result = profiled(path, tmp_path / "device", prompts=(16,), new=4)
    assert [row.test for row in result.rows] == ["pp16", "tg4", "answer"]
    assert result.rows[-1].answer == result.answer_here


@pytest.mark.slow
@pytest.mark.exports
def test_the_rows_of_embeddings(tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "model", FAMILIES["modernbert"])
    asked = asking(str(model), bits=6.0, importance="zd", verify=False, pooling=("mean",))
    path = export(asked, tmp_path / "bundle").path
    result = profiled(path, tmp_path / "device", prompts=(8,))
    assert [(row.test, row.unit) for row in result.rows] == [("pp8", "tokens")]


@pytest.mark.exports
def test_a_sustained_rate(exported: Path, tmp_path: Path) -> None:
    settings = Settings(threads=1, python=sys.executable, cool_within=0.0, sustain=0.6, repeats=2)
    lengths = ProfileLengths(prompts=(8,), new=8, repeats=2)
    (result,) = profile_devices(exported, [f"local://{tmp_path / 'device'}"], lengths, settings)
    prefill, decode, _ = result.rows
    assert prefill.sustained is None
    held = decode.sustained
    assert held is not None
    assert held.first == held.windows[0]
    assert held.rate == pytest.approx(sum(held.windows[-4:]) / 4)
    assert held.seconds >= 0.6
    assert (
        held.settled == all(abs(rate - held.rate) <= 0.05 * held.rate for rate in held.windows[-4:]) or not held.settled
    )
