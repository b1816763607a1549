"""A deployable graph: a module, its ports and the states it carries. A leaf: only torch enters, every room may import it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

Dim = int | str
StateKind = Literal["kv", "cross", "conv", "window", "recurrent"]
"""window: the last keys or values of attention within a window, oldest first; like conv, its size is fixed."""


@dataclass(frozen=True)
class Port:
    """A graph input or output. A string in `shape` names a symbolic dimension, shared by name within the graph."""

    name: str
    dtype: torch.dtype
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class State:
    """What a graph carries from call to call.

    An `updated` state is an input and, under the name `<name>_out`, an output of the same shape; an exporter maps the
    pair to what its backend has (shared past and present buffers, mutable buffers, Core ML state). A state that is
    not updated is written by another graph (the keys and values of cross-attention) and only read here.
    """

    name: str
    kind: StateKind
    dtype: torch.dtype
    shape: tuple[Dim, ...]
    updated: bool


@dataclass(frozen=True)
class Graph:
    """One program to lower: `module(*inputs, states)` returns the flat tuple `(*outputs, *updated states)`.

    `states` is a list of tensors, left out where the graph has none. An output that bears the name of another graph's
    state fills it. `example` gives a size above 1 for each symbolic dimension to trace with, `bounds` its limits.
    `root` stands before the names of the module's parameters in the checkpoint (see `checkpoint_name`).
    """

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    states: tuple[State, ...] = ()
    example: dict[str, int] = field(default_factory=dict)
    bounds: dict[str, tuple[int, int]] = field(default_factory=dict)
    root: str = ""

    def checkpoint_name(self, path: str) -> str:
        """The checkpoint's name of the parameter at `path` of `module`; a module that wraps a model holds it as `whole`."""
        return self.root + path.removeprefix("whole.")

    @property
    def input_names(self) -> list[str]:
        return [p.name for p in self.inputs] + [s.name for s in self.states]

    @property
    def output_names(self) -> list[str]:
        return [p.name for p in self.outputs] + [f"{s.name}_out" for s in self.states if s.updated]

    def call(self, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run the module eagerly on `values`, in the order of `input_names`; outputs in the order of `output_names`."""
        n = len(self.inputs)
        args = (*values[:n], list(values[n:])) if self.states else tuple(values)
        out: tuple[torch.Tensor, ...] = self.module(*args)
        return out

    def example_inputs(self) -> tuple[torch.Tensor, ...]:
        """Zero tensors of the example sizes (index-like inputs are valid as zeros, masks as ones)."""

        def make(dtype: torch.dtype, shape: tuple[Dim, ...]) -> torch.Tensor:
            sizes = [d if isinstance(d, int) else self.example[d] for d in shape]
            return torch.ones(sizes, dtype=dtype) if dtype == torch.bool else torch.zeros(sizes, dtype=dtype)

        ports: list[Port | State] = [*self.inputs, *self.states]
        return tuple(make(p.dtype, p.shape) for p in ports)

    def parameters(self) -> set[str]:
        """The checkpoint's names of all parameters that the module reaches, those of other graphs among them if it does."""
        return {self.checkpoint_name(path) for path, _ in self.module.named_parameters(remove_duplicate=False)}

    def export(self) -> torch.export.ExportedProgram:
        """The graph as one `torch.export` program over plain ATen and the `edgewright::` ops, dimensions dynamic."""
        dims = {n: torch.export.Dim(n, min=lo, max=hi) for n, (lo, hi) in self.bounds.items()}

        def dynamic(ports: Sequence[Port | State]) -> list[dict[int, torch.export.Dim]]:
            return [{i: dims[d] for i, d in enumerate(p.shape) if isinstance(d, str)} for p in ports]

        n, examples = len(self.inputs), self.example_inputs()
        args: tuple[Any, ...] = examples[:n]
        shapes: tuple[Any, ...] = tuple(dynamic(self.inputs))
        if self.states:
            args, shapes = (*args, list(examples[n:])), (*shapes, dynamic(self.states))
        taken = inspect.signature(self.module.forward).parameters.values()
        if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in taken):
            shapes = (shapes,)  # torch.export binds all arguments to the one name
        with torch.no_grad():
            return torch.export.export(self.module, args, dynamic_shapes=shapes if dims else None)
