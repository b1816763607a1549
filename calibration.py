"""Calibration data through a model once, all of it from layer to layer, weights read when their module runs.

Top-level room: checkpoint, models, prompts and the eager runtime enter. At any moment the weights of one module are in memory, in
float32, with the activations of all the data; so a model larger than memory can be calibrated, whatever its architecture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .bundle import Generation
from .checkpoint import Checkpoint
from .errors import UserError
from .models.layers import Embedding, Linear
from .prompts import read_task, text_windows
from .quant.gptq import BLOCK_WEIGHTS
from .runtimes.eager import EagerSession
from .runtimes.session import Array, StateBuffers

MOST_TOKENS = 1 << 15
"""Tokens of one calibration, unless memory asks for fewer: four times 8,192 lower held-out error by 13 to 18 % (SmolLM2)."""

WINDOW = 512
"""Tokens of a window of text, unless the model takes fewer in one call."""

FEWEST_TOKENS = 512
CHUNK_WEIGHTS = 16 << 20
"""Weights that GPTQ works on at a time."""

SMALL = 1 << 16
"""Weights of a parameter that may stay in memory."""

ATTENTION_BYTES = 48 << 10
"""Of a token: scores of a dozen heads over a window, a few times."""

PROCESS_BYTES = 700 << 20
"""Anonymous memory of the process before any of the work (measured, rounded up)."""

Call = tuple[str, dict[str, torch.Tensor]]
"""A graph and its inputs by name."""

Provide = Callable[[str, nn.Module, torch.Tensor], torch.Tensor]
"""(stored name, the module that asks, the checkpoint's tensor) -> the value to compute with."""


@dataclass(frozen=True)
class Sample:
    """One piece of calibration data as token ids.

    tokens: what the model reads. decoded: what the decoder of an encoder-decoder is fed, its start token first. context: of
    a model that reads one.
    """

    tokens: tuple[int, ...]
    decoded: tuple[int, ...] = ()
    context: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return len(self.tokens) + len(self.decoded) + len(self.context)


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 (hex) of the samples: the same samples give the same codes."""
    text = json.dumps([[s.tokens, s.decoded, s.context] for s in samples], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest_calls(calls: Sequence[Call]) -> str:
    """`digest` of a module's example inputs."""
    found = hashlib.sha256()
    for graph, inputs in calls:
        for name, value in sorted(inputs.items()):
            found.update(f"{graph}\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
            found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def walk_bytes(model: Any) -> tuple[int, int]:
    """Anonymous memory that GPTQ takes, (fixed, for each token of calibration data), estimated.

    Counted: what Python and torch take, the Hessian of the widest linear's inputs and its factor, a chunk of weights; the
    activations of a layer, attention over a window, and the keys and values of all layers.
    """
    graphs = model.graphs()
    vocab = {int(p.shape[-1]) for g in graphs for p in g.outputs if p.name == "logits"}
    linears = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, Linear)]
    widest = max((k for _, k in linears), default=0)
    broadest = max((max(n, k) for n, k in linears if n not in vocab), default=0)
    states = sum(
        prod(d for d in s.shape if isinstance(d, int)) * s.dtype.itemsize
        for g in graphs
        for s in {s.name: s for s in g.states}.values()
        if any(isinstance(d, str) and d != "batch" for d in s.shape)
    )
    # a chunk of weights in fp32; what GPTQ keeps for each block of rows
    fixed = PROCESS_BYTES + 12 * widest**2 + 4 * CHUNK_WEIGHTS + 32 * BLOCK_WEIGHTS * torch.get_num_threads()
    return fixed, states + 4 * (6 * broadest + 8 * widest) + ATTENTION_BYTES


def tokens_within(model: Any, limit: int) -> int:
    """How many tokens GPTQ can calibrate on within `limit` bytes, at most MOST_TOKENS. Raises UserError for too few."""
    fixed, each = walk_bytes(model)
    tokens = (limit - fixed) // each
    if tokens < FEWEST_TOKENS:
        need = (fixed + FEWEST_TOKENS * each) / 2**30
        raise UserError(
            f"--memory-limit {limit / 2**30:.2f} GiB is too little for GPTQ of this model, which takes {need:.2f} GiB; "
            "give more, or --quantizer rtn"
        )
    return min(MOST_TOKENS, tokens)


def read_samples(
    path: Path, checkpoint: Checkpoint, spec: Generation, longest: int, most_tokens: int = MOST_TOKENS
) -> list[Sample]:
    """Samples of a text file, or of a task file (`.tsv`): prompts with their first answers. About `most_tokens` tokens in all.

    longest: tokens the model's decoder takes in one call. Of a text, an encoder-decoder reads the first half of each window
    and its decoder is fed the second; a model with a context reads half as that. Raises UserError for a file that cannot be
    read or has too little in it, a model without a tokenizer, or tokens that the model does not have.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise UserError(f"{checkpoint.source} has no tokenizer, which calibration data need")
    start = () if spec.decoder_start is None else (spec.decoder_start,)
    made: list[Sample] = []
    if path.suffix == ".tsv":
        task = read_task(path, None, spec.task == "memory")
        for i, prompt in enumerate(task.prompts):
            tokens, answer = tokenizer.encode(prompt), tokenizer.encode(task.answers[i][0], special=False)
            context = tuple(tokenizer.encode(task.contexts[i], special=False)) if task.contexts else ()
            if spec.task == "seq2seq":
                made.append(Sample(tuple(tokens)[: spec.max_context - 1], (*start, *answer)[:longest]))
            else:
                made.append(Sample((*tokens, *answer)[:longest], (), context))
    else:
        halves = spec.task in ("seq2seq", "memory")
        length = max(4, min(WINDOW, longest, spec.max_context // 2) * (2 if halves else 1))
        for window in text_windows(path, tokenizer, length, max(1, most_tokens // length)):
            if halves and len(window) >= 4:
                first, second = tuple(window[: len(window) // 2]), tuple(window[len(window) // 2 :])
                seq2seq = spec.task == "seq2seq"
                made.append(Sample(first, (*start, *second)[:longest]) if seq2seq else Sample(second, (), first))
            elif not halves:
                made.append(Sample(tuple(window)))
    kept: list[Sample] = []
    total = 0
    for sample in made:
        total += sample.size
        if total > most_tokens and kept:
            break
        worst = max((*sample.tokens, *sample.decoded))
        if worst >= spec.vocab or (spec.context is not None and max(sample.context, default=0) >= spec.context.vocab):
            raise UserError(f"{path}: its tokens are not the model's {spec.vocab}; is the tokenizer of another model?")
        kept.append(sample)
    if not kept:
        raise UserError(f"{path}: too little text to calibrate on; give a longer one")
    return kept


class WeightsOnDemand:
    """Hooks on a model built on the meta device: a module's parameters are there, in float32, while it runs.

    provide: what to compute with in place of the checkpoint's values, such as those of a weight's codes and scales.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, provide: Provide | None = None) -> None:
        self._checkpoint, self._provide = checkpoint, provide
        self._held: set[nn.Module] = set()
        self._names: dict[nn.Module, dict[str, str]] = {}
        for path, module in model.named_modules():
            own = {leaf: p for leaf, p in module.named_parameters(recurse=False) if p.is_meta}
            names = {leaf: model.tied.get(f"{path}.{leaf}", f"{path}.{leaf}") for leaf in own}
            # A small one that is no linear's is there all the time: whatever module holds it, others may read it.
            small = [n for n, p in own.items() if p.numel() <= SMALL and not isinstance(module, Linear)]
            for leaf in small:
                self._set(module, leaf, names.pop(leaf))
            if names:
                self._names[module] = names
                module.register_forward_pre_hook(lambda m, _: self._read(m))
                module.register_forward_hook(lambda m, _, __: self._drop(m))

    def stored(self, module: nn.Module) -> str:
        """The checkpoint's name of a module's weight."""
        return self._names[module]["weight"]

    def _read(self, module: nn.Module) -> None:
        for leaf, name in self._names[module].items():
            if getattr(module, leaf).is_meta:
                self._set(module, leaf, name)

    def _set(self, module: nn.Module, leaf: str, name: str) -> None:
        self._checkpoint.expect(name, tuple(getattr(module, leaf).shape))
        value = self._checkpoint.tensor(name)
        if self._provide is not None:
            value = self._provide(name, module, value)
        # Only the rows looked up are converted: an embedding may be the largest tensor there is.
        value = value if isinstance(module, Embedding) and leaf == "weight" else value.to(torch.float32)
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))

    def _drop(self, module: nn.Module) -> None:
        if module in self._held:
            return
        for leaf in self._names[module]:
            value = getattr(module, leaf)
            module.register_parameter(leaf, nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False))

    @contextmanager
    def holding(self, block: nn.Module) -> Iterator[None]:
        """Keep the parameters of `block` and what is in it until the end of the context."""
        inside = [module for module in block.modules() if module in self._names]
        self._held |= set(inside)
        try:
            for module in inside:
                self._read(module)
            yield
        finally:
            self._held -= set(inside)
            for module in inside:
                self._drop(module)


class _Reached(Exception):
    """The head has its input: nothing after it is wanted."""


Visit = Callable[[str, Linear, torch.Tensor], None]
"""(stored name of the weight, module, its input) -> nothing; called before the module runs, and before its weight is read."""


class Walk:
    """One pass of calibration data through every graph of a model.

    model: built on the meta device. samples: as `read_samples` gives; or, of a model without a generate loop, calls: graphs
    and inputs. provide: see `WeightsOnDemand`. visit: called at every linear the first time that it is reached.
    session: what runs `model`, where not the plain eager runtime.
    """

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        spec: Generation,
        samples: Sequence[Sample],
        calls: Sequence[Call] = (),
        provide: Provide | None = None,
        visit: Visit | None = None,
        session: EagerSession | None = None,
    ) -> None:
        self.spec, self._samples, self._calls = spec, list(samples), merged(model, calls)
        self._graphs = {g.name: g for g in model.graphs()}
        self._session = session or EagerSession(list(self._graphs.values()))
        self._real = torch.zeros(0, 0, dtype=torch.bool)
        self._visit, self._seen = visit, set[str]()
        self._stop: nn.Module | None = None
        self._linears = [m for m in model.modules() if isinstance(m, Linear)]
        if visit is not None:
            for module in self._linears:
                module.register_forward_pre_hook(self._reach)
        self.weights = WeightsOnDemand(model, checkpoint, provide)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The rows [T, K] of a linear's input [..., K] that are no padding."""
        if x.shape[:-1] == self._real.shape:
            return x[self._real]
        return x.reshape(-1, x.shape[-1])

    def to_head(self) -> None:
        """Visit all linears, the head with every token; what follows the head is not computed."""
        widths = {int(p.shape[-1]) for g in self._graphs.values() for p in g.outputs if p.name == "logits"}
        heads = [m for m in self._linears if int(m.weight.shape[0]) in widths]
        self._stop = heads[-1] if heads and self._visit is not None else None
        try:
            self._run(None)
        except _Reached:
            pass
        finally:
            self._stop = None

    def logits(self, most: int) -> tuple[Array, Array]:
        """Float32 logits [B, P, V] at P evenly spread positions, and where they follow a sample's tokens, bool [B, P].

        B * P is about `most`; padding and the rows of a memory are no sample's tokens.
        """
        return self._run(most)

    def _reach(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, Linear)
        assert self._visit is not None
        name = self.weights.stored(module)
        if name not in self._seen:
            self._seen.add(name)
            self._visit(name, module, args[0])
        if module is self._stop:
            raise _Reached

    def _run(self, most: int | None) -> tuple[Array, Array]:
        for graph, inputs in self._calls:
            mask = inputs.get("encoder_mask")
            self._real = mask if mask is not None else torch.zeros(0, 0, dtype=torch.bool)
            self._session.run(graph, {name: value.numpy() for name, value in inputs.items()}, {})
        if not self._samples:
            return np.zeros((0, 0, 0), np.float32), np.zeros((0, 0), bool)
        if self.spec.task == "seq2seq":
            return self._seq2seq(most)
        ids, real = padded([s.tokens for s in self._samples], self.spec.pad_id)
        extra: dict[str, Array] = {}
        counted = real
        if self.spec.context is not None:
            memory = self._memory()
            rows, prefix = memory.shape[1], len(self.spec.context.prefix)
            early = self.spec.context.splice == "released"
            lead = prefix - early
            front = [*self.spec.context.prefix[:lead], *[0] * (rows + early)]
            slots = [*[-1] * lead, *range(rows), *[-1] * early, *[-1] * ids.shape[1]]
            whole = torch.tensor(front).expand(len(ids), -1)
            ids = torch.cat([whole, ids], 1)
            counted = torch.cat([torch.zeros_like(whole, dtype=torch.bool), real], 1)  # what predicts a sample's tokens
            real = torch.cat([torch.ones_like(whole, dtype=torch.bool), real], 1)
            extra = {"memory": memory, "slots": np.array(slots, np.int64)}
        self._real = real
        return self._decode(ids, self._session.new_state(*ids.shape), most, extra, counted)

    def _seq2seq(self, most: int | None) -> tuple[Array, Array]:
        ids, self._real = padded([s.tokens for s in self._samples], self.spec.pad_id)
        encoder = self._real.numpy()
        decoded, real = padded([s.decoded for s in self._samples], self.spec.pad_id)
        state = self._session.new_state(*decoded.shape)
        encoded = self._session.run("encoder", {"input_ids": ids.numpy(), "encoder_mask": encoder}, state)
        self._session.run("cross_kv", {"encoder_hidden": encoded["encoder_hidden"]}, state)
        self._real = real
        return self._decode(decoded, state, most, {"encoder_mask": encoder}, real)

    def _decode(
        self,
        ids: torch.Tensor,
        state: StateBuffers,
        most: int | None,
        extra: Mapping[str, Array],
        counted: torch.Tensor,
    ) -> tuple[Array, Array]:
        length = ids.shape[1]
        if most is None:
            positions = np.arange(length) if self._stop is not None else np.zeros(1, np.int64)
        else:
            positions = np.unique(np.linspace(0, length - 1, max(1, min(length, most // len(ids)))).astype(np.int64))
        inputs = {"input_ids": ids.numpy(), "past_length": np.zeros(1, np.int64), "logit_positions": positions}
        real = counted[:, torch.from_numpy(positions)].numpy()
        logits = self._session.run("decoder", {**inputs, **extra}, state)["logits"]
        return logits, real

    def _memory(self) -> Array:
        """The memories [B, rows, hidden] of the samples' contexts, all cut to one length: rows side by side need one."""
        context = self.spec.context
        assert context is not None
        lengths = sorted(len(s.context) for s in self._samples)
        length = min(lengths[len(lengths) // 4], context.window)
        # the few that are shorter are read over again from their start
        ids = torch.tensor([(s.context * -(-length // len(s.context)))[:length] for s in self._samples])
        self._real = torch.ones_like(ids, dtype=torch.bool)
        if not context.tokens:
            return self._session.run("context", {"input_ids": ids.numpy()}, {})["memory"]
        whole = torch.cat([ids, torch.tensor(context.tokens).expand(len(ids), -1)], 1)
        self._real = torch.ones_like(whole, dtype=torch.bool)
        inputs = {
            "input_ids": whole.numpy(),
            "past_length": np.zeros(1, np.int64),
            "logit_positions": np.arange(length, whole.shape[1]),
        }
        return self._session.run("context", inputs, self._session.new_state(whole.shape[0], whole.shape[1], "context"))[
            "memory"
        ]


def merged(model: Any, calls: Sequence[Call]) -> list[Call]:
    """One call a graph: those of the most common shapes side by side in a batch, or the first where there is no batch."""
    ports = {g.name: {p.name: p for p in g.inputs} for g in model.graphs()}
    groups: dict[str, dict[tuple[Any, ...], list[dict[str, torch.Tensor]]]] = {}
    for graph, inputs in calls:
        key = tuple((name, tuple(v.shape), v.dtype) for name, v in sorted(inputs.items()))
        groups.setdefault(graph, {}).setdefault(key, []).append(inputs)
    found: list[Call] = []
    for graph, by_shape in groups.items():
        largest = max(by_shape.values(), key=len)
        batched = all(p.shape and p.shape[0] == "batch" for p in ports[graph].values())
        rows = largest if batched else largest[:1]
        found.append((graph, {name: torch.cat([r[name] for r in rows]) for name in rows[0]} if batched else rows[0]))
    return found


def padded(sequences: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64 [B, S] padded on the right, and where they are real, bool [B, S]."""
    longest = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), longest), pad)
    real = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        real[row, : len(sequence)] = True
    return ids, real
