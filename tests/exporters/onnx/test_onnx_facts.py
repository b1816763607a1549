"""The facts of ONNX Runtime's CPU kernels that the lowerings for it (exporters/onnx*.py) rely on, one small test each.

The documentation leaves most of them open; when an upgrade changes one, the test that fails names it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import reference_formulas
from helpers.onnx_models import MS, RNG, Arrays, build, close, load, normal, run, same_numbers
from onnx import helper

from edgewright.ops.packing import pack

HEADS = 4
SCALE = 0.2


@pytest.fixture(autouse=True)
def _same_numbers_whatever_ran_before() -> None:
    same_numbers()


# ---- recurrences ----


def recurrent(length: int, groups: int, per_key: bool) -> Arrays:
    """Operands of the references: q, k [B, T, groups, 8], v [B, T, HEADS, 6], log decays, rates, the state."""
    k = normal(2, length, groups, 8)
    arrays = {"q": normal(2, length, groups, 8), "k": k / np.linalg.norm(k, axis=-1, keepdims=True)}
    arrays |= {"v": normal(2, length, HEADS, 6), "state": normal(2, HEADS, 8, 6)}
    g = -np.abs(normal(2, length, HEADS, 8 if per_key else 1))
    g[:, length // 2] *= 300  # a token that forgets everything
    return arrays | {"g": g, "beta": np.abs(normal(2, length, HEADS))}


def linear_attention(arrays: Arrays, rule: str) -> tuple[np.ndarray, np.ndarray]:
    names = ["q", "k", "v", "state", "g", "beta"][: 6 if "delta" in rule else 5]
    groups = arrays["q"].shape[2]
    node = helper.make_node(
        "LinearAttention",
        names,
        ["out", "present"],
        domain=MS,
        q_num_heads=groups,
        kv_num_heads=HEADS,
        scale=SCALE,
        update_rule=rule,
    )
    feeds = {n: a if n in ("state", "beta") else a.reshape(*a.shape[:2], -1) for n, a in arrays.items() if n in names}
    out, present = run([node], feeds, ["out", "present"])
    return out.reshape(arrays["v"].shape), present


@pytest.mark.parametrize("length", [1, 2, 65])
@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("per_key", [False, True])
def test_linear_attention_is_the_gated_recurrence_also_for_groups_of_values(
    length: int, groups: int, per_key: bool
) -> None:
    arrays = recurrent(length, groups, per_key)
    given = [torch.from_numpy(arrays[n]) for n in ("q", "k", "v", "g", "state")]
    for got, want in zip(
        linear_attention(arrays, "gated"), torch.ops.edgewright.linear_attention(*given, SCALE), strict=True
    ):
        close(got, want.numpy())


@pytest.mark.parametrize("length", [1, 2, 65])
@pytest.mark.parametrize("groups", [HEADS, 2])
def test_linear_attention_is_the_gated_delta_rule(length: int, groups: int) -> None:
    arrays = recurrent(length, groups, per_key=False)
    given = [torch.from_numpy(arrays[n]) for n in ("q", "k", "v", "g", "beta", "state")]
    given[3] = given[3].squeeze(-1)
    for got, want in zip(
        linear_attention(arrays, "gated_delta"), torch.ops.edgewright.gated_delta_rule(*given, SCALE), strict=True
    ):
        close(got, want.numpy())


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("biased", [False, True])
def test_causal_conv_with_state_is_the_convolution_channels_first(length: int, biased: bool) -> None:
    x, weight, bias, state = normal(2, length, 10), normal(10, 4), normal(10), normal(2, 10, 3)
    node = helper.make_node(
        "CausalConvWithState",
        ["x", "weight", "bias" if biased else "", "state"],
        ["out", "present"],
        domain=MS,
        activation="none",
    )
    constants = {"weight": weight[:, None]} | ({"bias": bias} if biased else {})
    feeds = {"x": np.ascontiguousarray(x.swapaxes(1, 2)), "state": state}
    out, present = run([node], feeds, ["out", "present"], constants)
    given = [torch.from_numpy(a) for a in (x, weight, bias, state)]
    given[2] = given[2] if biased else None  # type: ignore[call-overload]
    want, after = torch.ops.edgewright.causal_conv(*given)
    close(out.swapaxes(1, 2), want.numpy())
    np.testing.assert_array_equal(present, after.numpy())


def test_sigmoid_is_zero_far_below_zero() -> None:
    """Why log decays are cut before a decomposition: a logarithm of this is minus infinity."""
    (out,) = run([helper.make_node("Sigmoid", ["x"], ["out"])], {"x": np.full((1, 8), -40, np.float32)}, ["out"])
    assert not out.any()


# ---- weights of 2, 4 and 8 bits ----


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("biased", [False, True])
def test_matmulnbits_reads_our_codes_with_the_default_zero_point(bits: int, group: int, biased: bool) -> None:
    columns, rows = 128, 24
    packed = pack(torch.from_numpy(RNG.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)), bits).numpy()
    scales = normal(rows, columns // group)  # of either sign
    values = reference_formulas.signed_codes(packed, bits) * scales.repeat(group, 1).astype(np.float64)
    x, bias = normal(3, 5, columns), normal(rows)
    want = x.astype(np.float64) @ values.T + (bias if biased else 0)

    def at(level: int) -> np.ndarray:
        node = helper.make_node(
            "MatMulNBits",
            ["x", "codes", "scales", "", "", "bias"] if biased else ["x", "codes", "scales"],
            ["out"],
            domain=MS,
            K=columns,
            N=rows,
            bits=bits,
            block_size=group,
            accuracy_level=level,
        )
        codes = packed.reshape(rows, columns // group, group * bits // 8)
        constants = {"codes": codes, "scales": scales} | ({"bias": bias} if biased else {})
        return run([node], {"x": x}, ["out"], constants)[0]

    close(at(1), want, 1e-6)
    close(at(4), want, 2e-2)
    assert np.abs(at(4) - want).max() > 1e-4 * np.abs(want).max()  # level 4 does quantize its input


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_gatherblockquantized_reads_uint8_rows_with_the_default_zero_point(bits: int, group: int) -> None:
    columns, rows = 64, 30
    unsigned = RNG.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    codes = pack(torch.from_numpy(unsigned), bits).numpy()
    scales = normal(rows, columns // group)
    ids = np.array([[0, 29, 3], [7, 7, 1]])
    node = helper.make_node(
        "GatherBlockQuantized",
        ["codes", "ids", "scales"],
        ["out"],
        domain=MS,
        bits=bits,
        block_size=group,
        gather_axis=0,
        quantize_axis=1,
    )
    out = run([node], {"ids": ids}, ["out"], {"codes": codes, "scales": scales})[0]
    signed = reference_formulas.signed_codes(codes, bits).astype(np.float32)
    np.testing.assert_array_equal(signed, unsigned.astype(np.float32) - 2 ** (bits - 1))
    np.testing.assert_array_equal(out, (signed * scales.repeat(group, 1))[ids])


# ---- pointwise ----


def test_skip_simplified_layer_normalization_gives_the_norm_first_and_the_sum_fourth() -> None:
    x, residual, gamma = normal(2, 3, 32), normal(2, 3, 32), normal(32)
    node = helper.make_node(
        "SkipSimplifiedLayerNormalization",
        ["x", "residual", "gamma"],
        ["normed", "", "", "total"],
        domain=MS,
        epsilon=1e-2,
    )
    normed, total = run([node], {"x": x, "residual": residual}, ["normed", "total"], {"gamma": gamma})
    np.testing.assert_array_equal(total, x + residual)
    close(normed, reference_formulas.rms_norm(x + residual, gamma, 1e-2))


@pytest.mark.parametrize("shape", [(2, 3, 32), (2, 3, 4, 32)])
def test_simplified_layer_normalization_is_rms_norm(shape: tuple[int, ...]) -> None:
    x, gamma = normal(*shape), normal(32)
    node = helper.make_node(
        "SimplifiedLayerNormalization", ["x", "gamma"], ["out"], axis=-1, epsilon=1e-2, stash_type=1
    )
    close(run([node], {"x": x}, ["out"], {"gamma": gamma})[0], reference_formulas.rms_norm(x, gamma, 1e-2))


def test_quick_gelu_with_alpha_1_is_silu() -> None:
    x = np.linspace(-30, 30, 500, dtype=np.float32)
    node = helper.make_node("QuickGelu", ["x"], ["out"], domain=MS, alpha=1.0)
    close(run([node], {"x": x}, ["out"])[0], reference_formulas.silu(x), 1e-6)


def test_gelu_tanh_follows_the_formula() -> None:
    x = np.linspace(-10, 10, 500, dtype=np.float32)
    node = helper.make_node("Gelu", ["x"], ["out"], approximate="tanh")
    close(run([node], {"x": x}, ["out"])[0], reference_formulas.gelu_tanh(x), 1e-6)


# ---- the session ----


def test_external_data_is_found_for_a_model_given_as_bytes(tmp_path: Path) -> None:
    weight = normal(64)
    x = normal(64)
    (tmp_path / "weights.bin").write_bytes(bytes(4096) + weight.tobytes())
    model = build([helper.make_node("Add", ["x", "w"], ["out"])], {"x": x}, ["out"], {"w": weight})
    (tensor,) = model.graph.initializer
    onnx.external_data_helper.set_external_data(tensor, "weights.bin", offset=4096, length=weight.nbytes)
    tensor.ClearField("raw_data")
    session = load(model, model_external_initializers_file_folder_path=str(tmp_path))
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x + weight)


def test_the_runtime_reports_which_provider_runs_each_node() -> None:
    x = normal(2, 3, 32)
    nodes = [
        helper.make_node("QuickGelu", ["x"], ["y"], domain=MS, alpha=1.0),
        helper.make_node("SimplifiedLayerNormalization", ["y", "gamma"], ["out"], axis=-1),
    ]
    session = load(build(nodes, {"x": x}, ["out"], {"gamma": normal(32)}), record_ep_graph_assignment_info="1")
    found = [(p.ep_name, n.op_type) for p in session.get_provider_graph_assignment_info() for n in p.get_nodes()]
    assert sorted(found) == [
        ("CPUExecutionProvider", "QuickGelu"),
        ("CPUExecutionProvider", "SimplifiedLayerNormalization"),
    ]
