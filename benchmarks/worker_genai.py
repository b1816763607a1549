"""onnxruntime-genai's worker of the SmolLM2 benchmark: `python worker_genai.py MODEL_DIR`, run by the peers' Python.

It speaks the protocol of `peers.py`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime_genai as og
from worker_common import prompt_ids, serve


class Worker:
    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.model: og.Model | None = None

    def load(self, threads: int = 1) -> dict[str, Any]:
        start = time.perf_counter()
        config = og.Config(self.directory)
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = og.Model(config)
        return {"seconds": time.perf_counter() - start, "system": f"onnxruntime-genai {og.__version__}"}

    def prefill(self, n: int) -> dict[str, Any]:
        generator = self._generator(n + 1)
        ids = np.array(prompt_ids(n), dtype=np.int32)
        start = time.perf_counter()
        generator.append_tokens(ids)
        return {"seconds": time.perf_counter() - start}

    def decode(self, context: int, n: int) -> dict[str, Any]:
        # min_length keeps the search from stopping at an end-of-text token that random ids may provoke.
        generator = self._generator(context + n + 1, min_length=context + n + 1)
        generator.append_tokens(np.array(prompt_ids(context), dtype=np.int32))
        generator.generate_next_token()  # only samples from the prompt's logits; each later call runs the model
        seconds = []
        for _ in range(n):
            start = time.perf_counter()
            generator.generate_next_token()
            seconds.append(time.perf_counter() - start)
        return {"seconds_per_token": seconds}

    def generate(self, prompt: str, n: int) -> dict[str, Any]:
        tokenizer = og.Tokenizer(self.model)
        ids = tokenizer.encode(prompt)
        generator = self._generator(len(ids) + n)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        return {"text": tokenizer.decode(generator.get_sequence(0)[len(ids) :])}

    def _generator(self, max_length: int, min_length: int = 0) -> og.Generator:
        """A greedy generator whose KV cache holds `max_length` tokens."""
        if self.model is None:
            raise RuntimeError("send load first")
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=max_length, min_length=min_length, do_sample=False, batch_size=1)
        return og.Generator(self.model, params)


if __name__ == "__main__":
    worker = Worker(sys.argv[1])
    serve(
        {"load": worker.load, "prefill": worker.prefill, "decode": worker.decode, "generate": worker.generate},
    )
