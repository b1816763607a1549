"""Quality of a language model's weights on a text: perplexity, mean KL from the original's predictions, top-1 agreement.

    python benchmarks/quality_text.py MODEL --text FILE [CANDIDATE ...] [--windows 16] [--cache DIR] [--json]
    python benchmarks/quality_text.py FILE.gguf --write DIRECTORY

MODEL is what the candidates were made from; each CANDIDATE is a bundle (its ONNX artefact as it ships, or the one of
`--format`), a GGUF file, or a checkpoint directory (quantized or not). `--write` only makes a safetensors copy of a
GGUF file: its values in fp32, in the Hugging Face layout.

The text is cut into windows of 512 tokens, each begun with the begin-of-text token, the context empty at every window's
start. All tokens after a window's first are predicted, so 16 windows are 8,176 positions. The original's log-probabilities
stay on disk as float16 (2 bytes times vocabulary times position: 4.3 GB for 16 windows of Gemma's 262,144 tokens). As the
reference counts the distribution which these round to; it differs from the original's by a KL below 1e-5.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgewright.bundle import Bundle
from edgewright.calibration.prompts import text_windows
from edgewright.checkpoints.checkpoint import Checkpoint
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.checkpoints.safetensors_writer import StreamingWriter
from edgewright.models.loading import CODES, load_dequantized, load_original
from edgewright.models.registry import build
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.registry import open_session
from edgewright.runtimes.session import Session

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "quality"
WINDOW = 512
ROWS = 2  # positions worked on at once: a few MB even of a large vocabulary


@dataclass(frozen=True)
class Score:
    """perplexity: of the text. kl: mean over positions of KL(original || this), nats. top1: the share of positions where both
    have the same best token. positions: how many tokens were predicted."""

    perplexity: float
    kl: float
    top1: float
    positions: int


class Reference:
    """The original model's predictions on a text, against which sessions are scored.

    Args:
        model: the original checkpoint: a directory, a GGUF file, or one that is open.
        text: a text file.
        windows: how many windows of `length` tokens; only whole ones count.
        cache: where the log-probabilities are kept; computed when they are not there for this model and text.

    Attributes:
        perplexity: the original's own. vocabulary: how many tokens. windows: the token ids, [windows][length].
    """

    def __init__(
        self,
        model: str | Path | Checkpoint,
        text: str | Path,
        windows: int = 16,
        length: int = WINDOW,
        cache: Path = CACHE,
    ) -> None:
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(str(model))
        if checkpoint.tokenizer is None:
            raise SystemExit(f"{checkpoint.source}: no tokenizer")
        found = text_windows(Path(text), checkpoint.tokenizer, length, windows)
        self.windows = [w for w in found if len(w) == length]
        if len(self.windows) < windows:
            raise SystemExit(f"{text}: {len(self.windows)} windows of {length} tokens, {windows} are wanted")
        key = hashlib.sha256(json.dumps([checkpoint.fingerprint(), self.windows]).encode()).hexdigest()[:16]
        self._file = cache / f"{key}.npz"
        self.vocabulary = int(build(checkpoint.config).graphs()[0].outputs[0].shape[-1])
        self._shape = (len(self.windows), length - 1, self.vocabulary)
        if not self._file.exists():
            self._compute(session_of(checkpoint))
        held = np.load(self._file)
        self._best, self.perplexity = held["best"], float(held["perplexity"])
        self._log_probs = np.memmap(self._file.with_suffix(".f16"), np.float16, "c", shape=self._shape)

    def _compute(self, session: Session) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        log_probs = np.memmap(self._file.with_suffix(".f16"), np.float16, "w+", shape=self._shape)
        best = np.empty(self._shape[:2], np.int32)
        loss = 0.0
        for i, window in enumerate(self.windows):
            logits = predictions(session, window)
            for a in range(0, len(logits), ROWS):
                part = log_softmax(logits[a : a + ROWS])
                rows = slice(a, a + len(part))
                log_probs[i, rows] = part.half().numpy()
                best[i, rows] = part.argmax(-1).numpy()
                loss -= float(part.gather(1, torch.tensor(window[1:])[rows].unsqueeze(1)).double().sum())
        log_probs.flush()
        # Last, so that where it is the other file is whole.
        np.savez(self._file, best=best, perplexity=np.exp(loss / best.size))

    def score(self, candidate: Session | torch.nn.Module) -> Score:
        """Run every window through a session (or a model whose weights are loaded)."""
        session = EagerSession(candidate.graphs()) if isinstance(candidate, torch.nn.Module) else candidate
        loss = divergence = 0.0
        agreed = 0
        for i, window in enumerate(self.windows):
            logits = predictions(session, window)
            for a in range(0, len(logits), ROWS):
                ours = log_softmax(logits[a : a + ROWS])
                rows = slice(a, a + len(ours))
                original = torch.from_numpy(self._log_probs[i, rows]).float()
                agreed += int((ours.argmax(-1).numpy() == self._best[i, rows]).sum())
                loss -= float(ours.gather(1, torch.tensor(window[1:])[rows].unsqueeze(1)).double().sum())
                # float16 takes the sum of probabilities a little off 1: log(sum) normalises it.
                ratio, weight = original - ours, original.exp_()
                total = weight.sum(-1, dtype=torch.float64)
                rates = ratio.mul_(weight).sum(-1, dtype=torch.float64) / total - total.log()
                divergence += float(rates.sum())
        positions = self._best.size
        return Score(float(np.exp(loss / positions)), divergence / positions, agreed / positions, positions)


def predictions(session: Session, window: list[int]) -> torch.Tensor:
    """Logits after each token of a window but its last, fp32 [len(window) - 1, vocabulary], by one prefill."""
    length = len(window)
    inputs = {
        "input_ids": np.array([window], np.int64),
        "past_length": np.zeros(1, np.int64),
        "logit_positions": np.arange(length - 1),
    }
    return torch.from_numpy(session.run("decoder", inputs, session.new_state(1, length))["logits"][0])


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """fp32 [rows, vocabulary]; torch's own, which adds up in fp32, is off by 7e-6, more than what is to be seen here."""
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted.sub_(shifted.exp().sum(-1, keepdim=True, dtype=torch.float64).log().float())


def session_of(checkpoint: Checkpoint) -> EagerSession:
    """A decoder-only checkpoint in float32; codes and scales are dequantized."""
    model = build(checkpoint.config)
    quantized = any(name.endswith(CODES) for name in checkpoint.names())
    (load_dequantized if quantized else load_original)(model, checkpoint)
    return EagerSession(model.graphs())


def open_candidate(path: str, format: str, threads: int) -> Session:
    """A bundle's artefact, or a checkpoint in float32."""
    if (Path(path) / "manifest.json").exists():
        return open_session(Bundle.open(path), format, threads)
    return session_of(open_checkpoint(path))


def write_checkpoint(source: str | Path, directory: Path) -> None:
    """A checkpoint's values in fp32 as `directory`/model.safetensors, beside config.json and the tokenizer's files.

    Tied weights stay one tensor. A GGUF file's values are what its blocks dequantize to.
    """
    checkpoint = open_checkpoint(str(source))
    directory.mkdir(parents=True, exist_ok=True)
    entries = [(name, "F32", checkpoint.info(name).shape) for name in checkpoint.names()]
    with StreamingWriter(directory / "model.safetensors", entries, {"format": "pt"}) as writer:
        for name, _, _ in entries:
            writer.write(name, checkpoint.tensor(name).float())
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save(directory)
    (directory / "config.json").write_text(json.dumps(checkpoint.config | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity, KL and top-1 agreement of weights on a text.")
    parser.add_argument("model", help="what the candidates were made from")
    parser.add_argument("candidates", nargs="*", metavar="CANDIDATE", help="bundle, GGUF file or checkpoint directory")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--format", default="onnx", help="which artefact of a bundle")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path, metavar="DIRECTORY", help="only copy MODEL there as fp32 safetensors")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(options.threads)
    if options.write is not None:
        write_checkpoint(options.model, options.write)
        return
    if options.text is None:
        parser.error("--text is needed")
    reference = Reference(options.model, options.text, options.windows, cache=options.cache)
    found: dict[str, dict[str, Any]] = {options.model: {"perplexity": reference.perplexity, "kl": 0.0, "top1": 1.0}}
    for path in options.candidates:
        start = time.perf_counter()
        score = reference.score(open_candidate(path, options.format, options.threads))
        found[path] = asdict(score) | {"seconds": time.perf_counter() - start}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for path, row in found.items():
        print(f"perplexity {row['perplexity']:8.3f}  kl {row['kl']:.5f}  top-1 {100 * row['top1']:6.2f} %  {path}")


if __name__ == "__main__":
    main()
