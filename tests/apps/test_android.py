"""The Android client's core on a JVM, over the AAR's own JNI and ONNX Runtime 1.29: traces, answers, failures, cancelling."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.android import MODEL, Client
from helpers.apps import EXAMPLES, ROOT
from helpers.cli_runner import edgewright, refused

from edgewright.runtimes.sampling import GREEDY
from edgewright.runtimes.text_generation import open_bundle

pytestmark = pytest.mark.slow
WORDS = 40
KNIGHT = "k n i g h t"


@pytest.fixture
def app(android_client: Client) -> Client:
    return android_client


@pytest.fixture
def projects(android_projects: Callable[[str], Path]) -> Callable[[str], Path]:
    return android_projects


@pytest.fixture
def bundles(android_bundles: Callable[[str], Path]) -> Callable[[str], Path]:
    return android_bundles


@pytest.fixture
def model(projects: Callable[[str], Path]) -> Path:
    return projects("t5gemma-g2p") / MODEL


def test_todays_encoders_are_refused(app_bundles: Callable[[str], Path], tmp_path: Path) -> None:
    """They need a newer runtime than there is for Android; the line says how to export for that one."""
    line = refused(edgewright("embed", app_bundles("t5gemma"), "--platform", "android", "-o", tmp_path / "out"))
    assert "--platform android has ONNX Runtime 1.29, and encoder.onnx needs 1.30.0" in line
    assert "export again with --onnxruntime 1.29" in line


@pytest.mark.parametrize("as_on_android", [False, True])
@pytest.mark.parametrize("name", sorted([*EXAMPLES, "llama"]))
def test_the_golden_traces_pass(name: str, as_on_android: bool, app: Client, projects: Callable[[str], Path]) -> None:
    model = projects(name) / MODEL
    traces = json.loads((model / "traces.json").read_text())
    cases, texts = len(traces["cases"]), len(traces["texts"])
    assert cases >= 3
    opened, said = app.run(("open", model), ("trace",), as_on_android=as_on_android)
    assert opened == ""
    assert said.startswith(f"{cases} of {cases} traces, {texts} of {texts} texts")


def test_a_wrong_trace_fails(app: Client, model: Path, tmp_path: Path) -> None:
    """Another token than the recorded one, a text that is decoded otherwise, other tokens of a text."""
    changes = ((("cases", 0, "steps", 1, "token"), 5), (("cases", 1, "text"), "no"), (("texts", 0, "ids"), [7]))
    commands: list[tuple[object, ...]] = [("open", model)]
    for number, (at, value) in enumerate(changes):
        where = traces = json.loads((model / "traces.json").read_text())
        for key in at[:-1]:
            where = where[key]
        where[at[-1]] = value
        (tmp_path / f"{number}.json").write_text(json.dumps(traces))
        commands.append(("trace", tmp_path / f"{number}.json"))
    first, second, third = app.run(*commands)[1:]
    assert "5 of 6 traces, 17 of 17 texts" in first
    assert "5 of 6 traces, 17 of 17 texts" in second
    assert "6 of 6 traces, 16 of 17 texts" in third
    assert all("error: the traces differ" in said for said in (first, second, third))


@pytest.mark.parametrize("name", ["deltanet-g2p", "t5gemma-g2p"])
def test_held_out_words_are_answered_as_the_product_does(
    name: str, app: Client, projects: Callable[[str], Path], bundles: Callable[[str], Path]
) -> None:
    opened = open_bundle(bundles(name), "onnx", threads=1)
    lines = (ROOT / "examples" / name / "task.tsv").read_text().splitlines()[:WORDS]
    prompts = [line.partition("\t")[0] for line in lines]
    said = app.run(("open", projects(name) / MODEL), *(("prompt", prompt) for prompt in prompts))[1:]
    assert [s.split("\t")[0] for s in said] == ["".join(opened.generate(p, sampling=GREEDY)) for p in prompts]


def test_a_memory_serves_again(app: Client, projects: Callable[[str], Path], bundles: Callable[[str], Path]) -> None:
    opened = open_bundle(bundles("dolphin-packages"), "onnx", threads=1)
    task = (ROOT / "examples" / "dolphin-packages" / "task.tsv").read_text().splitlines()[:3]
    for context, prompt, _ in (line.split("\t") for line in task):
        asked = (
            ("open", projects("dolphin-packages") / MODEL),
            ("context", context),
            ("prompt", prompt),
            ("prompt", prompt),
        )
        first, again = app.run(*asked)[2:]
        want = "".join(opened.generate(prompt, context=context, sampling=GREEDY))
        assert (first.split("\t")[0], again.split("\t")[0]) == (want, want)


def test_an_answer_stops_where_it_is_told(app: Client, model: Path) -> None:
    asked = [
        ("prompt", KNIGHT),
        ("prompt", KNIGHT, "", " T"),
        ("prompt", KNIGHT, 2),
        ("prompt", KNIGHT, "", "", "", 1.5),
    ]
    whole, stopped, two, drawn = app.run(("open", model), *asked)[1:]
    assert whole.split("\t")[:2] == ["N AY T", "END"]
    assert whole.split("\t")[3].replace("|", "") == "N AY T"
    assert stopped.split("\t")[:2] == ["N AY", "STOP"]
    assert two.split("\t")[:2] == ["N AY", "LIMIT"]
    assert drawn.split("\t")[1] in ("END", "LIMIT", "CONTEXT")


def damaged(model: Path, folder: Path) -> Path:
    copy = folder / "damaged"
    shutil.copytree(model, copy)
    return copy


def with_file(model: Path, name: str, data: bytes) -> None:
    """Another file, which app.json says is right."""
    (model / name).write_bytes(data)
    contract = json.loads((model / "app.json").read_text())
    contract["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (model / "app.json").write_text(json.dumps(contract))


def test_half_a_character_is_held_back(app: Client, model: Path, tmp_path: Path) -> None:
    """The answer's three tokens are made the three bytes of one character: it comes whole, or at the very end as what is there."""
    copy = damaged(model, tmp_path)
    contract = json.loads((copy / "app.json").read_text())
    said = app.run(("open", model), ("prompt", KNIGHT))[1].split("\t")[2].split(",")
    vocab = {f"filler{i}": i for i in range(contract["vocab"]) if str(i) not in said}
    vocab |= dict(zip("âĤ¬", map(int, said), strict=True))
    tokenizer = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "decoder": {"type": "ByteLevel"}}
    ids = ",".join(map(str, json.loads((model / "traces.json").read_text())["texts"][0]["ids"] + [1]))
    with_file(copy, "tokenizer.json", json.dumps(tokenizer).encode())
    whole, half = app.run(("open", copy), ("ids", ids), ("ids", ids, 2))[1:]
    assert whole.split("\t")[0::3] == ["€", "€"]
    assert half.split("\t")[0::3] == ["\ufffd", "\ufffd"]


def test_damaged_files_are_refused(app: Client, model: Path, tmp_path: Path) -> None:
    copy = damaged(model, tmp_path)
    weights = copy / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[4096] ^= 1
    weights.write_bytes(data)
    assert "weights.bin is damaged (its SHA-256 is not that of app.json)" in app.run(("open", copy))[0]
    weights.write_bytes(data[:-1])
    assert f"has {len(data) - 1} bytes of {len(data)}; download it again" in app.run(("open", copy))[0]
    weights.unlink()
    assert "weights.bin is missing" in app.run(("open", copy))[0]


def test_other_mistakes_are_one_line(app: Client, model: Path, projects: Callable[[str], Path], tmp_path: Path) -> None:
    copy = damaged(model, tmp_path)
    cases = [
        (("open", tmp_path), "app.json is missing"),
        (("prompt", "k"), "no model is open"),
        (("open", model, 1_000_000), "takes 4 MB of memory, 1 MB are free"),
        (("open", model), ""),
        (("prompt", "  "), "the prompt is empty"),
        (("prompt", "a " * 70), "the model reads at most 64; shorten it"),
        (("ids", "70"), "token 70, the model has 70"),
        (("prompt", "k", 0), "0 new tokens were asked for"),
        (("busy", "k n"), "the model is answering already; wait for that answer, cancel it, or open a second model"),
        (("context", "k"), "this model reads no context"),
        (("bench", 0, 1), "pp 0, tg 1, repeats 2: each is 1 or more"),
        (("open", projects("deltanet-g2p") / MODEL), ""),
        (("prompt", "a " * 70), "the model's context is 64; shorten it"),
    ]
    for line in ('{"a": 1', "{}", '{"schema_version": 2}', '{"schema_version": 1, "name": 5}'):
        other = copy.with_name(f"contract{len(cases)}")
        shutil.copytree(copy, other)
        (other / "app.json").write_text(line)
        cases.append((("open", other), {"{": "no JSON", "}": "as it was written"}.get(line[-1], "no JSON")))
    cases[-2] = (cases[-2][0], "is of another version")
    for (command, want), said in zip(cases, app.run(*(c for c, _ in cases)), strict=True):
        assert want in said, command
        assert (said.startswith("error: "), said.count("\n")) == (bool(want), 0), command


def test_a_graph_that_does_not_open_says_why(app: Client, model: Path, tmp_path: Path) -> None:
    copy = damaged(model, tmp_path)
    with_file(copy, "decoder.onnx", b"no graph")
    (said,) = app.run(("open", copy))
    assert "decoder.onnx does not open in ONNX Runtime 1.29.0 (it needs 1.24.1)" in said
    assert said.count("\n") == 0


def test_a_flow_is_cancelled(app: Client, model: Path, projects: Callable[[str], Path]) -> None:
    """Behind the first piece; and from another thread while a long prompt is read: the model is free for the next one at once."""
    commands = [("open", model), ("cancel", KNIGHT, 1), ("prompt", KNIGHT)]
    _, cancelled, answered = app.run(*commands)
    assert cancelled == "cancelled behind 1, and free"
    assert answered.startswith("N AY T\t")
    ids = ",".join(["5"] * 60)
    _, stopped = app.run(("open", projects("deltanet-g2p") / MODEL), ("stop", ids, 0))
    assert stopped.startswith("stopped, ")


def test_the_bench_prints_rows(app: Client, projects: Callable[[str], Path]) -> None:
    _, rows = app.run(("open", projects("deltanet-g2p") / MODEL), ("bench", 16, 8))
    assert [line.split("|")[1].strip() for line in rows.splitlines()] == ["pp16", "tg8"]


@pytest.mark.parametrize("name", ["dolphin-packages", "t5gemma-g2p"])
def test_the_screen_does_all_it_can(name: str, app: Client, projects: Callable[[str], Path], tmp_path: Path) -> None:
    """The sample without a screen: too early, opened from assets, asked, measured, checked, stopped, closed, opened again."""
    prompt, context = KNIGHT, ""
    if name == "dolphin-packages":
        context, prompt, _ = (ROOT / "examples" / name / "task.tsv").read_text().splitlines()[0].split("\t")
    (said,) = app.run(("session", projects(name) / MODEL, tmp_path / "files", prompt, context))
    assert "early: the model is not open yet; wait for it" in said
    assert f"{prompt}\n" in said
    assert " by: end" in said or " by: limit" in said
    assert "log: | pp8 | " in said
    assert "log: | tg4 | " in said
    assert "log: 6 of 6 traces" in said
    assert "| tg4 |" in (tmp_path / "files.md").read_text()


# ---- from assets to the app's own folder ----------------------------------------------------------------------------------


def test_assets_are_copied_once(app: Client, model: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    (files / "an-older-model").mkdir(parents=True)
    (first,) = app.run(("install", model, files))
    here = Path(first)
    assert [p.name for p in files.iterdir()] == [here.name]
    for name in json.loads((model / "app.json").read_text())["files"]:
        assert (here / name).read_bytes() == (model / name).read_bytes()
    stamps = {p.name: p.stat().st_mtime_ns for p in here.iterdir() if p.suffix in (".bin", ".onnx")}
    assert app.run(("install", model, files), ("open", here)) == [first, ""]
    assert stamps == {p.name: p.stat().st_mtime_ns for p in here.iterdir() if p.suffix in (".bin", ".onnx")}
    (here / "weights.bin").unlink()
    (here / "weights.bin.copying").write_bytes(b"half of it")  # an app that was ended
    assert app.run(("install", model, files), ("open", here)) == [first, ""]


def test_what_is_damaged_on_the_phone_is_copied_again(app: Client, model: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    (here,) = app.run(("install", model, files))
    weights = Path(here) / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[4096] ^= 1
    weights.write_bytes(data)
    again = (("install", model, files), ("reopen", model, files))
    found, _, mended = app.run(again[1], *again)
    assert "weights.bin is damaged (its SHA-256 is not that of app.json); download it again" in found
    assert mended == "bundle"


def test_damaged_assets_are_refused(app: Client, model: Path, tmp_path: Path) -> None:
    copy = damaged(model, tmp_path)
    data = bytearray((copy / "weights.bin").read_bytes())
    data[100] ^= 1
    (copy / "weights.bin").write_bytes(data)
    (said,) = app.run(("install", copy, tmp_path / "files"))
    assert (
        said
        == "error: weights.bin in the app's assets is damaged (its SHA-256 is not that of app.json); install the app again"
    )
    assert not list((tmp_path / "files").rglob("weights.bin*"))
