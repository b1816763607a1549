"""Which ONNX Runtime first has what the exporter writes. Every row was found by opening graphs with the wheels of the registry.

tests/exporters/onnx/test_onnx_releases.py does so again. No library is imported here.
"""

from __future__ import annotations

import re

from ...errors import UserError
from ...system.reading import shown

Release = tuple[int, ...]

OLDEST = "1.23.2"
"""The oldest release that graphs are written for: before 1.23 GatherBlockQuantized has no `bits`, so no table of embeddings."""

OPSETS = {24: "1.24.1"}
"""Opset of the standard's domain -> the first release that reads it. Older ones: `OLDEST`."""

IR_VERSIONS = {12: "1.24.1"}
"""Version of the file format -> the first release that reads it. Older ones: `OLDEST`."""

OPS = {
    "Attention": "1.24.1",
    "TensorScatter": "1.25.0",
    "CausalConvWithState": "1.25.1",
    "LinearAttention": "1.25.1",
}
"""Op -> the first release with a CPU kernel of it. What is not here is in `OLDEST`."""

ATTRIBUTES = {
    ("GroupQueryAttention", "causal"): "1.30.0",
    ("MatMulNBits", "bits=2"): "1.24.1",
    ("GatherBlockQuantized", "bits=2"): "1.27.0",
}
"""(op, attribute or attribute=value) -> the first release that knows it, where it came after the op."""

CONTRIB = frozenset(
    {
        "CausalConvWithState",
        "FusedMatMul",
        "GatherBlockQuantized",
        "GroupQueryAttention",
        "LinearAttention",
        "MatMulNBits",
        "QuickGelu",
        "RotaryEmbedding",
        "SkipSimplifiedLayerNormalization",
    }
)
"""The ops of com.microsoft whose first release is known: those that the exporter writes."""


def parse(version: str) -> Release:
    """`1.24` or `1.24.3` as numbers that compare. Raises UserError for anything else."""
    if re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,4}){1,2}", version) is None:
        raise UserError(f"{shown(version, 40)} is no version of ONNX Runtime; write 1.24 or 1.24.3")
    return tuple(int(part) for part in version.split("."))


def has(version: str, op: str, attribute: str = "") -> bool:
    """Whether the release `version` has an op of the exporter's, with an attribute. `1.24` is the last of its line."""
    return reaches(version, OPS.get(op, OLDEST)) and reaches(version, ATTRIBUTES.get((op, attribute), OLDEST))


def reaches(version: str, needed: str) -> bool:
    """Whether a release is not before `needed`. `1.24` is the last of its line."""
    numbers = parse(version)
    wanted = parse(needed)
    return numbers >= wanted[: len(numbers)]


def check_asked(choices: tuple[int, ...] | tuple[str, ...]) -> None:
    """Raise UserError unless the release that `--onnxruntime` asks for is one that graphs are written for."""
    for asked in map(str, choices):
        if not reaches(asked, OLDEST):
            raise UserError(f"--onnxruntime {asked}: graphs are written for {OLDEST} and later; ask for such a release")
