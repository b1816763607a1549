"""Codes as bits: rows of small unsigned integers to a dense little-endian bit stream and back.

Along the last dimension a row is one bit stream, lowest bits first: with 4 bits element 0 is the low nibble of byte 0;
with 3 bits eight codes fill three bytes. `unpack` is plain traceable uint8 arithmetic (slices, shifts, a stack) with no
data-dependent shape, so it may stand inside an exported program as part of an op's eager reference.
"""

from __future__ import annotations

from math import gcd

import torch

WIDTHS = (2, 3, 4, 5, 6, 8)
"""The code widths in bits that a packed tensor may have."""


def period(bits: int) -> int:
    """Codes after which the bit stream is again at a byte boundary; the row length must be a multiple of it."""
    _check_width(bits)
    return 8 // gcd(bits, 8)


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row of `columns` codes. Raises ValueError when the row does not end at a byte boundary."""
    if columns % period(bits):
        raise ValueError(
            f"a row of {columns} codes of {bits} bits does not fill whole bytes; need a multiple of {period(bits)}"
        )
    return columns * bits // 8


def pack(unsigned: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack `unsigned`: uint8 [..., K], values below 2**bits -> uint8 [..., K*bits/8].

    Raises ValueError for another dtype, a width outside `WIDTHS`, a K that does not fill whole bytes, a code too large.
    """
    if unsigned.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, not {unsigned.dtype}")
    row_bytes = packed_bytes(unsigned.shape[-1], bits)
    if bits == 8:
        return unsigned.contiguous()
    if unsigned.numel() and int(unsigned.max()) >= 1 << bits:
        raise ValueError(f"code {int(unsigned.max())} does not fit in {bits} bits")
    run = period(bits)
    codes = unsigned.reshape(*unsigned.shape[:-1], unsigned.shape[-1] // run, run)
    columns = []
    for byte in range(run * bits // 8):
        first = byte * 8 // bits
        last = (byte * 8 + 7) // bits
        value: torch.Tensor | None = None
        for j in range(first, last + 1):
            shift = j * bits - byte * 8  # where code j starts in this byte; negative: it starts in the byte before
            part = codes[..., j] << shift if shift >= 0 else codes[..., j] >> -shift
            value = part if value is None else value | part
        assert value is not None
        columns.append(value)
    return torch.stack(columns, dim=-1).reshape(*unsigned.shape[:-1], row_bytes)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Unpack `packed`: uint8 [..., K*bits/8] -> uint8 [..., K], K = `columns`. Traceable; the inverse of `pack`.

    Raises ValueError when the last dimension is not the packed length of `columns` codes.
    """
    row_bytes = packed_bytes(columns, bits)
    if packed.shape[-1] != row_bytes:
        raise ValueError(f"{columns} codes of {bits} bits take {row_bytes} bytes, not {packed.shape[-1]}")
    if bits == 8:
        return packed
    run = period(bits)
    mask = (1 << bits) - 1
    octets = packed.reshape(*packed.shape[:-1], columns // run, run * bits // 8)
    codes = []
    for j in range(run):
        byte, shift = divmod(j * bits, 8)
        value = octets[..., byte] >> shift if shift else octets[..., byte]
        if shift + bits > 8:  # the code reaches into the next byte
            value = value | (octets[..., byte + 1] << (8 - shift))
        codes.append(value & mask if shift + bits != 8 else value)
    return torch.stack(codes, dim=-1).reshape(*packed.shape[:-1], columns)


def repack(packed: torch.Tensor, bits: int, to_bits: int, columns: int) -> torch.Tensor:
    """The same signed codes in a wider container: uint8 [..., K*bits/8] -> uint8 [..., K*to_bits/8].

    A code c is stored as c + 2**(bits-1), so the stored number moves by 2**(to_bits-1) - 2**(bits-1).
    Raises ValueError when `to_bits` is narrower than `bits`.
    """
    if to_bits == bits:
        packed_bytes(columns, bits)
        return packed
    if to_bits < bits:
        raise ValueError(f"{bits}-bit codes do not fit in a {to_bits}-bit container")
    return pack(unpack(packed, bits, columns) + ((1 << (to_bits - 1)) - (1 << (bits - 1))), to_bits)


def _check_width(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"code width {bits} is not one of {', '.join(map(str, WIDTHS))}")


def swap_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 of the same shape, the halves of each byte exchanged."""
    swapped = packed >> 4
    return swapped.bitwise_or_(packed << 4)
