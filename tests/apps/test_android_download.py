"""The Android client's downloader against a server on this machine: resumed, in parts, truncated, damaged; and `--weights-url`."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers.android import MODEL, Client
from helpers.apps import project
from helpers.cli_runner import edgewright, refused

from edgewright.apps import download as downloading
from edgewright.apps.download import Download, make_download
from edgewright.apps.platforms import PLATFORMS
from edgewright.errors import UserError
from edgewright.system.hashes import of_file

PART = 100_000


class Server(ThreadingHTTPServer):
    """Serves a folder. most: bytes of an answer before the line is cut, None for all. ranges: whether it goes on where asked."""

    folder: Path
    most: int | None = None
    ranges = True
    asked: list[tuple[str, str | None]]

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked = folder, []

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append((self.path.lstrip("/"), wanted))
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, begin = path.read_bytes(), 0
        if wanted is not None and self.server.ranges:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        self.wfile.write(data[begin:][: self.server.most])
        self.close_connection = True


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    found = Server(tmp_path / "served")
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


@pytest.fixture
def made(android_client: Client, android_bundles: Callable[[str], Path]) -> tuple[Client, Path]:
    """The client, and the bundle of a tiny model."""
    return android_client, android_bundles("t5gemma")


@pytest.fixture
def described(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, bytes]:
    """download.json of a file in three parts, which the server has, and the file's bytes."""
    monkeypatch.setattr(downloading, "MOST_PART", PART)
    data = bytes((i * 7 + i // 251) % 256 for i in range(250_000))
    (tmp_path / "weights.bin").write_bytes(data)
    download, files = make_download("weights.bin", tmp_path / "weights.bin", server.base, tmp_path)
    for name, path in files.items():
        (server.folder / name).write_bytes(path.read_bytes())
    (tmp_path / "download.json").write_text(download.model_dump_json())
    return tmp_path / "download.json", data


@pytest.mark.slow
def test_parts_become_one_file(
    made: tuple[Client, Path], described: tuple[Path, bytes], server: Server, tmp_path: Path
) -> None:
    file, data = described
    said = made[0].run(("fetch", file, tmp_path / "here"), ("fetch", file, tmp_path / "here"))
    assert said == ["fetched 250000, whole"] * 2
    assert (tmp_path / "here" / "weights.bin").read_bytes() == data
    assert server.asked == [(f"weights.bin.00{i}", None) for i in range(3)]  # and nothing the second time


@pytest.mark.slow
def test_what_was_cut_off_is_gone_on_with(
    made: tuple[Client, Path], described: tuple[Path, bytes], server: Server, tmp_path: Path
) -> None:
    file, data = described
    server.most = 60_000
    cut, again, once_more = made[0].run(*[("fetch", file, tmp_path / "here")] * 3)
    line = "the download was cut off"
    assert cut.startswith("error: weights.bin.000 has 60000 bytes of 100000: ")
    assert again.startswith("error: weights.bin.001 has 60000 bytes of 100000: ")
    assert line in cut
    assert cut.endswith("try again, it goes on from there")
    assert once_more == "fetched 250000, whole"
    assert [a for a in server.asked if a[1]] == [
        ("weights.bin.000", "bytes=60000-"),
        ("weights.bin.001", "bytes=60000-"),
    ]
    assert (tmp_path / "here" / "weights.bin").read_bytes() == data


@pytest.mark.slow
def test_a_server_without_ranges_begins_anew(
    made: tuple[Client, Path], described: tuple[Path, bytes], server: Server, tmp_path: Path
) -> None:
    file, data = described
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "weights.bin.partial").write_bytes(data[:130_000])
    server.ranges = False
    assert made[0].run(("fetch", file, tmp_path / "here")) == ["fetched 250000, whole"]
    assert (tmp_path / "here" / "weights.bin").read_bytes() == data


@pytest.mark.slow
def test_a_damaged_part_is_refused_and_fetched_anew(
    made: tuple[Client, Path], described: tuple[Path, bytes], server: Server, tmp_path: Path
) -> None:
    file, data = described
    part = server.folder / "weights.bin.001"
    good = part.read_bytes()
    part.write_bytes(b"\xff" + good[1:])
    (said,) = made[0].run(("fetch", file, tmp_path / "here"))
    assert (
        said
        == "error: weights.bin.001 is damaged (its SHA-256 is not that of download.json); try again, or upload it again"
    )
    assert (tmp_path / "here" / "weights.bin.partial").read_bytes() == data[:PART]
    part.write_bytes(good + b"more")
    (said,) = made[0].run(("fetch", file, tmp_path / "here"))
    assert "weights.bin.001 is longer than the 100000 bytes that download.json says" in said
    part.unlink()
    (said,) = made[0].run(("fetch", file, tmp_path / "here"))
    assert "weights.bin.001 cannot be fetched: the server says 404; look at the address http://127.0.0.1:" in said
    part.write_bytes(good)
    assert made[0].run(("fetch", file, tmp_path / "here")) == ["fetched 250000, whole"]
    assert (tmp_path / "here" / "weights.bin").read_bytes() == data


@pytest.mark.slow
def test_what_was_here_before_is_hashed_too(
    made: tuple[Client, Path], described: tuple[Path, bytes], server: Server, tmp_path: Path
) -> None:
    """As where an app was ended between the last byte of a part and its hash."""
    file, data = described
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "weights.bin.partial").write_bytes(b"\xff" * PART)
    damaged, whole = made[0].run(*[("fetch", file, tmp_path / "here")] * 2)
    assert "weights.bin.000 is damaged" in damaged
    assert whole == "fetched 250000, whole"
    assert (tmp_path / "here" / "weights.bin").read_bytes() == data


@pytest.mark.slow
def test_no_server_and_no_sense_are_lines(
    made: tuple[Client, Path], described: tuple[Path, bytes], tmp_path: Path
) -> None:
    file, _ = described
    value = json.loads(file.read_text())
    file.write_text(json.dumps(value | {"base": "http://127.0.0.1:9/"}))
    (said,) = made[0].run(("fetch", file, tmp_path / "here"))
    assert said.startswith("error: weights.bin.000 has 0 bytes of 100000: the download was cut off (")
    value["files"][0]["name"] = "../weights.bin"
    file.write_text(json.dumps(value))
    (said,) = made[0].run(("fetch", file, tmp_path / "here"))
    assert said == 'error: download.json names no file: "../weights.bin"'


@pytest.mark.slow
def test_an_app_fetches_its_weights(
    made: tuple[Client, Path], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From `embed --weights-url` over the upload to an answer."""
    client, bundle = made
    size = (bundle / "onnx" / "weights.bin").stat().st_size
    monkeypatch.setattr(downloading, "MOST_PART", size // 2 + 1)
    project(bundle, tmp_path / "app", "android", weights_url=server.base)
    model = tmp_path / "app" / MODEL
    assert not (model / "weights.bin").exists()
    assert sorted(p.name for p in (tmp_path / "app" / "upload").iterdir()) == ["weights.bin.000", "weights.bin.001"]
    for path in (tmp_path / "app" / "upload").iterdir():
        (server.folder / path.name).write_bytes(path.read_bytes())
    (here,) = client.run(("install", model, tmp_path / "files"))
    assert of_file(Path(here) / "weights.bin") == of_file(bundle / "onnx" / "weights.bin")
    assert client.run(("open", here), ("trace",))[1].startswith("6 of 6 traces")


# ---- without any tool of Android's ----------------------------------------------------------------------------------------


def test_small_weights_are_one_part(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"12345")
    download, files = make_download("weights.bin", tmp_path / "weights.bin", "https://example.org/model", tmp_path)
    assert download.base == "https://example.org/model/"
    assert files == {"weights.bin": tmp_path / "weights.bin"}
    assert [(p.name, p.bytes) for p in download.files[0].parts] == [("weights.bin", 5)]
    assert Download.model_validate_json(download.model_dump_json()) == download


@pytest.mark.parametrize(
    "url", ["", "http://example.org/", "ftp://example.org/", "https://", "https://a/?b", "https://a/#b", "https://a b/"]
)
def test_an_address_that_is_none_is_refused(url: str, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"12345")
    with pytest.raises(UserError, match="--weights-url"):
        make_download("weights.bin", tmp_path / "weights.bin", url, tmp_path)


def test_other_platforms_fetch_nothing(app_bundles: Callable[[str], Path], tmp_path: Path) -> None:
    asked = ("--platform", "cpp", "--weights-url", "https://example.org/", "-o", tmp_path / "out")
    assert "--weights-url is for --platform android; leave it out for cpp" in refused(
        edgewright("embed", app_bundles("t5gemma"), *asked)
    )


def test_weights_that_no_package_holds_are_refused(
    app_bundles: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dataclasses.replace(PLATFORMS["android"], most_file=1000, runtime="1.32")
    monkeypatch.setitem(PLATFORMS, "android", small)
    line = refused(edgewright("embed", app_bundles("t5gemma"), "--platform", "android", "-o", tmp_path / "out"))
    assert "an app ships files of at most 1000; give --weights-url, and the app fetches it" in line
