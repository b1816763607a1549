"""The header of a TensorRT engine file, read without TensorRT."""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError

HALF_STATES = ("kv", "cross")


"""Kinds of states that are float16."""


_SM_BITS = (75, 80, 86, 89, 120, 121)


_HEAD = 36  # bytes of an engine file that are read as its header


# A tagged string (its length, then its letters) in an engine's plan, and what stands behind the name of an input or output.
_STRING, _PORT = b"\x01\x80\x0c\x80\x01\x00", b"\x1c\x80\x01\x00\x03\x80\x01\x00"


_LONGEST = 512  # letters of a name


_PROFILE = re.compile(r" \[profile (\d+)\]$")


@dataclass(frozen=True)
class Header:
    """What a TensorRT-RTX engine file says of itself.

    ports: names of its inputs and outputs. profiles: how many optimization profiles it was built with.
    """

    version: tuple[int, int, int, int]
    payload_bytes: int
    sms: tuple[int, ...]
    ports: frozenset[str]
    profiles: int


def read_header(path: Path) -> Header:
    """The header of an engine and the names in its plan. Raises UserError if it is none, or shorter than it says."""
    if not path.is_file() or path.stat().st_size < _HEAD:
        raise UserError(f"{path}: not a TensorRT-RTX engine; export the bundle again")
    # Nothing but names and numbers is taken from a plan, each within the file.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        if plan[:4] != b"vtrt" or plan[28:32] != b"vtrt":
            raise UserError(f"{path}: not a TensorRT-RTX engine; export the bundle again")
        (payload,) = struct.unpack_from("<Q", plan, 16)
        (mask,) = struct.unpack_from("<I", plan, 32)
        if len(plan) < payload:
            raise UserError(f"{path}: {len(plan)} bytes where its header says {payload}; export the bundle again")
        names = _ports(plan)
        version = (plan[24], plan[25], plan[26], plan[27])
    sms = tuple(sm for i, sm in enumerate(_SM_BITS) if mask >> i & 1)
    profiles = 1 + max((int(m[1]) for m in map(_PROFILE.search, names) if m is not None), default=0)
    return Header(version, payload, sms, frozenset(_PROFILE.sub("", n) for n in names), profiles)


def _ports(plan: mmap.mmap) -> list[str]:
    """Names of inputs and outputs; those of a second profile end in `[profile 1]`.

    Layers that TensorRT named itself can look like ports; no port of ours is unnamed.
    """
    found = []
    for match in re.finditer(re.escape(_STRING) + rb"(..)\0{6}", plan, re.DOTALL):
        (length,) = struct.unpack("<H", match[1])
        stop = match.end() + length
        if 0 < length <= _LONGEST and plan[stop : stop + len(_PORT)] == _PORT:
            found.append(plan[match.end() : stop].decode("utf-8", "replace"))
    return [name for name in found if not name.startswith("(Unnamed Layer")]
