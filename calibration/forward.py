"""Calibration data through a model once, all of it layer by layer.

In memory at any moment are the weights of one module, in float32, and what all the data have at that module. So a model larger
than memory can be calibrated, whatever its architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..models.language_model import LanguageModel
from ..models.layers.linear import Linear
from ..runtimes.eager import EagerSession
from ..runtimes.encoder_inputs import encoder_batch
from ..runtimes.session import Array, StateBuffers
from ..system.memory import freed_at_once
from ..system.round_robin import RoundRobin
from .batches import merged, padded
from .samples import Sample
from .source import Source
from .spilled_caches import DiskCacheSession, scratch
from .streamed_weights import StreamedWeights, WeightTransform

MOST_THREADS = 8
"""Threads that a part computes with. Each part has its own, and only one part computes at a time."""

CHUNK_WEIGHTS = 16 << 20
"""Weights that GPTQ works on at a time."""


class _HeadReached(Exception):
    """The head has its input: nothing after it is needed."""


Visit = Callable[[str, Linear, list[torch.Tensor]], None]
"""(stored name of the weight, module, its inputs, a tensor a part) -> nothing. Called when all parts have come to the module,
before it runs and before its weight is read."""

_NOTHING = np.zeros((0, 0, 0), np.float32), np.zeros((0, 0), bool)


@dataclass
class _Part:
    """Some of the samples, by their places, which go through the model together. real: what is no padding now, [B, S]."""

    places: list[int]
    real: torch.Tensor


class CalibrationForward:
    """One pass of a source's data through every graph of `model`.

    The data go in parts of `source.part_tokens`, side by side. At each linear they wait for each other: it is visited with all
    the data and its weight is read once, while other operations take memory for one part alone.

    model: built on the meta device, of no use afterwards. transform: see `StreamedWeights`. visit: called at every linear the
    first time that it is reached. session: what runs `model`; without one the eager runtime, which keeps caches in files of
    `folder`, or of the system's folder for them.
    """

    def __init__(
        self,
        model: LanguageModel,
        source: Source,
        transform: WeightTransform | None = None,
        visit: Visit | None = None,
        session: EagerSession | None = None,
        folder: Path | None = None,
    ) -> None:
        self._generation, self._samples = source.generation, list(source.samples)
        self._calls = merged(model, source.calls)
        self._graphs = {g.name: g for g in model.graphs()}
        graphs = list(self._graphs.values())
        self._session = session or DiskCacheSession(graphs, folder or scratch())
        unknown = torch.zeros(0, 0, dtype=torch.bool)
        self._parts = [_Part(places, unknown) for places in source.parts()] or [_Part([], unknown)]
        self._turns: RoundRobin[tuple[Array, Array]] = RoundRobin([])
        self._visit, self._visited = visit, set[str]()
        self._arrived: list[torch.Tensor] = []
        self._stop: nn.Module | None = None
        self._linears = [m for m in model.modules() if isinstance(m, Linear)]
        meeting = self._linears if visit is not None or len(self._parts) > 1 else []
        for module in meeting:
            module.register_forward_pre_hook(self._reach)  # before the hook that reads the weight
        self.weights = StreamedWeights(model, source.checkpoint, transform)
        for module in meeting:
            module.register_forward_hook(self._leave)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The rows [T, K] that are no padding, of an input [..., K] of the part that computes now."""
        return _real_rows(x, self._parts[self._turns.current])

    def all_rows(self, inputs: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """`rows` of every part's input, as a visit gets them."""
        for x, part in zip(inputs, self._parts, strict=True):
            yield _real_rows(x, part)

    def sequences(self, inputs: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every part's input that is of sequences, [B, S, K], with where it is no padding, bool [B, S]."""
        for x, part in zip(inputs, self._parts, strict=True):
            if x.ndim == 3:
                yield x, part.real if x.shape[:-1] == part.real.shape else torch.ones(x.shape[:-1], dtype=torch.bool)

    def to_head(self) -> None:
        """Visit all linears, the head with every token. What follows the head is not computed."""
        widths = {int(p.shape[-1]) for g in self._graphs.values() for p in g.outputs if p.name == "logits"}
        heads = [m for m in self._linears if int(m.weight.shape[0]) in widths]
        self._stop = heads[-1] if heads and self._visit is not None else None
        try:
            self._run(None)
        except _HeadReached:
            pass
        finally:
            self._stop = None

    def logits(self, most: int) -> tuple[Array, Array]:
        """Float32 logits [B, P, V] at P evenly spread positions, and where they follow a sample's tokens, bool [B, P].

        Of an "embed" model the vectors of the samples, [B, 1, D], and all true.

        B * P is about `most`. Padding and the rows of a memory are no sample's tokens.
        """
        return self._run(most)

    def _reach(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Wait for the other parts; the last one visits. The weight stays until the last has gone through."""
        assert isinstance(module, Linear)
        name = self.weights.stored(module)
        visited = self._visit is None or name in self._visited
        if not visited:
            self._arrived.append(args[0])
        if self._turns.last:
            if not visited:
                assert self._visit is not None
                self._visited.add(name)
                inputs, self._arrived = self._arrived, []
                self._visit(name, module, inputs)
            if module is not self._stop:
                self.weights.hold(module)
        self._turns.barrier()
        if module is self._stop:
            raise _HeadReached

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._turns.last:
            self.weights.release(module)
        self._turns.barrier()

    def _run(self, most: int | None) -> tuple[Array, Array]:
        works = [self._run_calls] if self._calls else [self._work_of(part, most) for part in self._parts]
        if not self._calls and not self._samples:
            return _NOTHING
        self._turns = RoundRobin(works)
        if len(works) == 1:
            return self._turns.run()[0]  # as the session gives them: perhaps with what a backward pass needs
        threads = torch.get_num_threads()
        try:
            with freed_at_once():
                results = self._turns.run()
        finally:
            torch.set_num_threads(threads)  # what the parts set is also what a new thread begins with
        if most is None:  # to the head: parts differ in length, and nobody reads their logits
            return results[0]
        order = np.argsort([i for part in self._parts for i in part.places])
        logits, real = (np.concatenate(values)[order] for values in zip(*results, strict=True))
        return logits, real

    def _run_calls(self) -> tuple[Array, Array]:
        for graph, inputs in self._calls:
            mask = inputs.get("encoder_mask")
            self._parts[0].real = mask if mask is not None else torch.zeros(0, 0, dtype=torch.bool)
            self._session.run(graph, {name: value.numpy() for name, value in inputs.items()}, {})
        return _NOTHING

    def _work_of(self, part: _Part, most: int | None) -> Callable[[], tuple[Array, Array]]:
        """What takes one part through the model, up to the head if it is to stop there."""

        def work() -> tuple[Array, Array]:
            if len(self._parts) > 1:
                torch.set_num_threads(min(MOST_THREADS, torch.get_num_threads()))
            try:
                run = {"seq2seq": self._seq2seq, "embed": self._embed}.get(self._generation.task, self._causal)
                return run(part, most)
            except _HeadReached:
                return _NOTHING

        return work

    def _padded(
        self, part: _Part, of: Callable[[Sample], Sequence[int]], most: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`padded`; for logits to the longest of all samples, so that those of all parts are of the same positions."""
        length = None if most is None else max(len(of(s)) for s in self._samples)
        return padded([of(self._samples[i]) for i in part.places], self._generation.pad_id, length)

    def _causal(self, part: _Part, most: int | None) -> tuple[Array, Array]:
        ids, real = self._padded(part, lambda s: s.tokens, most)
        extra: dict[str, Array] = {}
        counted = real
        context = self._generation.context
        if context is not None:
            memory = self._memory(part)
            rows, prefix = memory.shape[1], len(context.prefix)
            early = context.splice == "released"
            lead = prefix - early
            front = [*context.prefix[:lead], *[0] * (rows + early)]
            slots = [*[-1] * lead, *range(rows), *[-1] * early, *[-1] * ids.shape[1]]
            before = torch.tensor(front).expand(len(ids), -1)
            ids = torch.cat([before, ids], 1)
            counted = torch.cat(
                [torch.zeros_like(before, dtype=torch.bool), real], 1
            )  # what predicts a sample's tokens
            real = torch.cat([torch.ones_like(before, dtype=torch.bool), real], 1)
            extra = {"memory": memory, "slots": np.array(slots, np.int64)}
        part.real = real
        return self._decode(ids, self._new_state(*ids.shape), most, extra, counted)

    def _embed(self, part: _Part, most: int | None) -> tuple[Array, Array]:
        ids, part.real = self._padded(part, lambda s: s.tokens, None)
        inputs = {"input_ids": ids.numpy(), "encoder_mask": part.real.numpy()}
        vectors = self._session.run("encoder", inputs, {})["sentence_embedding"]
        return vectors[:, None], np.ones((len(vectors), 1), bool)

    def _seq2seq(self, part: _Part, most: int | None) -> tuple[Array, Array]:
        read = [self._samples[i] for i in part.places]
        inputs, encoder = encoder_batch(self._generation, [s.tokens if s.sound is None else s.sound for s in read])
        part.real = torch.from_numpy(encoder)
        decoded, real = self._padded(part, lambda s: s.decoded, most)
        state = self._new_state(*decoded.shape)
        encoded = self._session.run("encoder", inputs, state)
        self._session.run("cross_kv", {"encoder_hidden": encoded["encoder_hidden"]}, state)
        part.real = real
        return self._decode(decoded, state, most, {"encoder_mask": encoder}, real)

    def _new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        """The session's state, whose empty slots take no memory: what is written to a cache is a new tensor."""
        empty = self._session.new_state(0, capacity, graph)
        return {n: torch.zeros((), dtype=v.dtype).expand(batch, *v.shape[1:]) for n, v in empty.items()}

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
            count = max(1, min(length, most // len(self._samples)))
            positions = np.unique(np.linspace(0, length - 1, count).astype(np.int64))
        inputs = {"input_ids": ids.numpy(), "past_length": np.zeros(1, np.int64), "logit_positions": positions}
        real = counted[:, torch.from_numpy(positions)].numpy()
        logits = self._session.run("decoder", {**inputs, **extra}, state)["logits"]
        return logits, real

    def _memory(self, part: _Part) -> Array:
        """The memories [B, rows, hidden] of the samples' contexts, all cut to one length: side by side they need one."""
        context = self._generation.context
        assert context is not None
        lengths = sorted(len(s.context) for s in self._samples)
        length = min(lengths[len(lengths) // 4], context.window)
        # the few that are shorter are read again from their start
        contexts = [self._samples[i].context for i in part.places]
        ids = torch.tensor([(c * -(-length // len(c)))[:length] for c in contexts])
        part.real = torch.ones_like(ids, dtype=torch.bool)
        if not context.tokens:
            return self._session.run("context", {"input_ids": ids.numpy()}, {})["memory"]
        ids = torch.cat([ids, torch.tensor(context.tokens).expand(len(ids), -1)], 1)
        part.real = torch.ones_like(ids, dtype=torch.bool)
        inputs = {
            "input_ids": ids.numpy(),
            "past_length": np.zeros(1, np.int64),
            "logit_positions": np.arange(length, ids.shape[1]),
        }
        state = self._new_state(ids.shape[0], ids.shape[1], "context")
        return self._session.run("context", inputs, state)["memory"]


def _real_rows(x: torch.Tensor, part: _Part) -> torch.Tensor:
    """Of [B, S, …, K] those at real positions, which may have several rows each; all of what is no such sequence."""
    of_positions = x.ndim > part.real.ndim and x.shape[: part.real.ndim] == part.real.shape
    return (x[part.real] if of_positions else x).reshape(-1, x.shape[-1])
