"""The runner's commands, each a line of JSON on standard output: about, place, unpack, measure, stop, forget."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from .about import FLASH, about, emulated, flash_is_broken
from .journal import Journal
from .sensors import clocks, fastest_cores

_TIMED = ("rate", "deviation", "median", "rates", "energy", "sustained")


class Refused(Exception):
    """What cannot be done here: a line for the user, and no reason to try again."""


def main(arguments: list[str]) -> int:
    """0: done. 2: refused, with a record "error". Anything else is a crash, or the link's end."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a link that breaks ends no measurement
    command, *rest = arguments
    try:
        if command == "about":
            say({"record": "about", **about(Path(rest[0]))})
        elif command == "place":
            say({"record": "place", "lacking": place(Path(rest[0]))})
        elif command == "unpack":
            unpack(Path(rest[0]), [Path(wheel) for wheel in rest[1:]])
            say({"record": "unpack"})
        elif command == "measure":
            measure(Path(rest[0]))
        elif command == "stop":
            say({"record": "stop", "stopped": Journal(Path(rest[0])).stop_holder()})
        elif command == "forget":
            Journal(Path(rest[0])).forget()
            say({"record": "forget"})
        else:
            raise Refused(f"no command {command}")
    except Refused as error:
        say({"record": "error", "error": str(error)})
        return 2
    return 0


def say(record: dict[str, Any]) -> None:
    """A line of JSON; nobody may be listening any more."""
    try:
        print(json.dumps(record), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def place(wanted: Path) -> list[dict[str, Any]]:
    """Put the files that came whole where they belong; returns those that lack: {"sha256", "have"}, bytes that came so far.

    wanted: {"store": folder, "files": [{"path", "sha256", "size"}]}. A file comes into the store as `<sha256>.partial`; whole
    and of that hash it is `<sha256>`, and gets a second name at its path, so that other bundles find it, too.
    """
    request = json.loads(wanted.read_text(encoding="utf-8"))
    store = Path(request["store"])
    store.mkdir(parents=True, exist_ok=True)
    lacking: dict[str, int] = {}
    for entry in request["files"]:
        path, kept = Path(entry["path"]), store / entry["sha256"]
        partial = kept.with_name(f"{kept.name}.partial")
        if _is(path, entry):
            continue
        if not _is(kept, entry):
            have = partial.stat().st_size if partial.exists() else 0
            if have < entry["size"]:
                lacking[entry["sha256"]] = have
                continue
            if not _is(partial, entry):
                partial.unlink()
                lacking[entry["sha256"]] = 0
                continue
            os.replace(partial, kept)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.unlink()
        try:
            os.link(kept, path)
        except OSError:  # Android allows no second name
            os.replace(kept, path)
    return [{"sha256": digest, "have": have} for digest, have in lacking.items()]


def unpack(folder: Path, wheels: list[Path]) -> None:
    """Unpack wheels into a folder for PYTHONPATH, which appears whole or not at all."""
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
    os.replace(partial, folder)


def measure(path: Path) -> None:
    """Measure what a request asks for and the journal lacks; each finished row is told and kept.

    While another process measures, its rows are told.
    """
    request = json.loads(path.read_text(encoding="utf-8"))
    journal, told = Journal(Path(request["journal"])), 0
    while not journal.lock():
        told = _tell(journal, told)
        time.sleep(0.3)
    _tell(journal, told)
    done = {record["test"] for record in journal.records() if record["record"] == "row"}
    skip = request["skip"]
    todo = [test for test in request["tests"] if test["name"] not in done and test["name"] not in skip]
    if todo:
        _run(request, todo, journal)
    say({"record": "end"})


def _tell(journal: Journal, told: int) -> int:
    records = journal.records()
    for record in records[told:]:
        say(record)
    return len(records)


def _run(request: dict[str, Any], todo: list[dict[str, Any]], journal: Journal) -> None:
    settings = {**_settings(), **_pin(request["threads"])}
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, NotImplemented

    from . import sensors
    from .model import Model
    from .rows import Cool, row

    cool = Cool(request["cool_within"], [record for record in journal.records() if record["record"] == "row"])
    folder, virtual = Path(request["bundle"]), emulated()
    say({"record": "loading", "pid": os.getpid()})
    start = time.perf_counter()
    try:
        model = Model(folder, request["threads"])
    except (Fail, InvalidGraph, NotImplemented) as error:
        line = " ".join(str(error).split())[:300]
        raise Refused(f"onnxruntime {onnxruntime.__version__} does not open the graphs ({line})") from None
    loaded = {
        "record": "loaded",
        "load_s": None if virtual else time.perf_counter() - start,
        "memory": sensors.memory(),
        "onnxruntime": onnxruntime.__version__,
        "settings": settings,
    }
    journal.add(loaded)
    say(loaded)
    for test in todo:
        say({"record": "begin", "test": test["name"]})
        made = row(model, folder, test, request, cool)
        made["figure"] = "emulated" if virtual else "measured"
        if virtual:
            made.update({name: None for name in _TIMED if name in made})
        journal.add(made)
        say(made)
    del model
    gc.collect()
    start = time.perf_counter()
    Model(folder, request["threads"])
    again = {"record": "loaded again", "load_s": None if virtual else time.perf_counter() - start}
    journal.add(again)
    say(again)


def _settings() -> dict[str, str]:
    """What is set for this device before the runtime is imported, and why."""
    from importlib.metadata import version

    if FLASH in os.environ:
        return {f"{FLASH}={os.environ[FLASH]}": "set on the device"}
    try:
        release = version("onnxruntime")
    except Exception:  # a runtime without metadata: of an unknown age
        release = "0"
    why = flash_is_broken(release)
    if not why:
        return {}
    os.environ[FLASH] = "1"
    return {f"{FLASH}=1": why}


def _pin(threads: int) -> dict[str, str]:
    """Keep this process on as many of the fastest cores, where cores differ; what was set, and why."""
    chosen = fastest_cores(clocks(), threads)
    if not chosen:
        return {}
    try:
        os.sched_setaffinity(0, chosen)
    except (OSError, AttributeError):
        return {}
    return {f"cores {','.join(map(str, sorted(chosen)))}": f"the fastest for {threads} threads"}


def _is(path: Path, entry: dict[str, Any]) -> bool:
    """Whether a file is there with this size and hash."""
    try:
        if path.stat().st_size != entry["size"]:
            return False
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return False
    return digest.hexdigest() == str(entry["sha256"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
