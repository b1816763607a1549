"""The Swift package built with all warnings as errors: its own tests on each model, golden traces, answers, failure messages."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from helpers.apps import EXAMPLES, ROOT, bundle_for, project
from helpers.swift import SwiftClient, build, open_toolchain, swiftlint
from helpers.tokenizer_kinds import KINDS, made, texts

from edgewright.apps.platforms import PLATFORMS
from edgewright.apps.tokenizer_parts import read_parts, require_known
from edgewright.runtimes.sampling import GREEDY
from edgewright.runtimes.text_generation import open_bundle

pytestmark = pytest.mark.slow
AGE = "1.29"
OLDER = ("t5gemma", "t5gemma-g2p")
"""Models whose graphs ask for a later ONNX Runtime than Apple's, unless they are exported for it."""
WORDS = 20
MODELS = [*EXAMPLES, "llama"]


@pytest.fixture(scope="module")
def bundles(app_bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def exported(name: str) -> Path:
        return bundle_for(AGE, name, tmp_path_factory.mktemp(name)) if name in OLDER else app_bundles(name)

    return exported


@pytest.fixture(scope="module")
def projects(bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("swift")

    @cache
    def embedded(name: str) -> Path:
        project(bundles(name), folder / name, "swift")
        return folder / name

    return embedded


@pytest.fixture(scope="module")
def app(projects: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> SwiftClient:
    swift = open_toolchain(tmp_path_factory.getbasetemp())
    return build(swift, projects("t5gemma-g2p"), tmp_path_factory.mktemp("runtime"))


@pytest.mark.parametrize("name", MODELS)
def test_the_packages_own_tests_pass(name: str, app: SwiftClient, projects: Callable[[str], Path]) -> None:
    """Golden traces, a second call, cancelling, half characters, stop strings, NFC, SHA-256, sampling, the screen."""
    done = app.tests(projects(name) / "model")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Executed 0 tests" not in done.stdout.splitlines()[-1]
    assert "testTheGoldenTracesPass" in done.stdout + done.stderr


@pytest.mark.parametrize("name", MODELS)
def test_the_golden_traces_pass(name: str, app: SwiftClient, projects: Callable[[str], Path]) -> None:
    model = projects(name) / "model"
    done = app("--model", model, "--trace", model / "traces.json")
    assert done.returncode == 0, done.stderr
    traces = json.loads((model / "traces.json").read_text())
    cases, texts = len(traces["cases"]), len(traces["texts"])
    assert done.stdout.startswith(f"{cases} of {cases} traces, {texts} of {texts} texts")


def test_a_wrong_trace_fails(app: SwiftClient, projects: Callable[[str], Path], tmp_path: Path) -> None:
    """Another token than the recorded one, a text that is decoded otherwise, other tokens of a text."""
    model = projects("t5gemma-g2p") / "model"
    for at, value in ((("cases", 0, "steps", 1, "token"), 5), (("cases", 1, "text"), "no"), (("texts", 0, "ids"), [7])):
        traces = json.loads((model / "traces.json").read_text())
        where = traces
        for key in at[:-1]:
            where = where[key]
        where[at[-1]] = value
        (tmp_path / "traces.json").write_text(json.dumps(traces))
        done = app("--model", model, "--trace", tmp_path / "traces.json")
        assert done.returncode == 1, done.stdout
        assert "recorded" in done.stderr


@pytest.mark.parametrize("name", ["deltanet-g2p", "t5gemma-g2p"])
def test_held_out_words_are_answered_as_the_product_does(
    name: str, app: SwiftClient, projects: Callable[[str], Path], bundles: Callable[[str], Path]
) -> None:
    opened = open_bundle(bundles(name), "onnx", threads=1)
    lines = (ROOT / "examples" / name / "task.tsv").read_text().splitlines()[:WORDS]
    for prompt in (line.partition("\t")[0] for line in lines):
        done = app("--model", projects(name) / "model", "--prompt", prompt, "--threads", 1)
        want = "".join(opened.generate(prompt, sampling=GREEDY))
        assert done.stdout == f"{want}\n", (prompt, done.stderr)


def test_a_memory_is_kept_and_serves_again(
    app: SwiftClient, projects: Callable[[str], Path], bundles: Callable[[str], Path], tmp_path: Path
) -> None:
    model = projects("dolphin-packages") / "model"
    opened = open_bundle(bundles("dolphin-packages"), "onnx", threads=1)
    memory = tmp_path / "memory"
    for line in (ROOT / "examples" / "dolphin-packages" / "task.tsv").read_text().splitlines()[:3]:
        context, prompt, _ = line.split("\t")
        (tmp_path / "context.txt").write_text(context)
        common = ("--model", model, "--prompt", prompt)
        read = app(*common, "--context", tmp_path / "context.txt", "--save-memory", memory)
        again = app(*common, "--memory", memory)
        want = "".join(opened.generate(prompt, context=context, sampling=GREEDY))
        assert (read.stdout, again.stdout) == (f"{want}\n", f"{want}\n"), read.stderr + again.stderr
    memory.write_bytes(memory.read_bytes()[:-4])
    assert "is no memory of a context" in fails(app, "--model", model, "--prompt", "x", "--memory", memory)
    other = app("--model", projects("t5gemma-g2p") / "model", "--prompt", "k", "--memory", memory)
    assert other.returncode == 2


def fails(app: SwiftClient, *arguments: object) -> str:
    """The one line of a failure."""
    done = app(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_damaged_weights_are_refused(app: SwiftClient, projects: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "damaged"
    shutil.copytree(projects("t5gemma-g2p") / "model", model)
    asked = ("--model", model, "--prompt", "k")
    weights = model / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[4096] ^= 1
    weights.write_bytes(data)
    assert "weights.bin is damaged (its SHA-256 is not that of app.json)" in fails(app, *asked)
    weights.write_bytes(data[:-1])
    assert f"has {len(data) - 1} bytes of {len(data)}; download it again" in fails(app, *asked)
    weights.unlink()
    assert "weights.bin is missing" in fails(app, *asked)
    contract = json.loads((model / "app.json").read_text())
    contract["files"]["../weights.bin"] = contract["files"].pop("weights.bin")
    (model / "app.json").write_text(json.dumps(contract))
    assert "names a file outside its folder" in fails(app, *asked)
    (model / "app.json").write_text("{}")
    assert "app.json is not as it was written" in fails(app, *asked)


def test_other_mistakes_are_one_line(app: SwiftClient, projects: Callable[[str], Path], tmp_path: Path) -> None:
    model = projects("t5gemma-g2p") / "model"
    assert "app.json is missing" in fails(app, "--model", tmp_path, "--prompt", "k")
    assert "the prompt is empty" in fails(app, "--model", model, "--prompt", "  ")
    assert "the model reads at most 64; shorten it" in fails(app, "--model", model, "--prompt", "a " * 70)
    assert "there is no option --promt" in fails(app, "--promt", "k")
    assert "--ids 5,x are no token ids" in fails(app, "--model", model, "--ids", "5,x")
    assert "token 70, the model has 70" in fails(app, "--model", model, "--ids", "70")
    assert "--tg x is no number" in fails(app, "--model", model, "--bench", "--tg", "x")
    assert "an empty stop string" in fails(app, "--model", model, "--prompt", "k", "--stop", "")
    assert "there is no Core ML here" in fails(app, "--model", model, "--prompt", "k", "--runtime", "coreml")
    little = fails(app, "--model", model, "--prompt", "k", "--available-memory", 1000)
    assert "GiB of memory, and 0.00 are there; close other apps" in little
    decoder = projects("deltanet-g2p") / "model"
    assert "the model's context is 64; shorten it" in fails(app, "--model", decoder, "--prompt", "a " * 70)


def test_a_graph_that_the_runtime_lacks_is_named(
    app: SwiftClient, projects: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(projects("t5gemma-g2p") / "model", model)
    graph = model / "decoder.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"GroupQueryAttention", b"GroupQueryAttentiom"))
    line = fails(app, "--model", model, "--prompt", "k", "--no-check")
    assert "decoder.onnx does not open in ONNX Runtime" in line
    assert "(it needs 1." in line


def test_an_answer_stops_where_it_is_told(app: SwiftClient, projects: Callable[[str], Path]) -> None:
    asked = ("--model", projects("t5gemma-g2p") / "model", "--prompt", "k n i g h t")
    assert app(*asked).stdout == "N AY T\n"
    stopped = app(*asked, "--stop", " T")
    assert (stopped.stdout, "ended by: stop" in stopped.stderr) == ("N AY\n", True)
    two = app(*asked, "--max-new-tokens", 2)
    assert (two.stdout, "ended by: limit" in two.stderr) == ("N AY\n", True)


def test_the_bench_prints_rows(app: SwiftClient, projects: Callable[[str], Path]) -> None:
    done = app("--model", projects("deltanet-g2p") / "model", "--bench", "--pp", 16, "--tg", 8, "--repeats", 2)
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]] == ["pp16", "tg8"], done.stderr


def test_the_core_ml_adapter_type_checks_against_a_stub(app: SwiftClient, tmp_path: Path) -> None:
    """No Core ML runs here. The stub has the declarations that the adapter uses, and stands under the framework's name."""
    stub = Path(__file__).parent / "swift" / "CoreMLStub.swift"
    shutil.copyfile(stub, tmp_path / "CoreML.swift")
    emit = ("swiftc", "-emit-module", "-module-name", "CoreML", "-swift-version", 6, "CoreML.swift")
    stubbed = app.swift.run(*emit, at=tmp_path)
    assert stubbed.returncode == 0, stubbed.stderr
    modules = app.package / ".build" / "debug" / "Modules"
    sources = sorted((app.package / "Sources" / "EdgewrightCoreML").glob("*.swift"))
    checked = ("swiftc", "-typecheck", "-warnings-as-errors", "-swift-version", 6, "-I", tmp_path, "-I", modules)
    done = app.swift.run(*checked, *sources, at=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "Wrong.swift").write_text("import CoreML\nfunc wrong(_ model: MLModel) -> Int { model.makeState() }\n")
    wrong = app.swift.run(*checked, *sources, "Wrong.swift", at=tmp_path)
    assert "cannot convert return expression" in wrong.stderr


def test_the_sources_are_formatted(app: SwiftClient) -> None:
    folders = [app.package / name for name in ("App", "Package.swift", "Sources", "Tests")]
    how = ("--strict", "--recursive", "--configuration", app.package / "swift-format.json")
    done = app.swift.run("swift", "format", "lint", *how, *folders)
    assert (done.returncode, done.stderr) == (0, "")


def test_swiftlint_finds_nothing(app: SwiftClient, tmp_path: Path) -> None:
    done = swiftlint(app, tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_every_source_parses(app: SwiftClient) -> None:
    """Also what no compiler here sees: the SwiftUI view, and the sample app."""
    sources = [*(app.package / "App").glob("*.swift"), *(app.package / "Sources").rglob("*.swift")]
    done = app.swift.run("swiftc", "-frontend", "-parse", *sources)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_tokens_and_texts_are_the_librarys(
    kind: str, app: SwiftClient, projects: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every kind of model and step that `embed` lets through, over Unicode."""
    model, tokenizer = tmp_path / "model", made(kind)
    shutil.copytree(projects("t5gemma-g2p") / "model", model)
    file = model / "tokenizer.json"
    tokenizer.save(str(file))
    platform = PLATFORMS["swift"]
    assert platform.models is not None
    assert platform.steps is not None
    require_known(read_parts(file), platform.models, platform.steps, "swift")
    contract = json.loads((model / "app.json").read_text())
    data = file.read_bytes()
    contract["files"]["tokenizer.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (model / "app.json").write_text(json.dumps(contract))
    cases = []
    for text in texts():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        cases.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids)})
    (model / "traces.json").write_text(json.dumps({"cases": [], "texts": cases, "new_tokens": 1, "tolerance": 1}))
    done = app("--model", model, "--trace", model / "traces.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"0 of 0 traces, {len(texts())} of {len(texts())} texts")
