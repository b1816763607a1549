"""Each `edgewright::` op against its restatement in `plain` or in torch, its fake, and its decomposition in programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import reference_formulas as formulas
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from edgewright import ops
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.graph import Graph
from edgewright.models.layers.linear import Embedding, Linear, QuantizedEmbedding, QuantizedLinear
from edgewright.models.loading import load_original
from edgewright.models.registry import build
from edgewright.ops import DECOMPOSITIONS
from edgewright.quant.rtn import effective_group, quantize_rtn
from edgewright.quant.tensor import QuantizedTensor

EW = torch.ops.edgewright
HEADS, DIM, SCALE = 4, 16, 0.3
WIDTHS = [2, 3, 4, 5, 6, 8]


def normal(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def qkv(batch: int, queries: int, keys: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        normal(batch, queries, HEADS, DIM, spread=2.0),
        normal(batch, keys, kv_heads, DIM, spread=2.0),
        normal(batch, kv_heads, DIM, keys).permute(0, 3, 1, 2).contiguous(),
    )


def close(got: torch.Tensor, want: np.ndarray | torch.Tensor, tolerance: float = 2e-6) -> None:
    want = torch.as_tensor(want)
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max() <= tolerance * want.abs().max()


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: np.ndarray, softcap: float) -> np.ndarray:
    return formulas.attention(q.numpy(), k.numpy(), v.numpy(), allowed, SCALE, softcap)


# ---- attention ----


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 1, 3, 40])
@pytest.mark.parametrize(("past", "queries", "kv_heads"), [(0, 6, 2), (5, 4, 1), (7, 1, 4)])
def test_cached_attention(softcap: float, window: int, past: int, queries: int, kv_heads: int) -> None:
    q, k, v = qkv(2, queries, queries, kv_heads)
    # Noise beyond the past: it must be neither read nor, past the new tokens, changed.
    caches = [normal(2, kv_heads, past + queries + 3, DIM, spread=s) for s in (2.0, 5.0)]
    before = [c.clone() for c in caches]
    out, *after = EW.cached_attention(q, k, v, *caches, torch.tensor([past]), SCALE, softcap, window)

    for cache, old, new, added in zip(caches, before, after, (k, v), strict=True):
        assert torch.equal(cache, old)
        assert torch.equal(new[:, :, past : past + queries], added.transpose(1, 2))
        kept = torch.ones(new.shape[2], dtype=torch.bool)
        kept[past : past + queries] = False
        assert torch.equal(new[:, :, kept], old[:, :, kept])
    seen = [torch.cat([b[:, :, :past].transpose(1, 2), x], 1) for b, x in zip(before, (k, v), strict=True)]
    close(out, attention(q, *seen, formulas.causal(2, queries, past, window), softcap))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 6),
    past=st.integers(0, 7),
    room=st.integers(0, 3),
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.integers(0, 9),
    softcap=st.sampled_from([0.0, 0.5, 50.0]),
)
def test_cached_attention_of_any_shape(
    batch: int, queries: int, past: int, room: int, kv_heads: int, window: int, softcap: float
) -> None:
    q, k, v = qkv(batch, queries, queries, kv_heads)
    caches = [normal(batch, kv_heads, past + queries + room, DIM, spread=s) for s in (2.0, 5.0)]
    out = EW.cached_attention(q, k, v, *caches, torch.tensor([past]), SCALE, softcap, window)[0]
    seen = [torch.cat([c[:, :, :past].transpose(1, 2), x], 1) for c, x in zip(caches, (k, v), strict=True)]
    close(out, attention(q, *seen, formulas.causal(batch, queries, past, window), softcap), 5e-6)


def test_cached_attention_in_pieces_equals_one_call() -> None:
    q, k, v = qkv(2, 9, 9, 2)
    empty = torch.zeros(2, 2, 12, DIM)
    whole = EW.cached_attention(q, k, v, empty, empty, torch.tensor([0]), SCALE, 3.0, 4)
    caches, pieces = [empty, empty], []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        part = [x[:, start:stop] for x in (q, k, v)]
        out, *caches = EW.cached_attention(*part, *caches, torch.tensor([start]), SCALE, 3.0, 4)
        pieces.append(out)
    for got, want in zip((torch.cat(pieces, 1), *caches), whole, strict=True):
        close(got, want, 1e-6)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_bidirectional_attention(softcap: float, kv_heads: int) -> None:
    q, k, v = qkv(3, 7, 7, kv_heads)
    allowed = (np.random.default_rng(0).random((3, 7, 7)) > 0.5) | np.eye(7, dtype=bool)
    got = EW.bidirectional_attention(q, k, v, torch.from_numpy(allowed)[:, None], SCALE, softcap)
    close(got, attention(q, k, v, allowed, softcap))


def test_a_wholly_masked_row_is_finite() -> None:
    q, k, v = qkv(1, 4, 4, 2)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    assert EW.bidirectional_attention(q, k, v, mask, SCALE, 3.0).isfinite().all()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cross_attention(softcap: float, kv_heads: int) -> None:
    q, k, v = qkv(3, 4, 6, kv_heads)
    mask = torch.arange(6) < torch.tensor([[6], [1], [4]])
    caches = [x.transpose(1, 2).contiguous() for x in (k, v)]
    got = EW.cross_attention(q, *caches, mask[:, None, None], SCALE, softcap)
    close(got, attention(q, k, v, np.broadcast_to(mask.numpy()[:, None], (3, 4, 6)), softcap))


@pytest.mark.parametrize("past", [0, 5, 2000])
def test_rope_turns_halves_by_position(past: int) -> None:
    x = normal(2, 6, HEADS, DIM)
    inv_freq = 10000.0 ** (-torch.arange(DIM // 2) / (DIM // 2))
    positions = past + torch.arange(6)
    # float32 angles of some thousand radians are exact to some 1e-4
    close(
        EW.rope(x, positions, inv_freq),
        formulas.rope(x.numpy(), positions.numpy(), inv_freq.numpy()),
        2e-6 + past * 1e-7,
    )


# ---- pointwise ----


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 4, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(offset: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = normal(*shape, spread=0.1), normal(32).to(dtype)
    got = EW.rms_norm(x, weight, 1e-2, offset)
    assert got.dtype == torch.float32
    close(got, formulas.rms_norm(x.numpy(), offset + weight.float().numpy(), 1e-2), 1e-6)
    close(got, functional.rms_norm(x, (32,), offset + weight.float(), 1e-2), 1e-6)


def test_gelu_tanh() -> None:
    x = torch.linspace(-12, 12, 997)
    close(EW.gelu_tanh(x), functional.gelu(x, approximate="tanh"), 1e-7)
    close(EW.gelu_tanh(x), formulas.gelu_tanh(x.numpy()), 1e-7)
    assert (EW.gelu_tanh(x) - functional.gelu(x)).abs().max() > 1e-4


# ---- quantized ----


def quantized(bits: int, group: int) -> QuantizedTensor:
    return quantize_rtn(normal(24, 128), bits, group)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_quantized_ops_use_the_values_of_the_tensor(bits: int, group: int) -> None:
    w = quantized(bits, group)
    values = w.dequantize()
    scales = w.scales.float().numpy().repeat(group, 1)
    np.testing.assert_array_equal(
        values.numpy(), formulas.signed_codes(w.codes.numpy(), bits).astype(np.float32) * scales
    )

    ids = torch.tensor([[0, 23, 5], [7, 7, 1]])
    rows = EW.quantized_embedding(ids, w.codes, w.scales, bits, group)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, values[ids])
    unit = EW.quantized_linear(torch.eye(128), w.codes, w.scales, None, bits, group)
    assert torch.equal(unit, values.T)
    x, bias = normal(2, 3, 128), normal(24)
    close(EW.quantized_linear(x, w.codes, w.scales, bias, bits, group), x.double() @ values.double().T + bias, 1e-6)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(("past", "queries", "window"), [(0, 6, 0), (5, 4, 3), (7, 1, 2)])
def test_merged_attention_has_one_softmax_over_its_cache_and_the_source(
    softcap: float, past: int, queries: int, window: int
) -> None:
    q, k, v = qkv(2, queries, queries, 2)
    caches = [normal(2, 2, past + queries + 3, DIM, spread=s) for s in (2.0, 5.0)]
    cross = [normal(2, 2, 5, DIM, spread=s) for s in (2.1, 3.0)]
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, :, :, 3:] = False
    out, *after = EW.merged_attention(q, k, v, *caches, *cross, mask, torch.tensor([past]), SCALE, softcap, window)
    both = []
    for cache, new, added, source in zip(caches, after, (k, v), cross, strict=True):
        own = torch.cat([cache[:, :, :past].transpose(1, 2), added], 1)
        assert torch.equal(new[:, :, : past + queries], own.transpose(1, 2))
        both.append(torch.cat([own, source.transpose(1, 2)], 1))
    seen = formulas.causal(2, queries, past, window)
    allowed = np.concatenate([seen, np.broadcast_to(mask[:, 0].numpy(), (2, queries, 5))], -1)
    close(out, attention(q, *both, allowed, softcap))


@pytest.mark.parametrize("window", [0, 3])
def test_shared_attention_sees_the_slots_up_to_each_querys_own(window: int) -> None:
    q, *_ = qkv(2, 3, 3, 2)
    caches = [normal(2, 2, 9, DIM, spread=s) for s in (2.0, 5.0)]
    at = torch.tensor([0, 6, 3])
    slots, own = np.arange(9)[None], at.numpy()[:, None]
    allowed = np.broadcast_to((slots <= own) & (slots > own - (window or 9)), (2, 3, 9))
    seen = [c.transpose(1, 2) for c in caches]
    close(EW.shared_attention(q, *caches, at, SCALE, window), attention(q, *seen, allowed, 0.0))


# ---- schemas, fakes, decompositions ----


def samples() -> dict[str, tuple[Any, ...]]:
    """Arguments for one call of every op."""
    q, k, v = qkv(2, 3, 3, 2)
    cache = normal(2, 2, 8, DIM)
    codes, factors = EW.quantize_kv(cache)
    w = quantized(3, 32)
    return {
        "cached_attention": (q, k, v, cache, cache + 1, torch.tensor([4]), SCALE, 3.0, 2),
        "biased_attention": (q, k, v, cache, cache + 1, torch.tensor([4]), normal(5, HEADS), SCALE),
        "bidirectional_attention": (q, k, v, torch.ones(2, 1, 3, 3, dtype=torch.bool), SCALE, 3.0),
        "cross_attention": (q, cache, cache + 1, torch.ones(2, 1, 1, 8, dtype=torch.bool), SCALE, 0.0),
        "rope": (q, torch.arange(3) + 2, normal(DIM // 2)),
        "rms_norm": (normal(2, 3, 32), normal(32), 1e-6, 1.0),
        "gelu_tanh": (normal(2, 5),),
        "quantized_linear": (normal(2, 3, 128), w.codes, w.scales, normal(24), 3, 32),
        "quantized_embedding": (torch.tensor([[3, 1]]), w.codes, w.scales, 3, 32),
        "merged_attention": (
            *(q, k, v, cache, cache + 1, normal(2, 2, 5, DIM), normal(2, 2, 5, DIM)),
            *(torch.ones(2, 1, 1, 5, dtype=torch.bool), torch.tensor([4]), SCALE, 3.0, 2),
        ),
        "shared_attention": (q, cache, cache + 1, torch.tensor([0, 5, 6]), SCALE, 3),
        "quantize_kv": (k.transpose(1, 2),),
        "append_kv": (codes, EW.quantize_kv(k.transpose(1, 2))[0], torch.tensor([4])),
        "quantized_attention": (
            *(q, codes, factors, codes.flip(2), factors.flip(2)),
            *(torch.ones(2, 1, 1, 8, dtype=torch.bool), SCALE, 3.0),
        ),
        "quantized_merged_attention": (
            *(q, codes, factors, codes.flip(2), factors.flip(2)),
            *(codes[:, :, :5], factors[:, :, :5], codes[:, :, 3:], factors[:, :, 3:]),
            *(torch.ones(2, 1, 1, 5, dtype=torch.bool), torch.tensor([0, 5, 6]), SCALE, 3.0, 2),
        ),
        "quantized_causal_attention": (
            *(q, codes, factors, codes.flip(2), factors.flip(2)),
            *(torch.tensor([0, 5, 6]), SCALE, 3.0, 2),
        ),
        "quantized_biased_attention": (
            *(q, codes, factors, codes.flip(2), factors.flip(2)),
            *(torch.tensor([0, 5, 6]), normal(5, HEADS), SCALE),
        ),
        "causal_conv": (normal(2, 3, 5), normal(5, 4), normal(5), normal(2, 5, 3)),
        "gated_delta_rule": (
            q,
            q,
            q,
            -normal(2, 3, HEADS).abs(),
            normal(2, 3, HEADS),
            normal(2, HEADS, DIM, DIM),
            SCALE,
        ),
        "generalized_delta_rule": (
            *(q, q, q, -normal(2, 3, HEADS, DIM).abs()),
            *(normal(2, 3, HEADS, DIM) / DIM, normal(2, 3, HEADS, DIM) / DIM, normal(2, HEADS, DIM, DIM)),
        ),
        "diagonal_scan": (normal(2, 3, 5).sigmoid(), normal(2, 3, 5), normal(2, 5)),
        "linear_attention": (q, q, q, -normal(2, 3, HEADS, 1).abs(), normal(2, HEADS, DIM, DIM), SCALE),
        "selective_scan": (
            *(normal(2, 3, 5), normal(2, 3, 5).abs(), -normal(5, 4).abs()),
            *(normal(2, 3, 4), normal(2, 3, 4), normal(2, 5, 4)),
        ),
    }


def test_every_op_has_a_decomposition() -> None:
    assert set(DECOMPOSITIONS) == {getattr(EW, name).default for name in samples()}


@pytest.mark.parametrize("name", list(samples()))
def test_schema_fake_and_decomposition_agree_with_the_op(name: str) -> None:
    op, args = getattr(EW, name).default, samples()[name]
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    results, spelled_out = op(*args), DECOMPOSITIONS[op](*args)
    for got, want in zip(*(r if isinstance(r, tuple) else (r,) for r in (spelled_out, results)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "name",
    [
        *("rope", "rms_norm", "gelu_tanh", "cross_attention", "cached_attention", "causal_conv", "gated_delta_rule"),
        *("quantize_kv", "append_kv", "quantized_attention", "quantized_causal_attention"),
        *("quantized_merged_attention", "biased_attention", "quantized_biased_attention"),
    ],
)
def test_the_fake_of_strided_arguments_has_the_strides_of_the_result(name: str) -> None:
    """As cross_kv leaves its keys: the same numbers, but not contiguous."""
    args = [
        a.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(a, torch.Tensor) and a.dim() > 2 else a
        for a in samples()[name]
    ]
    torch.library.opcheck(getattr(EW, name).default, tuple(args), test_utils=("test_schema", "test_faketensor"))


def test_a_file_of_ops_is_imported_with_the_package() -> None:
    """Its ops are in `DECOMPOSITIONS` whatever else a program imports."""
    files = {path.stem for path in Path(ops.__file__).parent.glob("*.py") if "@define(" in path.read_text()}
    assert files <= set(ops.__all__)


def test_no_registered_op_is_forgotten() -> None:
    registered = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("edgewright::")]
    assert {n.split("::")[1].split(".")[0] for n in registered} == set(samples())


def test_quantized_linear_without_bias_passes_the_checks() -> None:
    w = quantized(5, 128)
    args = (normal(4, 128), w.codes, w.scales, None, 5, 128)
    torch.library.opcheck(EW.quantized_linear.default, args, test_utils=("test_schema", "test_faketensor"))


def quantize_in_place(model: Any) -> None:
    """Every linear and embedding in its quantized form, the widths in turn."""
    modules = [(p, m) for p, m in model.named_modules() if isinstance(m, Linear | Embedding)]
    for i, (path, module) in enumerate(modules):
        bits = WIDTHS[i % len(WIDTHS)]
        w = quantize_rtn(module.weight, bits, effective_group(module.weight.shape[1], 32))
        parts = (w.codes, w.scales, bits, w.group_size)
        new = QuantizedLinear(*parts, module.bias) if isinstance(module, Linear) else QuantizedEmbedding(*parts)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.eval())


def values_for(graph: Graph, sizes: dict[str, int], past: int) -> list[torch.Tensor]:
    """Random inputs and states of these sizes, in the order of `graph.input_names`; the last source token is padding."""
    generator = torch.Generator().manual_seed(1)

    def make(name: str, dtype: torch.dtype, shape: tuple[int | str, ...]) -> torch.Tensor:
        actual = [d if isinstance(d, int) else sizes[d] for d in shape]
        if name == "past_length":
            return torch.tensor([past])
        if name == "logit_positions":
            return torch.arange(sizes["sequence"])[-sizes["logits"] :]
        if dtype == torch.bool:
            mask = torch.ones(actual, dtype=torch.bool)
            mask[-1, max(1, actual[1] - 1) :] = False
            return mask
        if dtype == torch.int64:
            return torch.randint(3, 70, actual, generator=generator)
        return torch.randn(actual, generator=generator)

    return [make(p.name, p.dtype, p.shape) for p in (*graph.inputs, *graph.states)]


LENGTHS = [
    ({"batch": 3, "source": 9, "sequence": 5, "capacity": 11, "logits": 4}, 6),
    ({"batch": 1, "source": 1, "sequence": 1, "capacity": 20, "logits": 1}, 13),
    ({"batch": 1, "source": 17, "sequence": 16, "capacity": 16, "logits": 16}, 0),
]
SHORT = {"t5gemma": 1, "llama": 1, "gemma3": 2}


@pytest.mark.exports
@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in SHORT if n != "llama")])
def test_a_decomposed_program_has_no_private_op_and_the_same_numbers(name: str, tmp_path: Path) -> None:
    layers = {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    changes = {
        "t5gemma": {"encoder": layers, "decoder": layers, "tokenizer": False},
        "llama": {"num_hidden_layers": 2},
        "gemma3": layers,
    }
    source = open_checkpoint(str(getattr(tiny, f"write_tiny_{name}")(tmp_path / "source", **changes[name])))
    model = build(source.config)
    load_original(model, source)
    quantize_in_place(model)
    used: set[str] = set()
    for graph in model.graphs():
        program = graph.export()
        used |= private_ops(program)
        plain_program = program.run_decompositions(torch.export.default_decompositions() | DECOMPOSITIONS)
        assert not private_ops(plain_program)
        module, n = plain_program.module(), len(graph.inputs)
        for sizes, past in LENGTHS:
            values = values_for(graph, sizes, past)
            with torch.no_grad():
                got = module(*values[:n], *([values[n:]] if graph.states else []))
            want = graph.call(values)
            assert len(got) == len(want) == len(graph.output_names)
            for g, w in zip(got, want, strict=True):
                close(g, w, 1e-5)
    assert len(used) >= 5


def private_ops(program: torch.export.ExportedProgram) -> set[str]:
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {t for t in targets if t.startswith("edgewright")}
