"""The facts of ONNX Runtime's attention on the CPU that the lowerings for it (exporters/onnx*.py) rely on, one small test each."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers import reference_formulas as formulas
from helpers.onnx_models import MS, RNG, Arrays, build, close, load, normal, run, same_numbers
from onnx import helper

HEADS, KV, DIM = 4, 2, 16
SCALE, CAP = 0.2, 5.0
LOWEST = np.finfo(np.float32).min


@pytest.fixture(autouse=True)
def _same_numbers_whatever_ran_before() -> None:
    same_numbers()


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
    close(
        attend(q, k, v, bias=bias, softcap=softcap, causal=0),
        formulas.attention(q, k, v, allowed, SCALE, softcap),
    )


def test_a_wholly_masked_row_stays_finite() -> None:
    q, k, v = qkv(1, 4)
    bias = np.full((1, 1, 4, 4), LOWEST)
    assert np.isfinite(attend(q, k, v, bias=bias, softcap=CAP, causal=0)).all()


def test_packed_qkv_equals_three_inputs() -> None:
    q, k, v = qkv(2, 5)
    apart = attend(q, k, v, softcap=CAP)
    close(apart, formulas.attention(q, k, v, formulas.causal(2, 5, 0), SCALE, CAP))
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
    close(
        binding.get_outputs()[-1].numpy(),
        formulas.attention(q, *seen, formulas.causal(batch, queries, past), SCALE),
    )


@pytest.mark.parametrize("window", [1, 2, 3, 6, 40])
@pytest.mark.parametrize("past", [0, 5])
def test_a_window_keeps_exactly_that_many_tokens_the_own_one_included(window: int, past: int) -> None:
    keys, values = normal(1, KV, 12, DIM), normal(1, KV, 12, DIM)
    q, k, v = qkv(1, 6)
    got = attend(q, k, v, past=(keys, values, past), local_window_size=window, softcap=CAP)
    seen = [np.concatenate([old[:, :, :past].swapaxes(1, 2), new], 1) for old, new in ((keys, k), (values, v))]
    close(got, formulas.attention(q, *seen, formulas.causal(1, 6, past, window), SCALE, CAP))


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
    turned_q, turned_k = (formulas.rope(x, np.arange(4) + past, inv_freq) for x in (q, k))
    close(present[:, :, past : past + 4].swapaxes(1, 2), turned_k)  # the cache holds rotated keys
    seen = [np.concatenate([old[:, :, :past].swapaxes(1, 2), x], 1) for old, x in ((keys, turned_k), (values, v))]
    close(out, formulas.attention(turned_q, *seen, formulas.causal(1, 4, past), 0.5))


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
        return np.concatenate([formulas.rope(x[..., :rotated], np.arange(4) + past, inv_freq), x[..., rotated:]], -1)

    seen = [np.concatenate([c[:, :, :past].swapaxes(1, 2), x], 1) for c, x in zip(cache, (turn(k), v), strict=True)]
    close(got, formulas.attention(turn(q), *seen, formulas.causal(1, 4, past), SCALE))


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
    close(out.reshape(x.shape), formulas.rope(x, positions, inv_freq))


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
    close(standard_attention(mask, q, k, v, softcap), formulas.attention(q, k, v, mask[:, 0], SCALE, softcap))


def test_attention_24_does_not_broadcast_a_mask_over_queries() -> None:
    """Why the lowering expands the mask of cross-attention."""
    q, k, v = normal(2, 3, HEADS, DIM), normal(2, 6, KV, DIM), normal(2, 6, KV, DIM)
    with pytest.raises(Exception, match="Attention node"):
        standard_attention(np.ones((2, 1, 1, 6), bool), q, k, v, 3.0)
