"""What a file calls a model's tensors, as a table of rules: rename, split, join, transpose, reorder rows, leave out.

A rule is about a module's path; its weight and bias follow it. In a path `{}` stands for a number and `*` for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..system.reading import one_line
from .row_orders import Halves

PREFIXES = (
    ("model.language_model.model.", "model."),
    ("model.language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model."),
)
"""What stands before the names of the text model in the files of a multimodal one, and what stands there in a text model's."""

LEFT_OUT = (
    *("mtp.*", "model.mtp.*", "*.mtp_block.*", "v_head.*", "value_head.*"),
    *("vision_tower.*", "model.vision_tower.*", "vision_model.*", "model.vision_model.*", "visual.*", "model.visual.*"),
    *("vision_encoder.*", "patch_merger.*", "vision_language_adapter.*", "pre_mm_projector_norm.*"),
    *("multi_modal_projector.*", "model.multi_modal_projector.*", "model.connector.*", "connector.*"),
    *("audio_tower.*", "model.audio_tower.*", "embed_vision.*", "model.embed_vision.*", "embed_audio.*"),
    *("model.embed_audio.*", "audio_projection.*"),
)
"""Tensors that no text model reads: heads for later tokens and values, and the towers of images and sound."""

_RECOMPUTED = ("*.inv_freq", "inv_freq", "*.rotary_emb.cos_cached", "*.rotary_emb.sin_cached")


@dataclass(frozen=True)
class Piece:
    """A part of a tensor in a file.

    Attributes:
        source: the tensor's name in the file.
        start, rows: the rows it is, counted behind a transposition; None for all that there are.
        of: how many rows the whole tensor must have; 0 for any.
        transposed: the file holds [in, out].
        heads: > 0: rows are in another order within so many heads (`order`).
        order: "halves": the file keeps neighbours together that RoPE turns, the model the halves of a head; "third": for each
            head the file has its query, key and value, and this is number `part` of them.
        rotated: > 0: of each head in the order "halves" only the first so many rows are in it.
        taps: the file holds a convolution over time, [out, in, taps], the model its matrix [out, taps * in], a tap's inputs side
            by side.
        add: what is added to each value.
        at: its place among the pieces of a joined tensor.
    """

    source: str
    start: int = 0
    rows: int | None = None
    of: int = 0
    transposed: bool = False
    heads: int = 0
    order: str = ""
    part: int = 0
    rotated: int = 0
    taps: bool = False
    add: float = 0.0
    at: int = 0

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the piece of a tensor [stored]. Raises ValueError if it cannot be of it."""
        if self.taps and len(stored) != 1:
            if len(stored) != 3:
                raise ValueError(f"{len(stored)} dimensions, a convolution over time has 3")
            stored = (stored[0], stored[1] * stored[2])
        whole = tuple(reversed(stored)) if self.transposed and len(stored) == 2 else stored
        if not whole:
            return whole
        if self.of and whole[0] != self.of:
            raise ValueError(f"{whole[0]} rows, {self.of} are expected")
        if self.order == "third":
            if whole[0] % (3 * self.heads):
                raise ValueError(f"{whole[0]} rows are not three for each of {self.heads} heads")
            return (whole[0] // 3, *whole[1:])
        if self.order == "halves" and whole[0] % (2 * self.heads):
            raise ValueError(f"{whole[0]} rows are not pairs of {self.heads} heads")
        rows = whole[0] - self.start if self.rows is None else self.rows
        if rows < 0 or self.start + rows > whole[0]:
            raise ValueError(f"rows {self.start} to {self.start + rows} of {whole[0]}")
        return (rows, *whole[1:])

    def file_rows(self, start: int, stop: int, total: int) -> slice | npt.NDArray[np.int64]:
        """The file's rows that are rows start..stop of a piece of `total` rows."""
        if not self.order:
            return slice(self.start + start, self.start + stop)
        row = np.arange(start, stop)
        size = total // self.heads
        if self.order == "halves":
            return Halves(self.heads, size, self.rotated)(row)
        head, within = np.divmod(row, size)
        rows: npt.NDArray[np.int64] = (3 * head + self.part) * size + within
        return rows


@dataclass(frozen=True)
class Rule:
    """A path in the file, and the paths in the model that it has pieces of. A piece's `source` is filled in when it matches."""

    path: str
    targets: tuple[tuple[str, Piece], ...]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        text = re.escape(self.path).replace(r"\{\}", r"(\d+)").replace(r"\*", "(.+)")
        return re.compile(rf"{text}(\.weight|\.bias)?")

    def pieces(self, name: str) -> list[tuple[str, Piece]] | None:
        """(name in the model, piece) of a tensor of the file; None if the rule is not about it."""
        match = self.pattern.fullmatch(name)
        if match is None:
            return None
        *parts, leaf = match.groups()
        return [(_filled(path, parts) + (leaf or ""), replace(piece, source=name)) for path, piece in self.targets]


def _filled(path: str, parts: Iterable[str]) -> str:
    for part in parts:
        path = re.sub(r"\{\}|\*", lambda _, part=part: part, path, count=1)  # type: ignore[misc]
    return path


def rename(path: str, new: str, transposed: bool = False, add: float = 0.0) -> Rule:
    """`path` of the file is `new` of the model."""
    return Rule(path, ((new, Piece("", transposed=transposed, add=add)),))


def split(path: str, parts: Mapping[str, int], transposed: bool = False) -> Rule:
    """`path` of the file holds several weights one below the other. parts: name in the model -> its rows."""
    targets, start = [], 0
    for name, rows in parts.items():
        targets.append((name, Piece("", start, rows, sum(parts.values()), transposed)))
        start += rows
    return Rule(path, tuple(targets))


def join(paths: Iterable[str], new: str) -> list[Rule]:
    """`paths` of the file, one below the other, are `new` of the model."""
    return [Rule(path, ((new, Piece("", at=i)),)) for i, path in enumerate(paths)]


def halves(path: str, heads: int, new: str | None = None, rotated: int = 0) -> Rule:
    """A query or key whose rows are in the order of a RoPE that turns neighbours. rotated: rows of each head, 0 for all."""
    return Rule(path, ((new or path, Piece("", heads=heads, order="halves", rotated=rotated)),))


def convolution(path: str, new: str) -> Rule:
    """A convolution over time, which is a linear over patches here (`models.layers.convolution`)."""
    return Rule(path, ((new, Piece("", taps=True)),))


def heads_of_three(path: str, parts: tuple[str, str, str], heads: int) -> Rule:
    """`path` holds for each head its query, key and value. parts: their names in the model."""
    return Rule(path, tuple((n, Piece("", heads=heads, order="third", part=i)) for i, n in enumerate(parts)))


@dataclass(frozen=True, init=False)
class Names:
    """The table of a family. root: what a file of the model without its head lacks before each name.

    ignored: patterns of tensors that the model does not read, beside those that none does.
    """

    rules: tuple[Rule, ...] = ()
    root: str = "model."
    ignored: tuple[str, ...] = field(default=())

    def __init__(self, *rules: Rule, root: str = "model.", ignored: Iterable[str] = ()) -> None:
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "root", root)
        object.__setattr__(self, "ignored", tuple(ignored))

    def resolve(self, present: Iterable[str], wanted: set[str]) -> Resolved:
        """Where each tensor of the model lies among those that a file has. Raises UserError if two are the same one."""
        pieces: dict[str, dict[int, Piece]] = {}
        left_out: list[str] = []
        for name in present:
            found = self._found(name, wanted)
            if found is None:
                if _any(name, (*_RECOMPUTED, *LEFT_OUT, *self.ignored)):
                    if not _any(name, _RECOMPUTED):
                        left_out.append(name)
                    continue
                found = [(name, Piece(name))]  # whoever asks which tensors have no place names it
            for new, piece in found:
                taken = pieces.setdefault(new, {})
                if piece.at in taken:
                    raise UserError(
                        f"the checkpoint holds {one_line(new)} twice: {one_line(taken[piece.at].source)} and {one_line(name)}"
                    )
                taken[piece.at] = piece
        return Resolved({new: tuple(by[i] for i in sorted(by)) for new, by in pieces.items()}, tuple(left_out))

    def _found(self, name: str, wanted: set[str]) -> list[tuple[str, Piece]] | None:
        tried = [name]
        tried += [new + name.removeprefix(old) for old, new in PREFIXES if name.startswith(old)]
        tried += [self.root + name]
        for candidate in tried:
            for rule in self.rules:
                found = rule.pieces(candidate)
                if found is not None and all(new in wanted for new, _ in found):
                    return [(new, replace(piece, source=name)) for new, piece in found]
            if candidate in wanted:
                return [(candidate, Piece(name))]
        return None


@dataclass(frozen=True)
class Resolved:
    """pieces: name in the model -> its pieces in the file, one below the other. left_out: tensors that no model reads."""

    pieces: Mapping[str, tuple[Piece, ...]]
    left_out: tuple[str, ...]


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
