"""The journal of rows and the files on a device: whole or not at all, one process at a time, found by hash."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edgewright.errors import UserError
from edgewright.measuring.device import Device, Sent
from edgewright.measuring.links import LinkDown, LocalLink
from edgewright.measuring.on_device import main as main_module
from edgewright.measuring.on_device.journal import Journal
from edgewright.measuring.on_device.main import main, place, unpack

HOLD = """
import sys, time
from pathlib import Path
from edgewright.measuring.on_device.journal import Journal
print(Journal(Path(sys.argv[1])).lock(), flush=True)
time.sleep(600)
"""


def test_an_unfinished_line_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows")
    assert journal.records() == []
    journal.add({"record": "row", "test": "a"})
    with open(tmp_path / "rows", "ab") as file:
        file.write(b'{"record": "row", "te')
    assert [r["test"] for r in journal.records()] == ["a"]
    assert journal.lock()
    journal.add({"record": "row", "test": "b"})
    assert [r["test"] for r in Journal(tmp_path / "rows").records()] == ["a", "b"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert not Journal(path).lock()
        assert Journal(path).stop_holder()
        assert holder.wait(timeout=30) == -15
    assert Journal(path).lock()
    assert not Journal(tmp_path / "other").stop_holder()


def wanted(folder: Path, files: dict[str, bytes]) -> Path:
    entries = [
        {"path": str(folder / name), "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in files.items()
    ]
    listing = folder / "wanted.json"
    listing.write_text(json.dumps({"store": str(folder / "files"), "files": entries}))
    return listing


def partial(folder: Path, data: bytes) -> Path:
    return folder / "files" / f"{hashlib.sha256(data).hexdigest()}.partial"


def test_what_lacks_is_told_with_what_came(tmp_path: Path) -> None:
    one, two = b"a" * 100, b"b" * 50
    listing = wanted(tmp_path, {"x/one": one, "x/two": two})
    digests = [hashlib.sha256(data).hexdigest() for data in (one, two)]
    assert place(listing) == [{"sha256": digest, "have": 0} for digest in digests]
    partial(tmp_path, one).write_bytes(one[:30])
    partial(tmp_path, two).write_bytes(two)
    assert place(listing) == [{"sha256": digests[0], "have": 30}]
    assert (tmp_path / "x" / "two").read_bytes() == two
    partial(tmp_path, one).write_bytes(b"c" * 100)  # as long, and wrong
    assert place(listing) == [{"sha256": digests[0], "have": 0}]
    assert not partial(tmp_path, one).exists()
    partial(tmp_path, one).write_bytes(one)
    assert place(listing) == []
    (tmp_path / "x" / "one").write_bytes(b"damaged")
    (tmp_path / "x" / "two").unlink()
    place(listing)


@pytest.mark.parametrize("links", [True, False], ids=["names", "moves"])
def test_a_file_is_shared_by_bundles_or_moved(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(main_module.os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    data = b"weights"
    listing = wanted(tmp_path, {"first/w": data})
    place(listing)
    partial(tmp_path, data).write_bytes(data)
    assert place(listing) == []
    second = wanted(tmp_path, {"second/w": data})
    assert (place(second) == []) is links
    assert (tmp_path / "first" / "w").read_bytes() == data


def test_wheels_are_unpacked_whole(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("a/__init__.py", "")
    (tmp_path / "b.whl").write_bytes(b"no zip")
    with pytest.raises(zipfile.BadZipFile):
        unpack(tmp_path / "site", [tmp_path / "a.whl", tmp_path / "b.whl"])
    assert not (tmp_path / "site").exists()
    unpack(tmp_path / "site", [tmp_path / "a.whl"])
    assert (tmp_path / "site" / "a" / "__init__.py").exists()


def test_a_wrong_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dance"]) == 2
    assert json.loads(capsys.readouterr().out) == {"record": "error", "error": "no command dance"}


class Flaky(LocalLink):
    """This machine behind a link that breaks in the middle of files."""

    def __init__(self, folder: Path, breaks: int, keeps: int) -> None:
        super().__init__("local://", str(folder))
        self.breaks, self.keeps = breaks, keeps
        self.offsets: list[int] = []

    def append(self, local: Path, remote: str, offset: int) -> None:
        self.offsets.append(offset)
        if self.breaks:
            self.breaks -= 1
            with open(remote, "ab") as target:
                target.write(local.read_bytes()[offset : offset + self.keeps])
            raise LinkDown("the cable came off")
        super().append(local, remote, offset)


def send(link: LocalLink, tmp_path: Path, notes: list[str]) -> None:
    device = Device(link, sys.executable, notes.append)
    device.connect()
    data = os.urandom(5000)
    local = tmp_path / "w.bin"
    local.write_bytes(data)
    target = f"{link.folder}/b/w.bin"
    device.send([Sent(target, local, hashlib.sha256(data).hexdigest())])
    assert Path(target).read_bytes() == data


def test_a_broken_upload_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    notes: list[str] = []
    link = Flaky(tmp_path / "device", breaks=3, keeps=1200)
    send(link, tmp_path, notes)
    assert link.offsets == [0, 1200, 2400, 3600]
    assert sum("the link broke" in n for n in notes) == 3


def test_an_upload_that_never_moves_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(UserError, match=r"w\.bin does not arrive whole"):
        send(Flaky(tmp_path / "device", breaks=100, keeps=0), tmp_path, [])


class Lying(LocalLink):
    """A device that answers the runner's commands itself."""

    def __init__(self, folder: Path, answers: dict[str, Any]) -> None:
        super().__init__("local://", str(folder))
        self.answers = answers

    def run(self, command: Any, seconds: float = 600.0) -> Any:
        done = super().run(command, seconds)
        for word, answer in self.answers.items():
            if word in command:
                return type(done)(0, json.dumps(answer) + "\n", "")
        return done


@pytest.mark.parametrize(
    "answer",
    [{"record": "place", "lacking": [{"sha256": "../../etc", "have": 0}]}, {"record": "place", "lacking": [3]}],
    ids=["another file", "no file"],
)
def test_a_device_gets_only_what_was_offered(tmp_path: Path, answer: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="asks for a file that was not offered"):
        send(Lying(tmp_path / "device", {"place": answer}), tmp_path, [])


def test_a_device_that_says_nonsense_of_itself(tmp_path: Path) -> None:
    link = Lying(tmp_path / "device", {"about": {"record": "about", "machine": 7}})
    with pytest.raises(UserError, match="the device says of its machine"):
        Device(link, sys.executable, lambda _: None).connect()
