"""Scores a checkpoint of this example on its task file: `python score.py [DIRECTORY]` (default: this directory).

Prints the exact answers of greedy decoding, in all and by kind of question, and what the memory is worth: the same
questions asked of another package's memory. Holds the model too: `train` enters it from here.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2Model

LONGEST = 24  # tokens of an answer: the limit of generation
BATCH = 100
# What a question of each kind begins with: the task file holds the words alone.
KINDS = {
    "What is its name": "name",
    "Which version": "version",
    "Which section": "section",
    "Which architecture": "architecture",
    "Who maintains": "maintainer",
    "Where is": "host",
    "Which role": "role",
    "What does it need first": "first",
    "Does it need": "needs",
}


class Pair(NamedTuple):
    context: str
    question: str
    answers: list[str]


def decoder(keys: dict[str, Any]) -> Qwen2Model:
    """A Qwen2 stack of the config's keys, without a head."""
    rope = {"rope_type": "default", "rope_theta": keys["rope_theta"]}
    # Spelled-out attention: on a CPU its backward pass takes a third of the time of the fused one at these lengths.
    config = Qwen2Config(**{**keys, "model_type": "qwen2"}, rope_parameters=rope, attn_implementation="eager")
    return Qwen2Model(config)


class Dolphin(nn.Module):
    """A decoder that reads a context and hands its memory to a decoder that answers (arXiv 2408.15518).

    `config`: config.json. The modules have the names of the checkpoint's tensors; the head is tied to the embedding.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        encoder = config["encoder_config"]
        self.memory_ids = config["memory_token_ids"]
        self.eos = config["eos_token_id"]
        self.pad = config["pad_token_id"]
        self.model = decoder({k: v for k, v in config.items() if k != "encoder_config"})
        self.model.context_encoder = nn.ModuleDict(
            {
                "encoder": nn.ModuleDict({"model": decoder(encoder)}),
                "projector": nn.ModuleDict(
                    {"context_projection": nn.Linear(encoder["hidden_size"], config["hidden_size"])}
                ),
            }
        )

    def remember(self, contexts: list[list[int]]) -> Tensor:
        """The memory [batch, M, hidden] of contexts: the projected last hidden states at the M memory tokens."""
        rows = [context + self.memory_ids for context in contexts]
        longest = max(map(len, rows))
        # Padding stands at the end, where the causal mask hides it from the memory tokens.
        ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])
        part = self.model.context_encoder
        hidden = part["encoder"]["model"](input_ids=ids, use_cache=False).last_hidden_state
        width = len(self.memory_ids)
        places = torch.tensor([[len(context) + i for i in range(width)] for context in contexts])
        memory = torch.gather(hidden, 1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        return part["projector"]["context_projection"](memory)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.model.embed_tokens.weight.T

    @torch.inference_mode()
    def answer(self, memory: Tensor, questions: list[list[int]]) -> list[list[int]]:
        """Greedy answers [batch] to questions of one length: memory at positions 0..M-1, then the question. No eos in them."""
        inputs = torch.cat([memory, self.model.embed_tokens(torch.tensor(questions))], 1)
        cache = DynamicCache()
        rows: list[Tensor] = []
        for _ in range(LONGEST):
            hidden = self.model(inputs_embeds=inputs, past_key_values=cache, use_cache=True).last_hidden_state
            rows.append(self.head(hidden[:, -1]).argmax(-1))
            if (torch.stack(rows) == self.eos).any(0).all():
                break
            inputs = self.model.embed_tokens(rows[-1])[:, None]
        outputs = torch.stack(rows, 1).tolist()
        return [row[: row.index(self.eos)] if self.eos in row else row for row in outputs]


def rounded(weights: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Every matrix rounded to the nearest of `bits`-bit codes in groups of 32 inputs, as `edgewright export` rounds it."""
    from edgewright.quant.rtn import quantize_rtn

    return {
        name: quantize_rtn(weight, bits, 32).dequantize() if weight.ndim == 2 else weight
        for name, weight in weights.items()
    }


def load(directory: Path, bits: int | None = None) -> Dolphin:
    """The checkpoint's bf16 weights, rounded further if `bits` are given, to be computed with in fp32."""
    model = Dolphin(json.loads((directory / "config.json").read_text()))
    weights = load_file(directory / "model.safetensors")
    model.load_state_dict({n: w.float() for n, w in (rounded(weights, bits) if bits else weights).items()})
    return model.eval()


def read_task(path: Path) -> list[Pair]:
    """Lines of `context<TAB>question<TAB>answer | answer ...`."""
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [Pair(context, question, answers.split(" | ")) for context, question, answers in rows]


def kind(question: str) -> str:
    return next(name for start, name in KINDS.items() if question.startswith(start))


@torch.inference_mode()
def memories(model: Dolphin, tokenizer: Tokenizer, contexts: list[str]) -> Tensor:
    """The memory [contexts, M, hidden] of each context."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(contexts)]
    return torch.cat([model.remember(ids[start : start + BATCH]) for start in range(0, len(ids), BATCH)])


def answers(model: Dolphin, tokenizer: Tokenizer, memory: Tensor, questions: list[str]) -> list[str]:
    """The model's answer to each question from the memory [questions, M, hidden] in its row."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(questions)]
    by_length: dict[int, list[int]] = {}  # rows of one length need no padding
    for row, question in enumerate(ids):
        by_length.setdefault(len(question), []).append(row)
    texts = [""] * len(ids)
    for rows in by_length.values():
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            outputs = model.answer(memory[part], [ids[row] for row in part])
            for row, output in zip(part, outputs, strict=True):
                texts[row] = tokenizer.decode(output)
    return texts


def right(outputs: list[str], pairs: list[Pair]) -> list[bool]:
    return [output.strip() in pair.answers for output, pair in zip(outputs, pairs, strict=True)]


def report(hits: list[bool], pairs: list[Pair]) -> str:
    """`exact answers: 700 of 900 (77.8%)` and a line with each kind of question."""
    total = Counter(kind(pair.question) for pair in pairs)
    found = Counter(kind(pair.question) for pair, hit in zip(pairs, hits, strict=True) if hit)
    kinds = ", ".join(f"{name} {found[name]}/{total[name]}" for name in sorted(total))
    return f"exact answers: {sum(hits)} of {len(hits)} ({sum(hits) / len(hits):.1%})\n  {kinds}"


def score(model: Dolphin, tokenizer: Tokenizer, pairs: list[Pair]) -> tuple[list[bool], list[bool]]:
    """Which answers are exact: (from the question's own context, from the context of the pair before it)."""
    memory = memories(model, tokenizer, [pair.context for pair in pairs])
    questions = [pair.question for pair in pairs]
    own = answers(model, tokenizer, memory, questions)
    other = answers(model, tokenizer, memory.roll(1, 0), questions)
    return right(own, pairs), right(other, pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a small Dolphin on questions about Debian packages.")
    parser.add_argument("directory", type=Path, nargs="?", default=Path(__file__).resolve().parent)
    parser.add_argument("--task", type=Path, help="task file (default: task.tsv of the directory)")
    parser.add_argument("--bits", type=int, choices=[2, 3, 4, 5, 6, 8], help="round the weights first, in groups of 32")
    arguments = parser.parse_args()
    directory = arguments.directory
    torch.set_num_threads(1)  # the matrices are so small that a second thread costs more than it gives
    pairs = read_task(arguments.task or directory / "task.tsv")
    own, other = score(load(directory, arguments.bits), Tokenizer.from_file(str(directory / "tokenizer.json")), pairs)
    print(report(own, pairs))
    print("from the context of another package,", report(other, pairs))


if __name__ == "__main__":
    main()
