"""One test measured: warm-up, repeats, the sustained rate, and the device's state before and after.

A test is {"name", "kind", "tokens", "depth"}. Kinds: "prefill" reads so many tokens, "decode" generates so many after `depth`,
"sound" reads a window, "calls" runs a module's examples, "answer" has the greedy tokens of a prompt and no time.
"""

from __future__ import annotations

import json
import statistics
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from . import sensors
from .model import Array, Model, Stream, greedy, read_context

QUESTION = 8
"""Tokens of the prompt after a context."""

WINDOWS = 12
"""A sustained run is told in so many windows; it has settled when the last of them agree."""

AGREEING, WITHIN = 4, 0.05
"""So many windows whose rates lie this near to their mean have settled."""

_COOLER = 5.0
"""Degrees above the first reading that count as cool."""

_WARM = 50.0
"""Degrees below which a device is cool however it began."""

Timed = Callable[[AbstractContextManager[None]], "tuple[float, float]"]
"""Does a test once; the context is entered around what is timed. -> (work, seconds)."""


def row(model: Model, folder: Path, test: dict[str, Any], request: dict[str, Any], cool: Cool) -> dict[str, Any]:
    """The finished row of a test. Rates are units of work a second: tokens, seconds of sound or calls."""
    if test["kind"] == "answer":
        tokens = greedy(model, test["prompt"], test["tokens"], test.get("context", ()))
        return {"record": "row", "test": test["name"], "kind": "answer", "answer": tokens}
    once = _timed(model, folder, test)
    waited = cool.wait()
    before = sensors.state()
    meter = sensors.Meter(sensors.sources())
    once(sensors.Meter([]))  # warm-up
    passes = [once(meter) for _ in range(request["repeats"])]
    rates = [work / seconds for work, seconds in passes]
    return {
        "record": "row",
        "test": test["name"],
        "kind": test["kind"],
        "unit": {"sound": "seconds of sound", "calls": "calls"}.get(test["kind"], "tokens"),
        "rate": statistics.fmean(rates),
        "deviation": statistics.stdev(rates) if len(rates) > 1 else 0.0,
        "median": statistics.median(rates),
        "n": len(rates),
        "rates": rates,
        "energy": meter.result(sum(work for work, _ in passes)),
        "sustained": _sustained(once, request["sustain"]) if request["sustain"] and test["kind"] == "decode" else None,
        "memory": sensors.memory(),
        "cool": waited,
        "before": before,
        "after": sensors.state(),
        "at": time.time(),
    }


class Cool:
    """Waits until the hottest sensor is near its first reading, and Android's thermal status 0; at most `within` seconds a row."""

    def __init__(self, within: float, before: Iterable[dict[str, Any]] = ()) -> None:
        """before: the rows of a run that ended early: it may have begun cooler."""
        self.within = within
        first = sensors.hottest()
        limits = [limit for row in before if (limit := row.get("cool", {}).get("limit_celsius")) is not None]
        self.limit = None if first is None else min([max(first + _COOLER, _WARM), *limits])

    def wait(self, every: float = 2.0) -> dict[str, Any]:
        """How long was waited, and whether the device is cool; "not measured" where it tells no temperature."""
        start = time.monotonic()
        while True:
            cool = self._cool()
            waited = time.monotonic() - start
            if cool is None or cool or waited >= self.within:
                told = sensors.NOT_MEASURED if cool is None else cool
                return {"cool": told, "waited_s": round(waited, 1), "limit_celsius": self.limit}
            time.sleep(every)

    def _cool(self) -> bool | None:
        status, hottest = sensors.throttling(), sensors.hottest()
        if status.startswith("Android"):
            return status.endswith(" 0")
        if self.limit is None or hottest is None:
            return None
        return bool(hottest <= self.limit)


def _sustained(once: Timed, seconds: float) -> dict[str, Any]:
    """The rate over `seconds`, in windows; goes on for twice that where it has not settled."""
    rates: list[float] = []
    meter = sensors.Meter(sensors.sources())
    length, start, total = seconds / WINDOWS, time.monotonic(), 0.0
    while True:
        began, work, spent = time.monotonic(), 0.0, 0.0
        while spent == 0.0 or time.monotonic() - began < length:
            done, took = once(meter)
            work, spent = work + done, spent + took
        rates.append(work / spent)
        total += work
        last = rates[-AGREEING:]
        mean = statistics.fmean(last)
        settled = len(last) == AGREEING and all(abs(rate - mean) <= WITHIN * mean for rate in last)
        ran = time.monotonic() - start
        if ran >= seconds and (settled or ran >= 2 * seconds):
            return {
                "first": rates[0],
                "rate": mean,
                "settled": settled,
                "seconds": ran,
                "windows": rates,
                "energy": meter.result(total),
            }


def _timed(model: Model, folder: Path, test: dict[str, Any]) -> Timed:
    kind, count = test["kind"], test["tokens"]
    spec = model.spec
    if kind == "calls":
        return _calls(model, examples(folder / "checkpoint" / "examples.safetensors"))
    if kind == "prefill":
        return _prefill(model, tokens_of(spec, count))
    if kind == "sound":
        return _sound(model)

    def decode(meter: AbstractContextManager[None]) -> tuple[float, float]:
        stream = Stream(model, tokens_of(spec, max(1, test["depth"])), count + 1)
        token = int(stream.feed(stream.pending).argmax())
        with meter:
            start = time.perf_counter()
            for _ in range(count):
                token = int(stream.feed(np.array([[token]], np.int64)).argmax())
            return count, time.perf_counter() - start

    return decode


def _prefill(model: Model, ids: list[int]) -> Timed:
    def read(meter: AbstractContextManager[None]) -> tuple[float, float]:
        with meter:
            start = time.perf_counter()
            if model.spec["task"] == "embed":
                inputs = {"input_ids": np.array([ids], np.int64), "encoder_mask": np.ones((1, len(ids)), bool)}
                model.run("encoder", inputs, {})
            elif model.spec["task"] == "memory":
                stream = Stream(model, tokens_of(model.spec, QUESTION), 1, read_context(model, ids))
                stream.feed(stream.pending)
            else:
                stream = Stream(model, ids, 1)
                stream.feed(stream.pending)
            return len(ids), time.perf_counter() - start

    return read


def _sound(model: Model) -> Timed:
    sound = model.spec["speech"]["sound"]

    def listen(meter: AbstractContextManager[None]) -> tuple[float, float]:
        with meter:
            start = time.perf_counter()
            stream = Stream(model, (), 1)
            stream.feed(stream.pending)
            return sound["window"] / sound["rate"], time.perf_counter() - start

    return listen


def _calls(model: Model, calls: list[tuple[str, dict[str, Array]]]) -> Timed:
    def call(meter: AbstractContextManager[None]) -> tuple[float, float]:
        with meter:
            start = time.perf_counter()
            for graph, inputs in calls:
                model.run(graph, inputs, {})
            return len(calls), time.perf_counter() - start

    return call


def tokens_of(spec: dict[str, Any], count: int) -> list[int]:
    """So many made-up tokens, the same each time."""
    drawn = np.random.default_rng(0).integers(min(4, spec["vocab"] - 1), spec["vocab"], count)
    return [int(token) for token in drawn]


def examples(path: Path) -> list[tuple[str, dict[str, Array]]]:
    """(graph, inputs) of each example in a safetensors file, whose tensors are named `<number>.<graph>.<input>`."""
    kinds = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I8": np.int8, "BOOL": np.bool_}
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    found: dict[int, tuple[str, dict[str, Array]]] = {}
    for name, entry in sorted(header.items()):
        if name == "__metadata__":
            continue
        number, graph, port = name.split(".", 2)
        start, end = entry["data_offsets"]
        values: Array = np.frombuffer(raw[8 + size + start : 8 + size + end], kinds[entry["dtype"]])
        found.setdefault(int(number), (graph, {}))[1][port] = values.reshape(entry["shape"])
    return [found[number] for number in sorted(found)]
