"""llama.cpp's quantizations of a model at their true bytes: perplexity, KL and top-1 agreement beside the original's.

    python benchmarks/peers_quality.py MODEL.gguf --calibration FILE --text FILE --output RESULTS.json [--name NAME] [--types …]

The GGUF becomes one of float32 first (`llama-quantize --allow-requantize … F32`: the values its blocks dequantize to), so
that every type starts from the same weights. `llama-imatrix` computes the importance matrix on the calibration text, 512
tokens at a time. Nothing else is given to `llama-quantize`: which tensors get which type is its own choice. It cannot keep
K-quants where a row is not a multiple of 256 weights and takes a larger type there; the results tell what each tensor became.
By itself it keeps an embedding that is the head too at 6 bits or more; TYPE:EMBEDDING asks for another type of the embedding.

Each file is read by this project's reader, dequantized to float32 and scored by `quality_text`, so that all weights, ours
and theirs, meet the same arithmetic. llama.cpp itself rounds activations to int8 and does a little worse; `--crosscheck TYPE`
runs its own `llama-perplexity --kl-divergence` on the same text.

The tools are built from the sources in the source package of llama-cpp-python into `.cache/peers/llama.cpp`; the variable
EDGEWRIGHT_LLAMACPP names a directory that holds them already. Results are added to the JSON file point by point, and points
in it are not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peers import PACKAGES
from quality_text import CACHE as SCORES
from quality_text import WINDOW, Reference, session_of

from edgewright.checkpoints.gguf_file import read_gguf
from edgewright.checkpoints.opening import open_checkpoint

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "peers" / "llama.cpp"
TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity")
TYPES = (
    "Q2_K",
    "Q3_K_S",
    "Q3_K_M",
    "Q4_0",
    "Q4_K_S",
    "Q4_K_M",
    "IQ4_NL",
    "Q5_K_S",
    "Q6_K",
    "Q4_0:Q4_0",
    "IQ4_NL:IQ4_NL",
)
BUILD_OPTIONS = [
    *("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_BUILD_COMMON=ON", "-DLLAMA_BUILD_TOOLS=ON"),
    *("-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF"),
    *("-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF"),
]


def tools() -> Path:
    """The directory of llama.cpp's command-line tools, which are built when they are not there: ten minutes on two cores."""
    if given := os.environ.get("EDGEWRIGHT_LLAMACPP"):
        if missing := [t for t in TOOLS if not (Path(given) / t).exists()]:
            raise SystemExit(f"EDGEWRIGHT_LLAMACPP={given} lacks {', '.join(missing)}: unset it to have them built")
        return Path(given)
    built = CACHE / "build" / "bin"
    if not all((built / tool).exists() for tool in TOOLS):
        CACHE.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps", "--dest", CACHE]
        run(*pip, PACKAGES[0])
        (package,) = CACHE.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(package) as archive:
            archive.extractall(CACHE, filter="data")
        (sources,) = CACHE.glob("llama_cpp_python-*/vendor/llama.cpp")
        run("cmake", "-S", sources, "-B", CACHE / "build", *BUILD_OPTIONS)
        run("cmake", "--build", CACHE / "build", "-j", os.cpu_count() or 1, "--target", *TOOLS)
    return built


def float32_gguf(source: Path, work: Path) -> Path:
    """The GGUF file with every tensor dequantized to float32."""
    return made(
        work / "f32.gguf", lambda out: run(tools() / "llama-quantize", "--allow-requantize", source, out, "F32")
    )


def importance_matrix(model: Path, text: Path, chunks: int, work: Path, threads: int) -> Path:
    """llama-imatrix's sums of squared activations over `chunks` stretches of 512 tokens from the start of the text.

    They are taken from the model at 8 bits (Q8_0), as llama.cpp's users do: several times faster, and nearly the same sums.
    """
    options = ["-c", WINDOW, "-b", WINDOW, "--chunks", chunks, "-t", threads, "--no-ppl"]
    fast = made(work / "Q8_0.gguf", lambda out: run(tools() / "llama-quantize", model, out, "Q8_0", threads))
    return made(
        work / f"imatrix-{chunks}.gguf",
        lambda out: run(tools() / "llama-imatrix", "-m", fast, "-f", text, "-o", out, *options),
    )


def quantized_gguf(model: Path, matrix: Path, kind: str, work: Path, threads: int) -> Path:
    """llama-quantize's file of a type, with the importance matrix; of a TYPE:EMBEDDING the embedding's type is given too."""
    kind, _, embedding = kind.partition(":")
    options = ["--imatrix", matrix, *(["--token-embedding-type", embedding] if embedding else [])]
    return made(
        work / f"{kind}{'-' if embedding else ''}{embedding}.gguf",
        lambda out: run(tools() / "llama-quantize", *options, model, out, kind, threads),
    )


def sizes(path: Path) -> dict[str, Any]:
    """True bytes of a GGUF file: of its matrices, of the file; bits a matrix weight; and the types of each kind of tensor."""
    matrices = {name: t for name, t in read_gguf(path).tensors.items() if len(t.shape) > 1}
    stored = sum(t.data.nbytes for t in matrices.values())
    weights = sum(t.shape[0] * t.shape[1] for t in matrices.values())
    became: dict[str, Counter[str]] = {}
    for name, tensor in matrices.items():
        became.setdefault(re.sub(r"blk\.\d+\.", "", name).removesuffix(".weight"), Counter())[tensor.kind.name] += 1
    return {
        "bytes": stored,
        "bits": stored * 8 / weights,
        "weights": weights,
        "file_bytes": path.stat().st_size,
        "tensors": {kind: dict(counts) for kind, counts in sorted(became.items())},
    }


def own_divergence(
    model: Path, quantized: Path, text: Path, windows: int, work: Path, threads: int
) -> dict[str, float]:
    """What llama-perplexity itself says of a file: perplexity, KL and top-1 over the second halves of windows.

    Its activations are int8, it scores only tokens with at least 256 before them, and it puts no begin-of-text token into
    vocabularies that do not ask for one: the numbers are near those of `quality_text`, not equal.
    """
    perplexity, options = tools() / "llama-perplexity", ["-c", WINDOW, "-b", WINDOW, "--chunks", windows, "-t", threads]
    base = work / f"logits-{windows}.kld"
    made(base, lambda out: run(perplexity, "-m", model, "-f", text, "--kl-divergence-base", out, *options))
    said = run(perplexity, "-m", quantized, "--kl-divergence-base", base, "--kl-divergence", *options)
    patterns = {
        "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
        "kl": r"Mean\s+KLD:\s*([\d.]+)",
        "top1": r"Same top p:\s*([\d.]+)",
    }
    found = {key: re.search(pattern, said) for key, pattern in patterns.items()}
    if not all(found.values()):
        raise SystemExit(f"llama-perplexity said nothing that is understood:\n{said[-2000:]}")
    values = {key: float(match.group(1)) for key, match in found.items() if match}
    return values | {"top1": values["top1"] / 100}


def made(path: Path, make: Any) -> Path:
    """`path`, made under another name if it is not there, so that what is there is whole."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"unfinished-{path.name}")
        make(unfinished)
        unfinished.rename(path)
    return path


def run(*command: Any) -> str:
    """Runs a tool; gives what it says, and ends with its last lines when it fails."""
    words = [str(word) for word in command]
    print("+", " ".join(words), file=sys.stderr)
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise SystemExit("\n".join([*done.stdout.splitlines()[-20:], f"failed: {' '.join(words)}"]))
    return done.stdout


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | type | bits | matrices, MB | file, MB | perplexity | KL | top-1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, rows in results.items():
        for kind, row in sorted(rows.items(), key=lambda item: item[1]["bytes"]):
            sizes_ = f"{row['bits']:.2f} | {row['bytes'] / 1e6:.1f} | {row['file_bytes'] / 1e6:.1f}"
            lines.append(
                f"| {model} | {kind} | {sizes_} | {row['perplexity']:.2f} | {row['kl']:.4f} | {100 * row['top1']:.1f} % |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="llama.cpp's quantizations scored on a text.")
    parser.add_argument("model", type=Path, help="a GGUF file of architecture llama or gemma3")
    parser.add_argument("--calibration", type=Path, required=True, help="text of the importance matrix")
    parser.add_argument("--text", type=Path, required=True, help="text of the scores")
    parser.add_argument("--output", type=Path, required=True, help="JSON; read first when it is there")
    parser.add_argument("--name", help="the model's name in it (default: the file's)")
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--chunks", type=int, default=100, help="stretches of 512 tokens for the importance matrix")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--crosscheck", nargs="*", default=[], metavar="TYPE")
    parser.add_argument("--work", type=Path, default=CACHE / "models", help="where GGUF files go")
    parser.add_argument("--cache", type=Path, default=SCORES, help="where the original's log-probabilities go")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = options.name or options.model.stem
    work = options.work / name
    model = float32_gguf(options.model, work)
    matrix = importance_matrix(model, options.calibration, options.chunks, work, options.threads)
    results: dict[str, dict[str, Any]] = json.loads(options.output.read_text()) if options.output.exists() else {}
    rows = results.setdefault(name, {})

    def keep(kind: str, row: dict[str, Any]) -> None:
        rows[kind] = rows.get(kind, {}) | row
        options.output.write_text(json.dumps(results, indent=1) + "\n")

    reference = Reference(model, options.text, options.windows, cache=options.cache)
    keep("F32", sizes(model) | {"perplexity": reference.perplexity, "kl": 0.0, "top1": 1.0})
    for kind in options.types:
        if kind in rows:
            continue
        start = time.perf_counter()
        path = quantized_gguf(model, matrix, kind, work, options.threads)
        made_in = time.perf_counter() - start
        score = reference.score(session_of(open_checkpoint(str(path))))
        keep(kind, sizes(path) | asdict(score) | {"quantize_seconds": made_in, "imatrix_chunks": options.chunks})
        print(f"{name} {kind}: {score}", file=sys.stderr)
    for kind in options.crosscheck:
        path = quantized_gguf(model, matrix, kind, work, options.threads)
        keep(kind, {"llama.cpp": own_divergence(model, path, options.text, options.windows, work, options.threads)})
    print(table(results))


if __name__ == "__main__":
    main()
