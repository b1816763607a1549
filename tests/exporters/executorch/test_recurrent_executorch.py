"""Recurrences, attention without or with some rotary dimensions, merged and shared attention through ExecuTorch.

Float32 weights, so that nothing is quantized and the program must give what the reference gives.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import recurrent_blocks as blocks

from edgewright.bundle import GraphSpec
from edgewright.graph import Graph
from edgewright.runtimes.eager import EagerSession

pytest.importorskip("executorch")

from edgewright.exporters.artefact import Options
from edgewright.exporters.executorch import export as exporter
from edgewright.runtimes.executorch.session import ExecuTorchSession

CONTEXT = 80
PIECES = (33, 1, 1, 7, 1, 30, 1)
CLOSE = 2e-5
POISON = blocks.VOCAB - 1
"""A token whose embedding is NaN."""


def tokens(rows: int, length: int, seed: int) -> np.ndarray:
    return blocks.tokens(rows, length, seed) % POISON


def exported(graphs: list[Graph], folder: Path) -> ExecuTorchSession:
    exporter.export(graphs, folder, Options(CONTEXT))
    return ExecuTorchSession(folder, [GraphSpec.of(g) for g in graphs], threads=1)


@pytest.fixture(
    scope="module",
    params=["delta", *(pytest.param(name, marks=pytest.mark.slow) for name in blocks.BLOCKS if name != "delta")],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    graphs, folder = blocks.BLOCKS[request.param](CONTEXT), tmp_path_factory.mktemp("executorch")
    graphs[0].module.get_parameter("whole.embed.weight").data[POISON] = float("nan")
    return SimpleNamespace(
        name=request.param,
        graphs=graphs,
        reference=EagerSession(graphs),
        session=exported(graphs, folder),
        folder=folder,
    )


def test_chunks_and_steps_are_the_reference(case: Any) -> None:
    """Streams one after the other on the same buffers, each of two rows."""
    for seed in (1, 2, 3):
        ids = tokens(2, sum(PIECES), seed)
        want = blocks.feed(case.reference, case.reference.new_state(2, CONTEXT), ids, PIECES)
        got = blocks.feed(case.session, case.session.new_state(2, CONTEXT), ids, PIECES)
        assert blocks.worst(got, want) < CLOSE


def test_a_recurrent_graph_has_a_method_for_one_token(case: Any) -> None:
    names = {name: {"decoder_chunk", "decoder_step"} for name in ("mamba", "griffin", "rwkv")}
    plain = {"no_rope": {"decoder"}, "partial": {"decoder"}, "shared": {"decoder"}}
    assert case.session._names == (names | plain).get(case.name, {"decoder", "decoder_step"})


def test_xnnpack_computes_the_recurrence_of_a_step(case: Any) -> None:
    """All of a layer is in a delegate: kernels look tokens up, write states and pick positions."""
    placed = case.session.placement()
    kept = placed.host.get("decoder_step", {}).keys() | placed.fallback.get("decoder_step", {}).keys()
    plain = {"aten::embedding.out", "aten::index_select.out", "aten::copy_", "aten::slice_copy.Tensor_out"}
    plain |= {"llama::update_cache.out", "llama::custom_sdpa.out", "aten::constant_pad_nd.out"}
    plain |= {"aten::expand_copy.out"} if case.name == "griffin" else set()  # block-diagonal gates for each row
    plain |= {"aten::gt.Scalar_out", "aten::log1p.out", "aten::where.self_out"}  # of torch's own softplus
    assert {op for op in kept if not op.endswith(" on positions")} <= plain


def test_a_stream_of_nan_leaves_nothing_to_the_next(case: Any) -> None:
    """States are not cleared between streams; a product with zero would keep NaN."""
    spoiled = blocks.feed(case.session, case.session.new_state(1, CONTEXT), np.full((1, sum(PIECES)), POISON), PIECES)
    assert np.isnan(spoiled).all()
    for pieces in ((1, 12), (13,)):
        ids = tokens(1, 13, 4)
        want = blocks.feed(case.reference, case.reference.new_state(1, CONTEXT), ids, pieces)
        assert blocks.worst(blocks.feed(case.session, case.session.new_state(1, CONTEXT), ids, pieces), want) < CLOSE


@pytest.mark.parametrize(
    ("window", "softcap"), [pytest.param(0, 0.0, marks=pytest.mark.slow), (5, 4.0)], ids=["plain", "window and softcap"]
)
def test_merged_attention_sees_cache_and_source(window: int, softcap: float, tmp_path: Path) -> None:
    graphs = blocks.merged(CONTEXT, window, softcap)
    session, logits = exported(graphs, tmp_path), []
    hidden = np.random.default_rng(0).standard_normal((2, 9, blocks.HIDDEN)).astype(np.float32)
    mask = np.arange(9) < np.array([[9], [4]])
    ids = blocks.tokens(2, 20, 3)
    for one in (EagerSession(graphs), session):
        state = one.new_state(2, CONTEXT)
        one.run("cross_kv", {"encoder_hidden": hidden}, state)
        logits.append(blocks.feed(one, state, ids, (12, 1, 7), {"encoder_mask": mask}))
    assert blocks.worst(logits[1], logits[0]) < CLOSE


def test_two_graphs_have_states_and_a_memory_goes_between(tmp_path: Path) -> None:
    graphs = blocks.remembering(CONTEXT, memory=150)
    found: list[list[np.ndarray]] = []
    for session in (EagerSession(graphs), exported(graphs, tmp_path)):
        reading, state = session.new_state(2, CONTEXT, "context"), session.new_state(2, CONTEXT)
        given = {"input_ids": blocks.tokens(2, 12, 4), "past_length": np.array([0])}
        memory = session.run("context", given | {"logit_positions": np.array([3, 7, 11])}, reading)["memory"]
        ids, slots = blocks.tokens(2, 70, 5), np.resize([0, -1, 2, -1, 1], 70)
        given = {"input_ids": ids, "memory": memory, "slots": slots, "past_length": np.array([0])}
        found.append([memory, session.run("decoder", given | {"logit_positions": np.arange(70)}, state)["logits"]])
    for want, got in zip(*found, strict=True):
        assert blocks.worst(got, want) < CLOSE
