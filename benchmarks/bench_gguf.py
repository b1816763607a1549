"""Perplexity of GGUF files by this project's reader and by llama.cpp, on the same windows of the same text.

    python benchmarks/bench_gguf.py MODEL.gguf --text FILE [--types Q8_0 Q4_K_M …] [--windows 8] [--output RESULTS.json]

llama.cpp makes a file of each type from MODEL by its own choice of a type for each tensor (`worker_gguf.py`). Ours is that of
the file's values in float32; llama.cpp rounds activations to int8 where its kernels do. With `--values` llama.cpp also brings
each file back to float32 itself: its values must be ours to the bit, and its perplexity of them leaves that rounding out.
Windows are 512 tokens, begun with the begin-of-text token. The text is cut by both tokenizers, which must give the same ids.

The peers' Python is that of `peers.py` (EDGEWRIGHT_PEERS_VENV names another).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peers import peers_python
from quality_text import WINDOW, log_softmax, predictions, session_of

from edgewright.calibration.prompts import text_windows
from edgewright.checkpoints.gguf_file import read_gguf
from edgewright.models.opening import open_model

TYPES = ("F32", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "IQ4_XS", "IQ3_S")
WORKER = Path(__file__).resolve().parent / "worker_gguf.py"


def ours(path: Path, windows: list[list[int]]) -> float:
    """Perplexity of the file's values, computed in float32."""
    session = session_of(open_model(str(path)))
    loss, count = 0.0, 0
    for window in windows:
        rows = log_softmax(predictions(session, window))
        loss -= float(rows.gather(1, torch.tensor(window[1:]).unsqueeze(1)).double().sum())
        count += len(rows)
    return math.exp(loss / count)


def theirs(*command: object) -> str:
    """What llama.cpp's worker prints."""
    done = subprocess.run([peers_python(), WORKER, *map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"worker_gguf.py {' '.join(map(str, command))}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def windows_of(model: Path, text: Path, count: int, work: Path) -> list[list[int]]:
    """The windows by our tokenizer. Ends the program if llama.cpp's gives other ids."""
    tokenizer = open_model(str(model)).tokenizer
    if tokenizer is None:
        raise SystemExit(f"{model}: no tokenizer")
    part = work / "text.txt"
    part.write_text(text.read_text(encoding="utf-8")[: WINDOW * count * 8], encoding="utf-8")
    ids = tokenizer.encode(part.read_text(encoding="utf-8"), special=False)
    if ids != json.loads(theirs("tokens", model, part)):
        raise SystemExit(f"{text}: llama.cpp's ids are others")
    return [window for window in text_windows(text, tokenizer, WINDOW, count) if len(window) == WINDOW]


def other_values(made: Path, floats: Path) -> list[str]:
    """Tensors of a file whose values here are not those that llama.cpp brought back to float32, to the bit."""
    ours, theirs = open_model(str(made)), open_model(str(floats))
    if set(ours.names()) != set(theirs.names()):
        raise SystemExit(f"{floats}: llama.cpp writes other tensors")
    return [name for name in ours.names() if not torch.equal(ours.tensor(name), theirs.tensor(name))]


def kinds(path: Path) -> str:
    """How many matrices have which type."""
    found = Counter(t.kind.name for t in read_gguf(path).tensors.values() if len(t.shape) > 1)
    return ", ".join(f"{count} {kind}" for kind, count in found.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--values", action="store_true")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        windows = windows_of(given.model, given.text, given.windows, work)
        (work / "windows.json").write_text(json.dumps(windows))
        for kind in given.types:
            made = work / f"{kind}.gguf"
            theirs("quantize", given.model, made, kind)
            mine = ours(made, windows)
            other = float(theirs("perplexity", made, work / "windows.json", "--threads", given.threads))
            row = {"type": kind, "ours": mine, "llama.cpp": other, "tensors": kinds(made)}
            print(
                f"| {kind} | {mine:.3f} | {other:.3f} | {100 * (mine / other - 1):+.2f} % | {kinds(made)} |", flush=True
            )
            if given.values:
                floats = work / "floats.gguf"
                theirs("quantize", made, floats, "F32")
                if other_tensors := other_values(made, floats):
                    raise SystemExit(f"{kind}: other values of {', '.join(other_tensors)}")
                row["values"] = float(theirs("perplexity", floats, work / "windows.json", "--threads", given.threads))
                print(f"{kind}: the same values in all tensors; llama.cpp on them: {row['values']:.4f}", flush=True)
                floats.unlink()
            rows.append(row)
            made.unlink()
            if given.output is not None:
                given.output.write_text(json.dumps(rows, indent=2) + "\n")
    worst = max(abs(row["ours"] / row["llama.cpp"] - 1) for row in rows)
    print(f"{len(windows)} windows, the largest difference is {100 * worst:.2f} %")
    sys.exit(worst > 0.01)


if __name__ == "__main__":
    main()
