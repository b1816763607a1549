"""The C++ client built with all warnings as errors: golden traces, answers, failure messages; once more under sanitizers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from helpers.apps import EXAMPLES, ONNXRUNTIME, ROOT, SANITIZERS, client, compiled, make_embedding_bundle, project

from edgewright.runtimes.sampling import GREEDY
from edgewright.runtimes.text_generation import open_bundle

pytestmark = pytest.mark.slow
WORDS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cpp")


@pytest.fixture(scope="module")
def bundles(app_bundles: Callable[[str], Path]) -> Callable[[str], Path]:
    return app_bundles


@pytest.fixture(scope="module")
def projects(folder: Path, bundles: Callable[[str], Path]) -> Callable[[str], Path]:
    @cache
    def made(name: str) -> Path:
        project(bundles(name), folder / name)
        return folder / name

    return made


@pytest.fixture(scope="module")
def app(projects: Callable[[str], Path], folder: Path) -> Path:
    """One client for all models: only what lies in `model` differs."""
    return compiled(projects("t5gemma-g2p"), folder / "app", "-O1")


@pytest.mark.parametrize("name", [*EXAMPLES, "llama"])
def test_the_golden_traces_pass(name: str, app: Path, projects: Callable[[str], Path]) -> None:
    model = projects(name) / "model"
    done = client(app, "--model", model, "--trace", model / "traces.json")
    assert done.returncode == 0, done.stderr
    traces = json.loads((model / "traces.json").read_text())
    cases, texts = len(traces["cases"]), len(traces["texts"])
    assert done.stdout.startswith(f"{cases} of {cases} traces, {texts} of {texts} texts")


def test_a_wrong_trace_fails(app: Path, projects: Callable[[str], Path], tmp_path: Path) -> None:
    """Another token than the recorded one, a text that is decoded otherwise, other tokens of a text."""
    model = projects("t5gemma-g2p") / "model"
    for at, value in ((("cases", 0, "steps", 1, "token"), 5), (("cases", 1, "text"), "no"), (("texts", 0, "ids"), [7])):
        traces = json.loads((model / "traces.json").read_text())
        where = traces
        for key in at[:-1]:
            where = where[key]
        where[at[-1]] = value
        (tmp_path / "traces.json").write_text(json.dumps(traces))
        done = client(app, "--model", model, "--trace", tmp_path / "traces.json")
        assert (done.returncode, done.stderr.count("recorded")) >= (1, 1), done.stdout


@pytest.mark.parametrize("name", ["deltanet-g2p", "t5gemma-g2p"])
def test_held_out_words_are_answered_as_the_product_does(
    name: str, app: Path, projects: Callable[[str], Path], bundles: Callable[[str], Path]
) -> None:
    opened = open_bundle(bundles(name), "onnx", threads=1)
    lines = (ROOT / "examples" / name / "task.tsv").read_text().splitlines()[:WORDS]
    for prompt in (line.partition("\t")[0] for line in lines):
        done = client(app, "--model", projects(name) / "model", "--prompt", prompt, "--threads", 1)
        want = "".join(opened.generate(prompt, sampling=GREEDY))
        assert done.stdout == f"{want}\n", (prompt, done.stderr)


def test_a_memory_is_kept_and_serves_again(
    app: Path, projects: Callable[[str], Path], bundles: Callable[[str], Path], tmp_path: Path
) -> None:
    model = projects("dolphin-packages") / "model"
    opened = open_bundle(bundles("dolphin-packages"), "onnx", threads=1)
    for line in (ROOT / "examples" / "dolphin-packages" / "task.tsv").read_text().splitlines()[:3]:
        context, prompt, _ = line.split("\t")
        (tmp_path / "context.txt").write_text(context)
        memory = tmp_path / "memory"
        read = client(
            app, "--model", model, "--prompt", prompt, "--context", tmp_path / "context.txt", "--save-memory", memory
        )
        again = client(app, "--model", model, "--prompt", prompt, "--memory", memory)
        want = "".join(opened.generate(prompt, context=context, sampling=GREEDY))
        assert (read.stdout, again.stdout) == (f"{want}\n", f"{want}\n"), read.stderr + again.stderr
    kept = memory.read_bytes()
    memory.write_bytes(kept[:-4])
    assert "is no memory of a context" in client(app, "--model", model, "--prompt", "x", "--memory", memory).stderr
    other = client(app, "--model", projects("t5gemma-g2p") / "model", "--prompt", "k", "--memory", memory)
    assert other.returncode == 2


def damaged(projects: Callable[[str], Path], folder: Path, name: str = "t5gemma-g2p") -> Path:
    copy = folder / "damaged"
    shutil.copytree(projects(name) / "model", copy)
    return copy


def fails(app: Path, *arguments: object) -> str:
    """The one line of a failure."""
    done = client(app, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_damaged_weights_are_refused(app: Path, projects: Callable[[str], Path], tmp_path: Path) -> None:
    model = damaged(projects, tmp_path)
    weights = model / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[4096] ^= 1
    weights.write_bytes(data)
    assert "weights.bin is damaged (its SHA-256 is not that of app.json)" in fails(
        app, "--model", model, "--prompt", "k"
    )
    weights.write_bytes(data[:-1])
    assert f"has {len(data) - 1} bytes of {len(data)}; download it again" in fails(
        app, "--model", model, "--prompt", "k"
    )
    weights.unlink()
    assert "weights.bin is missing" in fails(app, "--model", model, "--prompt", "k")


def test_other_mistakes_are_one_line(app: Path, projects: Callable[[str], Path], tmp_path: Path) -> None:
    model = projects("t5gemma-g2p") / "model"
    assert "app.json is missing" in fails(app, "--model", tmp_path, "--prompt", "k")
    assert "the prompt is empty" in fails(app, "--model", model, "--prompt", "  ")
    assert "the model reads at most 64; shorten it" in fails(app, "--model", model, "--prompt", "a " * 70)
    assert "there is no option --promt" in fails(app, "--promt", "k")
    assert "--ids 5,x are no token ids" in fails(app, "--model", model, "--ids", "5,x")
    assert "token 70, the model has 70" in fails(app, "--model", model, "--ids", "70")
    assert "--tg x is no number" in fails(app, "--model", model, "--bench", "--tg", "x")
    decoder = projects("deltanet-g2p") / "model"
    assert "the model's context is 64; shorten it" in fails(app, "--model", decoder, "--prompt", "a " * 70)
    copy = damaged(projects, tmp_path)
    (copy / "app.json").write_text("{}")
    assert "app.json or tokenizer.json is not as it was written" in fails(app, "--model", copy, "--prompt", "k")


def test_an_answer_stops_where_it_is_told(app: Path, projects: Callable[[str], Path]) -> None:
    model = projects("t5gemma-g2p") / "model"
    whole = client(app, "--model", model, "--prompt", "k n i g h t").stdout.strip()
    assert whole == "N AY T"
    stopped = client(app, "--model", model, "--prompt", "k n i g h t", "--stop", " T")
    assert (stopped.stdout, "ended by: stop" in stopped.stderr) == ("N AY\n", True)
    two = client(app, "--model", model, "--prompt", "k n i g h t", "--max-new-tokens", 2)
    assert (two.stdout, "ended by: limit" in two.stderr) == ("N AY\n", True)


def test_the_bench_prints_rows(app: Path, projects: Callable[[str], Path]) -> None:
    done = client(app, "--model", projects("deltanet-g2p") / "model", "--bench", "--pp", 16, "--tg", 8, "--repeats", 2)
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]] == ["pp16", "tg8"], done.stderr


def test_vectors_are_the_products(app: Path, tmp_path: Path) -> None:
    bundle = make_embedding_bundle(tmp_path)
    project(bundle, tmp_path / "app")
    model, opened = tmp_path / "app" / "model", open_bundle(bundle, "onnx", threads=1)
    done = client(app, "--model", model, "--trace", model / "traces.json")
    assert (done.returncode, done.stdout.startswith("12 of 12 traces, 17 of 17 texts; vectors differ")) == (0, True), (
        done.stderr
    )
    texts = ["the keeper lit the lamp", "a " * 60, "Ünïcode Text, lamp"]
    for name in (None, "query"):
        asked = () if name is None else ("--prompt-name", name)
        done = client(app, "--model", model, "--embed", "-", *asked, stdin="".join(f"{text}\n" for text in texts))
        here = np.array([json.loads(line) for line in done.stdout.splitlines()])
        assert np.abs(here - opened.embed(texts, prompt_name=name)).max() < 1e-3, done.stderr
    traces = json.loads((model / "traces.json").read_text())
    traces["vectors"][0]["vector"][3] += 0.1
    (tmp_path / "traces.json").write_text(json.dumps(traces))
    assert "vector 0: 0.1" in client(app, "--model", model, "--trace", tmp_path / "traces.json").stderr
    assert "generates nothing; use embed" in fails(app, "--model", model, "--prompt", "lamp")
    assert "x is no prompt of this model; it has: document, query" in fails(
        app, "--model", model, "--embed", "lamp", "--prompt-name", "x"
    )
    assert "the text is empty" in fails(app, "--model", model, "--embed", " ")
    rows = client(app, "--model", model, "--bench", "--pp", 16, "--repeats", 1).stdout.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["pp16"]


def test_cmake_builds_and_tests(projects: Callable[[str], Path], tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake here")
    source = projects("t5gemma-g2p")
    compiled(source, tmp_path / "here", "-O0")  # skips where a tool is missing
    for command in (
        [
            "cmake",
            "-S",
            str(source),
            "-B",
            str(tmp_path / "build"),
            f"-DONNXRUNTIME={ONNXRUNTIME}",
            "-DCMAKE_BUILD_TYPE=Debug",
        ],
        ["cmake", "--build", str(tmp_path / "build")],
        ["ctest", "--test-dir", str(tmp_path / "build"), "--output-on-failure"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "warning" not in done.stdout + done.stderr


def test_nothing_is_amiss_under_sanitizers(projects: Callable[[str], Path], folder: Path) -> None:
    app = compiled(projects("t5gemma-g2p"), folder / "sanitized", "-O1", *SANITIZERS)
    for name in EXAMPLES:
        model = projects(name) / "model"
        done = client(
            app,
            "--model",
            model,
            "--trace",
            model / "traces.json",
            "--prompt",
            "k n i g h t",
            "--temperature",
            1,
            "--top-p",
            0.9,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "runtime error" not in done.stderr
    assert "the prompt is empty" in fails(app, "--model", model, "--prompt", "")
