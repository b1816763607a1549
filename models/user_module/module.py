"""A user's own `nn.Module` as one graph: its linears, convolutions and embeddings made the ones that are quantized.

What may enter: `ops`, `graph`, the shared layers. `-m package.module:factory` names a function that gives the module and its
example inputs. It is the user's own code: it runs because its name was given on the command line (`allow`), never because a
file names it. A convolution is a linear over the patches it sees, so it lowers wherever a quantized linear does.
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
from ...system.reading import one_line
from ..language_model import Example, LanguageModel
from . import replacements

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)
GRAPH = "module"
_DTYPES = (torch.float32, torch.int64, torch.bool)
_allowed: set[str] = set()

Inputs = dict[str, torch.Tensor]


def is_factory(model: str) -> bool:
    """Whether the user named a function rather than a checkpoint."""
    return FACTORY.fullmatch(model) is not None


def allow(factory: str) -> None:
    """The user gave this name: its code may run in this process."""
    _allowed.add(factory)


@dataclass(frozen=True)
class Made:
    """What a factory gave: the module in eval mode, its modules replaced by ours, example inputs by name, output shapes."""

    module: nn.Module
    examples: list[Inputs]
    outputs: list[tuple[int, ...]]


@functools.cache
def load(factory: str) -> Made:
    """Call the factory. Raises UserError if it was not allowed, is not there, fails, or gives something else.

    It returns `(module, inputs)`: inputs a tensor, a tuple of tensors or a dict by the names of `forward`, or a list of
    several such, all of the same shapes; float32, int64 or bool.
    """
    if factory not in _allowed:
        raise UserError(
            f"this needs the code of {one_line(factory, 120)}, which runs only where you name it: give -m {one_line(factory, 120)}"
        )
    package, _, name = factory.partition(":")
    if (here := os.getcwd()) not in sys.path:  # a script's path begins where the script lies, not where the user is
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"-m {factory}: {one_line(error, 120)}; is it importable from here (PYTHONPATH)?") from None
    try:
        given = function()
    except Exception as error:  # the user's own code
        raise UserError(f"-m {factory}: the factory raised {type(error).__name__}: {one_line(error, 200)}") from error
    if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[0], nn.Module):
        raise UserError(f"-m {factory}: the factory must return (module, example inputs)")
    module, inputs = given
    names = [p.name for p in inspect.signature(module.forward).parameters.values()]
    many = inputs if isinstance(inputs, list) else [inputs]
    examples = [_by_name(factory, names, one) for one in many]
    _check(factory, examples)
    ours = replacements.replaced(module.eval().requires_grad_(False), factory)
    whole, first = Whole(ours, list(examples[0])), tuple(examples[0].values())
    with torch.no_grad():
        outputs = whole(*first)
        try:
            torch.export.export(whole, first)
        except Exception as error:  # dozens of types, of dynamo's and the user's own code
            reason = one_line(str(error).partition("\n")[0], 200)
            raise UserError(f"-m {factory}: torch.export does not take the module: {reason}") from error
    if not outputs or any(not o.is_floating_point() for o in outputs):
        raise UserError(f"-m {factory}: every output must be a floating tensor")
    return Made(ours, examples, [tuple(o.shape) for o in outputs])


def _by_name(factory: str, names: Sequence[str], given: Any) -> Inputs:
    if isinstance(given, torch.Tensor):
        given = (given,)
    if isinstance(given, tuple):
        if len(given) > len(names):
            raise UserError(f"-m {factory}: {len(given)} example inputs for forward({', '.join(names)})")
        given = dict(zip(names, given, strict=False))
    if not isinstance(given, Mapping) or not given or not all(n in names for n in given):
        raise UserError(f"-m {factory}: example inputs are a tensor, a tuple of them, or a dict by forward's names")
    return {name: given[name] for name in names if name in given}


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


class Whole(nn.Module):
    """The user's module, its outputs a flat tuple."""

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
    """The module of a factory, named in the config, its parameters on the meta device until they are loaded."""

    task = "module"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        factory = config.get("factory")
        if not isinstance(factory, str) or not is_factory(factory):
            raise UserError(
                f"config.json: factory is {one_line(repr(factory), 80)}, expected 'package.module:function'"
            )
        made = load(factory)
        # A copy without its weights: they come from the checkpoint, quantized or not.
        memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in made.module.parameters()}
        self.whole = copy.deepcopy(made.module, dict(memo))
        self.inputs = made.examples
        self.tied = replacements.tied(made.module, "whole.")
        self.max_context = 1
        self.outputs = made.outputs

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
                module=Whole(self.whole, list(first)),
                inputs=tuple(Port(n, v.dtype, tuple(v.shape)) for n, v in first.items()),
                outputs=tuple(
                    Port(f"output_{i}" if len(self.outputs) > 1 else "output", torch.float32, shape)
                    for i, shape in enumerate(self.outputs)
                ),
                root="whole.",
            )
        ]


def tensors(factory: str) -> dict[str, torch.Tensor]:
    """The module's weights by the names that `Model` has for them."""
    return {f"whole.{n}": p.detach() for n, p in load(factory).module.named_parameters()}
