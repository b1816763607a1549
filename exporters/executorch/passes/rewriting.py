"""The module that the passes change, and what they share: constants by content or key, results by call."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .. import lowerings


class Rewriting:
    """One exported module during its passes.

    capacity: tokens of a KV cache. past_length: the node of the number of tokens in the caches, once an attention has
    been lowered.
    """

    def __init__(self, module: fx.GraphModule, capacity: int) -> None:
        self.module, self.graph, self.capacity = module, module.graph, capacity
        self.past_length: Any = None
        self._buffers: dict[tuple[Any, ...], str] = {}
        self._constants: dict[tuple[Any, ...], fx.Node] = {}
        self._results: dict[tuple[Any, ...], fx.Node] = {}

    def replace_module(self, module: fx.GraphModule) -> None:
        """Go on with a copy of the module; nodes of the graph before are forgotten."""
        self.module, self.graph = module, module.graph
        self._constants.clear()

    def calls(self) -> list[fx.Node]:
        """The graph's calls in order, as they are before the pass that asks."""
        return [node for node in self.graph.nodes if node.op == "call_function"]

    def input(self, index: int) -> fx.Node:
        """The graph's input of that index; the last is the token positions of the filled part of the cache."""
        inputs: list[fx.Node] = [n for n in self.graph.nodes if n.op == "placeholder"]
        return inputs[index]

    # -- constants

    def value(self, node: Any) -> torch.Tensor:
        """The tensor of a parameter's or constant's node."""
        assert isinstance(node, fx.Node)
        assert node.op == "get_attr"
        tensor: torch.Tensor = operator.attrgetter(str(node.target))(self.module)
        return tensor

    def constant(self, key: tuple[Any, ...], make: Callable[[], torch.Tensor]) -> fx.Node:
        """The node of a constant, built once for each key. It has a storage of its own: ExecuTorch writes whole storages."""
        if key not in self._buffers:
            name = f"constant_{len(self._buffers)}"
            self.module.register_buffer(name, _owned(make().detach()))
            self._buffers[key] = name
        if key not in self._constants:
            self._constants[key] = self.graph.get_attr(self._buffers[key])
        return self._constants[key]

    # -- results

    def once(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """The call's node, one for equal arguments, before the node that is being rewritten."""
        key = (function, *args)
        if key not in self._results:
            self._results[key] = self.graph.call_function(function, args)
        return self._results[key]

    def start(self, past_length: fx.Node) -> fx.Node:
        """The number of tokens in the cache, as a size known at run time only."""
        return self.once(lowerings.start_of, past_length, self.capacity)


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, alone in its storage."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
