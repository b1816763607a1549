"""`chat` and `serve` over a real bundle: turns, pipes, and the real OpenAI client over HTTP."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from helpers import tiny
from helpers.cli_runner import edgewright, passed, refused
from helpers.requests import asking

from edgewright import compiler
from edgewright.runtimes.text_generation import open_bundle

pytestmark = pytest.mark.exports

TEMPLATE = (
    "{% if tools %}t o {% endif %}{% for m in messages %}{{ m.role[0] }} {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
KEY = "a key"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("talking"), context=128)


def exported(folder: Path, context: int) -> Path:
    """A tiny Llama of random weights that talks in letters and phonemes."""
    model = tiny.write_tiny_llama(folder / "model", num_hidden_layers=1, max_position_embeddings=context)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.EXAMPLE / name, model / name)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    (model / "generation_config.json").write_text(json.dumps({"max_new_tokens": 8}))
    compiler.export(asking(str(model), bits=8.0, verify=False), folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose last token's vector is that of the text."""
    folder = tmp_path_factory.mktemp("embedder")
    model = tiny.write_tiny_llama(folder / "model", num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.EXAMPLE / name, model / name)
    compiler.export(asking(str(model), bits=8.0, verify=False, pooling=("last",)), folder / "bundle")
    return folder / "bundle"


def answer(bundle: Path, prompt: str, **options: Any) -> str:
    return "".join(open_bundle(bundle).generate(prompt, **options))


# chat


def test_turns_over_a_pipe(bundle: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = f"k n i\n\n/no\n/reset\nk n i\ng h t\n/save {saved}\n/system b e\nk n i\n/exit\nnever read\n"
    result = edgewright("chat", bundle, "--no-check", stdin=lines)
    first = answer(bundle, "k n i", chat=True)
    answers = passed(result).splitlines()
    assert answers[:2] == [first, first]
    assert len(answers) == 4
    assert "'/no' is no command here" in result.stderr
    kept = [int(n) for n in re.findall(r"(\d+) kept", result.stderr)]
    assert kept[0] == 0
    assert kept[2] > 0
    talk = json.loads(saved.read_text())
    assert [m["role"] for m in talk] == ["user", "assistant"] * 2
    assert talk[1]["content"] == first


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_ctrl_c_ends_an_answer_and_not_the_chat(tmp_path: Path) -> None:
    bundle = exported(tmp_path, context=4096)
    command = [sys.executable, "-u", "-m", "edgewright.cli", "chat", str(bundle), "-n", "4000"]  # for seconds

    def handle_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=handle_interrupts,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("k n i\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate("g h t\n", timeout=60)
    assert process.returncode == 0, err
    assert err.count("stopped by") == 2, err
    assert out.count("\n") == 2


# serve


@contextlib.contextmanager
def serving(bundle: Path, *options: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-m", "edgewright.cli", "serve", str(bundle), "--port", "0", "--name", "tiny", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"http://\S+/v1", line):
                    threading.Thread(target=process.stderr.read, daemon=True).start()
                    yield found[0]
                    break
            else:
                raise AssertionError("".join(lines))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


@pytest.fixture(scope="module")
def address(bundle: Path) -> Iterator[str]:
    with serving(bundle, "--api-key", KEY) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key=KEY, max_retries=0)


HELLO: Any = [{"role": "user", "content": "k n i"}]


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "edgewright"
    with pytest.raises(openai.NotFoundError, match="this server has tiny"):
        client.models.retrieve("other")


def test_a_chat_completion_is_what_run_says(client: openai.OpenAI, bundle: Path) -> None:
    wanted = answer(bundle, "k n i", chat=True, max_new_tokens=5)
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    assert choice.message.content == wanted
    assert choice.finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 5
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    for token in choice.logprobs.content:
        assert token.top_logprobs[0].logprob == token.logprob <= 0  # greedy: the best one
        assert len(token.top_logprobs) == 2
    pieces = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(pieces)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )  # type: ignore[union-attr]
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1  # type: ignore[union-attr]


def test_completions_stops_seeds_and_tools(client: openai.OpenAI, bundle: Path) -> None:
    plain = answer(bundle, "k n i", chat=False)
    whole = client.completions.create(model="tiny", prompt=["k n i", "g h t"], max_tokens=8, logprobs=1)
    assert [c.text for c in whole.choices] == [plain, answer(bundle, "g h t", chat=False)]
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.tokens or []) == 8
    letter = plain.split()[2]
    cut = client.completions.create(model="tiny", prompt="k n i", stop=[letter])
    assert cut.choices[0].text == plain[: plain.index(letter)]
    assert cut.choices[0].finish_reason == "stop"
    drawn = [
        [c.text for c in client.completions.create(model="x", prompt="k", temperature=2, seed=seed, n=3).choices]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 1
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with_tools = client.chat.completions.create(model="tiny", messages=HELLO, tools=tools, max_tokens=1)
    without = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("path", "body", "status", "line"),
    [
        ("/chat/completions", b"{", 400, "JSON"),
        ("/chat/completions", b'{"messages": []}', 400, "messages: List should have at least 1"),
        ("/chat/completions", b'{"messages": [{"content": "k"}]}', 400, "each message needs a role"),
        ("/chat/completions", b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 400, "no text"),
        (
            "/chat/completions",
            b'{"messages": [{"role": "user", "content": "k"}], "temperature": -1}',
            400,
            "temperature",
        ),
        (
            "/chat/completions",
            b'{"messages": [{"role": "user"}], "response_format": {"type": "json_object"}}',
            400,
            "response_format",
        ),
        ("/completions", b'{"prompt": "k", "logit_bias": {"5": 1}}', 400, "logit_bias is not supported"),
        ("/completions", b'{"prompt": ""}', 400, "the prompt is empty"),
        ("/completions", b'{"prompt": []}', 400, "0 answers"),
        ("/completions", b'{"prompt": [99999]}', 400, "token 99999"),
        ("/completions", b'{"prompt": "k", "n": 99}', 400, "n: "),
        ("/completions", json.dumps({"prompt": "k " * 500}).encode(), 400, "context is"),
        ("/completions", b"[" * 100_000, 400, "JSON"),
        ("/completions", b" " * (17 << 20), 413, "bytes"),
        ("/nothing", b"{}", 404, ""),
    ],
)
def test_bad_requests(address: str, path: str, body: bytes, status: int, line: str) -> None:
    response = httpx2.post(address + path, content=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    assert response.status_code == status
    if line:
        assert line in response.json()["error"]["message"]


def test_the_key_is_asked_for(address: str) -> None:
    for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": KEY.encode() + b"\xff"}):
        response = httpx2.get(address + "/models", headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert httpx2.get(address.removesuffix("/v1") + "/health").json() == {"status": "ok"}


def test_many_clients_and_some_that_leave(client: openai.OpenAI, address: str, bundle: Path) -> None:
    prompts = [" ".join("knightough"[: 1 + i % 10]) for i in range(100)]
    wanted = {p: answer(bundle, p, chat=False) for p in set(prompts)}

    def ask(i: int) -> str:
        if i % 5 == 0:  # leaves after the first piece
            with client.completions.create(model="tiny", prompt=prompts[i], stream=True) as pieces:
                next(iter(pieces))
            return wanted[prompts[i]]
        if i % 2:
            return client.completions.create(model="tiny", prompt=prompts[i]).choices[0].text
        return "".join(
            c.choices[0].text for c in client.completions.create(model="tiny", prompt=prompts[i], stream=True)
        )

    with ThreadPoolExecutor(100) as pool:
        assert list(pool.map(ask, range(100))) == [wanted[p] for p in prompts]
    assert client.completions.create(model="tiny", prompt="k n i").choices[0].text == answer(
        bundle, "k n i", chat=False
    )


def test_more_than_may_wait(bundle: Path) -> None:
    with serving(bundle, "--waiting", "1") as address:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)

        def ask(_: int) -> str:
            try:
                return client.completions.create(model="tiny", prompt="k n i", max_tokens=100).choices[0].text
            except openai.RateLimitError as error:
                return str(error.status_code)

        with ThreadPoolExecutor(30) as pool:
            answers = list(pool.map(ask, range(30)))
        assert "429" in answers
        assert len(set(answers) - {"429"}) == 1


def test_embeddings_are_what_run_says(embedder: Path, bundle: Path) -> None:
    texts = ["k n i g h t", "t o u g h"]
    wanted = open_bundle(embedder).embed(texts)
    with serving(embedder) as address:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        for form in ("float", "base64"):  # the client asks for base64 by itself and unpacks it
            made = client.embeddings.create(model="tiny", input=texts, encoding_format=form)  # type: ignore[arg-type]
            vectors = [
                np.frombuffer(base64.b64decode(d.embedding), "<f4") if isinstance(d.embedding, str) else d.embedding
                for d in made.data
            ]
            np.testing.assert_allclose(np.array(vectors), wanted, rtol=1e-6)
        assert made.usage.prompt_tokens == made.usage.total_tokens > 10
        np.testing.assert_allclose(
            np.array(client.embeddings.create(model="tiny", input="k n i g h t").data[0].embedding),
            wanted[0],
            atol=1e-5,
        )
        with pytest.raises(openai.BadRequestError, match="is a model of embeddings; use /v1/embeddings"):
            client.completions.create(model="tiny", prompt="k")
        with pytest.raises(openai.BadRequestError, match="numbers, not 7"):
            client.embeddings.create(model="tiny", input="k", dimensions=7)
        with pytest.raises(openai.BadRequestError, match="is empty"):
            client.embeddings.create(model="tiny", input="")
    with serving(bundle) as address:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="tiny is no model of embeddings"):
            client.embeddings.create(model="tiny", input="k")


def test_addresses_that_cannot_be_had(bundle: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "give another --port" in refused(edgewright("serve", bundle, "--port", taken.getsockname()[1]))
    assert "no address of this machine" in refused(edgewright("serve", bundle, "--host", "no.such.host.invalid"))
