"""Which bits, groups and scale types targets hold, one alone or several together.

Found by running each backend (see `docs`). Every exporter stores the same codes and scales; where a target lacks a
width, the codes ride in the next wider container it has: the numbers stay, the bytes do not. A group size of 0 means
one scale per output channel.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from ..errors import UserError
from .registry import TARGETS
from .target import WeightStorage

PER_CHANNEL = 0
"""The group size that stands for one scale per output channel, whatever the number of inputs."""

_MATMULNBITS_BLOCKS = (128, 64, 32, 16)


def signed_scales(targets: Iterable[str]) -> bool:
    """Whether every one of `targets` holds negative scales; of no targets at all nothing is known."""
    names = tuple(targets)
    return bool(names) and all(TARGETS[name].signed_scales for name in names)


def weight_storage(target: str, bits: int) -> WeightStorage:
    """How `target` holds codes of `bits` bits. Raises UserError for an unknown target or a width that it does not hold."""
    if target not in TARGETS:
        raise UserError(f"unknown target {target!r}; choose from {', '.join(TARGETS)}")
    rows = {row.bits: row for row in TARGETS[target].storage}
    if bits not in rows:
        widths = ", ".join(map(str, sorted(rows)))
        raise UserError(f"{bits}-bit weights do not exist for {target}; choose from {widths}")
    return rows[bits]


def container(target: str, bits: int) -> int:
    """Bits a code of `bits` bits takes in the target's artefact. Raises UserError as `weight_storage` does."""
    return weight_storage(target, bits).container


def native_bits(target: str) -> tuple[int, ...]:
    """The widths that the target stores at their true size. Raises UserError for an unknown target."""
    weight_storage(target, 4)
    return tuple(sorted(row.bits for row in TARGETS[target].storage if row.container == row.bits))


def common_bits(targets: Iterable[str]) -> tuple[int, ...]:
    """The widths that every one of `targets` stores at their true size. Raises UserError as `native_bits` does."""
    return tuple(sorted(set.intersection(*(set(native_bits(t)) for t in targets))))


def legal_group(target: str, bits: int, group: int) -> bool:
    """Whether the target runs codes of `bits` bits with this group size (0: per channel) at full speed."""
    return group == PER_CHANNEL or group in weight_storage(target, bits).groups


def legal_choices(targets: Iterable[str], widths: Iterable[int], groups: Iterable[int]) -> list[tuple[int, int]]:
    """The (bits, group) pairs that every one of `targets` holds, for `widths` (16: bf16, always) and `groups`.

    8 bits take one scale per channel everywhere; so does another width whose groups some target refuses. Without
    targets only the first rule holds. Raises UserError as `weight_storage` does.
    """
    targets = tuple(targets)
    groups = tuple(groups)
    choices: list[tuple[int, int]] = []
    for bits in sorted(set(widths)):
        fitting = [] if bits in (8, 16) else [g for g in groups if all(legal_group(t, bits, g) for t in targets)]
        choices += [(bits, group) for group in fitting or [PER_CHANNEL]]
    return choices


def stored_bytes(target: str, bits: int, group: int, rows: int, columns: int) -> int:
    """Bytes of an [N, K] = [`rows`, `columns`] weight in the target's artefact: codes, scales, lookup table.

    `group`: the effective group size; 0 or K means one scale per channel. 16 bits: the bf16 or fp16 weight itself.
    Raises UserError as `weight_storage` does.
    """
    if bits == 16:
        return rows * columns * 2
    row = weight_storage(target, bits)
    per_channel = group in (PER_CHANNEL, columns)
    if row.scales_in_blocks:
        block = scale_block(columns) if per_channel else group
        blocks = ceil(columns / block)  # the last block is padded when 16 does not divide K
        return rows * blocks * (ceil(block * row.container / 8) + row.scale_bytes)
    codes = rows * ceil(columns * row.container / 8)
    scales = rows * row.channel_scale_bytes if per_channel else rows * (columns // group) * row.scale_bytes
    return codes + scales + row.table_bytes


def scale_block(columns: int) -> int:
    """The block over which MatMulNBits repeats a channel's scale: the largest of 128, 64, 32, 16 dividing K, or 16."""
    return next((block for block in _MATMULNBITS_BLOCKS if columns % block == 0), 16)
