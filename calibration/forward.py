"""Calibration data through a model once, all of it from layer to layer, weights read when their module runs.

Top-level room: checkpoint, models, prompts and the eager runtime enter. At any moment the weights of one module are in
memory, in float32, with what all the data have there; so a model larger than memory can be calibrated, whatever its
architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..bundle import Generation
from ..checkpoints.checkpoint import Checkpoint
from ..models.language_model import LanguageModel
from ..models.layers.linear import Linear
from ..runtimes.eager import EagerSession
from ..runtimes.session import Array, StateBuffers
from ..system.memory import freed_at_once
from ..system.round_robin import RoundRobin
from .samples import Call, Sample
from .spilled_caches import DiskCacheSession, scratch
from .streamed_weights import StreamedWeights, WeightTransform

PART_TOKENS = 1024
"""Tokens that go through the model together: enough for matrix products to be fast."""

MOST_THREADS = 8
"""Threads that a part computes with; each part has its own, of which all but one part's sleep."""

CHUNK_WEIGHTS = 16 << 20
"""Weights that GPTQ works on at a time."""

_LENGTHS: tuple[Callable[[Sample], Sequence[int]], ...] = (
    lambda s: s.tokens,
    lambda s: s.decoded,
    lambda s: s.context,
)


class _Reached(Exception):
    """The head has its input: nothing after it is wanted."""


Visit = Callable[[str, Linear, list[torch.Tensor]], None]
"""(stored name of the weight, module, its inputs, a tensor a part) -> nothing; called before the module runs and its weight is
read, when all parts have come to it."""


@dataclass
class _Part:
    """Some of the samples, by their places, which go through the model together. real: what is no padding now, [B, S]."""

    places: list[int]
    real: torch.Tensor


class CalibrationForward:
    """One pass of calibration data through every graph of a model.

    The data go in parts of PART_TOKENS, side by side: at each linear they wait for each other, so that it is visited with
    all the data, and its weight is read once, while what an operation takes besides is there for one part alone.

    model: built on the meta device. samples: as `read_samples` gives; or, of a model without a generate loop, calls: graphs
    and inputs. transform: see `StreamedWeights`. visit: called at every linear the first time that it is reached.
    session: what runs `model`; without one the eager runtime, which keeps caches in files of `folder`, or of the system's
    folder for them.
    """

    def __init__(
        self,
        model: LanguageModel,
        checkpoint: Checkpoint,
        spec: Generation,
        samples: Sequence[Sample],
        calls: Sequence[Call] = (),
        transform: WeightTransform | None = None,
        visit: Visit | None = None,
        session: EagerSession | None = None,
        folder: Path | None = None,
    ) -> None:
        self.spec, self._samples, self._calls = spec, list(samples), merged(model, calls)
        self._graphs = {g.name: g for g in model.graphs()}
        graphs = list(self._graphs.values())
        self._session = session or DiskCacheSession(graphs, folder or scratch())
        none = torch.zeros(0, 0, dtype=torch.bool)
        self._parts = [_Part(some, none) for some in parted(self._samples)]
        self._parts = self._parts or [_Part([], none)]
        self._step: RoundRobin[tuple[Array, Array]] = RoundRobin([])
        self._visit, self._seen = visit, set[str]()
        self._arrived: list[torch.Tensor] = []
        self._stop: nn.Module | None = None
        self._linears = [m for m in model.modules() if isinstance(m, Linear)]
        meeting = self._linears if visit is not None or len(self._parts) > 1 else []
        for module in meeting:
            module.register_forward_pre_hook(self._reach)  # before the hook that reads the weight
        self.weights = StreamedWeights(model, checkpoint, transform)
        for module in meeting:
            module.register_forward_hook(self._leave)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The rows [T, K] that are no padding, of an input [..., K] of the part that goes on now."""
        return _real_rows(x, self._parts[self._step.current])

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
        """Wait for the other parts; the last one visits. The weight stays until the last has gone through."""
        assert isinstance(module, Linear)
        name = self.weights.stored(module)
        visited = self._visit is None or name in self._seen
        if not visited:
            self._arrived.append(args[0])
        if self._step.last:
            if not visited:
                assert self._visit is not None
                self._seen.add(name)
                inputs, self._arrived = self._arrived, []
                self._visit(name, module, inputs)
            if module is not self._stop:
                self.weights.hold(module)
        self._step.barrier()
        if module is self._stop:
            raise _Reached

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._step.last:
            self.weights.release(module)
        self._step.barrier()

    def _run(self, most: int | None) -> tuple[Array, Array]:
        works = [self._calls_alone] if self._calls else [self._part_of(part, most) for part in self._parts]
        if not self._calls and not self._samples:
            return np.zeros((0, 0, 0), np.float32), np.zeros((0, 0), bool)
        self._step = RoundRobin(works)
        if len(works) == 1:
            return self._step.run()[0]  # as the session gave them: perhaps with what a backward pass needs
        threads = torch.get_num_threads()
        try:
            with freed_at_once():
                found = self._step.run()
        finally:
            torch.set_num_threads(threads)  # what the parts set is also what a new thread begins with
        if most is None:  # of a walk to the head: parts differ in length, and nobody asks
            return found[0]
        order = np.argsort([i for part in self._parts for i in part.places])
        logits, real = (np.concatenate(values)[order] for values in zip(*found, strict=True))
        return logits, real

    def _calls_alone(self) -> tuple[Array, Array]:
        for graph, inputs in self._calls:
            mask = inputs.get("encoder_mask")
            self._parts[0].real = mask if mask is not None else torch.zeros(0, 0, dtype=torch.bool)
            self._session.run(graph, {name: value.numpy() for name, value in inputs.items()}, {})
        return np.zeros((0, 0, 0), np.float32), np.zeros((0, 0), bool)

    def _part_of(self, part: _Part, most: int | None) -> Callable[[], tuple[Array, Array]]:
        """What takes one part through the model, up to the head if there it is to stop."""

        def work() -> tuple[Array, Array]:
            if len(self._parts) > 1:
                torch.set_num_threads(min(MOST_THREADS, torch.get_num_threads()))
            try:
                return self._seq2seq(part, most) if self.spec.task == "seq2seq" else self._causal(part, most)
            except _Reached:
                return np.zeros((0, 0, 0), np.float32), np.zeros((0, 0), bool)

        return work

    def _padded(
        self, part: _Part, of: Callable[[Sample], Sequence[int]], most: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`padded`; where logits are asked for, to the longest of all samples: those of all parts are of the same positions."""
        length = None if most is None else max(len(of(s)) for s in self._samples)
        return padded([of(self._samples[i]) for i in part.places], self.spec.pad_id, length)

    def _causal(self, part: _Part, most: int | None) -> tuple[Array, Array]:
        ids, real = self._padded(part, lambda s: s.tokens, most)
        extra: dict[str, Array] = {}
        counted = real
        if self.spec.context is not None:
            memory = self._memory(part)
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
        part.real = real
        return self._decode(ids, self._new_state(*ids.shape), most, extra, counted)

    def _seq2seq(self, part: _Part, most: int | None) -> tuple[Array, Array]:
        ids, part.real = self._padded(part, lambda s: s.tokens, most)
        encoder = part.real.numpy()
        decoded, real = self._padded(part, lambda s: s.decoded, most)
        state = self._new_state(*decoded.shape)
        encoded = self._session.run("encoder", {"input_ids": ids.numpy(), "encoder_mask": encoder}, state)
        self._session.run("cross_kv", {"encoder_hidden": encoded["encoder_hidden"]}, state)
        part.real = real
        return self._decode(decoded, state, most, {"encoder_mask": encoder}, real)

    def _new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        """The session's, in which the empty slots of a cache take no memory: what is written to a cache is a new one."""
        made = self._session.new_state(0, capacity, graph)
        return {n: torch.zeros((), dtype=v.dtype).expand(batch, *v.shape[1:]) for n, v in made.items()}

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
            wanted = max(1, min(length, most // len(self._samples)))
            positions = np.unique(np.linspace(0, length - 1, wanted).astype(np.int64))
        inputs = {"input_ids": ids.numpy(), "past_length": np.zeros(1, np.int64), "logit_positions": positions}
        real = counted[:, torch.from_numpy(positions)].numpy()
        logits = self._session.run("decoder", {**inputs, **extra}, state)["logits"]
        return logits, real

    def _memory(self, part: _Part) -> Array:
        """The memories [B, rows, hidden] of the samples' contexts, all cut to one length: rows side by side need one."""
        context = self.spec.context
        assert context is not None
        lengths = sorted(len(s.context) for s in self._samples)
        length = min(lengths[len(lengths) // 4], context.window)
        # the few that are shorter are read over again from their start
        contexts = [self._samples[i].context for i in part.places]
        ids = torch.tensor([(c * -(-length // len(c)))[:length] for c in contexts])
        part.real = torch.ones_like(ids, dtype=torch.bool)
        if not context.tokens:
            return self._session.run("context", {"input_ids": ids.numpy()}, {})["memory"]
        whole = torch.cat([ids, torch.tensor(context.tokens).expand(len(ids), -1)], 1)
        part.real = torch.ones_like(whole, dtype=torch.bool)
        inputs = {
            "input_ids": whole.numpy(),
            "past_length": np.zeros(1, np.int64),
            "logit_positions": np.arange(length, whole.shape[1]),
        }
        return self._session.run("context", inputs, self._new_state(whole.shape[0], whole.shape[1], "context"))[
            "memory"
        ]


def merged(model: LanguageModel, calls: Sequence[Call]) -> list[Call]:
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


def parted(samples: Sequence[Sample]) -> list[list[int]]:
    """The places of the samples in parts of about PART_TOKENS, padding counted, those of like length together."""
    found: list[list[int]] = []
    for place in sorted(range(len(samples)), key=lambda i: samples[i].size, reverse=True):
        together = [samples[i] for i in (*found[-1], place)] if found else []
        size = sum(max(len(of(s)) for s in together) for of in _LENGTHS) if together else 0
        if not found or size * len(together) > PART_TOKENS:
            found.append([])
        found[-1].append(place)
    return found


def _real_rows(x: torch.Tensor, part: _Part) -> torch.Tensor:
    return x[part.real] if x.shape[:-1] == part.real.shape else x.reshape(-1, x.shape[-1])


def padded(
    sequences: Sequence[Sequence[int]], pad: int, length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64 [B, S] padded on the right to `length` or the longest, and where they are real, bool [B, S]."""
    longest = max(len(s) for s in sequences) if length is None else length
    ids = torch.full((len(sequences), longest), pad)
    real = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        real[row, : len(sequence)] = True
    return ids, real
