"""Codes out of bit streams, and codes times scales."""

from __future__ import annotations

from math import gcd

import torch


def stream_words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes of `bits` bits, one right behind the other."""
    return -(-count * bits // 32)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes, uint8 [rows, count], of little-endian bit streams [rows, words]. bits: 1 to 8."""
    stream = words.clone(memory_format=torch.contiguous_format).view(
        torch.uint8
    )  # a row or column alone has odd strides
    together = 8 // gcd(bits, 8)  # codes that fill whole bytes
    steps, size = -(-count // together), bits * together // 8
    if stream.shape[1] < steps * size:
        stream = torch.nn.functional.pad(stream, (0, steps * size - stream.shape[1]))
    stream = stream[:, : steps * size].view(-1, steps, size)
    codes = torch.empty((stream.shape[0], steps, together), dtype=torch.uint8)
    for i in range(together):
        byte, shift = divmod(i * bits, 8)
        code = stream[:, :, byte] >> shift
        if shift + bits > 8:
            code |= stream[:, :, byte + 1] << (8 - shift)
        codes[:, :, i] = code & ((1 << bits) - 1)
    return codes.flatten(1)[:, :count]


def scaled(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    size: int,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """(codes - zeros) * scales, float32 [rows, width].

    codes: [rows, width], no float32. scales, zeros: float32 [rows, groups], for `size` columns each, of which the last may have
    fewer; or column i belongs to `groups[i]`.
    """
    values = codes.float()
    if groups is not None:
        if zeros is not None:
            values -= zeros[:, groups]
        return values.mul_(scales[:, groups])
    whole = values.shape[1] // size
    for columns, first, last in ((slice(0, whole * size), 0, whole), (slice(whole * size, None), whole, whole + 1)):
        part = values[:, columns]
        if part.shape[1]:
            part = part.view(part.shape[0], last - first, -1)
            if zeros is not None:
                part -= zeros[:, first:last, None]
            part *= scales[:, first:last, None]
    return values
