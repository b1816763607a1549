"""The calibration text through a model once, from layer to layer.

Weights are read from the mapped checkpoint when their module runs and dropped after it: in memory at a time, in float32, is one
matrix, or those of one feed-forward block. The activations of all the text go from layer to layer together. Keys and values of
every layer stay until the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..bundle import Generation, require_tokens
from ..calibration.batches import padded
from ..calibration.prompts import read_task, text_windows
from ..calibration.streamed_weights import StreamedWeights
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.prompt import read_prompt
from ..errors import UserError
from ..models.eugen import gated_mlps
from ..models.language_model import LanguageModel
from ..models.layers.mlp import GatedMLP
from ..runtimes.eager import EagerSession
from ..runtimes.generate import generate_batch

MOST_TOKENS = 1 << 14
"""Tokens of one calibration: enough for a few thousand features, and their activations stay in memory."""

WINDOW = 256
_BATCH = 64  # prompts an encoder-decoder answers at a time

Visit = Callable[[str, GatedMLP, torch.Tensor, torch.Tensor], torch.Tensor]
"""(path, block, its inputs [rows, hidden], the sequence each row is of [rows]) -> the outputs that the next layer reads."""


class _Visited(nn.Module):
    """Stands in a block's place while the text goes through: gives the rows that are no padding to `visit`."""

    def __init__(
        self, path: str, block: GatedMLP, weights: StreamedWeights, forward_pass: BlockForward, visit: Visit
    ) -> None:
        super().__init__()
        self.path, self.forward_pass, self.visit, self.weights = path, forward_pass, visit, weights
        self.block = (block,)  # in a tuple: registered, its parameters would have two names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        real = self.forward_pass.real
        sequence = torch.arange(len(real)).unsqueeze(1).expand_as(real)[real]
        with self.weights.holding(self.block[0]):
            rows = self.visit(self.path, self.block[0], x[real], sequence)
        out = torch.zeros(*x.shape[:2], rows.shape[-1])
        out[real] = rows
        return out


class BlockForward:
    """One pass of prompts through every graph of a model, `visit` called at each block of `paths` as it is reached.

    model: built on the meta device. prompts: token ids, each of at least one token. An encoder-decoder's decoder is fed
    the model's own greedy answers. generation: the kind of loop and where it stops.
    """

    def __init__(
        self,
        model: LanguageModel,
        checkpoint: Checkpoint,
        generation: Generation,
        prompts: Sequence[Sequence[int]],
        paths: Sequence[str],
        visit: Visit,
    ) -> None:
        self._generation, self._prompts = generation, [list(p) for p in prompts]
        self._session = EagerSession(model.graphs())
        self.real = torch.zeros(0, 0, dtype=torch.bool)
        self._weights = StreamedWeights(model, checkpoint)
        self._answers = self._generate() if generation.task == "seq2seq" else []
        blocks = gated_mlps(model)
        for path in paths:
            model.set_submodule(path, _Visited(path, blocks[path], self._weights, self, visit))

    def run(self) -> int:
        """Run it and return the number of tokens. The model is of no use afterwards."""
        decoded, extra, tokens = self._prompts, {}, 0
        pad, seq2seq = self._generation.pad_id, self._generation.task == "seq2seq"
        if seq2seq:
            spec = self._generation
            start = [] if spec.decoder_start is None else [spec.decoder_start, *spec.forced]
            decoded = [start + answer for answer in self._answers]
        state = self._session.new_state(len(decoded), max(len(s) for s in decoded))
        if seq2seq:
            ids, self.real = padded(self._prompts, pad)
            tokens, extra = int(self.real.sum()), {"encoder_mask": self.real.numpy()}
            encoded = self._session.run("encoder", {"input_ids": ids.numpy()} | extra, state)
            self._session.run("cross_kv", {"encoder_hidden": encoded["encoder_hidden"]}, state)
        ids, self.real = padded(decoded, pad)
        first = np.zeros(1, np.int64)
        inputs = {"input_ids": ids.numpy(), "past_length": first, "logit_positions": first}
        self._session.run("decoder", inputs | extra, state)
        return tokens + int(self.real.sum())

    def _generate(self) -> list[list[int]]:
        answers: list[list[int]] = []
        for start in range(0, len(self._prompts), _BATCH):
            batch = self._prompts[start : start + _BATCH]
            answers += generate_batch(self._session, self._generation, batch, self._generation.max_new_tokens)
        return answers


def read_prompts(
    source: Path | Sequence[Sequence[int]], checkpoint: Checkpoint, generation: Generation
) -> list[list[int]]:
    """Token prompts of a text file, a task file (`.tsv`), or as given; at most MOST_TOKENS tokens of them.

    Raises UserError for a file that cannot be read, a model without a tokenizer, or a prompt the model cannot take.
    """
    if isinstance(source, Path):
        tokenizer = checkpoint.tokenizer
        if tokenizer is None:
            raise UserError(f"{checkpoint.source} has no tokenizer, which calibration text needs")
        if source.suffix == ".tsv":
            continues = generation.task != "seq2seq"
            prompts = [read_prompt(tokenizer, p, continues).ids for p in read_task(source).prompts]
        else:
            length = min(WINDOW, max(2, generation.max_context // 2))
            prompts = text_windows(source, tokenizer, length, MOST_TOKENS // length)
    else:
        prompts = [list(p) for p in source]
    kept, total = [], 0
    for prompt in prompts:
        if not 0 < len(prompt) < generation.max_context:
            raise UserError(
                f"a calibration prompt has {len(prompt)} tokens; the model takes 1 to {generation.max_context - 1}"
            )
        require_tokens(prompt, generation.vocab, "a calibration prompt")
        total += len(prompt)
        if total > MOST_TOKENS:
            break
        kept.append(prompt)
    return kept
