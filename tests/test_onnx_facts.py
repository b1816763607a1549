"""The facts of ONNX Runtime's CPU kernels that the lowerings for it (exporters/onnx*.py) rely on, one small test each.

The documentation leaves most of them open; when an upgrade changes one, the test that fails names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import plain
import pytest
import torch
from onnx import TensorProto as Kind
from onnx import helper

from edgewright.ops.packing import pack

MS = "com.microsoft"
RNG = np.random.default_rng(0)
HEADS, KV, DIM = 4, 2, 16
SCALE, CAP = 0.2, 5.0
LOWEST = np.finfo(np.float32).min
KINDS = {"float32": Kind.FLOAT, "int64": Kind.INT64, "int32": Kind.INT32, "uint8": Kind.UINT8, "bool": Kind.BOOL}
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _same_numbers_whatever_ran_before() -> None:
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(
    nodes: list[onnx.NodeProto], inputs: Arrays, outputs: list[str], initializers: Arrays | None = None
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "fact",
        [helper.make_tensor_value_info(n, KINDS[a.dtype.name], [None] * a.ndim) for n, a in inputs.items()],
        [helper.make_tensor_value_info(o, Kind.FLOAT, None) for o in outputs],
        [onnx.numpy_helper.from_array(a, n) for n, a in (initializers or {}).items()],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def load(model: onnx.ModelProto | bytes, **entries: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    raw = model if isinstance(model, bytes) else model.SerializeToString()
    return ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])


def run(
    nodes: list[onnx.NodeProto], inputs: Arrays, outputs: list[str], initializers: Arrays | None = None
) -> list[np.ndarray]:
    return load(build(nodes, inputs, outputs, initializers)).run(None, inputs)


def grouped_query(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    past: tuple[np.ndarray, np.ndarray, int] | None = None,
    tables: tuple[np.ndarray, np.ndarray] | None = None,
    bias: np.ndarray | None = None,
    packed: bool = False,
    **attributes: Any,
) -> tuple[onnx.ModelProto, Arrays]:
    """One GroupQueryAttention and its inputs; q [B, S, H, D], k and v [B, S, KV, D], past (keys, values, length)."""
    batch, queries = q.shape[:2]
    flat = [x.reshape(batch, queries, -1) for x in (q, k, v)]
    arrays = {"q": np.concatenate(flat, -1)} if packed else dict(zip("qkv", flat, strict=True))
    total = queries
    if past is not None:
        arrays |= {"past_k": past[0], "past_v": past[1]}
        total += past[2]
    arrays |= {"lengths": np.full(batch, total - 1, np.int32), "total": np.array(total, np.int32)}
    if tables is not None:
        arrays |= {"cos": tables[0], "sin": tables[1]}
    if bias is not None:
        arrays["bias"] = bias
    names = ["q", "k", "v", "past_k", "past_v", "lengths", "total", "cos", "sin", "positions", "bias"]
    node = helper.make_node(
        "GroupQueryAttention",
        [n if n in arrays else "" for n in names],
        ["out", "present_k", "present_v"],
        domain=MS,
        num_heads=q.shape[2],
        kv_num_heads=k.shape[2],
        **{"scale": SCALE} | attributes,
    )
    return build([node], arrays, ["out", "present_k", "present_v"]), arrays


def attend(*args: Any, **kwargs: Any) -> np.ndarray:
    model, arrays = grouped_query(*args, **kwargs)
    return load(model).run(["out"], arrays)[0]


def qkv(batch: int, queries: int, spread: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(spread * normal(batch, queries, heads, DIM) for heads in (HEADS, KV, KV))  # type: ignore[return-value]


def close(got: np.ndarray, want: np.ndarray, tolerance: float = 2e-6) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


# ---- GroupQueryAttention ----


def test_softcap_is_exact_and_precedes_the_bias() -> None:
    q, k, v = qkv(2, 5)
    keys, values = (np.repeat(x, HEADS // KV, 2).transpose(0, 2, 1, 3).astype(np.float64) for x in (k, v))
    scores = q.transpose(0, 2, 1, 3) @ keys.swapaxes(2, 3) * SCALE
    bias = 4 * normal(2, 1, 5, 5)
    after, before = CAP * np.tanh(scores / CAP) + bias, CAP * np.tanh((scores + bias) / CAP)

    def finish(scores: np.ndarray) -> np.ndarray:
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True) @ values).transpose(0, 2, 1, 3).reshape(2, 5, -1)

    got = attend(q, k, v, bias=bias, softcap=CAP, causal=0)
    close(got, finish(after))
    assert np.abs(got - finish(before)).max() > 0.1


@pytest.mark.parametrize("softcap", [0.0, CAP])
def test_causal_off_with_a_mask_as_bias_is_bidirectional_attention(softcap: float) -> None:
    q, k, v = qkv(3, 7)
    allowed = (RNG.random((3, 7, 7)) > 0.5) | np.eye(7, dtype=bool)
    allowed[2, :, 4:] = False  # padding
    allowed[2, 4:, 0] = True
    bias = np.where(allowed, np.float32(0), LOWEST)[:, None]
    close(attend(q, k, v, bias=bias, softcap=softcap, causal=0), plain.attention(q, k, v, allowed, SCALE, softcap))


def test_a_wholly_masked_row_stays_finite() -> None:
    q, k, v = qkv(1, 4)
    bias = np.full((1, 1, 4, 4), LOWEST)
    assert np.isfinite(attend(q, k, v, bias=bias, softcap=CAP, causal=0)).all()


def test_packed_qkv_equals_three_inputs() -> None:
    q, k, v = qkv(2, 5)
    apart = attend(q, k, v, softcap=CAP)
    close(apart, plain.attention(q, k, v, plain.causal(2, 5, 0), SCALE, CAP))
    np.testing.assert_array_equal(attend(q, k, v, packed=True, softcap=CAP), apart)


@pytest.mark.parametrize(("batch", "queries", "past"), [(2, 3, 0), (1, 3, 4), (3, 1, 4)])
def test_past_and_present_may_be_one_buffer(batch: int, queries: int, past: int) -> None:
    capacity = 9
    keys, values = normal(batch, KV, capacity, DIM), normal(batch, KV, capacity, DIM)
    q, k, v = qkv(batch, queries)
    model, arrays = grouped_query(q, k, v, past=(keys, values, past))
    binding = (session := load(model)).io_binding()
    buffers = {n: ort.OrtValue.ortvalue_from_numpy(arrays.pop(f"past_{n}").copy()) for n in "kv"}
    for name, array in arrays.items():
        binding.bind_cpu_input(name, array)
    for n, buffer in buffers.items():
        binding.bind_ortvalue_input(f"past_{n}", buffer)
        binding.bind_ortvalue_output(f"present_{n}", buffer)
    binding.bind_output("out")
    session.run_with_iobinding(binding)

    want = {"k": keys.copy(), "v": values.copy()}
    for n, new in (("k", k), ("v", v)):
        want[n][:, :, past : past + queries] = new.swapaxes(1, 2)
        np.testing.assert_array_equal(buffers[n].numpy(), want[n])  # the new tokens written, nothing else touched
    seen = [want[n][:, :, : past + queries].swapaxes(1, 2) for n in "kv"]
    close(binding.get_outputs()[-1].numpy(), plain.attention(q, *seen, plain.causal(batch, queries, past), SCALE))


@pytest.mark.parametrize("window", [1, 2, 3, 6, 40])
@pytest.mark.parametrize("past", [0, 5])
def test_a_window_keeps_exactly_that_many_tokens_the_own_one_included(window: int, past: int) -> None:
    keys, values = normal(1, KV, 12, DIM), normal(1, KV, 12, DIM)
    q, k, v = qkv(1, 6)
    got = attend(q, k, v, past=(keys, values, past), local_window_size=window, softcap=CAP)
    seen = [np.concatenate([old[:, :, :past].swapaxes(1, 2), new], 1) for old, new in ((keys, k), (values, v))]
    close(got, plain.attention(q, *seen, plain.causal(1, 6, past, window), SCALE, CAP))


@pytest.mark.parametrize("past", [0, 3])
def test_do_rotary_rotates_halves_from_the_past_length_on(past: int) -> None:
    inv_freq = 100.0 ** (-np.arange(DIM // 2) / (DIM // 2))
    angles = np.outer(np.arange(20), inv_freq)
    tables = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    keys, values = normal(1, KV, 12, DIM), normal(1, KV, 12, DIM)
    q, k, v = qkv(1, 4, spread=1.0)
    model, arrays = grouped_query(
        q, k, v, past=(keys, values, past), tables=tables, do_rotary=1, rotary_interleaved=0, scale=0.5
    )
    out, present, _ = load(model).run(None, arrays)
    turned_q, turned_k = (plain.rope(x, np.arange(4) + past, inv_freq) for x in (q, k))
    close(present[:, :, past : past + 4].swapaxes(1, 2), turned_k)  # the cache holds rotated keys
    seen = [np.concatenate([old[:, :, :past].swapaxes(1, 2), x], 1) for old, x in ((keys, turned_k), (values, v))]
    close(out, plain.attention(turned_q, *seen, plain.causal(1, 4, past), 0.5))


@pytest.mark.parametrize("packed", [False, True])
def test_tables_narrower_than_a_head_rotate_its_first_dimensions(packed: bool) -> None:
    dim, rotated, past = 32, 16, 3
    inv_freq = 100.0 ** (-np.arange(rotated // 2) / (rotated // 2))
    angles = np.outer(np.arange(20), inv_freq)
    tables = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    q, k, v = (normal(1, 4, heads, dim) for heads in (HEADS, KV, KV))
    cache = normal(1, KV, 12, dim), normal(1, KV, 12, dim)
    got = attend(q, k, v, past=(*cache, past), tables=tables, packed=packed, do_rotary=1, rotary_interleaved=0)

    def turn(x: np.ndarray) -> np.ndarray:
        return np.concatenate([plain.rope(x[..., :rotated], np.arange(4) + past, inv_freq), x[..., rotated:]], -1)

    seen = [np.concatenate([c[:, :, :past].swapaxes(1, 2), x], 1) for c, x in zip(cache, (turn(k), v), strict=True)]
    close(got, plain.attention(turn(q), *seen, plain.causal(1, 4, past), SCALE))


def test_a_rotated_part_that_is_no_multiple_of_16_is_refused() -> None:
    """Why such heads are rotated by RotaryEmbedding before."""
    q, k, v = qkv(1, 2)
    cache, table = normal(1, KV, 9, DIM), normal(9, 4)
    with pytest.raises(Exception, match="a multiple of 8"):
        attend(q, k, v, past=(cache, cache, 2), tables=(table, table), do_rotary=1)


def test_rotary_embedding_takes_positions_of_any_order_and_flat_heads() -> None:
    x, positions, inv_freq = normal(2, 3, HEADS, 8), np.array([3, 9, 2]), 100.0 ** (-np.arange(4) / 4)
    angles = np.outer(np.arange(20), inv_freq).astype(np.float32)
    node = helper.make_node("RotaryEmbedding", ["x", "positions", "cos", "sin"], ["out"], domain=MS)
    feeds = {"x": x.reshape(2, 3, -1), "positions": np.tile(positions, (2, 1))}
    (out,) = run([node], feeds, ["out"], {"cos": np.cos(angles), "sin": np.sin(angles)})
    close(out.reshape(x.shape), plain.rope(x, positions, inv_freq))


def test_tensor_scatter_writes_in_place_where_past_and_present_are_one_buffer() -> None:
    cache, new, starts = normal(2, KV, 9, DIM), normal(2, KV, 3, DIM), np.array([4, 4])
    node = helper.make_node("TensorScatter", ["past", "new", "starts"], ["present"], axis=-2)
    binding = (session := load(build([node], {"past": cache, "new": new, "starts": starts}, ["present"]))).io_binding()
    buffer = ort.OrtValue.ortvalue_from_numpy(cache.copy())
    binding.bind_ortvalue_input("past", buffer)
    binding.bind_ortvalue_output("present", buffer)
    binding.bind_cpu_input("new", new)
    binding.bind_cpu_input("starts", starts)
    session.run_with_iobinding(binding)
    want = cache.copy()
    want[:, :, 4:7] = new
    np.testing.assert_array_equal(buffer.numpy(), want)


def test_several_rows_of_several_tokens_after_a_past_are_refused() -> None:
    """Why `generate` prefills the prompts of a decoder-only batch one after the other."""
    q, k, v = qkv(2, 3)
    cache = normal(2, KV, 9, DIM)
    with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
        attend(q, k, v, past=(cache, cache, 2))


# ---- Attention, of the standard ----


def standard_attention(mask: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, softcap: float) -> np.ndarray:
    """q [B, S, H, D]; k, v [B, T, KV, D] through Attention-24."""
    node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["out"], scale=SCALE, softcap=softcap)
    arrays = {n: np.ascontiguousarray(x.swapaxes(1, 2)) for n, x in (("q", q), ("k", k), ("v", v))}
    out = run([node], arrays | {"mask": mask}, ["out"])[0]
    return out.swapaxes(1, 2).reshape(*q.shape[:2], -1)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("queries", [1, 4])
def test_attention_24_with_softcap_and_a_bool_mask_is_exact(softcap: float, queries: int) -> None:
    q, k, v = 3 * normal(2, queries, HEADS, DIM), 3 * normal(2, 6, KV, DIM), 3 * normal(2, 6, KV, DIM)
    mask = RNG.random((2, 1, queries, 6)) > 0.4
    mask[..., 0] = True
    close(standard_attention(mask, q, k, v, softcap), plain.attention(q, k, v, mask[:, 0], SCALE, softcap))


def test_attention_24_does_not_broadcast_a_mask_over_queries() -> None:
    """Why the lowering expands the mask of cross-attention."""
    q, k, v = normal(2, 3, HEADS, DIM), normal(2, 6, KV, DIM), normal(2, 6, KV, DIM)
    with pytest.raises(Exception, match="Attention node"):
        standard_attention(np.ones((2, 1, 1, 6), bool), q, k, v, 3.0)


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
    values = plain.signed_codes(packed, bits) * scales.repeat(group, 1).astype(np.float64)
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
    signed = plain.signed_codes(codes, bits).astype(np.float32)
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
    close(normed, plain.rms_norm(x + residual, gamma, 1e-2))


@pytest.mark.parametrize("shape", [(2, 3, 32), (2, 3, 4, 32)])
def test_simplified_layer_normalization_is_rms_norm(shape: tuple[int, ...]) -> None:
    x, gamma = normal(*shape), normal(32)
    node = helper.make_node(
        "SimplifiedLayerNormalization", ["x", "gamma"], ["out"], axis=-1, epsilon=1e-2, stash_type=1
    )
    close(run([node], {"x": x}, ["out"], {"gamma": gamma})[0], plain.rms_norm(x, gamma, 1e-2))


def test_quick_gelu_with_alpha_1_is_silu() -> None:
    x = np.linspace(-30, 30, 500, dtype=np.float32)
    node = helper.make_node("QuickGelu", ["x"], ["out"], domain=MS, alpha=1.0)
    close(run([node], {"x": x}, ["out"])[0], plain.silu(x), 1e-6)


def test_gelu_tanh_follows_the_formula() -> None:
    x = np.linspace(-10, 10, 500, dtype=np.float32)
    node = helper.make_node("Gelu", ["x"], ["out"], approximate="tanh")
    close(run([node], {"x": x}, ["out"])[0], plain.gelu_tanh(x), 1e-6)


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
