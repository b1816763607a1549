"""What the benchmark workers share: the line protocol, the fixed prompt, the memory reading.

A worker runs in the virtual environment of its own runtime, so this file uses the standard library alone. The protocol
itself is described in `peers.py`.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Handler = Callable[..., dict[str, Any]]

FIRST_ORDINARY_ID = 17  # SmolLM2: ids 0..16 are special tokens
VOCABULARY = 49152


def prompt_ids(n: int, seed: int = 0) -> list[int]:
    """`n` token ids that look random and are the same for every worker: ordinary SmolLM2 ids, no special tokens."""
    rng = random.Random(seed)
    return [rng.randrange(FIRST_ORDINARY_ID, VOCABULARY) for _ in range(n)]


def peak_rss_mb() -> float:
    """Highest resident set of this process so far (VmHWM), in 10^6 bytes, touched pages of mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status has no VmHWM line: peak memory needs Linux")


def serve(handlers: dict[str, Handler]) -> None:
    """Answers one JSON line per JSON line of standard input until `quit` or the end of input.

    `handlers`: command name -> function of the remaining keys, returning the answer. One that raises is answered
    with `{"error": "..."}`, and the worker lives on. `memory` and `quit` are the same for all and need no handler.
    """
    # Native libraries print to file descriptor 1. Answers go to a copy of it; everything else goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    commands: dict[str, Handler] = {**handlers, "memory": lambda: {"peak_rss_mb": round(peak_rss_mb(), 1)}}
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            name = request.pop("cmd")
            if name == "quit":
                return
            if name not in commands:
                raise ValueError(f"no command {name!r}: use {', '.join(sorted(commands))} or quit")
            answer = commands[name](**request)
        except Exception as error:  # the boundary of the process: the driver must see every failure as an answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
