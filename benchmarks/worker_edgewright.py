"""Edgewright's worker of the SmolLM2 benchmark: `python worker_edgewright.py BUNDLE [FORMAT]`, run by Edgewright's Python.

It speaks the protocol of `peers.py` and goes through the same session and loop as `edgewright run`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from worker_common import prompt_ids, serve

from edgewright.bundle import CHECKPOINT, Bundle
from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.runtimes.generate import Stream, generate
from edgewright.runtimes.registry import open_session
from edgewright.runtimes.session import Session


class Worker:
    def __init__(self, path: str, format: str = "onnx") -> None:
        self.bundle, self.format = Bundle.open(path), format
        self.spec = self.bundle.manifest.generation
        self.session: Session | None = None

    def load(self, threads: int = 1) -> dict[str, Any]:
        start = time.perf_counter()
        opened = self.session = open_session(self.bundle, self.format, threads)
        return {"seconds": time.perf_counter() - start, "system": f"{opened.how}, {self.bundle.manifest.tools}"}

    def _stream(self, count: int, new: int) -> Stream:
        if self.session is None:
            raise RuntimeError("send load first")
        return Stream(self.session, self.spec, [prompt_ids(count)], new)

    def prefill(self, n: int) -> dict[str, Any]:
        stream = self._stream(n, 1)
        start = time.perf_counter()
        stream.prefill()
        return {"seconds": time.perf_counter() - start}

    def decode(self, context: int, n: int) -> dict[str, Any]:
        stream = self._stream(context, n + 1)
        token = int(stream.prefill()[0, -1].argmax())
        seconds = []
        for _ in range(n):
            start = time.perf_counter()
            token = int(stream.feed(np.array([[token]], np.int64))[0, -1].argmax())
            seconds.append(time.perf_counter() - start)
        return {"seconds_per_token": seconds}

    def generate(self, prompt: str, n: int) -> dict[str, Any]:
        if self.session is None:
            raise RuntimeError("send load first")
        tokenizer = Tokenizer.from_dir(Path(self.bundle.path) / CHECKPOINT)
        ids = tokenizer.encode(prompt, special=False)
        return {"text": tokenizer.decode(list(generate(self.session, self.spec, ids, n)))}


if __name__ == "__main__":
    worker = Worker(*sys.argv[1:])
    serve({"load": worker.load, "prefill": worker.prefill, "decode": worker.decode, "generate": worker.generate})
