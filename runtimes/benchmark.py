"""Measuring one artefact in a process of its own: load times, llama-bench rows, peak memory, time by op. No torch enters.

Peak memory is then the artefact's and not the compiler's (see `system.subprocesses`).
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle, Generation
from ..system.memory import anonymous_bytes, peak_resident_bytes
from ..system.subprocesses import Progress, serve
from .example_inputs import Call, read_examples
from .generate import Stream, read_context
from .registry import open_session
from .session import PlacedSession

_OP_STEPS = 16
_TOP_OPS = 12
_QUESTION = 8  # tokens asked after a context


def measure(
    path: str, format: str, prompts: list[int], new: int, depths: list[int], repeats: int, threads: int
) -> dict[str, Any]:
    """Rows `pp<n>` and `tg<n> @ d<depth>` (tokens/s of each repeat after one warm-up), load times, memory, op times.

    Where something stands in for the target's device: {"not_measured": why}. For an encoder-decoder pp is encoder, cross-KV
    and the first decoder step over that many source tokens, and the depth of a tg row is the source length; for a
    decoder-only model it is the tokens already in the cache. For a decoder-decoder pp is a context of that many tokens read
    and a question of 8 after it. A module has one row, its calls a second.
    """
    bundle = Bundle.open(path)
    spec = bundle.manifest.generation

    def load() -> tuple[PlacedSession, float]:
        start = time.perf_counter()
        session = open_session(bundle, format, threads)
        return session, time.perf_counter() - start

    timed = spec.task in ("seq2seq", "causal")
    session, first_load = load()
    if session.stand_in:
        return {"not_measured": session.how}
    loaded = anonymous_bytes()
    if spec.task == "module":
        rows = [_call_row(session, read_examples(bundle), repeats)]
    else:
        rows = [_prefill_row(session, spec, n, repeats) for n in prompts]
        if new:
            rows += [_decode_row(session, spec, new, depth, repeats) for depth in depths]
    peak = peak_resident_bytes()
    anonymous = anonymous_bytes()
    del session
    _, warm_load = load()
    return {
        "rows": rows,
        "load_first_s": first_load,
        "load_warm_s": warm_load,
        "memory": {"peak_resident": peak, "anonymous_after_load": loaded, "anonymous_after_run": anonymous},
        "ops": _time_by_op(bundle, threads, max(prompts, default=16)) if format == "onnx" and timed else {},
        "host": {"cpu": _cpu_name(), "threads": threads or "all cores"},
        "kind": "measured",
    }


def _tokens(spec: Generation, count: int) -> list[int]:
    rng = np.random.default_rng(0)
    return [int(t) for t in rng.integers(min(4, spec.vocab - 1), spec.vocab, count)]


def _prefill_row(session: PlacedSession, spec: Generation, count: int, repeats: int) -> dict[str, Any]:
    rates = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        if spec.task == "memory":
            Stream(
                session, spec, [_tokens(spec, _QUESTION)], 1, read_context(session, spec, _tokens(spec, count))
            ).prefill()
        else:
            Stream(session, spec, [_tokens(spec, count)], 1).prefill()
        rates.append(count / (time.perf_counter() - start))
    return _row(f"pp{count}", rates[1:])


def _call_row(session: PlacedSession, calls: list[Call], repeats: int) -> dict[str, Any]:
    rates = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for graph, inputs in calls:
            session.run(graph, inputs, {})
        rates.append(len(calls) / (time.perf_counter() - start))
    return _row("calls a second", rates[1:])


def _decode_row(session: PlacedSession, spec: Generation, count: int, depth: int, repeats: int) -> dict[str, Any]:
    rates = []
    for _ in range(repeats + 1):
        stream = Stream(session, spec, [_tokens(spec, max(1, depth))], count + 1)
        token = stream.prefill()[:, -1].argmax(-1)
        start = time.perf_counter()
        for _ in range(count):
            token = stream.feed(token[:, None].astype(np.int64))[:, -1].argmax(-1)
        rates.append(count / (time.perf_counter() - start))
    return _row(f"tg{count}" + (f" @ d{depth}" if depth else ""), rates[1:])


def _row(test: str, rates: list[float]) -> dict[str, Any]:
    return {
        "test": test,
        "tokens_per_s": float(np.mean(rates)),
        "std": float(np.std(rates, ddof=1)) if len(rates) > 1 else 0.0,
        "median": float(np.median(rates)),
        "repeats": len(rates),
    }


def _time_by_op(bundle: Bundle, threads: int, prompt: int) -> dict[str, list[dict[str, Any]]]:
    """Kernel time by op type and provider for one prefill and some decode steps, from ONNX Runtime's own profiler."""
    from .onnx.session import OnnxSession

    spec, folder = bundle.manifest.generation, bundle.path / "onnx"
    with tempfile.TemporaryDirectory() as scratch:
        session = OnnxSession(folder, bundle.manifest.graphs, threads, profile_prefix=Path(scratch) / "ort")
        room = spec.max_context - (prompt if spec.task == "causal" else 1) - 1
        steps = min(_OP_STEPS, max(0, room))
        stream = Stream(session, spec, [_tokens(spec, prompt)], steps + 1)
        token = stream.prefill()[:, -1].argmax(-1)
        for _ in range(steps):
            token = stream.feed(token[:, None].astype(np.int64))[:, -1].argmax(-1)
        files = {name: s.end_profiling() for name, s in session.sessions.items()}
        return {name: _summarise(Path(file)) for name, file in files.items()}


def _summarise(trace: Path) -> list[dict[str, Any]]:
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for event in json.loads(trace.read_text()):
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
            entry = totals[event["args"]["op_name"], event["args"].get("provider", "")]
            entry[0] += event["dur"] / 1000.0
            entry[1] += 1
    everything = sum(ms for ms, _ in totals.values()) or 1.0
    ordered = sorted(totals.items(), key=lambda item: -item[1][0])[:_TOP_OPS]
    return [
        {
            "op": op,
            "unit": provider.removesuffix("ExecutionProvider"),
            "ms": ms,
            "calls": int(n),
            "share": ms / everything,
        }
        for (op, provider), (ms, n) in ordered
    ]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _measure_job(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    return measure(**job)


if __name__ == "__main__":
    serve(_measure_job)
