"""The tensors that one quantized weight consists of, and what a scheme makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ...errors import UserError
from ...system.dtypes import dtype_name
from ...system.reading import one_line
from ..checkpoint import WEIGHT_DTYPES, TensorInfo, TensorStore

FLOATS = WEIGHT_DTYPES
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INT32 = (torch.int32,)
WAY_OUT = "is config.json the one of these weights?"


@dataclass(frozen=True)
class Weight:
    """A weight as its parts mean it.

    shape: [out, in]. parts: names of the tensors that it replaces. kind: all that decides its values beside the parts' bytes.
    rows: float32 values of rows start..stop, which reads these rows' parts alone.
    """

    shape: tuple[int, int]
    parts: tuple[str, ...]
    kind: str
    rows: Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Found:
    """What a scheme found.

    weights: by name. text: the scheme in words. unused: tensors that a model of float weights does not have.
    """

    weights: Mapping[str, Weight]
    text: str
    unused: frozenset[str] = frozenset()


@dataclass
class Parts:
    """The tensors whose names start with `stem`, checked when they are taken."""

    store: TensorStore
    stem: str
    taken: list[str] = field(default_factory=list)

    def has(self, leaf: str) -> bool:
        return self.stem + leaf in self.store.infos

    def take(self, leaf: str, dtypes: Iterable[torch.dtype], *shapes: tuple[int | None, ...]) -> TensorInfo:
        """The info of a part. Raises UserError if it is missing, empty, or has another dtype or none of the shapes.

        A size None stands for any.
        """
        name = self.stem + leaf
        info = self.store.infos.get(name)
        if info is None:
            raise UserError(
                f"no tensor {one_line(name)}, which belongs to {one_line(self.taken or self.stem)}; {WAY_OUT}"
            )
        fits = not shapes or any(
            len(shape) == len(info.shape) and all(s in (None, n) for s, n in zip(shape, info.shape, strict=True))
            for shape in shapes
        )
        if not fits or info.dtype not in tuple(dtypes) or 0 in info.shape:
            expected = " or ".join(dtype_name(d) for d in dtypes)
            sizes = " or ".join(str([("any" if s is None else s) for s in shape]).replace("'", "") for shape in shapes)
            raise UserError(
                f"{one_line(name)} is {dtype_name(info.dtype)} {list(info.shape)}, expected {expected} {sizes}; {WAY_OUT}"
            )
        self.taken.append(name)
        return info

    def drop(self, *leaves: str) -> None:
        """Take parts that do not change the weight, where they are there."""
        self.taken += [self.stem + leaf for leaf in leaves if self.has(leaf)]

    def read(self, leaf: str) -> torch.Tensor:
        return self.store.tensor(self.stem + leaf)

    def error(self, text: str) -> UserError:
        return UserError(f"{one_line(self.stem)}: {text}; {WAY_OUT}")

    def weight(self, shape: tuple[int, int], kind: str, rows: Callable[[int, int], torch.Tensor]) -> Weight:
        return Weight(shape, tuple(self.taken), kind, rows)


def modules(store: TensorStore, suffix: str) -> list[str]:
    """What stands before `suffix` in the names that end with it: "a.b." of "a.b.qweight"."""
    return [name.removesuffix(suffix) for name in store.infos if name.endswith("." + suffix)]


def group_index(parts: Parts, leaf: str, groups: int, size: int) -> Callable[[], torch.Tensor | None]:
    """Reads which group each column belongs to, int64 [in]; None where they are in order, `size` columns each.

    Raises UserError, when it is called, for a group that is not there.
    """

    def read() -> torch.Tensor | None:
        index = parts.read(leaf).long()
        if bool((index < 0).any()) or bool((index >= groups).any()):
            raise parts.error(f"{leaf} names a group that is not one of its {groups}")
        in_order = torch.arange(index.shape[0]) // size
        return None if torch.equal(index, in_order) else index

    return read
