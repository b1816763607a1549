"""A model of which a module's weights are in memory only while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..checkpoints.checkpoint import Checkpoint
from ..models.language_model import LanguageModel
from ..models.layers.linear import Embedding, Linear
from ..models.registry import stored_name

SMALL = 1 << 16
"""Weights of a parameter that may stay in memory."""

WeightTransform = Callable[[str, nn.Module, torch.Tensor], torch.Tensor]
"""(stored name, the module that asks, the checkpoint's tensor) -> the value to compute with."""


class StreamedWeights:
    """Hooks on a model built on the meta device: a module's parameters are there, in float32, while it runs.

    transform: what to compute with in place of the checkpoint's values, such as those of a weight's codes and scales.
    """

    def __init__(self, model: LanguageModel, checkpoint: Checkpoint, transform: WeightTransform | None = None) -> None:
        self._checkpoint, self._transform = checkpoint, transform
        self._held: set[nn.Module] = set()
        self._until_release: set[nn.Module] = set()
        self._names: dict[nn.Module, dict[str, str]] = {}
        for path, module in model.named_modules():
            own = {leaf: p for leaf, p in module.named_parameters(recurse=False) if p.is_meta}
            names = {leaf: stored_name(model, f"{path}.{leaf}") for leaf in own}
            # A small one that is no linear's stays in memory: modules other than its own may read it.
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
        if self._transform is not None:
            value = self._transform(name, module, value)
        # An embedding may be the largest tensor there is: only the rows that are looked up are converted.
        value = value if isinstance(module, Embedding) and leaf == "weight" else value.to(torch.float32)
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))

    def _drop(self, module: nn.Module) -> None:
        if module in self._held:
            return
        for leaf in self._names[module]:
            value = getattr(module, leaf)
            module.register_parameter(leaf, nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False))

    def hold(self, module: nn.Module) -> None:
        """Keep the parameters of `module` until `release`."""
        if module not in self._held:
            self._read(module)
            self._held.add(module)
            self._until_release.add(module)

    def release(self, module: nn.Module) -> None:
        """Drop what `hold` kept. What `holding` keeps stays."""
        if module in self._until_release:
            self._until_release.remove(module)
            self._held.remove(module)
            self._drop(module)

    @contextmanager
    def holding(self, block: nn.Module) -> Iterator[None]:
        """Keep the parameters of `block` and what is in it until the end of the context."""
        modules = [module for module in block.modules() if module in self._names]
        self._held |= set(modules)
        try:
            for module in modules:
                self._read(module)
            yield
        finally:
            self._held -= set(modules)
            for module in modules:
                self._drop(module)
