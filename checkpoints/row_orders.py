"""Orders of rows and columns in which files differ from the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Halves:
    """Rows of `heads` heads of `size`: the file's RoPE turns neighbours (llama.cpp, Mistral), the model's the two halves of a head.

    The model's row of half h and pair j is the file's row 2 j + h. rotated: so many rows of a head turn, the first; 0: all.
    """

    heads: int
    size: int
    rotated: int = 0

    @property
    def total(self) -> int:
        return self.heads * self.size

    def __call__(self, rows: Numbers) -> Numbers:
        """The file's rows that are these rows of the model."""
        head, within = np.divmod(rows, self.size)
        turning = self.rotated or self.size
        half, pair = np.divmod(within, turning // 2)
        turned: Numbers = head * self.size + np.where(within < turning, 2 * pair + half, within)
        return turned


@dataclass(frozen=True)
class Tiled:
    """Heads of `width` rows behind `start`: `each` of a group side by side in the model, one of each group in the file."""

    groups: int
    each: int
    width: int
    start: int = 0

    @property
    def total(self) -> int:
        return self.start + self.groups * self.each * self.width

    def __call__(self, rows: Numbers) -> Numbers:
        """The file's rows or columns that are these of the model."""
        head, within = np.divmod(rows - self.start, self.width)
        group, which = np.divmod(head, self.each)
        moved: Numbers = self.start + (which * self.groups + group) * self.width + within
        return np.where(rows < self.start, rows, moved)


Order = Halves | Tiled
