"""GPTQ: the stored form, a row's independence of its neighbours, and an output error below RTN's, whatever the inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.ops.packing import WIDTHS
from edgewright.quant.gptq import hessian_error, quantize_gptq, row_block
from edgewright.quant.hessian import DAMPING, MOST_DAMPING, damping_for, factor
from edgewright.quant.rtn import quantize_rtn
from edgewright.quant.tensor import QuantizedTensor, is_canonical


def correlated(columns: int, tokens: int, seed: int, outlier: float = 1.0) -> torch.Tensor:
    """Inputs [tokens, columns] that a few directions dominate, as a trained model's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn((columns, columns), generator=generator) * (torch.arange(columns) + 1.0).rsqrt()[:, None]
    inputs = torch.randn((tokens, columns), generator=generator) @ mixing
    inputs[:, 3] *= outlier
    return inputs


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def normal(rows: int, columns: int, seed: int, size: float = 0.02) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)) * size


def assert_same(left: QuantizedTensor, right: QuantizedTensor) -> None:
    assert torch.equal(left.codes, right.codes)
    assert torch.equal(left.scales.view(torch.int16), right.scales.view(torch.int16))


@given(
    bits=st.sampled_from(WIDTHS),
    group=st.sampled_from([8, 32, 64, 192]),
    rows=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    inputs=st.sampled_from(["correlated", "outlier", "rank one", "zeros", "dead", "huge", "tiny"]),
    size=st.sampled_from([0.0, 1e-7, 0.02, 1e4, 1e30]),
    signed=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_any_weight_and_inputs_give_a_valid_tensor_twice(
    bits: int, group: int, rows: int, seed: int, inputs: str, size: float, signed: bool
) -> None:
    x = correlated(192, 96, seed, outlier=1e3 if inputs == "outlier" else 1.0)
    if inputs == "rank one":
        x = x[:1]
    if inputs == "dead":
        x[:, 10:40] = 0.0
    x *= {"zeros": 0.0, "huge": 1e7, "tiny": 1e-15}.get(inputs, 1.0)
    hessian = hessian_of(x)
    weight = normal(rows, 192, seed, size)
    made = factor(hessian)
    result = quantize_gptq(weight, made, bits, group, signed)
    assert is_canonical(result.scales)
    assert signed or bool((result.scales > 0).all())
    assert result.shape == (rows, 192)
    assert bool(torch.isfinite(result.dequantize()).all())
    assert_same(result, quantize_gptq(weight, factor(hessian.clone()), bits, group, signed))


@given(
    rows=st.integers(2, 600),
    block=st.sampled_from([32, 96, 256]),
    columns=st.sampled_from([64, 320]),
    bits=st.sampled_from([2, 3, 4, 8]),
    seed=st.integers(0, 2**16),
    cut=st.floats(0.0, 1.0),
)
@settings(deadline=None, max_examples=15)
def test_a_row_does_not_depend_on_the_rows_beside_it(
    rows: int, block: int, columns: int, bits: int, seed: int, cut: float
) -> None:
    weight = normal(rows, columns, seed)
    made = factor(hessian_of(correlated(columns, 500, seed)))
    whole = quantize_gptq(weight, made, bits, 32, bits < 4, block)
    at = min(rows - 1, max(1, int(cut * rows)))
    for part, start in ((weight[:at], 0), (weight[at:], at), (weight[at : at + 1], at)):
        alone = quantize_gptq(part, made, bits, 32, bits < 4, block)
        stop = start + len(part)
        assert torch.equal(alone.codes, whole.codes[start:stop])
        assert torch.equal(alone.scales, whole.scales[start:stop])


@given(rows=st.integers(1, 1 << 19), columns=st.integers(32, 1 << 15))
@settings(deadline=None)
def test_blocks_of_rows_fill_two_threads_and_waste_little(rows: int, columns: int) -> None:
    block = row_block(rows, columns)
    blocks = -(-rows // block)
    assert block % 32 == 0
    assert blocks > 1 or rows <= 256
    assert blocks * block - rows <= max(block, rows // 2)
    assert block <= 1024
    assert block * columns <= max(3 << 20, 256 * columns) + 32 * columns
    assert block >= 128 or rows <= 256


def test_the_number_of_threads_changes_nothing() -> None:
    weight = normal(300, 512, 5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        made = factor(hessian_of(correlated(512, 700, 5)))
        one = quantize_gptq(weight, made, 3, 64)
        torch.set_num_threads(2)
        assert_same(one, quantize_gptq(weight, made, 3, 64))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", [32, 128, 256])
def test_the_output_error_is_far_below_that_of_rounding_to_nearest(bits: int, group: int) -> None:
    hessian = hessian_of(correlated(256, 4096, bits))
    weight = normal(48, 256, group)
    ours = hessian_error(weight, quantize_gptq(weight, factor(hessian), bits, group), hessian)
    nearest = hessian_error(weight, quantize_rtn(weight, bits, group), hessian)
    assert float(ours.mean()) < 0.7 * float(nearest.mean())


@pytest.mark.parametrize(("bits", "most"), [(2, 0.92), (3, 0.92), (4, 0.95)])
def test_signed_scales_lower_the_output_error(bits: int, most: float) -> None:
    hessian = hessian_of(correlated(256, 4096, bits))
    weight, made = normal(96, 256, 7), factor(hessian)
    plain, signed = (quantize_gptq(weight, made, bits, 64, s) for s in (False, True))
    assert float(hessian_error(weight, signed, hessian).sum() / hessian_error(weight, plain, hessian).sum()) < most


def test_the_gain_holds_on_inputs_it_has_not_seen() -> None:
    inputs = correlated(256, 4096, 11)
    seen, unseen = hessian_of(inputs[:2048]), hessian_of(inputs[2048:])
    weight = normal(48, 256, 11)
    made = factor(seen, damping_for(256, 2048))
    for bits in (2, 4):
        ours = hessian_error(weight, quantize_gptq(weight, made, bits, 64), unseen)
        assert float(ours.mean()) < 0.8 * float(hessian_error(weight, quantize_rtn(weight, bits, 64), unseen).mean())


@given(bits=st.sampled_from(WIDTHS), group=st.sampled_from([16, 64, 256]), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=15)
def test_never_much_worse_than_rounding_to_nearest(bits: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn((300, 256), generator=generator) @ torch.randn((256, 256), generator=generator)
    hessian = hessian_of(inputs)
    weight = normal(16, 256, seed)
    ours = hessian_error(weight, quantize_gptq(weight, factor(hessian), bits, group), hessian)
    nearest = hessian_error(weight, quantize_rtn(weight, bits, group), hessian)
    assert float(ours.mean()) <= 1.01 * float(nearest.mean())


@pytest.mark.parametrize("bits", WIDTHS)
def test_inputs_without_correlation_give_what_rounding_to_nearest_gives(bits: int) -> None:
    weight, hessian = normal(64, 256, bits), torch.eye(256)
    ours = quantize_gptq(weight, factor(hessian), bits, 32)
    scales = ours.scales.float().repeat_interleave(32, dim=1)
    inside = ours.signed.to(torch.int16).abs() < 2 ** (bits - 1) - 1  # not clipped
    # an error exactly between two codes may go either way
    assert float((weight - ours.dequantize()).abs().div(scales)[inside].max()) < 0.5001
    nearest = hessian_error(weight, quantize_rtn(weight, bits, 32), hessian)
    assert float(hessian_error(weight, ours, hessian).mean()) == pytest.approx(float(nearest.mean()), rel=0.08)


def test_what_a_16_bit_grid_holds_exactly_is_kept_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-7, 8, (8, 64), generator=generator).float()
    codes[:, ::32] = 7.0
    weight = codes * 0.125
    result = quantize_gptq(weight, factor(hessian_of(correlated(64, 200, 1))), 4, 32)
    assert torch.equal(result.dequantize(), weight)


def test_the_error_is_that_of_the_outputs() -> None:
    inputs = correlated(128, 333, 2)
    weight = normal(12, 128, 2)
    result = quantize_gptq(weight, factor(hessian_of(inputs)), 2, 32)
    outputs = (inputs @ (weight - result.dequantize()).T).square().mean(dim=0)
    torch.testing.assert_close(hessian_error(weight, result, hessian_of(inputs)), outputs, rtol=1e-3, atol=0.0)


def test_the_factor_is_the_damped_hessian() -> None:
    hessian = hessian_of(correlated(96, 300, 3, outlier=50.0))
    made = factor(hessian)
    lower = made.feedback * made.weights.sqrt()
    damped = hessian + torch.eye(96) * (DAMPING * hessian.diagonal().mean())
    expected = damped[made.order[:, None], made.order]
    torch.testing.assert_close(lower @ lower.T, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert bool((hessian.diagonal()[made.order].diff() >= 0).all())
    assert bool((made.feedback.diagonal() == 1).all())


def test_a_matrix_that_is_not_positive_definite_is_damped_until_it_is() -> None:
    hessian = torch.full((64, 64), 1.0)
    hessian[0, 1] = hessian[1, 0] = 1.5  # rounding made it indefinite
    made = factor(hessian)
    assert made.damping > DAMPING
    assert bool(torch.isfinite(made.feedback).all())


def test_damping_follows_the_inputs_a_token() -> None:
    assert damping_for(512, 10**9) == DAMPING
    assert damping_for(512, 1) == MOST_DAMPING
    assert DAMPING < damping_for(512, 8192) < damping_for(1024, 8192) < MOST_DAMPING


def test_mistakes_are_named() -> None:
    made = factor(torch.eye(96))
    weight = torch.zeros(4, 96)
    with pytest.raises(ValueError, match="group size 40 does not divide the 96 inputs"):
        quantize_gptq(weight, made, 4, 40)
    with pytest.raises(ValueError, match="the factor is of 96 inputs, the weight has 64"):
        quantize_gptq(weight[:, :64], made, 4, 32)
    with pytest.raises(ValueError, match="does not fill whole bytes"):
        quantize_gptq(torch.zeros(2, 6), factor(torch.eye(6)), 3, 6)
    with pytest.raises(ValueError, match="must be square and float32"):
        factor(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="must be square and float32"):
        factor(torch.eye(3, dtype=torch.float64))
    for bad in (float("nan"), float("inf"), -1.0, 1e30):
        with pytest.raises(ValueError, match="the diagonal of the Hessian"):
            factor(torch.eye(4) * bad)
    with pytest.raises(ValueError, match="the weight has shape"):
        hessian_error(torch.zeros(4, 32), quantize_gptq(weight, made, 4, 32), torch.eye(32))
