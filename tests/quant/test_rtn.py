"""RTN: canonical scales, the stored form, and an error never above plain absmax's, whatever the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.ops.packing import WIDTHS, pack
from edgewright.quant.rtn import best_scales, effective_group, quantize_rtn, round_to_codes
from edgewright.quant.tensor import QuantizedTensor, canonical, is_canonical


def absmax_error(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """Squared error per group of plain RTN with the (canonical) absmax scale, in fp64."""
    scale = canonical(groups.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1))
    return error_of(groups, scale * round_to_codes(groups, scale, bits))


def error_of(groups: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (groups.double() - value.double()).square().sum(dim=1)


def draw_weights(kind: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "normal":
        return normal * 0.02
    if kind == "heavy":
        return normal / torch.randn(shape, generator=generator).abs().clamp_min(1e-3)
    if kind == "one-sided":
        return normal.abs() * 3.0
    if kind == "outlier":
        normal[:, 0] = 1e4
        return normal
    if kind == "tiny":
        return normal * 1e-7
    return torch.zeros(shape)


@given(
    kind=st.sampled_from(["normal", "heavy", "one-sided", "outlier", "tiny", "zero"]),
    bits=st.sampled_from(WIDTHS),
    group=st.sampled_from([8, 32, 64, 128, 256]),
    rows=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=80)
def test_never_worse_than_absmax(kind: str, bits: int, group: int, rows: int, seed: int) -> None:
    weight = draw_weights(kind, (rows, 256), seed)
    result = quantize_rtn(weight, bits, group)
    assert result.scales.dtype == torch.bfloat16
    assert is_canonical(result.scales)
    assert torch.equal(result.scales.to(torch.float16).float(), result.scales.float())
    groups = weight.view(-1, group)
    ours = error_of(groups, result.dequantize().view(-1, group))
    assert bool((ours <= absmax_error(groups, bits) * (1 + 1e-5) + 1e-30).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_close_to_an_exhaustive_search(bits: int) -> None:
    groups = torch.randn(64, 64, generator=torch.Generator().manual_seed(bits)) * 0.1
    absmax = groups.abs().amax(dim=1, keepdim=True)
    best = torch.full((64,), torch.inf, dtype=torch.float64)
    for fraction in torch.linspace(0.05, 1.2, 500).tolist():
        scale = canonical(absmax * (fraction / (2 ** (bits - 1) - 1)))
        best = torch.minimum(best, error_of(groups, scale * round_to_codes(groups, scale, bits)))
    scale = best_scales(groups, bits)
    ours = error_of(groups, scale * round_to_codes(groups, scale, bits))
    assert float(ours.sum() / best.sum()) < (1.04 if bits == 8 else 1.01)


def test_rows_are_independent_and_threads_do_not_matter() -> None:
    weight = torch.randn(100, 1024, generator=torch.Generator().manual_seed(1))
    whole = quantize_rtn(weight, 4, 64)
    parts = [quantize_rtn(weight[a : a + 7], 4, 64) for a in range(0, 100, 7)]
    assert torch.equal(whole.codes, torch.cat([p.codes for p in parts]))
    assert torch.equal(whole.scales, torch.cat([p.scales for p in parts]))
    long = torch.randn(2, 65536, generator=torch.Generator().manual_seed(2))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append((quantize_rtn(long, 8, 65536), quantize_rtn(weight, 3, 1024)))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one.codes, three.codes)
        assert torch.equal(one.scales, three.scales)


def test_dequantize_is_code_times_scale() -> None:
    codes = torch.tensor([[0, 15, 8, 7], [1, 2, 3, 4]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 2.0], [1.0, 0.25]], dtype=torch.bfloat16)
    tensor = QuantizedTensor(pack(codes, 4), scales, 4, 2, (2, 4))
    assert tensor.dequantize().tolist() == [[-4.0, 3.5, 0.0, -2.0], [-7.0, -6.0, -1.25, -1.0]]
    assert tensor.signed.tolist() == [[-8, 7, 0, -1], [-7, -6, -5, -4]]
    assert tensor.nbytes == 4 + 8


@pytest.mark.parametrize(("bits", "most"), [(2, 0.89), (3, 0.89), (4, 0.92), (5, 0.96), (6, 0.98), (8, 1.0)])
def test_signed_scales_lower_the_error_for_no_byte(bits: int, most: float) -> None:
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(bits))
    plain, signed = quantize_rtn(weight, bits, 64), quantize_rtn(weight, bits, 64, signed=True)
    assert bool((plain.scales > 0).all())
    assert is_canonical(signed.scales)
    assert 0.3 < float((signed.scales < 0).float().mean()) < 0.7
    assert signed.nbytes == plain.nbytes
    assert float(error_of(weight, signed.dequantize()).sum() / error_of(weight, plain.dequantize()).sum()) < most
    parts = [quantize_rtn(weight[a : a + 7], bits, 64, signed=True) for a in range(0, 128, 7)]
    assert torch.equal(signed.codes, torch.cat([p.codes for p in parts]))
    assert torch.equal(signed.scales, torch.cat([p.scales for p in parts]))


def test_the_code_without_a_partner_is_the_largest_weight() -> None:
    """-8 * -0.5 is 4: with a positive scale of 0.5 the best for 4 is 3.5."""
    weight = torch.tensor([[4.0, -3.5, 1.0, 0.5, -0.5, 2.0, 1.5, -1.0]])
    made = quantize_rtn(weight, 4, 8, signed=True)
    assert made.scales.tolist() == [[-0.5]]
    assert torch.equal(made.dequantize(), weight)


def test_input_dtypes_give_the_same_codes() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    assert torch.equal(quantize_rtn(weight, 4, 32).codes, quantize_rtn(weight.float(), 4, 32).codes)


def test_canonical_scales() -> None:
    given_scales = torch.tensor([0.0, 1e-9, 2.0**-14, 0.1, 1.0, 65280.0, 65300.0, 1e30])
    rounded = canonical(given_scales)
    assert is_canonical(rounded)
    assert rounded.tolist() == [2**-14, 2**-14, 2**-14, 0.10009765625, 1.0, 65280.0, 65280.0, 65280.0]
    assert is_canonical(-rounded)
    for bad in (0.0, 2.0**-15, -(2.0**-15), 65536.0, float("nan"), 0.1):
        assert not is_canonical(torch.tensor([1.0, bad]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 7}, "width 7"),
        ({"group_size": 24}, "does not divide"),
        ({"codes": torch.zeros(2, 31, dtype=torch.uint8)}, "codes have shape"),
        ({"codes": torch.zeros(2, 32)}, "uint8"),
        ({"scales": torch.ones(2, 2)}, "bfloat16"),
        ({"scales": torch.ones(2, 4, dtype=torch.bfloat16)}, "scales have shape"),
        ({"scales": torch.zeros(2, 2, dtype=torch.bfloat16)}, "in \\[2"),
    ],
)
def test_parts_must_fit(change: dict[str, object], message: str) -> None:
    parts: dict[str, object] = {
        "codes": torch.zeros(2, 32, dtype=torch.uint8),
        "scales": torch.ones(2, 2, dtype=torch.bfloat16),
        "bits": 4,
        "group_size": 32,
        "shape": (2, 64),
    }
    QuantizedTensor(**parts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        QuantizedTensor(**(parts | change))  # type: ignore[arg-type]


def test_effective_group() -> None:
    assert effective_group(1024, 128) == 128
    assert effective_group(576, 128) == 64
    assert effective_group(96, 128) == 32
    assert effective_group(48, 128) == 48
    assert effective_group(1024, 0) == 1024
    assert effective_group(1024, 32) == 32
    assert effective_group(64, 1024) == 64
    with pytest.raises(ValueError, match="negative"):
        effective_group(64, -1)
