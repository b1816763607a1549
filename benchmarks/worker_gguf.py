"""llama.cpp's side of `bench_gguf.py`, run by the peers' Python.

    python worker_gguf.py quantize IN.gguf OUT.gguf TYPE
    python worker_gguf.py perplexity MODEL.gguf WINDOWS.json [--threads N]
    python worker_gguf.py tokens MODEL.gguf TEXT

`quantize` makes a file by llama.cpp's own choices of a type for each tensor. `perplexity` prints the perplexity of windows of
token ids, JSON [windows][length]: one call a window from an empty cache in float32, all tokens but the first predicted.
`tokens` prints llama.cpp's ids of a text file, special tokens in it parsed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


@llama_cpp.llama_log_callback
def _silent(_level: int, _text: bytes, _data: Any) -> None:
    """llama.cpp's log, dropped."""


def quantize(source: str, target: str, kind: str) -> None:
    """Write `target` from `source`. Raises RuntimeError where llama.cpp refuses."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = 1
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{'ALL_F32' if kind == 'F32' else 'MOSTLY_' + kind}")
    params.allow_requantize = True
    if status := llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama_model_quantize returned {status} for {kind} of {source}")


def loaded(path: str, vocabulary_only: bool = False) -> Any:
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers, params.vocab_only = 0, vocabulary_only
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    return model


def perplexity(path: str, windows: list[list[int]], threads: int) -> float:
    model = loaded(path)
    length, vocabulary = max(map(len, windows)), llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = length
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = 0
    loss, count = 0.0, 0
    for window in windows:
        context = llama_cpp.llama_init_from_model(model, params)
        batch = llama_cpp.llama_batch_init(length, 0, 1)
        batch.n_tokens = len(window)
        for i, token in enumerate(window):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        if status := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(window), vocabulary))
        for row, token in zip(logits, window[1:], strict=False):
            wide = row.astype(np.float64)
            loss += float(np.log(np.exp(wide - wide.max()).sum()) + wide.max() - wide[token])
            count += 1
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
    return math.exp(loss / count)


def tokens(path: str, text: str) -> list[int]:
    vocabulary = llama_cpp.llama_model_get_vocab(loaded(path, vocabulary_only=True))
    data = text.encode()
    ids = (ctypes.c_int32 * (len(data) + 8))()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), ids, len(ids), False, True)
    return list(ids[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("quantize")
    for name in ("source", "target", "kind"):
        make.add_argument(name)
    for command, file in (("perplexity", "windows"), ("tokens", "text")):
        part = commands.add_parser(command)
        part.add_argument("model")
        part.add_argument(file, type=Path)
        part.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    if given.command == "quantize":
        quantize(given.source, given.target, given.kind)
    elif given.command == "perplexity":
        print(perplexity(given.model, json.loads(given.windows.read_text()), given.threads))
    else:
        print(json.dumps(tokens(given.model, given.text.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
