"""Which bits, groups and scale types each target holds, in one table. What may enter: nothing.

Found by running each backend (see `docs`). Every exporter stores the same codes and scales; where a target lacks a
width, the codes ride in the next wider container it has: the numbers stay, the bytes do not. A group size of 0 means
one scale per output channel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from ..errors import UserError

PER_CHANNEL = 0
"""The group size that stands for one scale per output channel, whatever the number of inputs."""

GROUP_SIZES = (16, 32, 64, 128, 256)
"""Group sizes that some target can hold; powers of two only."""

_MATMULNBITS_BLOCKS = (128, 64, 32, 16)


@dataclass(frozen=True)
class Form:
    """How `target` holds codes of `bits` bits.

    container: bits of a code in the artefact. groups: the group sizes it takes; one scale per channel always works.
    scale_bytes, channel_scale_bytes: of one group scale, and of one scale per channel. zero_points: what the target
    could hold (we use none: signed scales do nearly as much for no byte). scales_in_blocks: the format knows no per-channel
    scale, so it is repeated for each block of inputs. table_bytes: the lookup table of one weight, where codes are indices.
    """

    target: str
    bits: int
    container: int
    groups: tuple[int, ...]
    scale_bytes: int
    channel_scale_bytes: int
    zero_points: str
    scales_in_blocks: bool = False
    table_bytes: int = 0


def _matmulnbits(target: str, scale_bytes: int) -> list[Form]:
    # 2 bits: blocks 16 and 256 exist and are silently slow on the CPU
    widths = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}
    return [
        Form(
            target,
            bits,
            container,
            (32, 64, 128) if container == 2 else GROUP_SIZES,
            scale_bytes,
            scale_bytes,
            "packed uint8",
            True,
        )
        for bits, container in widths.items()
    ]


def _xnnpack() -> list[Form]:
    # "Only 4b group quantization is supported"; group scales are stored as bf16, channel scales as fp32
    narrow = [Form("executorch", bits, 4, (32, 64, 128, 256), 2, 4, "none") for bits in (2, 3, 4)]
    return narrow + [Form("executorch", bits, 8, (), 2, 4, "none") for bits in (5, 6, 8)]


def _coreml() -> list[Form]:
    # 4 and 8 bits blockwise; 2, 3 and 6 as indices into an int8 table; no 5, which rides in 6
    blockwise = [Form("coreml", bits, bits, GROUP_SIZES, 2, 2, "same width as the codes") for bits in (4, 8)]
    indexed = {2: 2, 3: 3, 5: 6, 6: 6}
    return blockwise + [
        Form("coreml", bits, container, GROUP_SIZES, 2, 2, "in the table", table_bytes=1 << container)
        for bits, container in indexed.items()
    ]


def _tensorrt() -> list[Form]:
    # blocked INT8 is accepted and then expanded to fp16 inside the engine: it would cost, not save; INT4 with one scale
    # per channel is widened to INT8, so its scale is repeated for each block
    narrow = [Form("tensorrt", bits, 4, (16, 32, 64, 128), 2, 2, "none", True) for bits in (2, 3, 4)]
    return narrow + [Form("tensorrt", bits, 8, (), 2, 2, "none") for bits in (5, 6, 8)]


def _ethosu() -> list[Form]:
    # One scale per channel, in a record of ten bytes with the bias; Vela compresses the codes of eight bits further
    return [Form("ethosu", bits, 8, (), 10, 10, "none") for bits in (2, 3, 4, 5, 6, 8)]


FORMS: dict[tuple[str, int], Form] = {
    (form.target, form.bits): form
    for form in _matmulnbits("onnx", 4) + _xnnpack() + _coreml() + _tensorrt() + _matmulnbits("qnn", 2) + _ethosu()
}

TARGETS = tuple(dict.fromkeys(target for target, _ in FORMS))


TIED_TWICE = frozenset({"executorch"})
"""Targets that store an embedding's rows and the matrix of the head tied to it apart: their kernels want other layouts."""


SIGNED = frozenset({"onnx"})
"""Targets that hold negative scales. TensorRT refuses them; the others were not tried."""


def signed_scales(targets: Iterable[str]) -> bool:
    """Whether every one of `targets` holds negative scales; of no targets at all nothing is known."""
    names = set(targets)
    return bool(names) and names <= SIGNED


def form(target: str, bits: int) -> Form:
    """The row of the table. Raises UserError for a target or a width that is not in it."""
    if target not in TARGETS:
        raise UserError(f"unknown target {target!r}; choose from {', '.join(TARGETS)}")
    found = FORMS.get((target, bits))
    if found is None:
        widths = ", ".join(str(b) for t, b in sorted(FORMS) if t == target)
        raise UserError(f"{bits}-bit weights do not exist for {target}; choose from {widths}")
    return found


def container(target: str, bits: int) -> int:
    """Bits a code of `bits` bits takes in the target's artefact. Raises UserError as `form` does."""
    return form(target, bits).container


def native_bits(target: str) -> tuple[int, ...]:
    """The widths that the target stores at their true size. Raises UserError for an unknown target."""
    form(target, 4)
    return tuple(sorted(b for (t, b), row in FORMS.items() if t == target and row.container == b))


def common_bits(targets: Iterable[str]) -> tuple[int, ...]:
    """The widths that every one of `targets` stores at their true size. Raises UserError as `native_bits` does."""
    return tuple(sorted(set.intersection(*(set(native_bits(t)) for t in targets))))


def legal_group(target: str, bits: int, group: int) -> bool:
    """Whether the target runs codes of `bits` bits with this group size (0: per channel) at full speed."""
    return group == PER_CHANNEL or group in form(target, bits).groups


def legal_choices(targets: Iterable[str], widths: Iterable[int], groups: Iterable[int]) -> list[tuple[int, int]]:
    """The (bits, group) pairs that every one of `targets` holds, for `widths` (16: bf16, always) and `groups`.

    8 bits take one scale per channel everywhere; so does another width whose groups some target refuses. Without
    targets only the first rule holds. Raises UserError as `form` does.
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
    Raises UserError as `form` does.
    """
    if bits == 16:
        return rows * columns * 2
    row = form(target, bits)
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
