"""Scores a checkpoint of this example on its task file: `python score.py [DIRECTORY]` (default: this directory).

Prints the words right and the phoneme error rate of greedy decoding. Needs the extra `edgewright[train]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import Qwen3_5ForCausalLM

Pronunciation = Sequence[str]  # ARPAbet phonemes without stress: N, AY, T
LONGEST = 28  # phonemes of the longest pronunciation in cmudict, and the limit of generation
BATCH = 100


class Score(NamedTuple):
    words: int
    right: int  # words whose output equals a listed pronunciation
    errors: int  # phonemes inserted, deleted or replaced, against the nearest listed pronunciation
    phonemes: int  # phonemes of those nearest pronunciations

    def __str__(self) -> str:
        return (
            f"{self.right} of {self.words} words right ({self.right / self.words:.1%}), "
            f"phoneme error rate {self.errors / self.phonemes:.1%} ({self.errors} of {self.phonemes})"
        )


def read_task(path: Path) -> list[tuple[str, list[Pronunciation]]]:
    """Lines of `k n i g h t<TAB>pronunciation | pronunciation ...`: the prompts as the model reads them."""
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [(prompt, [p.split() for p in listed.split(" | ")]) for prompt, listed in rows]


def distance(a: Pronunciation, b: Pronunciation) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def score(outputs: list[Pronunciation], references: list[list[Pronunciation]]) -> Score:
    """Each output against the nearest of its references."""
    nearest = [
        min((distance(out, ref), len(ref)) for ref in refs) for out, refs in zip(outputs, references, strict=True)
    ]
    right = sum(errors == 0 for errors, _ in nearest)
    return Score(len(outputs), right, sum(errors for errors, _ in nearest), sum(length for _, length in nearest))


def rounded(weights: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """Every matrix rounded to the nearest of `bits`-bit codes in groups of 32 inputs, as `edgewright export` rounds it."""
    from edgewright.quant.rtn import quantize_rtn

    return {
        name: quantize_rtn(weight, bits, 32).dequantize() if weight.ndim == 2 else weight
        for name, weight in weights.items()
    }


@torch.inference_mode()
def pronounce(model: Qwen3_5ForCausalLM, tokenizer: Tokenizer, prompts: list[str]) -> list[Pronunciation]:
    """Greedy pronunciations of `prompts`, in their order. Prompts of one length go together: a recurrence knows no padding."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(prompts)]
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(ids):
        by_length.setdefault(len(prompt), []).append(row)
    outputs: list[Pronunciation] = [[]] * len(ids)
    for length, rows in by_length.items():
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            inputs = torch.tensor([ids[row] for row in part])
            made = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=LONGEST
            )
            for row, answer in zip(part, made[:, length:].tolist(), strict=True):
                outputs[row] = tokenizer.decode(answer).split()
    return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a word-to-phoneme hybrid on its held-out words.")
    parser.add_argument("directory", type=Path, nargs="?", default=Path(__file__).resolve().parent)
    parser.add_argument("--task", type=Path, help="task file (default: task.tsv of the directory)")
    parser.add_argument("--bits", type=int, choices=[2, 3, 4, 5, 6, 8], help="round the weights first, in groups of 32")
    arguments = parser.parse_args()
    directory = arguments.directory
    task = read_task(arguments.task or directory / "task.tsv")
    torch.set_num_threads(1)  # the matrices are so small that a second thread costs more than it gives
    # The bf16 weights, computed with in fp32.
    model = Qwen3_5ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if arguments.bits:
        model.load_state_dict(rounded(model.state_dict(), arguments.bits))
    outputs = pronounce(model, Tokenizer.from_file(str(directory / "tokenizer.json")), [prompt for prompt, _ in task])
    print(score(outputs, [references for _, references in task]))


if __name__ == "__main__":
    main()
