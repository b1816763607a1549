"""KV caches in int8: the ops against `plain`, every family's graphs, and whole models through ONNX Runtime."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import reference_formulas, tiny
from helpers.tiny_families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.bundle import Generation, GraphSpec, PortSpec, StateSpec
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError
from edgewright.exporters.artefact import Options
from edgewright.exporters.registry import exporter
from edgewright.graph import Graph, Port, State
from edgewright.models.kv_cache import Int8Cache, cached_attention, merged_attention, stored_as
from edgewright.models.loading import load_original
from edgewright.models.registry import build
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.onnx.session import OnnxSession
from edgewright.runtimes.session import DTYPES, Session
from edgewright.targets.registry import TARGETS, require_kv_cache
from edgewright.verification.compare import Prompts
from edgewright.verification.report import Agreement

EW = torch.ops.edgewright
CONFIGS = {"t5gemma": tiny.T5GEMMA, "llama": tiny.LLAMA, "gemma3_text": tiny.GEMMA3, **FAMILIES}
WITHOUT = {"modernbert", "bert", "roberta", "xlm-roberta", "distilbert", "mamba2", "recurrent_gemma", "rwkv7"}
"""Families that keep no keys and values, or those of a window alone: encoders, and what only recurs."""
HEADS, KV, DIM, SCALE = 4, 2, 16, 0.3


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def empty(batch: int, capacity: int) -> Int8Cache:
    """A cache in which each slot holds noise: what is not written yet must not be seen."""
    codes = torch.randint(-127, 128, (batch, KV, capacity, DIM), generator=torch.Generator().manual_seed(1))
    return Int8Cache(codes.to(torch.int8), torch.full((batch, KV, capacity, 1), 0.05))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x as 8 bits hold it: restated in numpy, a scale a row."""
    rows = x.numpy()
    scales = np.abs(rows).max(-1, keepdims=True) / np.float32(127)
    return torch.from_numpy(np.rint(rows / np.where(scales > 0, scales, 1)) * scales)


# ---- ops ----


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), spread=st.sampled_from([1e-38, 1e-6, 1.0, 1e6, 1e37]), width=st.integers(1, 40))
def test_codes_are_within_half_a_scale(seed: int, spread: float, width: int) -> None:
    x = spread * normal(seed, 2, 3, width)
    x[0, 0] = 0.0
    codes, scales = EW.quantize_kv(x)
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float32, (2, 3, 1))
    error = (codes.double() * scales.double() - x.double()).abs()
    assert (error <= scales.double() * 0.50001).all()
    assert not codes[0, 0].any()
    if spread > 1e-37:  # smaller than this, the scale is bounded
        assert (codes.abs().amax(-1)[1] == 127).all()


def test_a_value_that_is_no_number_stays_seen() -> None:
    codes, scales = EW.quantize_kv(torch.tensor([[1.0, float("inf")], [1.0, float("nan")]]))
    assert not (codes.float() * scales).isfinite().all(-1).any()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(("past", "queries"), [(0, 6), (5, 4), (7, 1)])
def test_int8_attention_is_attention_to_what_the_codes_say(
    softcap: float, window: int, past: int, queries: int
) -> None:
    total = past + queries
    q, k, v = (normal(i, 2, total, heads, DIM) for i, heads in ((2, HEADS), (3, KV), (4, KV)))
    caches = [empty(2, total + 3), empty(2, total + 3)]
    if past:
        early = [x[:, :past] for x in (q, k, v)]
        _, *caches = cached_attention(*early, *caches, torch.tensor([0]), SCALE, softcap, window)
    before = caches[0].codes.clone()
    late = [x[:, past:] for x in (q, k, v)]
    out, k_out, _ = cached_attention(*late, *caches, torch.tensor([past]), SCALE, softcap, window)
    allowed = reference_formulas.causal(2, queries, past, window)
    args = (late[0].numpy(), rounded(k).numpy(), rounded(v).numpy(), allowed, SCALE, softcap)
    want = torch.from_numpy(reference_formulas.attention(*args))
    assert (out - want).abs().max() <= 3e-6 * want.abs().max()
    assert isinstance(k_out, Int8Cache)
    assert torch.equal(caches[0].codes, before)  # ops change nothing in place
    assert torch.equal(k_out.codes[:, :, :past], before[:, :, :past])
    assert torch.equal(k_out.codes[:, :, total:], before[:, :, total:])


def test_int8_attention_to_a_source_too() -> None:
    q, k, v = (normal(i, 2, 6, heads, DIM) for i, heads in ((11, HEADS), (12, KV), (13, KV)))
    source = [normal(i, 2, KV, 5, DIM) for i in (14, 15)]
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    cross = [Int8Cache(*EW.quantize_kv(x)) for x in source]
    args = (mask[:, None, None], torch.tensor([0]), SCALE, 3.0, 3)
    out, _, _ = merged_attention(q, k, v, empty(2, 8), empty(2, 8), *cross, *args)
    allowed = np.concatenate(
        [reference_formulas.causal(2, 6, 0, 3), np.broadcast_to(mask[:, None].numpy(), (2, 6, 5))], axis=-1
    )
    keys, values = (torch.cat((rounded(x), rounded(y).transpose(1, 2)), 1) for x, y in zip((k, v), source, strict=True))
    want = torch.from_numpy(reference_formulas.attention(q.numpy(), keys.numpy(), values.numpy(), allowed, SCALE, 3.0))
    assert (out - want).abs().max() <= 3e-6 * want.abs().max()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_error_is_what_8_bits_give(softcap: float) -> None:
    """Scores move by at most `shift`: weights by e^(2 shift); and values by half a scale."""
    q, k, v = (normal(i, 2, 64, heads, DIM) for i, heads in ((5, HEADS), (6, KV), (7, KV)))
    none = torch.zeros(2, KV, 64, DIM)
    want, _, _ = EW.cached_attention(q, k, v, none, none, torch.tensor([0]), SCALE, softcap, 0)
    got, _, _ = cached_attention(q, k, v, empty(2, 64), empty(2, 64), torch.tensor([0]), SCALE, softcap, 0)
    half = [x.abs().amax(-1).max() / 254 for x in (k, v)]
    shift = SCALE * q.abs().sum(-1).max() * half[0]
    bound = (torch.exp(2 * shift) - 1) * v.abs().max() + half[1]
    assert (got - want).abs().max() <= bound
    typical = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert 1e-4 < typical < 0.01  # it does round, and no more than 8 bits do


def test_pieces_steps_and_one_call_are_equal() -> None:
    q, k, v = (normal(i, 2, 9, heads, DIM) for i, heads in ((8, HEADS), (9, KV), (10, KV)))
    results = []
    for cuts in ([0, 9], [0, 4, 5, 9], list(range(10))):
        caches: list[Any] = [empty(2, 12), empty(2, 12)]
        outs = []
        for start, stop in itertools.pairwise(cuts):
            part = [x[:, start:stop] for x in (q, k, v)]
            out, *caches = cached_attention(*part, *caches, torch.tensor([start]), SCALE, 3.0, 4)
            outs.append(out)
        results.append((torch.cat(outs, 1), caches))
    (whole, caches), *others = results
    for out, held in others:
        assert (out - whole).abs().max() <= 1e-6
        for cache, other in zip(caches, held, strict=True):  # to the bit: a token is quantized by itself
            assert torch.equal(cache.codes, other.codes)
            assert torch.equal(cache.scales, other.scales)


# ---- graphs ----


@pytest.mark.parametrize("family", [f for f in CONFIGS if f not in WITHOUT])
def test_every_family_has_int8_caches(family: str) -> None:
    model = build(CONFIGS[family])
    for before, after in zip(model.graphs(), stored_as(model.graphs(), "int8"), strict=True):
        assert after.parameters() == before.parameters()
        assert (after.name, after.inputs, after.bounds, after.example) == (
            before.name,
            before.inputs,
            before.bounds,
            before.example,
        )
        held = {s.name: s for s in after.states}
        for s in before.states:
            if s.kind in ("kv", "cross"):
                scales = State(f"{s.name}_scale", s.kind, torch.float32, (*s.shape[:-1], 1), s.updated)
                assert held[scales.name] == scales
                assert held[s.name] == State(s.name, s.kind, torch.int8, s.shape, s.updated)
            else:
                assert held[s.name] == s
        given = {p.name for p in after.outputs}
        if before.name == "cross_kv":
            assert all(f"{p.name}_scale" in given for p in before.outputs)
    assert [g.states for g in stored_as(model.graphs(), "float32")] == [g.states for g in model.graphs()]


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(UserError, match="--kv-cache int8: this model keeps no KV cache"):
        stored_as(build(CONFIGS["modernbert"]).graphs(), "int8")


def test_formats_with_float_caches_are_refused_before_any_work() -> None:
    require_kv_cache(("onnx", "coreml", "tensorrt"), "float32")
    require_kv_cache(tuple(name for name, target in TARGETS.items() if target.int8_cache), "int8")
    for form in ("coreml", "tensorrt", "qnn", "ethosu"):
        with pytest.raises(UserError, match=f"--kv-cache int8: {form} keeps float caches; export it without"):
            require_kv_cache(("onnx", form), "int8")


# ---- whole models ----


def tiny_model(family: str, folder: Path) -> Any:
    """The tiny model of a family in float32 weights, so that nothing but its caches is quantized."""
    checkpoint = open_checkpoint(str(tiny.write(folder / "model", CONFIGS[family])))
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    return model


def spec_of(graph: Graph) -> GraphSpec:
    def port(p: Port | State) -> dict[str, Any]:
        return {"name": p.name, "dtype": str(p.dtype).removeprefix("torch."), "shape": p.shape}

    return GraphSpec.model_construct(
        name=graph.name,
        inputs=tuple(PortSpec.model_construct(**port(p)) for p in graph.inputs),
        outputs=tuple(PortSpec.model_construct(**port(p)) for p in graph.outputs),
        states=tuple(StateSpec.model_construct(**port(s), kind=s.kind, updated=s.updated) for s in graph.states),
    )


def generation_of(model: Any) -> Generation:
    logits = next(p for g in model.graphs() for p in g.outputs if p.name == "logits")
    most = min(g.bounds["sequence"][1] for g in model.graphs() if "sequence" in g.bounds)
    return Generation(
        task=model.task,
        decoder_start=model.decoder_start,
        vocab=int(logits.shape[-1]),
        max_context=min(48, model.max_context),
        max_new_tokens=16,
        prefill_chunk=min(6, most),
    )


def agreement(reference: Session, candidate: Session, spec: Generation) -> Agreement:
    """Over prompts of several lengths, padded to one where the model has an encoder, and one longer than any chunk."""
    rng = np.random.default_rng(3)
    prompts = [[int(t) for t in rng.integers(3, spec.vocab, n)] for n in (9, 1, 4, 14)]
    (found,) = Prompts(spec, prompts, []).compare(reference, [candidate])
    return found


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("t5gemma", "falcon_h1", "phi4flash")]


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5gemma2", "t5")), *SLOW]
)
def test_onnx_is_the_reference_with_int8_caches(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tmp_path)
    spec = generation_of(model)
    graphs = stored_as(model.graphs(), "int8")
    exporter("onnx").export(graphs, tmp_path, Options(spec.max_context))
    session = OnnxSession(tmp_path, [spec_of(g) for g in graphs], 1, "float32")
    exact = EagerSession(model.graphs())

    found = agreement(EagerSession(graphs), session, spec)
    assert found.max_relative_error <= 1e-3  # a last bit that differs may round a code to the other side
    assert found.mean_kl <= 1e-8
    assert found.prompts_identical == found.prompts
    lost = agreement(exact, session, spec)  # the caches are rounded indeed, and not much is lost
    assert 1e-4 < lost.max_relative_error < 0.1

    held = session.new_state(2, 20)
    float_bytes = sum(v.nbytes for v in exact.new_state(2, 20).values() if v.dim() == 4 and v.shape[2] == 20)
    kept = [s for s in spec_of(graphs[-1]).states if s.kind == "kv"]
    assert {held[s.name].data_type() for s in kept} == {"tensor(int8)", "tensor(float)"}
    assert sum(held[s.name].numpy().nbytes for s in kept) == float_bytes * (1 / 4 + 1 / kept[0].shape[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama", *SLOW, *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5gemma2", "t5"))]
)
def test_executorch_is_the_reference_with_int8_caches(family: str, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    from edgewright.runtimes.executorch.session import ExecuTorchSession

    model = tiny_model(family, tmp_path)
    spec = generation_of(model)
    graphs = stored_as(model.graphs(), "int8")
    exporter("executorch").export(graphs, tmp_path, Options(spec.max_context))
    session = ExecuTorchSession(tmp_path, [spec_of(g) for g in graphs], 1)
    assert not session.placement().fallback
    # Looser than ONNX: where XNNPACK's last bits put a value on the other side of a half, its code is another.
    found = agreement(EagerSession(graphs), session, spec)
    assert found.max_relative_error <= 1e-3
    assert found.prompts_identical == found.prompts
    assert agreement(EagerSession(model.graphs()), session, spec).max_relative_error > 3 * found.max_relative_error


def test_sessions_know_int8() -> None:
    assert DTYPES["int8"] is np.int8
