"""Overrides of a plan by regex."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..ops.packing import WIDTHS
from ..targets.storage import PER_CHANNEL
from ..targets.target import GROUP_SIZES
from .plan import UNQUANTIZED


@dataclass(frozen=True)
class Override:
    """A user's choice for the weights whose name matches `regex` (searched anywhere); group None: the allocator's."""

    regex: str
    bits: int
    group: int | None = None

    @staticmethod
    def parse(text: str) -> Override:
        """Read 'regex=bits' or 'regex=bits:group' (group 0: one scale per channel). Raises UserError."""
        match = re.fullmatch(r"(.+)=([0-9]{1,3})(?::([0-9]{1,6}))?", text, re.DOTALL)
        if match is None:
            raise UserError(f"override {text!r} is not 'regex=bits' or 'regex=bits:group', for example 'embed=8'")
        group = None if match[3] is None else int(match[3])
        override = Override(match[1], int(match[2]), group)
        override.check()
        return override

    def check(self) -> None:
        """Raise UserError unless the regex compiles and the bits and group exist."""
        try:
            re.compile(self.regex)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"override {self.regex!r} is not a regular expression: {error}") from None
        _check_widths((self.bits,), f"override {self.regex!r}")
        if self.group not in (None, PER_CHANNEL) and (self.group not in GROUP_SIZES or self.bits in (8, UNQUANTIZED)):
            raise UserError(
                f"override {self.regex!r}: group {self.group} at {self.bits} bits; 8 bits take one scale per channel "
                f"(group 0), fewer take {', '.join(map(str, GROUP_SIZES))} or 0"
            )


def _check_widths(widths: Sequence[int], who: str) -> None:
    for width in widths:
        if width not in (*WIDTHS, UNQUANTIZED):
            raise UserError(f"{who}: {width} bits; choose from {', '.join(map(str, (*WIDTHS, UNQUANTIZED)))}")
