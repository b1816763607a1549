"""`profile --device URL`: a bundle's ONNX artefact measured on devices behind links, one after the other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bundle import Bundle, Generation
from ..errors import UserError
from ..measuring.device import Note
from ..measuring.links import is_link, open_link
from ..measuring.measure import FORMAT, DeviceResult, Settings, measure
from ..runtimes.benchmark import Lengths
from ..system.reading import one_line
from ..targets.onnx.graph_check import check_graph
from ..targets.onnx.oldest import read_oldest
from ..targets.onnx.releases import OLDEST, parse
from .profile import ProfileLengths

_ANSWER = 16
"""Tokens of the answer that a device gives, to be compared with this machine's."""


def profile_devices(
    path: str | Path,
    urls: Sequence[str],
    lengths: ProfileLengths | None = None,
    settings: Settings | None = None,
    note: Note = lambda _: None,
    check: bool = True,
) -> Iterator[DeviceResult]:
    """Measure a bundle on each device, one after the other: `ssh://user@host:port`, `adb`, `adb://SERIAL`, `local://`.

    Args:
        path: the bundle's folder.
        urls: the devices.
        lengths: what to measure; its repeats hold, those of `settings` do not.
        settings: None is the default of each.
        note: is told of what is sent and of each row.
        check: whether the files that are sent are hashed first.

    Raises UserError for lengths beyond the bundle's context, a bundle without an ONNX artefact, an address that is none, and a
    device that cannot be reached or does not run the graphs; VerificationFailure for a file that is not what was exported.
    """
    bundle = Bundle.open(path)
    bundle.target(FORMAT)
    links = [open_link(url) for url in urls]
    fitted = (lengths or ProfileLengths()).within(bundle.manifest.generation)
    settings = replace(settings or Settings(), repeats=fitted.repeats)
    if check:
        bundle.check_target(FORMAT)
    for graph in bundle.manifest.graphs:
        check_graph(bundle.path / FORMAT / f"{graph.name}.onnx")
    asked, oldest = tests_of(bundle, fitted), _oldest(bundle)
    here: tuple[int, ...] | None = None
    for link in links:
        result = measure(bundle, link, asked, oldest, settings, note)
        here = _answer_here(bundle, asked) if here is None else here
        yield result.model_copy(update={"answer_here": here})


def require_links(devices: Sequence[str]) -> None:
    """Raise UserError for a device that is a name of the library among links."""
    for device in devices:
        if not is_link(device):
            raise UserError(
                f"--device {one_line(device, 80)} is a name, and names are predicted; give links (ssh://user@host, adb, "
                "adb://SERIAL) in a command of their own"
            )


def tests_of(bundle: Bundle, lengths: Lengths) -> list[dict[str, Any]]:
    """The tests of llama-bench's rows, as `measuring.on_device.rows` takes them, and the answer to the bundle's first prompt."""
    spec = bundle.manifest.generation
    if spec.task == "module":
        return [{"name": "calls a second", "kind": "calls", "tokens": 0, "depth": 0}]
    tests: list[dict[str, Any]] = [
        {"name": f"pp{count}", "kind": "prefill", "tokens": count, "depth": 0} for count in lengths.prompts
    ]
    if spec.speech is not None:
        tests.append({"name": "seconds of sound a second", "kind": "sound", "tokens": 0, "depth": 0})
    if lengths.new:
        for depth in lengths.depths:
            name = f"tg{lengths.new}" + (f" @ d{depth}" if depth else "")
            tests.append({"name": name, "kind": "decode", "tokens": lengths.new, "depth": depth})
    if _answers(spec) and bundle.manifest.prompts:
        tests.append(answer_test(bundle, "answer", bundle.manifest.prompts[0], _first_context(bundle)))
    return tests


def answer_test(bundle: Bundle, name: str, prompt: Sequence[int], context: Sequence[int] = ()) -> dict[str, Any]:
    """The test that asks for greedy tokens after a prompt."""
    room = bundle.manifest.generation.max_context - (0 if bundle.manifest.generation.task == "seq2seq" else len(prompt))
    new = max(1, min(_ANSWER, bundle.manifest.generation.max_new_tokens, room - 1))
    return {"name": name, "kind": "answer", "tokens": new, "depth": 0, "prompt": list(prompt), "context": list(context)}


def _answer_here(bundle: Bundle, asked: list[dict[str, Any]]) -> tuple[int, ...] | None:
    """What this machine answers to the test of that kind; None where there is none."""
    from ..runtimes.generate import generate, read_context
    from ..runtimes.registry import open_session

    for test in asked:
        if test["kind"] == "answer":
            session, spec = open_session(bundle, FORMAT), bundle.manifest.generation
            memory = read_context(session, spec, test["context"]) if test["context"] else None
            return tuple(generate(session, spec, test["prompt"], test["tokens"], memory=memory))
    return None


def _answers(spec: Generation) -> bool:
    return spec.task in ("seq2seq", "causal", "memory") and spec.speech is None


def _first_context(bundle: Bundle) -> Sequence[int]:
    return bundle.manifest.contexts[0] if bundle.manifest.contexts else ()


def _oldest(bundle: Bundle) -> str:
    """The oldest onnxruntime that opens all graphs, as their files say."""
    graphs = {graph.name for graph in bundle.manifest.graphs}
    found = [str(entry["release"]) for name, entry in read_oldest(bundle.path / FORMAT).items() if name in graphs]
    oldest = max([*found, OLDEST], key=parse)
    assert re.fullmatch(r"[0-9.]+", oldest)
    return oldest
