"""The expected squared error of rounding, by bits and group size."""

from __future__ import annotations

from ..targets.storage import PER_CHANNEL

EXPECTED_ERROR: dict[tuple[int, int], float] = {
    (2, 16): 0.125, (2, 32): 0.137, (2, 64): 0.143, (2, 128): 0.146, (2, 256): 0.148, (2, 0): 0.149,
    (3, 16): 0.0259, (3, 32): 0.0320, (3, 64): 0.0359, (3, 128): 0.0382, (3, 256): 0.0394, (3, 0): 0.0404,
    (4, 16): 0.00560, (4, 32): 0.00740, (4, 64): 0.00898, (4, 128): 0.0102, (4, 256): 0.0110, (4, 0): 0.0117,
    (5, 16): 0.00125, (5, 32): 0.00172, (5, 64): 0.00217, (5, 128): 0.00259, (5, 256): 0.00294, (5, 0): 0.00336,
    (6, 16): 2.82e-4, (6, 32): 4.01e-4, (6, 64): 5.21e-4, (6, 128): 6.38e-4, (6, 256): 7.45e-4, (6, 0): 9.23e-4,
    (8, 0): 6.02e-5,
    (16, 0): 2.76e-6,
}  # fmt: skip
"""(bits, group) -> |w - w'|**2 / |w|**2, measured: `quantize_rtn` on a 4096 x 1024 standard normal matrix (group 0: one
scale for the 1024 inputs); 16 bits: rounding fp32 to bf16. tests/quant/test_allocate.py measures it again."""

SIGNED_ERROR: dict[tuple[int, int], float] = {
    (2, 16): 0.0923, (2, 32): 0.112, (2, 64): 0.124, (2, 128): 0.133, (2, 256): 0.138, (2, 0): 0.145,
    (3, 16): 0.0207, (3, 32): 0.0266, (3, 64): 0.0314, (3, 128): 0.0350, (3, 256): 0.0374, (3, 0): 0.0397,
    (4, 16): 0.00498, (4, 32): 0.00664, (4, 64): 0.00816, (4, 128): 0.00942, (4, 256): 0.0104, (4, 0): 0.0114,
    (5, 16): 0.00122, (5, 32): 0.00165, (5, 64): 0.00207, (5, 128): 0.00247, (5, 256): 0.00281, (5, 0): 0.00328,
    (6, 16): 2.80e-4, (6, 32): 3.94e-4, (6, 64): 5.09e-4, (6, 128): 6.23e-4, (6, 256): 7.27e-4, (6, 0): 9.06e-4,
    (8, 0): 6.02e-5,
    (16, 0): 2.76e-6,
}  # fmt: skip
"""The same where scales may be negative."""


def expected_error(bits: int, group_size: int, signed: bool) -> float:
    """Expected relative squared error of a weight at this effective group size; signed: scales may be negative."""
    table = SIGNED_ERROR if signed else EXPECTED_ERROR
    return table.get((bits, group_size), table[bits, PER_CHANNEL])
