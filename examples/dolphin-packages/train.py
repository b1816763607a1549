"""Trains the Dolphin of this directory on Debian's package records.

`python train.py --packages Packages.xz --translations Translation-en.xz --minutes 32 -o DIRECTORY`; `main`, at the end, is
the job read from top to bottom. Needs transformers: `pip install edgewright[train]`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from records import Example, Record, needed_names, one_question_each, read_records, split, write_example
from safetensors.torch import save_file
from score import LONGEST, Dolphin, Pair, kind, read_task, report, score
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

MEMORY = 16  # tokens that a context becomes
VOCABULARY = 2048
WINDOW = 256  # tokens of the longest context
HELDOUT = 900
PAD, EOS, UNK = 0, 1, 2
SPECIAL = ["<pad>", "<eos>", "<unk>", *(f"<memory_{i}>" for i in range(MEMORY))]


class Batch(NamedTuple):
    contexts: list[list[int]]
    ids: Tensor  # [batch, length]: every question with its answer, one after the other
    labels: Tensor  # [batch, length]: the token that follows within an answer, -100 elsewhere
    segments: Tensor  # [batch, length]: the number of the question, from 1; padding is -1
    positions: Tensor  # [batch, length]: every question begins after the memory


# ---------------------------------------------------------------------------------------------------------------- data


def build_tokenizer(texts: list[str]) -> Tokenizer:
    """BPE over words that carry their leading space, digits and punctuation apart, so that names copy symbol by symbol."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    special = [AddedToken(symbol, special=True, normalized=False) for symbol in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=[chr(code) for code in range(33, 127)],
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(example: Example, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """Ids of the context, and of each question and its answer; the answer ends with <eos>, the question with nothing."""
    texts = [example.context, *(text for q in example.questions for text in (q.text, q.answer))]
    context, *rest = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    return context, [(rest[i], [*rest[i + 1], EOS]) for i in range(0, len(rest), 2)]


def batches(records: list[Record], tokenizer: Tokenizer, size: int, seed: int) -> Iterator[Batch]:
    """Endless batches of `size` packages, worded anew every epoch, contexts of like length together.

    Half of the contexts leave the long description out: they cost less and teach the same.
    """
    rng = random.Random(seed)
    others = needed_names(records)
    order = list(records)
    while True:
        rng.shuffle(order)
        texts = [record if rng.random() < 0.5 else record._replace(description="") for record in order]
        for start in range(0, len(texts), 20 * size):
            pool = [
                encode(write_example(record, others, rng), tokenizer) for record in texts[start : start + 20 * size]
            ]
            pool = [row for row in pool if len(row[0]) <= WINDOW and all(len(a) <= LONGEST for _, a in row[1])]
            pool.sort(key=lambda row: len(row[0]))
            groups = [pool[i : i + size] for i in range(0, len(pool), size)]
            rng.shuffle(groups)
            yield from map(collate, groups)


def collate(rows: list[tuple[list[int], list[tuple[list[int], list[int]]]]]) -> Batch:
    """Packs the questions of each context into one row: they share its memory and do not see one another."""
    columns: list[tuple[list[int], list[int], list[int], list[int]]] = []
    for _, questions in rows:
        ids: list[int] = []
        labels: list[int] = []
        segments: list[int] = []
        positions: list[int] = []
        for number, (question, answer) in enumerate(questions, 1):
            length = len(question) + len(answer) - 1  # <eos> is predicted, never read
            ids += question + answer[:-1]
            labels += [-100] * (len(question) - 1) + answer
            segments += [number] * length
            positions += range(MEMORY, MEMORY + length)
        columns.append((ids, labels, segments, positions))
    longest = max(len(ids) for ids, *_ in columns)
    fillers = (PAD, -100, -1, 0)
    padded = [
        torch.tensor([row[i] + [filler] * (longest - len(row[i])) for row in columns])
        for i, filler in enumerate(fillers)
    ]
    return Batch([context for context, _ in rows], *padded)


# --------------------------------------------------------------------------------------------------------------- model


def build_config() -> dict[str, Any]:
    """config.json: four layers read the context, three answer."""

    def stack(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, Any]:
        return {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": intermediate,
            "vocab_size": VOCABULARY,
            "hidden_act": "silu",
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 512,  # rotary: a bound for buffers, no parameter
        }

    return {
        "model_type": "dolphin",
        "architectures": ["DolphinForCausalLM"],
        "dtype": "bfloat16",
        **stack(192, 3, 6, 2, 512),
        "tie_word_embeddings": True,
        "encoder_config": {**stack(192, 4, 6, 2, 512), "tie_word_embeddings": False},
        "num_memory_tokens": MEMORY,
        "memory_token_ids": [SPECIAL.index(f"<memory_{i}>") for i in range(MEMORY)],
        "projector": "linear",
        "splice": "exact",
        "prompt_prefix": [],
        "context_window": WINDOW,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def build_model(config: dict[str, Any]) -> Dolphin:
    """A fresh model set up to copy: both decoders share one embedding, and the projector begins as a scaled identity.

    A token that the memory carries then means the same to both from the first step; two tables of their own would have to
    learn that token by token.
    """
    model = Dolphin(config)
    part = model.model.context_encoder
    part["encoder"]["model"].embed_tokens.weight = model.model.embed_tokens.weight
    projection = part["projector"]["context_projection"]
    with torch.no_grad():
        projection.weight.copy_(0.1 * torch.eye(len(projection.weight)))
        projection.bias.zero_()
    return model


def build_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers; AdamW for embeddings, which are tables and no maps, the projector, biases, norms."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=0.01, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


# ------------------------------------------------------------------------------------------------------------ training


def loss_of(model: Dolphin, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answers' tokens: what `Dolphin.answer` computes, for all questions of a context at once."""
    memory = model.remember(batch.contexts)
    inputs = torch.cat([memory, model.model.embed_tokens(batch.ids).to(memory.dtype)], 1)
    count = len(batch.ids)
    segments = torch.cat([torch.zeros(count, MEMORY, dtype=torch.long), batch.segments], 1)
    positions = torch.cat([torch.arange(MEMORY).expand(count, -1), batch.positions], 1)
    same = segments[:, :, None] == segments[:, None, :]
    seen = (same | (segments == 0)[:, None, :]).tril()  # [batch, query, key]: the memory and one's own question
    mask = torch.zeros(seen.shape, dtype=inputs.dtype).masked_fill(~seen, torch.finfo(inputs.dtype).min)
    hidden = model.model(
        inputs_embeds=inputs, attention_mask=mask[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state[:, MEMORY:]
    told = batch.labels >= 0
    return torch.nn.functional.cross_entropy(model.head(hidden[told]).float(), batch.labels[told])


def progress_of(step: int, steps: int | None, started: float, minutes: float | None) -> float:
    """The part of the run that is over, 0 to 1: of the steps or of the time, whichever is further on."""
    by_step = step / steps if steps else 0.0
    by_time = (time.monotonic() - started) / (60 * minutes) if minutes else 0.0
    return max(by_step, by_time)


def learning_rate(progress: float) -> float:
    """Factor on the peak rates: 1 for the first 30 % of the run, then linear to 0."""
    return min(1.0, max(0.0, (1.0 - progress) / 0.7))


def train(model: Dolphin, stream: Iterator[Batch], steps: int | None, minutes: float | None) -> int:
    """Trains in place, bf16 autocast on fp32 weights, until the steps or minutes are over. Returns the steps done."""
    optimizers = build_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    model.train()
    started, step, recent = time.monotonic(), 0, 0.0
    while (progress := progress_of(step, steps, started, minutes)) < 1.0:
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate(progress)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        recent = loss.item() if step == 1 else 0.95 * recent + 0.05 * loss.item()
        if step % 20 == 0:
            elapsed = time.monotonic() - started
            print(f"step {step}  loss {recent:.3f}  {elapsed:.0f} s  {progress:.0%}", file=sys.stderr)
    return step


# -------------------------------------------------------------------------------------------------------------- saving


def majority(records: list[Record], pairs: list[Pair], seed: int) -> int:
    """Pairs that the usual answer to their kind of question in training gets right: what a question alone is worth."""
    rng = random.Random(seed)
    others = needed_names(records)
    usual: dict[str, Counter[str]] = {}
    for record in records:
        for question in write_example(record, others, rng).questions:
            usual.setdefault(question.kind, Counter())[question.answer] += 1
    return sum(usual[kind(pair.question)].most_common(1)[0][0] in pair.answers for pair in pairs)


def save(model: Dolphin, config: dict[str, Any], tokenizer: Tokenizer, directory: Path) -> None:
    """config.json, bf16 safetensors (the shared embedding under both its names), the tokenizer. Ends in bf16."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.clone() for name, tensor in model.to(torch.bfloat16).state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_task(heldout: list[Record], others: list[str], tokenizer: Tokenizer, seed: int, path: Path) -> None:
    """One question for each held-out package whose context fits: the context, a tab, the question, a tab, the answer."""
    pairs = one_question_each(heldout, others, seed)
    fitting = [pair for pair in pairs if len(tokenizer.encode(pair[0])) <= WINDOW]
    lines = (f"{context}\t{question.text}\t{question.answer}" for context, question in fitting)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Dolphin that answers questions about Debian packages.")
    parser.add_argument("--packages", type=Path, required=True, help="Packages.xz of a Debian release")
    parser.add_argument("--translations", type=Path, required=True, help="Translation-en.xz of the same release")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory of the new checkpoint")
    parser.add_argument("--minutes", type=float, help="stop after this time (32 unless --steps is given)")
    parser.add_argument("--steps", type=int, help="stop after this many steps; with a seed, repeatable on one machine")
    parser.add_argument("--batch", type=int, default=12, help="packages a step (default 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order (default 0)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    arguments = parser.parse_args()
    minutes = arguments.minutes if arguments.minutes or arguments.steps else 32.0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    training, heldout = split(read_records(arguments.packages, arguments.translations), arguments.seed, HELDOUT)
    others = needed_names(training)
    print(f"{len(training)} packages; {len(heldout)} held out", file=sys.stderr)
    rng = random.Random(arguments.seed)
    tokenizer = build_tokenizer([write_example(record, others, rng).context for record in training[::3]])

    config = build_config()
    model = build_model(config)
    stream = batches(training, tokenizer, arguments.batch, arguments.seed)
    steps = train(model, stream, arguments.steps, minutes)
    save(model, config, tokenizer, arguments.output)
    write_task(heldout, others, tokenizer, arguments.seed, arguments.output / "task.tsv")

    # Scored as it was saved: the weights rounded to bf16, the arithmetic in fp32.
    model.float().eval()
    pairs = read_task(arguments.output / "task.tsv")
    own, other = score(model, tokenizer, pairs)
    print(f"{steps} steps: {report(own, pairs)}")
    print("from the context of another package,", report(other, pairs))
    usual = majority(training, pairs, arguments.seed)
    print(f"the usual answer to each kind of question: {usual} of {len(pairs)} ({usual / len(pairs):.1%})")


if __name__ == "__main__":
    main()
