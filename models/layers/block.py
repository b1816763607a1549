"""The base class of modules whose linears have a role in quantization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from .linear import Linear

Groups = tuple[tuple[str, ...], ...]


class Block(nn.Module):
    """A module that declares the roles of its linears.

    Attributes:
        fused: children that a backend may fuse into one matrix; those of a tuple share one choice of bits.
        protected: children that stay at 16 bits unless the user overrides it: gates and decays of recurrences.
        key_value: children that compute keys and values.
        heads: query heads of a block that attends, heads of a recurrence; 0 for others.
    """

    fused: ClassVar[Groups] = ()
    protected: ClassVar[tuple[str, ...]] = ()
    key_value: ClassVar[tuple[str, ...]] = ()
    heads: int = 0

    def plain_linears(self, names: Sequence[str]) -> list[str]:
        """Those of the children `names` that are there and are linears, and not quantized ones."""
        children = dict(self.named_modules())
        return [name for name in names if isinstance(children.get(name), Linear)]


def attention_heads(module: nn.Module) -> int:
    """Heads of a module that attends or recurs; 0 of any other."""
    return module.heads if isinstance(module, Block) else 0
