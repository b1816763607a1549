"""A deployable graph: a module, its ports and the states that it carries from call to call."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

Dim = int | str
StateKind = Literal["kv", "cross", "conv", "window", "recurrent"]
"""kv: keys or values of self-attention, which grow. cross: those of cross-attention. conv: last inputs of a convolution.
window: last keys or values of attention within a window, oldest first. recurrent: the state of a recurrence."""


@dataclass(frozen=True)
class Port:
    """A graph input or output. A string in `shape` names a symbolic dimension, shared by name within the graph."""

    name: str
    dtype: torch.dtype
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class State:
    """What a graph carries from call to call.

    An `updated` state is an input and, under the name `<name>_out`, an output of the same shape. An exporter maps the pair to
    what its backend has: shared past and present buffers, mutable buffers, Core ML state. A state that is not updated is read
    only: another graph writes it.
    """

    name: str
    kind: StateKind
    dtype: torch.dtype
    shape: tuple[Dim, ...]
    updated: bool


@dataclass(frozen=True)
class Graph:
    """One program to lower: `module(*inputs, states)` returns the flat tuple `(*outputs, *updated states)`.

    The argument `states` is a list of tensors, absent if the graph has none. An output with the name of another graph's state
    fills that state.

    Attributes:
        example: symbolic dimension -> the size, above 1, that it is traced with.
        bounds: symbolic dimension -> its least and greatest size.
        root: what stands before the names of the module's parameters in the checkpoint (`checkpoint_name`).
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
        """The checkpoint's name of the parameter at `path` of `module`. A module that wraps a model holds it as `whole`."""
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
        """Tensors of the example sizes: zeros, which are valid indices, and for masks ones."""

        def tensor(dtype: torch.dtype, shape: tuple[Dim, ...]) -> torch.Tensor:
            sizes = [d if isinstance(d, int) else self.example[d] for d in shape]
            return torch.ones(sizes, dtype=dtype) if dtype == torch.bool else torch.zeros(sizes, dtype=dtype)

        ports: list[Port | State] = [*self.inputs, *self.states]
        return tuple(tensor(p.dtype, p.shape) for p in ports)

    def parameters(self) -> set[str]:
        """The checkpoint's names of all parameters that the module reaches, which may be more than it uses."""
        return {self.checkpoint_name(path) for path, _ in self.module.named_parameters(remove_duplicate=False)}

    def export(self) -> torch.export.ExportedProgram:
        """The graph as one `torch.export` program over plain ATen and the `edgewright::` ops, its symbolic dimensions dynamic."""
        dims = {n: torch.export.Dim(n, min=lo, max=hi) for n, (lo, hi) in self.bounds.items()}

        def dynamic(ports: Sequence[Port | State]) -> list[dict[int, torch.export.Dim]]:
            return [{i: dims[d] for i, d in enumerate(p.shape) if isinstance(d, str)} for p in ports]

        n, examples = len(self.inputs), self.example_inputs()
        args: tuple[Any, ...] = examples[:n]
        shapes: tuple[Any, ...] = tuple(dynamic(self.inputs))
        if self.states:
            args, shapes = (*args, list(examples[n:])), (*shapes, dynamic(self.states))
        parameters = inspect.signature(self.module.forward).parameters.values()
        if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
            shapes = (shapes,)  # torch.export binds all arguments to the one parameter
        with torch.no_grad():
            return torch.export.export(self.module, args, dynamic_shapes=shapes if dims else None)
