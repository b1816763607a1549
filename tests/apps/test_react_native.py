"""The React Native module: type-checked against the real packages, and run by node over ONNX Runtime 1.24.3, as a phone would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from helpers.apps import EXAMPLES, ROOT, TOOLS, bundle_for, make_embedding_bundle, project
from helpers.cli_runner import edgewright, passed, refused

from edgewright.apps.platforms import PLATFORMS
from edgewright.bundle import Bundle
from edgewright.runtimes.generate import Stream, read_context
from edgewright.runtimes.text_generation import open_bundle

PACKAGES = TOOLS / "react-native" / "node_modules"
OWN = Path(__file__).parent / "react_native"
RUNTIME = PLATFORMS["react-native"].runtime
PROMPTS = 12
FORMATTED = ("src/**", "screens/**", "test/**", "App.tsx", "*.json")

needs_tools = pytest.mark.skipif(
    not (PACKAGES / "react-native").is_dir() or shutil.which("node") is None,
    reason="no React Native packages or no node here: make apps-tools",
)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of an example, or of a tiny model: written for the platform's runtime."""
    return cache(lambda name: bundle_for(RUNTIME, name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def projects(bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("apps")

    @cache
    def made(name: str) -> Path:
        project(bundles(name), folder / name, "react-native")
        (folder / name / "node_modules").symlink_to(PACKAGES)
        return folder / name

    return made


def tool(project: Path, *command: object, **environment: str) -> str:
    """What a command prints in the project's folder; it must succeed."""
    known = {"ONNXRUNTIME_NODE_INSTALL": "skip", **os.environ, **environment}
    done = subprocess.run(list(map(str, command)), cwd=project, capture_output=True, text=True, timeout=550, env=known)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def run_tests(project: Path, *names: str, **environment: str) -> str:
    """Compile the project's tests, and run those of these names."""
    tool(project, PACKAGES / ".bin" / "tsc", "-p", "tsconfig.test.json")
    return tool(project, "node", "--test", *(f"build/test/{name}.test.js" for name in names), **environment)


def byte_level(file: Path) -> Path:
    """A tokenizer.json of single bytes and a few pairs, some of them across the bytes of one character."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    texts = ["日本語のテキスト 한국어 русский 🙂🙃 naïve café ½ ²"] * 3
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.save(str(file))
    return file


def clear_answers(name: str, bundle: Path, least: float) -> Iterator[dict[str, str | None]]:
    """What the product answers to the first tasks of an example, but where two tokens are nearer to each other than `least`: there
    another release may take the other one."""
    opened, spec = open_bundle(bundle, "onnx", threads=1), Bundle.open(bundle).manifest.generation
    for line in (ROOT / "examples" / name / "task.tsv").read_text().splitlines()[:40]:
        *contexts, prompt, _ = line.split("\t")
        context = contexts[0] if contexts else None
        read = None if context is None else opened.tokenizer.encode(context, special=False)
        memory = None if read is None else read_context(opened.session, spec, read)
        stream = Stream(opened.session, spec, [opened.read_prompt(prompt).ids], spec.max_new_tokens, memory)
        logits, said, margin = stream.prefill()[0, -1], list[int](), np.inf
        while len(said) < spec.max_new_tokens and margin > least:
            second, first = np.sort(logits)[-2:]
            margin = min(margin, float(first - second))
            token = int(logits.argmax())
            if token in spec.eos_ids:
                break
            said.append(token)
            logits = stream.feed(np.array([[token]], np.int64))[0, -1]
        if margin > least:
            yield {"prompt": prompt, "context": context, "said": opened.tokenizer.decode(said)}


# ---- without node -----------------------------------------------------------------------------------------------------


def test_a_graph_for_a_newer_runtime_is_refused(app_bundles: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = refused(edgewright("embed", app_bundles("t5gemma"), "--platform", "react-native", "-o", out))
    assert "--platform react-native has ONNX Runtime 1.24.3, and encoder.onnx needs 1.30.0" in line
    assert "export again with --onnxruntime 1.24.3" in line
    assert not out.exists()


def test_the_project_is_whole(app_bundles: Callable[[str], Path], tmp_path: Path) -> None:
    """The same bytes twice, no placeholder, both native runtimes pinned, every pin the platform's."""
    made, again = tmp_path / "one", tmp_path / "two"
    for folder in (made, again):
        passed(edgewright("embed", app_bundles("llama"), "--platform", "react-native", "-o", folder))
    files = {p.relative_to(made): p.read_bytes() for p in made.rglob("*") if p.is_file()}
    assert files == {p.relative_to(again): p.read_bytes() for p in again.rglob("*") if p.is_file()}
    for name, data in files.items():
        if name.parts[0] != "model":
            text = data.decode()
            assert "{%" not in text, name
            assert "TODO" not in text, name
            assert "{{" not in text or name.suffix in (".tsx", ".ts"), name
    packages = json.loads(files[Path("package.json")])
    for name in ("onnxruntime-react-native", "onnxruntime-common"):
        assert packages["dependencies"][name] == RUNTIME
    assert packages["devDependencies"]["onnxruntime-node"] == RUNTIME
    card = files[Path("README.md")].decode()
    assert f'resolutionStrategy.force "com.microsoft.onnxruntime:onnxruntime-android:{RUNTIME}"' in card
    assert f"pod 'onnxruntime-c', '{RUNTIME}'" in card


# ---- with it ----------------------------------------------------------------------------------------------------------


@needs_tools
@pytest.mark.slow
def test_types_hold_against_the_real_packages_and_all_is_formatted(projects: Callable[[str], Path]) -> None:
    app = projects("t5gemma-g2p")
    facts = {
        p: json.loads((PACKAGES / p / "package.json").read_text()) for p in ("react-native", "onnxruntime-react-native")
    }
    wanted = json.loads((app / "package.json").read_text())["dependencies"]
    assert {name: fact["version"] for name, fact in facts.items()} == {name: wanted[name] for name in facts}
    tool(app, PACKAGES / ".bin" / "tsc", "--noEmit")
    tool(app, PACKAGES / ".bin" / "prettier", "--check", *FORMATTED)
    (app / "wrong.ts").write_text('import { open } from "./src";\nvoid open(1);\n')
    try:
        config = {"extends": "./tsconfig.json", "include": ["wrong.ts"]}
        (app / "tsconfig.wrong.json").write_text(json.dumps(config))
        done = subprocess.run(
            [str(PACKAGES / ".bin" / "tsc"), "-p", "tsconfig.wrong.json"], cwd=app, capture_output=True, text=True
        )
        assert (done.returncode != 0, "wrong.ts(2" in done.stdout) == (True, True)
    finally:
        (app / "wrong.ts").unlink()
        (app / "tsconfig.wrong.json").unlink()


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXAMPLES, "llama"])
def test_the_golden_traces_pass_on_the_platforms_runtime(name: str, projects: Callable[[str], Path]) -> None:
    traces = json.loads((projects(name) / "model" / "traces.json").read_text())
    said = run_tests(projects(name), "traces")
    assert f"{len(traces['cases'])} traces and {len(traces['texts'])} texts; logits differ by at most" in said


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_answers_are_the_products(
    name: str, projects: Callable[[str], Path], bundles: Callable[[str], Path], tmp_path: Path
) -> None:
    """Streaming, cancelling, a second call, a full context, mistakes: tests/apps/react_native/answers.test.ts."""
    least = json.loads((projects(name) / "model" / "traces.json").read_text())["tolerance"]
    expected = list(islice(clear_answers(name, bundles(name), least), PROMPTS))
    assert len(expected) >= 4
    file = tmp_path / "expected.json"
    file.write_text(json.dumps(expected))
    copy = with_tests(projects(name), tmp_path)
    assert "# fail 0" in run_tests(copy, "answers", EXPECTED=str(file))


@needs_tools
@pytest.mark.slow
def test_vectors_are_the_products(tmp_path: Path) -> None:
    bundle = make_embedding_bundle(tmp_path, RUNTIME)
    project(bundle, tmp_path / "app", "react-native")
    (tmp_path / "app" / "node_modules").symlink_to(PACKAGES)
    texts, opened = ["the keeper lit the lamp", "a " * 60, "Ünïcode Text, lamp"], open_bundle(bundle, "onnx", threads=1)
    cases = [
        {"text": text, "prompt": name, "vector": opened.embed([text], prompt_name=name)[0].tolist()}
        for text in texts
        for name in (None, "query")
    ]
    (tmp_path / "expected.json").write_text(json.dumps(cases))
    shutil.copy(OWN / "vectors.test.ts", tmp_path / "app" / "test")
    said = run_tests(tmp_path / "app", "traces", "vectors", EXPECTED=str(tmp_path / "expected.json"))
    assert "12 traces and 17 texts" in said
    assert "# fail 0" in said
    tool(tmp_path / "app", PACKAGES / ".bin" / "tsc", "--noEmit")


@needs_tools
@pytest.mark.slow
def test_downloads_go_on_and_damage_is_found(projects: Callable[[str], Path], tmp_path: Path) -> None:
    assert "# fail 0" in run_tests(with_tests(projects("t5gemma-g2p"), tmp_path), "store")


@needs_tools
@pytest.mark.slow
def test_text_is_whole_characters(projects: Callable[[str], Path], tmp_path: Path) -> None:
    copy = with_tests(projects("t5gemma-g2p"), tmp_path)
    assert "# fail 0" in run_tests(copy, "text", TOKENIZER=str(byte_level(tmp_path / "tokenizer.json")))


@needs_tools
@pytest.mark.slow
def test_metro_bundles_it_and_hermes_takes_it(projects: Callable[[str], Path], tmp_path: Path) -> None:
    """The whole example by React Native's own bundler, then bytecode by the compiler of its engine."""
    if not (PACKAGES / "@react-native" / "metro-config").is_dir():
        pytest.skip("no Metro here: make apps-tools")
    copy = with_tests(projects("t5gemma-g2p"), tmp_path)
    shutil.copy(OWN / "bundle.cjs", copy)
    tool(copy, "node", "bundle.cjs", "android", "app.js", CI="1")
    hermes = PACKAGES / "hermes-compiler" / "hermesc" / "linux64-bin" / "hermesc"
    tool(copy, hermes, "-O", "-emit-binary", "-w", "-out", "app.hbc", "app.js")
    assert (copy / "app.hbc").stat().st_size > 100_000


def with_tests(project: Path, folder: Path) -> Path:
    """A copy of a project with the tests of this folder beside its own."""
    copy = folder / "app"
    shutil.copytree(project, copy, symlinks=True, ignore=shutil.ignore_patterns("build"))
    for path in OWN.glob("*.ts"):
        if path.name != "vectors.test.ts":
            shutil.copy(path, copy / "test")
    return copy
