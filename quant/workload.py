"""What the graphs of a model ask of a device: their bytes, operations and counts, from one run of each on shapes alone.

Weights are counted where they are multiplied or looked up, attention and recurrences where their ops are called. Nothing is read of
the checkpoint but its config.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from ..device_profiles.work import Phase, Work
from ..graph import Graph
from ..models.language_model import LanguageModel
from ..models.layers.linear import Embedding, Linear
from ..models.registry import stored_name
from ..targets.registry import TARGETS
from ..targets.storage import stored_bytes
from .plan import UNQUANTIZED, BitPlan, Unit

_CACHED = {"cached_attention": 8, "merged_attention": 11, "biased_attention": None, "shared_attention": 5}
"""Ops of attention over a cache that grows -> the place of their window among the arguments."""

_RECURRENCES = ("gated_delta_rule", "generalized_delta_rule", "linear_attention", "selective_scan", "diagonal_scan")

_FIXED = ("conv", "window", "recurrent")


@dataclass
class GraphWork:
    """One call of a graph with `tokens` tokens behind `depth` others.

    rows: stored name of a weight -> rows that are multiplied with it. calls: -> products, each of which reads it. looked_up: ->
    rows that are read of a table. other_bytes: of parameters that no plan has, float32. attention: multiply-adds. cache:
    numbers of keys and values that are read. state_bytes: of states that are read and written whole. layers: with attention or
    a recurrence."""

    graph: str
    tokens: int
    depth: int
    rows: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    looked_up: Counter[str] = field(default_factory=Counter)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    other_bytes: int = 0
    attention: float = 0.0
    cache: float = 0.0
    state_bytes: float = 0.0
    attention_layers: int = 0
    recurrent_layers: int = 0

    @property
    def layers(self) -> int:
        return max(1, self.attention_layers + self.recurrent_layers)

    @property
    def products(self) -> float:
        """Operations of all products with weights; a multiply-add counts as 2."""
        return 2.0 * sum(n * math.prod(self.shapes[name]) for name, n in self.rows.items())

    def weight_bytes(self, target: str, plan: BitPlan | None, bits: int = 4, group_size: int = 32) -> dict[int, float]:
        """Bits of the container -> bytes that a call reads, 16 for what is not quantized.

        plan: the bits of each weight; without one, all quantizable ones have `bits` and `group_size`.
        """
        read: Counter[int] = Counter()
        for name, rows in {**self.looked_up, **self.rows}.items():
            n, k = self.shapes[name]
            entry = plan.entries.get(name) if plan is not None else None
            if plan is not None and entry is None:
                width, group = UNQUANTIZED, 0
            else:
                width, group = (entry.bits, entry.group_size) if entry is not None else (bits, group_size)
            whole = stored_bytes(target, width, group if k % max(1, group) == 0 else 0, n, k)
            share = self.calls[name] if name in self.rows else min(1.0, rows / n)
            read[width] += round(whole * share)
        read[UNQUANTIZED] += self.other_bytes
        return dict(read)


class _Ops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts attention and recurrences as they are called."""

    def __init__(self, work: GraphWork) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "edgewright":
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        work = self.work
        if name in _RECURRENCES:
            work.recurrent_layers += 1
            return
        if "attention" not in name:
            return
        q = args[0]  # [B, S, H, D]
        queries, width = q.shape[1], q.shape[2] * q.shape[3]
        if name in _CACHED:
            place = _CACHED[name]
            window = args[place] if place is not None else 0
            heads = args[1].shape[1] if name == "shared_attention" else args[1].shape[2]
            seen = _mean_seen(work.depth, queries, window)
            read = min(window or work.depth + queries, work.depth + queries)
            if name == "merged_attention":
                seen, read = seen + args[5].shape[2], read + args[5].shape[2]
            work.attention_layers += 1
        else:  # over what is there whole: k as [B, T, KV, D], or a cache written once, [B, KV, T, D]
            written_once = name == "cross_attention"
            heads, keys = (args[1].shape[1], args[1].shape[2]) if written_once else (args[1].shape[2], args[1].shape[1])
            seen = float(keys)
            read = keys if written_once else 0
            work.attention_layers += 0 if written_once else 1
        work.attention += 2.0 * queries * width * seen
        work.cache += 2.0 * heads * q.shape[3] * read


def _mean_seen(depth: int, queries: int, window: int) -> float:
    """Positions that a query sees, on average over `queries` of them behind `depth` others."""
    mean = depth + (queries + 1) / 2
    return min(mean, window) if window else mean


def graph_work(
    model: LanguageModel, graph: Graph, tokens: int, depth: int, source: int, planned: set[str]
) -> GraphWork:
    """Run a graph of a model, built on the meta device, on shapes alone.

    tokens: of the call. depth: those in its caches. source: of what an encoder or a context gave. planned: stored names of the
    weights that a plan may have.
    """
    work = GraphWork(graph.name, tokens, depth)
    wanted = {"batch": 1, "sequence": tokens, "source": source, "memory": max(1, source), "logits": 1}
    wanted["capacity"] = depth + tokens
    example = {name: max(1, wanted.get(name, size)) for name, size in graph.example.items()}
    if not any("sequence" in p.shape for p in graph.inputs):  # an encoder reads a source, or a fixed window of sound
        example |= {"source": max(1, tokens)} if "source" in example else {}
    sized = Graph(
        graph.name, graph.module, graph.inputs, graph.outputs, graph.states, example, graph.bounds, graph.root
    )
    hooks = [m.register_forward_hook(_watch(model, work, planned, path, m)) for path, m in model.named_modules()]
    try:
        with torch.device("meta"):
            values = sized.example_inputs()
        args = (*values[: len(graph.inputs)], values[len(graph.inputs) :]) if graph.states else tuple(values)
        constants = {name: value.to("meta") for name, value in graph.module.named_buffers()}
        with torch.no_grad(), _Ops(work):
            functional_call(graph.module, constants, args)
    finally:
        for hook in hooks:
            hook.remove()
    for state in graph.states:
        if state.kind in _FIXED:
            sizes = [1 if d == "batch" else d if isinstance(d, int) else depth for d in state.shape]
            work.state_bytes += 2 * math.prod(sizes) * state.dtype.itemsize
    return work


def _watch(
    model: LanguageModel, work: GraphWork, planned: set[str], path: str, module: nn.Module
) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        for leaf, parameter in module.named_parameters(recurse=False):
            name = stored_name(model, f"{path}.{leaf}")
            table, matrix = isinstance(module, Embedding), isinstance(module, Linear) and leaf == "weight"
            if name not in planned and not matrix:
                work.other_bytes += 4 * (parameter.shape[-1] if table else parameter.numel())
                continue
            if not (table or matrix):
                continue
            work.shapes[name] = (parameter.shape[0], parameter[0].numel())
            rows = math.prod(inputs[0].shape) if table else math.prod(inputs[0].shape[:-1])
            (work.looked_up if table else work.rows)[name] += rows
            work.calls[name] += not table

    return hook


def as_work(
    work: GraphWork, phase: Phase, target: str, plan: BitPlan | None, bits: int = 4, group_size: int = 32
) -> Work:
    """The terms of one token of a call on a target.

    A runtime whose programs hold caches for the whole context reads them whole: give `graph_work` that depth.
    """
    facts = TARGETS[target]
    read = work.weight_bytes(target, plan, bits, group_size)
    quantized = {width: n for width, n in read.items() if width != UNQUANTIZED}
    most = max(quantized, key=lambda width: quantized[width]) if quantized else UNQUANTIZED
    cache_bytes = {"float32": 4, "float16": 2, "int16": 1, "int8": 4}[facts.activations]
    kept = f"int{most}" if most != UNQUANTIZED else "float"
    if phase == "decode":
        terms = {
            "weights": float(sum(read.values())),
            "cache": work.cache * cache_bytes + work.state_bytes,
            "attention": work.attention,
            "layers": float(work.layers),
            "fixed": 1.0,
            "recurrent": float(work.recurrent_layers),
            "experts": 0.0,
        }
    else:
        tokens = max(1, work.tokens)
        terms = {
            "products": work.products / tokens,
            "attention": 2 * work.attention / tokens,
            "weights": sum(read.values()) / tokens,
            "layers": work.layers / tokens,
            "recurrent": float(work.recurrent_layers),
            "experts": 0.0,
        }
    return Work(phase, terms, kept, facts.activations, work.tokens)


def planned_names(units: Sequence[Unit]) -> set[str]:
    """Stored names of all weights that a plan may have."""
    return {w.name for unit in units for w in unit.weights}


def state_bytes(graphs: Sequence[Graph], capacity: int, source: int, element: Mapping[str, int]) -> int:
    """Bytes of all states of one stream at a capacity. element: kind -> bytes of a number, where it is not the state's own."""
    sizes = {"batch": 1, "capacity": capacity, "source": source}
    total = 0
    for state in {s.name: s for g in graphs for s in g.states}.values():
        numbers = math.prod(d if isinstance(d, int) else sizes.get(d, capacity) for d in state.shape)
        total += numbers * element.get(state.kind, state.dtype.itemsize)
    return total
