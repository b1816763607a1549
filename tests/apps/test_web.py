"""Sites in headless Chromium: answers, streaming, offline, damaged files, cancelling; the server of `preview`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.apps import EXAMPLES, ROOT, TOOLS, make_embedding_bundle, project
from helpers.cli_runner import edgewright, refused

from edgewright.apps import vendor
from edgewright.apps.preview import HEADERS, server
from edgewright.bundle import Bundle
from edgewright.errors import UserError
from edgewright.runtimes.generate import generate
from edgewright.runtimes.registry import open_exact
from edgewright.runtimes.sampling import GREEDY
from edgewright.runtimes.text_embedding import embed_tokens
from edgewright.runtimes.text_generation import open_bundle

WORDS = 200
PACKAGES = TOOLS / "web" / "node_modules"
SCRIPT = Path(__file__).parent / "browser.mjs"


@pytest.fixture(scope="module")
def bundles(app_bundles: Callable[[str], Path]) -> Callable[[str], Path]:
    return app_bundles


@pytest.fixture(scope="module")
def sites(bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    if not (PACKAGES / vendor.ONNXRUNTIME).is_dir():
        pytest.skip("no onnxruntime-web here: make apps-tools")
    folder = tmp_path_factory.mktemp("sites")

    @cache
    def made(name: str) -> Path:
        project(bundles(name), folder / name, "web", packages=PACKAGES)
        return folder / name

    return made


@contextmanager
def served(site: Path) -> Iterator[str]:
    with server(site, 0) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{serving.server_port}/"
        finally:
            serving.shutdown()
            thread.join()


def browse(url: str, **job: object) -> dict[str, Any]:
    """What browser.mjs saw. Skips where there is no browser."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None or shutil.which("node") is None or not (PACKAGES / "playwright-core").is_dir():
        pytest.skip("no Chromium or playwright-core here: make apps-tools, apt-get install chromium")
    command = ["node", str(SCRIPT), str(PACKAGES), chromium, url]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=550, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# ---- without a browser ----------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder that `preview` takes for a site."""
    folder = tmp_path / "site"
    (folder / "model").mkdir(parents=True)
    for name in ("index.html", "model/app.json", "worker.js", "manifest.webmanifest", "x.wasm"):
        (folder / name).write_text("{}")
    (tmp_path / "secret.txt").write_text("secret")
    return folder


def test_preview_serves_what_threads_need(site: Path) -> None:
    kinds = {"": "text/html", "worker.js": "text/javascript", "x.wasm": "application/wasm"}
    with served(site) as url:
        for name, kind in kinds.items():
            with urllib.request.urlopen(url + name) as response:
                assert response.headers["Content-Type"] == kind
                assert {key: response.headers[key] for key in HEADERS} == HEADERS
        for name in ("missing.js", "../secret.txt", "%2e%2e/secret.txt"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(url + name)


def test_preview_refuses_what_is_no_site(site: Path, tmp_path: Path) -> None:
    assert "is no site; make one with 'edgewright embed" in refused(edgewright("preview", tmp_path))
    with server(site, 0) as serving:
        line = refused(edgewright("preview", site, "--port", serving.server_port))
    assert "give another --port" in line


def test_packages_that_are_not_there_are_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundles: Callable[[str], Path]
) -> None:
    monkeypatch.setattr(vendor, "_CHECKOUT", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"this folder has no onnxruntime-web .* npm install onnxruntime-web@1\.30\.0"):
        vendor.find_packages(None)
    with pytest.raises(UserError, match=r"--packages here holds no onnxruntime-web"):
        vendor.find_packages(Path("here"))
    line = refused(
        edgewright("embed", bundles("t5gemma"), "--platform", "cpp", "-o", tmp_path / "x", "--packages", "y")
    )
    assert "--packages is for --platform web" in line


def test_an_older_onnxruntime_web_is_refused(tmp_path: Path, bundles: Callable[[str], Path]) -> None:
    """The version of the packages decides, not the platform's."""
    for package, files in vendor.FILES.items():
        folder = tmp_path / "packages" / package
        (folder / "dist").mkdir(parents=True)
        version = "1.27.0" if package == vendor.ONNXRUNTIME else "0.2.0"
        (folder / "package.json").write_text(json.dumps({"version": version, "license": "MIT"}))
        for name in files:
            (folder / "dist" / name).write_text("")
    options = ("--packages", tmp_path / "packages", "-o", tmp_path / "out")
    line = refused(edgewright("embed", bundles("t5gemma"), "--platform", "web", *options))
    assert "has ONNX Runtime 1.27.0, and encoder.onnx needs 1.30.0" in line
    assert not (tmp_path / "out").exists()


# ---- with one -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_held_out_words_are_answered_as_the_product_does(
    sites: Callable[[str], Path], bundles: Callable[[str], Path]
) -> None:
    """As `edgewright run` does, but where its int8 activations decide a near tie: there as with float32 ones. Offline too."""
    name = "t5gemma-g2p"
    prompts = [
        line.partition("\t")[0] for line in (ROOT / "examples" / name / "task.tsv").read_text().splitlines()[:WORDS]
    ]
    with served(sites(name)) as url:
        seen = browse(url, prompts=[[p] for p in prompts], traces=True, form="k n i g h t", offline=["k n i g h t"])
    assert (seen["status"], seen["errors"]) == (None, [])
    assert seen["isolated"] is True
    assert seen["traces"]["wrong"] == []
    assert (seen["form"], seen["offline"]) == ("N AY T", "N AY T")
    opened, exact = open_bundle(bundles(name), "onnx", threads=1), open_exact(Bundle.open(bundles(name)), "onnx", 1)
    assert exact is not None
    spec, same = Bundle.open(bundles(name)).manifest.generation, 0
    for prompt, got in zip(prompts, seen["answers"], strict=True):
        floats = list(generate(exact, spec, opened.read_prompt(prompt).ids, spec.max_new_tokens))
        assert got["said"] == opened.tokenizer.decode(floats), prompt
        assert "".join(got["pieces"]) == got["said"]
        assert len(got["pieces"]) == len(floats)
        same += got["said"] == "".join(opened.generate(prompt, sampling=GREEDY))
    assert same >= 0.97 * WORDS


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in EXAMPLES if n != "t5gemma-g2p"])
def test_the_other_examples_pass_their_traces(name: str, sites: Callable[[str], Path]) -> None:
    line = (ROOT / "examples" / name / "task.tsv").read_text().splitlines()[0].split("\t")
    prompts = [[line[-2], {"context": line[0]} if len(line) == 3 else {}]]
    with served(sites(name)) as url:
        seen = browse(url, prompts=prompts, traces=True, offline=prompts[0])
    assert (seen["status"], seen["errors"], seen["traces"]["wrong"]) == (None, [], [])
    assert seen["answers"][0]["said"] == seen["offline"] != ""


@pytest.mark.slow
def test_damaged_weights_are_refused_also_in_the_cache(sites: Callable[[str], Path], tmp_path: Path) -> None:
    site = tmp_path / "damaged"
    shutil.copytree(sites("t5gemma-g2p"), site)
    weights = site / "model" / "weights.bin"
    whole = weights.read_bytes()
    for data, line in (
        (
            whole[:4096] + bytes([whole[4096] ^ 1]) + whole[4097:],
            "weights.bin is damaged (its SHA-256 is not that of app.json)",
        ),
        (whole[:-1], f"weights.bin has {len(whole) - 1} bytes of {len(whole)}: the download was cut off"),
        (whole + b"x", f"weights.bin has more than the {len(whole)} bytes"),
    ):
        weights.write_bytes(data)
        with served(site) as url:
            assert line in browse(url)["status"]
    weights.write_bytes(whole)
    damage = """async () => {
      const cache = await caches.open("edgewright-model");
      const key = (await cache.keys()).find(({ url }) => url.includes("weights.bin"));
      const data = new Uint8Array(await (await cache.match(key)).arrayBuffer());
      data[4096] ^= 1;
      await cache.put(key, new Response(data));
      return data.length;
    }"""
    with served(site) as url:
        seen = browse(url, script=f"({damage})()", offline=["k"])
    assert seen["script"] == len(whole)
    assert "weights.bin cannot be fetched, and this browser has not kept it" in seen["offline"]


@pytest.mark.slow
def test_messages_of_the_client(sites: Callable[[str], Path]) -> None:
    """An empty prompt, one too long, a second call, a cancelled one, a stop string, a draw with a seed, a benchmark."""
    script = """(async () => {
      const model = window.edgewright, line = (promise) => promise.then(() => null, (error) => error.message);
      const stop = new AbortController();
      const first = model.answer("c o m p i l e r", { signal: stop.signal, onText: () => stop.abort() });
      const second = await line(model.answer("k"));
      const draw = () => model.generate("c o m p i l e r", { sampling: { temperature: 2, top_k: 8, top_p: 0.9, seed: 7 } });
      return {
        second,
        cancelled: (await first).ending,
        empty: await line(model.answer("  ")),
        long: await line(model.answer("a ".repeat(70))),
        stopped: await model.answer("k n i g h t", { stops: [" T"] }),
        limit: (await model.answer("k n i g h t", { maxNewTokens: 2 })).ending,
        draws: [await draw(), await draw()],
        sampling: await line(model.answer("k", { sampling: { top_p: 0 } })),
        rows: (await model.bench({ pp: 8, tg: 4, repeats: 1 })).map((row) => row.test),
      };
    })()"""
    with served(sites("t5gemma-g2p")) as url:
        seen = browse(url, script=script)
    said = seen["script"]
    assert seen["errors"] == []
    assert "answering already" in said["second"]
    assert said["cancelled"] == "cancelled"
    assert "the prompt is empty" in said["empty"]
    assert "the model reads at most 64; shorten it" in said["long"]
    assert (said["stopped"]["text"], said["stopped"]["ending"], said["limit"]) == ("N AY", "stop", "limit")
    assert said["draws"][0] == said["draws"][1]
    assert "the sampling means nothing" in said["sampling"]
    assert said["rows"] == ["pp8", "tg4"]


@pytest.mark.slow
def test_vectors_are_the_products(sites: Callable[[str], Path], tmp_path: Path) -> None:
    """In scripts, and on the page, which compares texts."""
    bundle = make_embedding_bundle(tmp_path)
    project(bundle, tmp_path / "site", "web", packages=PACKAGES)
    texts = ["the keeper lit the lamp", "a " * 60, "Ünïcode Text, lamp"]
    script = """(async () => {
      const model = window.edgewright, line = (promise) => promise.then(() => null, (error) => error.message);
      const vectors = [];
      for (const text of TEXTS) {
        for (const promptName of [undefined, "query"]) vectors.push([...(await model.embed(text, { promptName }))]);
      }
      return {
        vectors,
        wrong: await line(model.embed("a", { promptName: "x" })),
        generate: await line(model.generate("a")),
        empty: await line(model.embed(" ")),
        rows: (await model.bench({ pp: 8, repeats: 1 })).map((row) => row.test),
      };
    })()""".replace("TEXTS", json.dumps(texts))
    with served(tmp_path / "site") as url:
        seen = browse(url, traces=True, script=script, form="the lamp of the ship", offline=None)
    assert (seen["status"], seen["errors"], seen["traces"]["wrong"]) == (None, [], [])
    assert (seen["traces"]["cases"], seen["form"]) == (12, "The first text. What you write next is compared with it.")
    said, opened = seen["script"], open_bundle(bundle, "onnx", threads=1)
    exact = open_exact(Bundle.open(bundle), "onnx", 1)  # with float32 activations, as the site
    assert exact is not None
    ids = [opened.encode_texts([text], name)[0] for text in texts for name in (None, "query")]
    wanted = embed_tokens(exact, opened.bundle.manifest.generation, ids)
    assert np.abs(np.array(said["vectors"]) - wanted).max() < 1e-4
    assert said["wrong"] == "x is no prompt of this model; it has: document, query"
    assert (said["generate"], said["empty"]) == (
        "this model makes vectors, and generates nothing; use embed",
        "the text is empty; give some text",
    )
    assert said["rows"] == ["pp8"]
