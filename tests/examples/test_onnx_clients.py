"""The clients of docs/using-the-onnx-graphs.md, taken from the page and run: the tokens are those of `edgewright run`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import onnx
import pytest
from helpers.requests import asking
from tokenizers import Tokenizer

from edgewright.bundle import Bundle
from edgewright.compiler import export
from edgewright.runtimes.generate import generate, read_context
from edgewright.runtimes.registry import open_exact, open_session

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "using-the-onnx-graphs.md").read_text()
EXAMPLES = ("deltanet-g2p", "dolphin-packages", "t5gemma-g2p")
QUESTIONS = 5
NPM = ("onnxruntime-node@1.30.0", "onnxruntime-web@1.30.0", "@huggingface/tokenizers@0.2.0")
GENAI = ("onnxruntime-genai==0.18.0",)


def block(language: str, number: int = 0) -> str:
    """A block of code on the page."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[number]


@pytest.fixture(scope="module")
def bundles(
    tiny_bundle: Callable[[str], tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The bundle of an example, or of a tiny model, made once."""

    @cache
    def made(name: str) -> Path:
        if name not in EXAMPLES:
            return tiny_bundle(name)[1]
        request = asking(str(ROOT / "examples" / name), bits=4.5, importance="zd", max_context=320)
        return export(request, tmp_path_factory.mktemp(name) / "bundle").path

    return made


def questions(name: str) -> list[list[str]]:
    """(prompt) or (prompt, context) of the first lines of an example's task."""
    rows = [line.split("\t") for line in (ROOT / "examples" / name / "task.tsv").read_text().splitlines()]
    return [row[-2::-1] for row in rows[:QUESTIONS]]


def answers(bundle: Path, asked: list[list[str]], exact: bool = False) -> list[list[int]]:
    """What the product answers, greedily, without a chat template: what `edgewright run --no-chat` prints.

    exact: with float32 activations.
    """
    opened, said = Bundle.open(bundle), []
    spec, session = opened.manifest.generation, (open_exact if exact else open_session)(opened, "onnx", 1)
    assert session is not None
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    for prompt, *context in asked:
        memory = None
        if context:
            memory = read_context(session, spec, tokenizer.encode(context[0], add_special_tokens=False).ids)
        ids = tokenizer.encode(prompt).ids
        said.append(list(generate(session, spec, ids, spec.max_new_tokens, memory=memory)))
    assert len({tuple(tokens) for tokens in said}) > 1
    return said


def client(command: list[str], folder: Path | None = None) -> list[int]:
    """The tokens that a client prints. Without the product on its path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    tokens: list[int] = json.loads(done.stdout)["tokens"]
    return tokens


def test_the_python_client_answers_as_the_product_does(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    _python(bundles("t5gemma"), [["k n i g h t"], ["s"]], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_python_client_answers_of_every_example(name: str, bundles: Callable[[str], Path], tmp_path: Path) -> None:
    _python(bundles(name), questions(name), tmp_path)


def _python(bundle: Path, asked: list[list[str]], folder: Path) -> None:
    script = folder / "client.py"
    script.write_text(block("python"))
    got = [client([sys.executable, str(script), str(bundle), *words]) for words in asked]
    assert got == answers(bundle, asked)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the JavaScript client and its packages. Skips where they cannot be had."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node here")
    folder = Path(os.environ.get("EDGEWRIGHT_NPM", tmp_path_factory.mktemp("npm")))
    if not (folder / "node_modules").exists():
        env = os.environ | {"ONNXRUNTIME_NODE_INSTALL": "skip"}
        command = ["npm", "install", "--no-audit", "--no-fund", *NPM]
        fetched = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
        if fetched.returncode:
            pytest.skip("the packages cannot be had here")
    (folder / "client.mjs").write_text(block("js"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("library", ["onnxruntime-node", "onnxruntime-web"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_javascript_client_answers_as_the_product_does(
    name: str, library: str, bundles: Callable[[str], Path], node: Path
) -> None:
    """The WebAssembly build has no int8 activations: its answers are those of float32 ones."""
    bundle, asked = bundles(name), questions(name)
    words = [[prompt, context[0] if context else "", library] for prompt, *context in asked]
    got = [client(["node", "client.mjs", str(bundle), *given], node) for given in words]
    assert got == answers(bundle, asked, exact=library == "onnxruntime-web")


@pytest.mark.slow
def test_genai_opens_a_decoder_only_bundle(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    """onnxruntime-genai generates the product's tokens, one prompt far longer than a chunk of the cache's growth."""
    where = Path(os.environ.get("EDGEWRIGHT_GENAI", tmp_path / "genai"))
    if not where.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(where), *GENAI]
        if subprocess.run(command, capture_output=True, timeout=600).returncode:
            pytest.skip("onnxruntime-genai cannot be had here")
    script = tmp_path / "genai.py"
    script.write_text(block("python", 1))
    bundle = bundles("llama")
    opened = Bundle.open(bundle)
    session, spec = open_session(opened, "onnx", 1), opened.manifest.generation
    for ids in ([5, 6, 7, 8, 9, 33, 21], [11], list(range(3, 33))):
        command = [sys.executable, str(script), str(bundle), ",".join(map(str, ids))]
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(where)}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        want = list(generate(session, spec, ids, 16))
        got = json.loads(done.stdout)
        assert got[: len(want)] == want
        assert set(got[len(want) :]) <= set(spec.eos_ids)


def test_a_decoder_only_bundle_has_what_genai_asks_for(bundles: Callable[[str], Path]) -> None:
    bundle = bundles("llama")
    decoder, files = (
        json.loads((bundle / "genai_config.json").read_text())["model"]["decoder"],
        Bundle.open(bundle).manifest.files,
    )
    assert {"genai_config.json", f"onnx/{Path(decoder['filename']).name}"} <= set(files)
    model = onnx.load(bundle / decoder["filename"], load_external_data=False)
    ports = [{p.name for p in side} for side in (model.graph.input, model.graph.output)]
    for names, given in zip(("inputs", "outputs"), ports, strict=True):
        wanted = {n % i for n in decoder[names].values() if "%d" in n for i in range(decoder["num_hidden_layers"])}
        assert given == wanted | {n for n in decoder[names].values() if "%d" not in n}
    logits = next(p for p in model.graph.output if p.name == "logits")
    assert [d.dim_value for d in logits.type.tensor_type.shape.dim[:2]] == [1, 1]
    used = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    assert used == {"weights.bin"}


def test_a_model_that_genai_cannot_feed_has_no_config(bundles: Callable[[str], Path]) -> None:
    bundle = bundles("t5gemma")
    assert not (bundle / "genai_config.json").exists()
    assert not (bundle / "onnx" / "genai.onnx").exists()


@pytest.mark.parametrize("name", ["llama", "t5gemma"])
def test_the_checker_objects_to_one_op_alone(name: str, bundles: Callable[[str], Path]) -> None:
    """ONNX Runtime keeps SimplifiedLayerNormalization in the standard's domain, where the standard has no such op."""
    paths = sorted((bundles(name) / "onnx").glob("*.onnx"))
    objections = []
    for path in paths:
        try:
            onnx.checker.check_model(path, full_check=True)
        except onnx.checker.ValidationError as error:
            objections.append(str(error).partition(" with ")[0])
    assert set(objections) == {"No Op registered for SimplifiedLayerNormalization"}
    op, kinds = "SimplifiedLayerNormalization", ["tensor(float)"]
    port = onnx.defs.OpSchema.FormalParameter
    kind = onnx.defs.OpSchema.AttrType
    attributes = {"axis": kind.INT, "epsilon": kind.FLOAT, "stash_type": kind.INT}
    schema = onnx.defs.OpSchema(
        op,
        "",
        1,
        inputs=[port("X", "T"), port("scale", "T")],
        outputs=[port("Y", "T")],
        type_constraints=[("T", kinds, "")],
        attributes=[onnx.defs.OpSchema.Attribute(n, k, "", required=False) for n, k in attributes.items()],
    )
    onnx.defs.register_schema(schema)
    try:
        for path in paths:
            onnx.checker.check_model(path)
    finally:
        onnx.defs.deregister_schema(op, 1, "")
