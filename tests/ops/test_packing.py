"""Packing: the documented bit layout, round trips at every width and shape, and `unpack` inside an exported program."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.ops.packing import WIDTHS, pack, packed_bytes, period, repack, unpack


@st.composite
def code_rows(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits = draw(st.sampled_from(WIDTHS))
    rows = draw(st.integers(0, 5))
    columns = draw(st.integers(0, 9)) * period(bits)
    values = draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.uint8).view(rows, columns), bits


@given(code_rows())
@settings(deadline=None)
def test_round_trip_and_layout(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (codes.shape[0], codes.shape[1] * bits // 8)
    assert torch.equal(unpack(packed, bits, codes.shape[1]), codes)
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):  # the layout, told another way
        number = sum(code << (bits * k) for k, code in enumerate(row))
        assert bytes(stream) == number.to_bytes(len(row) * bits // 8, "little")


@given(code_rows(), st.sampled_from(WIDTHS))
@settings(deadline=None)
def test_repack_keeps_signed_values(case: tuple[torch.Tensor, int], to_bits: int) -> None:
    codes, bits = case
    columns = codes.shape[1]
    packed = pack(codes, bits)
    if to_bits < bits:
        with pytest.raises(ValueError, match="do not fit"):
            repack(packed, bits, to_bits, columns)
    elif columns % period(to_bits) == 0:
        wide = unpack(repack(packed, bits, to_bits, columns), to_bits, columns)
        assert torch.equal(wide.int() - 2 ** (to_bits - 1), codes.int() - 2 ** (bits - 1))


def test_leading_dimensions_are_kept() -> None:
    codes = torch.randint(0, 8, (2, 3, 16), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, 3), 3, 16), codes)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.zeros(1, 8), 4)
    with pytest.raises(ValueError, match="16 does not fit in 4 bits"):
        pack(torch.full((1, 8), 16, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="multiple of 8"):
        packed_bytes(12, 3)
    with pytest.raises(ValueError, match="width 7"):
        unpack(torch.zeros(1, 7, dtype=torch.uint8), 7, 8)
    with pytest.raises(ValueError, match="take 3 bytes, not 4"):
        unpack(torch.zeros(1, 4, dtype=torch.uint8), 3, 8)


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpack_exports_with_a_dynamic_row_count(bits: int) -> None:
    class Unpack(torch.nn.Module):
        def forward(self, packed: torch.Tensor) -> torch.Tensor:
            return unpack(packed, bits, 24).to(torch.float32)

    codes = torch.randint(0, 2**bits, (5, 24), dtype=torch.uint8)
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(Unpack(), (pack(codes, bits),), dynamic_shapes=({0: rows},))
    other = torch.randint(0, 2**bits, (9, 24), dtype=torch.uint8)
    assert torch.equal(program.module()(pack(other, bits)), other.float())
