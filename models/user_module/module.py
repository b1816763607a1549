"""A user's own `nn.Module` as one graph, its linears, convolutions and embeddings replaced by ours, which can be quantized.

`-m package.module:factory` names a function that returns the module and its example inputs. This is the user's code: it runs
if its name was given on the command line (`allow`), not if a file names it. A convolution becomes a linear over patches, so it
lowers wherever a quantized linear does.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import UserError
from ...graph import Graph, Port
from ...system.reading import one_line, shown
from ..language_model import Example, LanguageModel
from . import replacements

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)
GRAPH = "module"
_DTYPES = (torch.float32, torch.int64, torch.bool)
_allowed: set[str] = set()

Inputs = dict[str, torch.Tensor]


def is_factory(model: str) -> bool:
    """Whether `model` names a function and not a checkpoint."""
    return FACTORY.fullmatch(model) is not None


def allow(factory: str) -> None:
    """Let the code of this factory run in this process: the user gave its name."""
    _allowed.add(factory)


@dataclass(frozen=True)
class FactoryModule:
    """What a factory returned: the module in eval mode, its parts replaced by ours, example inputs by name, output shapes."""

    module: nn.Module
    examples: list[Inputs]
    outputs: list[tuple[int, ...]]


@functools.cache
def load(factory: str) -> FactoryModule:
    """Call the factory. Raises UserError if it was not allowed, does not exist, fails, or returns something else.

    It returns `(module, inputs)`. inputs: a tensor, a tuple of tensors, a dict by the parameters of `forward`, or a list of
    several of these with the same shapes. dtypes: float32, int64 or bool.
    """
    if factory not in _allowed:
        raise UserError(
            f"this needs the code of {one_line(factory, 120)}, which runs only where you name it: give -m {one_line(factory, 120)}"
        )
    package, _, name = factory.partition(":")
    if (folder := os.getcwd()) not in sys.path:  # a script's path begins with the folder of the script
        sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"-m {factory}: {one_line(error, 120)}; is it importable from here (PYTHONPATH)?") from None
    try:
        pair = function()
    except Exception as error:  # the user's own code
        raise UserError(f"-m {factory}: the factory raised {type(error).__name__}: {one_line(error, 200)}") from error
    if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], nn.Module):
        raise UserError(f"-m {factory}: the factory must return (module, example inputs)")
    module, inputs = pair
    names = [p.name for p in inspect.signature(module.forward).parameters.values()]
    many = inputs if isinstance(inputs, list) else [inputs]
    examples = [_by_name(factory, names, one) for one in many]
    _check(factory, examples)
    ours = replacements.replaced(module.eval().requires_grad_(False), factory)
    step, first = ModuleStep(ours, list(examples[0])), tuple(examples[0].values())
    with torch.no_grad():
        outputs = step(*first)
        try:
            torch.export.export(step, first)
        except Exception as error:  # of dozens of types, from dynamo and the user's code
            reason = one_line(str(error).partition("\n")[0], 200)
            raise UserError(f"-m {factory}: torch.export does not take the module: {reason}") from error
    if not outputs or any(not o.is_floating_point() for o in outputs):
        raise UserError(f"-m {factory}: every output must be a floating tensor")
    return FactoryModule(ours, examples, [tuple(o.shape) for o in outputs])


def _by_name(factory: str, names: Sequence[str], inputs: Any) -> Inputs:
    """One example's inputs as a dict by the parameters of `forward`. Raises UserError for something else."""
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if isinstance(inputs, tuple):
        if len(inputs) > len(names):
            raise UserError(f"-m {factory}: {len(inputs)} example inputs for forward({', '.join(names)})")
        inputs = dict(zip(names, inputs, strict=False))
    if not isinstance(inputs, Mapping) or not inputs or not all(n in names for n in inputs):
        raise UserError(f"-m {factory}: example inputs are a tensor, a tuple of them, or a dict by forward's names")
    return {name: inputs[name] for name in names if name in inputs}


def _check(factory: str, examples: Sequence[Inputs]) -> None:
    if not examples:
        raise UserError(f"-m {factory}: no example inputs")
    first = examples[0]
    for example in examples:
        for name, value in example.items():
            if not isinstance(value, torch.Tensor) or value.dtype not in _DTYPES or 0 in value.shape:
                raise UserError(f"-m {factory}: the input {name} must be a float32, int64 or bool tensor, not empty")
            if name not in first or first[name].shape != value.shape or first[name].dtype != value.dtype:
                raise UserError(f"-m {factory}: all examples must have the names, shapes and dtypes of the first")


class ModuleStep(nn.Module):
    """The user's module with its outputs as a flat tuple. names: the parameters of `forward` that the inputs are for."""

    def __init__(self, whole: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.whole = whole
        self.names = tuple(names)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.whole(**dict(zip(self.names, inputs, strict=True)))
        if isinstance(out, Mapping):
            out = tuple(out.values())
        return (out,) if isinstance(out, torch.Tensor) else tuple(out)


class Model(LanguageModel):
    """The module of the factory that the config names. Its parameters are on the meta device until they are loaded."""

    task = "module"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        factory = config.get("factory")
        if not isinstance(factory, str) or not is_factory(factory):
            raise UserError(f"config.json: factory is {shown(factory, 80)}, expected 'package.module:function'")
        source = load(factory)
        # A copy without weights: these come from the checkpoint, quantized or not.
        memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in source.module.parameters()}
        self.whole = copy.deepcopy(source.module, dict(memo))
        self.inputs = source.examples
        self.tied = replacements.tied(source.module, "whole.")
        self.max_context = 1
        self.outputs = source.outputs

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        raise UserError("--num-layers is for language models; make the module smaller in its factory")

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {}

    def examples(self) -> list[Example]:
        return [(GRAPH, inputs) for inputs in self.inputs]

    def graphs(self) -> list[Graph]:
        first = self.inputs[0]
        return [
            Graph(
                name=GRAPH,
                module=ModuleStep(self.whole, list(first)),
                inputs=tuple(Port(n, v.dtype, tuple(v.shape)) for n, v in first.items()),
                outputs=tuple(
                    Port(f"output_{i}" if len(self.outputs) > 1 else "output", torch.float32, shape)
                    for i, shape in enumerate(self.outputs)
                ),
                root="whole.",
            )
        ]


def tensors(factory: str) -> dict[str, torch.Tensor]:
    """Name in `Model` -> weight of the factory's module."""
    return {f"whole.{n}": p.detach() for n, p in load(factory).module.named_parameters()}
