"""The quantized weight that every exporter stores: packed codes, canonical scales.

Uniform quantization with one scale per group along the input dimension: value = code * scale in fp32. There is one code more below
zero than above. Where every target holds negative scales, a scale may be negative: the code without a partner is then the group's
largest value, and the squared error is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.packing import WIDTHS, packed_bytes, unpack

SMALLEST_SCALE = 2.0**-14
"""The smallest normal float16; below it a backend with float16 scales would round or flush."""
LARGEST_SCALE = 65280.0
"""The largest bfloat16 that a float16 holds."""


def canonical(scale: torch.Tensor) -> torch.Tensor:
    """The nearest canonical scale of each fp32 `scale` (any shape), as fp32.

    Canonical scales are what bfloat16 and normal float16 both hold exactly: bfloat16 values in [2**-14, 65280]. Every
    backend's scale type then carries them unchanged, provided codes are computed after this rounding.
    """
    return scale.to(torch.bfloat16).to(torch.float32).clamp_(SMALLEST_SCALE, LARGEST_SCALE)


def is_canonical(scales: torch.Tensor) -> bool:
    """Whether every value of `scales` (any float dtype, any shape) is a canonical scale or the negative of one. NaN is not."""
    exact = scales.to(torch.float32).abs()
    inside = (exact >= SMALLEST_SCALE) & (exact <= LARGEST_SCALE)
    return bool((inside & (exact.to(torch.bfloat16).to(torch.float32) == exact)).all())


def sides(groups: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The signs, 1 or -1, that scales get where they may be negative: fp32 `groups` along `dim` -> its size there 1.

    The code without a partner goes to the side of the group's largest weight. With two bits, where it is a quarter of the codes,
    it goes to the side with the larger sum of cubes.
    """
    if bits == 2:
        heavy = groups.pow(3).sum(dim, keepdim=True) > 0
    else:
        low, high = torch.aminmax(groups, dim=dim, keepdim=True)
        heavy = high > -low
    return torch.where(heavy, -1.0, 1.0)


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight of shape (N, K): N output channels, K inputs.

    codes: uint8 [N, K*bits/8], see `packing`; c in [-2**(bits-1), 2**(bits-1)-1] is stored as c + 2**(bits-1).
    scales: bfloat16 [N, K/group_size], canonical but for their signs. bits: 2, 3, 4, 5, 6 or 8. group_size: K means one
    scale per channel. Raises ValueError when the parts do not fit together.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    group_size: int
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if self.bits not in WIDTHS:
            raise ValueError(f"code width {self.bits} is not one of {', '.join(map(str, WIDTHS))}")
        if self.group_size < 1 or columns % self.group_size:
            raise ValueError(f"group size {self.group_size} does not divide the {columns} inputs")
        if self.codes.dtype != torch.uint8 or self.scales.dtype != torch.bfloat16:
            raise ValueError(
                f"codes and scales must be uint8 and bfloat16, not {self.codes.dtype} and {self.scales.dtype}"
            )
        wanted = (rows, packed_bytes(columns, self.bits))
        if tuple(self.codes.shape) != wanted:
            raise ValueError(f"codes have shape {tuple(self.codes.shape)}, expected {wanted}")
        wanted = (rows, columns // self.group_size)
        if tuple(self.scales.shape) != wanted:
            raise ValueError(f"scales have shape {tuple(self.scales.shape)}, expected {wanted}")
        if not is_canonical(self.scales):
            raise ValueError("scales are not all bfloat16 values in [2**-14, 65280], or the negatives of such")

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales as stored in a quantized checkpoint."""
        return self.codes.numel() + 2 * self.scales.numel()

    @property
    def signed(self) -> torch.Tensor:
        """The signed codes, int8 [N, K]."""
        offset = 1 << (self.bits - 1)
        unsigned = unpack(self.codes, self.bits, self.shape[1])
        return (unsigned.to(torch.int16) - offset).to(torch.int8)

    def dequantize(self) -> torch.Tensor:
        """The weight's value on every runtime: code * scale, fp32 [N, K]."""
        rows, columns = self.shape
        grouped = self.signed.to(torch.float32).view(rows, columns // self.group_size, self.group_size)
        return grouped.mul_(self.scales.to(torch.float32).unsqueeze(-1)).view(rows, columns)
