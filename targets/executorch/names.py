"""File and method names that exporter and runtime of ExecuTorch share."""

from __future__ import annotations

PROGRAM = "model.pte"


POSITIONS = " on positions"


"""Behind the name of a kernel that is given no activations, but the integers of positions, or a mask."""


STEP, EXACT = "_step", "_chunk"


"""What the name of a graph's method for one token ends in, and that of one for exactly as many as it takes."""
