"""llama.cpp's worker of the SmolLM2 benchmark: `python worker_llamacpp.py MODEL.gguf`, run by the peers' Python.

It speaks the protocol of `peers.py`. It calls llama.cpp's C functions and not the `Llama` class, whose per-token Python
work would be counted against llama.cpp.
"""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

import llama_cpp
import numpy as np
from worker_common import prompt_ids, serve

PREFILL_BATCH = 512  # llama.cpp's own default of n_ubatch
PAD = 256  # llama.cpp rounds the length of its KV cache up to a multiple of this


@llama_cpp.llama_log_callback
def _silent(_level: int, _text: bytes, _data: Any) -> None:
    """llama.cpp's log, dropped."""


class Worker:
    def __init__(self, path: str) -> None:
        self.path = path
        self.model: Any = None
        self.threads = 1

    def load(self, threads: int = 1) -> dict[str, Any]:
        start = time.perf_counter()
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(self.path.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {self.path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.threads = threads
        return {"seconds": time.perf_counter() - start, "system": llama_cpp.llama_print_system_info().decode().strip()}

    def prefill(self, n: int) -> dict[str, Any]:
        context = self._context(n)
        try:
            ids = self._array(prompt_ids(n))
            start = time.perf_counter()
            self._decode(context, ids)
            self._argmax(context)
            return {"seconds": time.perf_counter() - start}
        finally:
            llama_cpp.llama_free(context)

    def decode(self, context: int, n: int) -> dict[str, Any]:
        handle = self._context(context + n)
        try:
            self._decode(handle, self._array(prompt_ids(context)))
            token = self._argmax(handle)
            seconds = []
            for _ in range(n):
                start = time.perf_counter()
                self._decode(handle, self._array([token]))
                token = self._argmax(handle)
                seconds.append(time.perf_counter() - start)
            return {"seconds_per_token": seconds}
        finally:
            llama_cpp.llama_free(handle)

    def generate(self, prompt: str, n: int) -> dict[str, Any]:
        text = prompt.encode()
        buffer = (llama_cpp.llama_token * (len(text) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, text, len(text), buffer, len(buffer), True, True)
        context = self._context(count + n)
        try:
            self._decode(context, self._array(buffer[:count]))
            pieces = []
            for _ in range(n):
                token = self._argmax(context)
                if llama_cpp.llama_vocab_is_eog(self.vocab, token):
                    break
                piece = ctypes.create_string_buffer(64)
                size = llama_cpp.llama_token_to_piece(self.vocab, token, piece, len(piece), 0, False)
                pieces.append(piece.raw[:size])
                self._decode(context, self._array([token]))
            return {"text": b"".join(pieces).decode(errors="replace")}
        finally:
            llama_cpp.llama_free(context)

    def _context(self, length: int) -> Any:
        """A context that holds `length` tokens, all other settings llama.cpp's own."""
        if self.model is None:
            raise RuntimeError("send load first")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = -(-length // PAD) * PAD
        params.n_ubatch = PREFILL_BATCH
        params.n_threads = params.n_threads_batch = self.threads
        context = llama_cpp.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError(f"llama.cpp cannot make a context of {length} tokens")
        return context

    @staticmethod
    def _array(ids: list[int]) -> Any:
        return (llama_cpp.llama_token * len(ids))(*ids)

    @staticmethod
    def _decode(context: Any, ids: Any) -> None:
        status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(ids)} tokens")

    def _argmax(self, context: Any) -> int:
        """The greedy next token. Reading the logits also waits for the computation to end."""
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())


if __name__ == "__main__":
    worker = Worker(sys.argv[1])
    serve(
        {"load": worker.load, "prefill": worker.prefill, "decode": worker.decode, "generate": worker.generate},
    )
