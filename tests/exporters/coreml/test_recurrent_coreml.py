"""Recurrences, attention without or with some rotary dimensions, merged and shared attention through the Core ML target.

The saved package is computed by the evaluator: wide, which judges the lowering, and rounded to float16 as declared.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import recurrent_blocks as blocks
from helpers.tiny_families import FAMILIES

from edgewright.bundle import GraphSpec
from edgewright.exporters.artefact import Options
from edgewright.exporters.coreml import export
from edgewright.exporters.coreml.translate import _program
from edgewright.graph import Graph
from edgewright.models.registry import build
from edgewright.runtimes.coreml.session import CoremlEvaluator
from edgewright.runtimes.eager import EagerSession

pytestmark = pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools is not installed")

CONTEXT = 80
PIECES = (33, 1, 1, 7, 1, 30, 1)
WIDE, HALF = 5e-5, 0.03


def exported(graphs: list[Graph], folder: Path) -> dict[str, CoremlEvaluator]:
    export.export(graphs, folder, Options(CONTEXT))
    specs = [GraphSpec.of(g) for g in graphs]
    return {kind: CoremlEvaluator(folder, specs, kind) for kind in ("float32", "float16")}


@pytest.fixture(scope="module", params=blocks.SOME)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    graphs = blocks.BLOCKS[request.param](CONTEXT)
    return SimpleNamespace(
        name=request.param, reference=EagerSession(graphs), sessions=exported(graphs, tmp_path_factory.mktemp("coreml"))
    )


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_chunks_and_steps_are_the_reference(case: Any, kind: str) -> None:
    """Two streams one after the other, each of two rows."""
    session, limit = case.sessions[kind], WIDE if kind == "float32" else HALF
    for seed in (1, 2):
        ids = blocks.tokens(2, sum(PIECES), seed)
        want = blocks.feed(case.reference, case.reference.new_state(2, CONTEXT), ids, PIECES)
        got = blocks.feed(session, session.new_state(2, CONTEXT), ids, PIECES)
        assert blocks.worst(got, want) < limit


def test_gates_behind_a_recurrence_stay_float32() -> None:
    """The second RG-LRU reads what the first one gave; its gates' weights are float32, and nothing there may be float64."""
    model = build(FAMILIES["recurrent_gemma"] | {"block_types": ["recurrent"], "num_hidden_layers": 2})
    (graph,) = model.to_empty(device="cpu").graphs()
    assert "diagonal_scan" not in str(_program(graph).graph)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 4.0)])
def test_merged_attention_sees_cache_and_source(window: int, softcap: float, tmp_path: Path) -> None:
    graphs = blocks.merged(CONTEXT, window, softcap)
    reference = EagerSession(graphs)
    hidden = np.random.default_rng(0).standard_normal((2, 9, blocks.HIDDEN)).astype(np.float32)
    hidden = hidden.astype(np.float16).astype(np.float32)
    mask = np.arange(9) < np.array([[9], [4]])
    for kind, session in exported(graphs, tmp_path).items():
        ids, logits = blocks.tokens(2, 20, 3), []
        for one in (reference, session):
            state = one.new_state(2, CONTEXT)
            one.run("cross_kv", {"encoder_hidden": hidden}, state)
            logits.append(blocks.feed(one, state, ids, (12, 1, 7), {"encoder_mask": mask}))
        assert blocks.worst(logits[1], logits[0]) < (WIDE if kind == "float32" else HALF)


def test_a_memory_of_one_graph_is_an_input_of_another(tmp_path: Path) -> None:
    graphs = blocks.remembering(CONTEXT, memory=150)
    found: list[list[np.ndarray]] = []
    sessions = exported(graphs, tmp_path)
    function = sessions["float32"]._batch.package.functions["decoder"]
    assert function.inputs["memory"] == ("FLOAT16", (1, -1, blocks.HIDDEN))
    for session in (EagerSession(graphs), sessions["float32"]):
        state = session.new_state(2, CONTEXT, "context")
        ids, asked = blocks.tokens(2, 12, 4), np.array([3, 7, 11])
        given = {"input_ids": ids, "past_length": np.array([0]), "logit_positions": asked}
        memory = session.run("context", given, state)["memory"]
        state = session.new_state(2, CONTEXT)
        slots = np.array([0, -1, 2, -1, 1])
        given = {"input_ids": ids[:, :5], "memory": memory, "slots": slots} | {"past_length": np.array([0])}
        first = session.run("decoder", given | {"logit_positions": np.arange(5)}, state)["logits"]
        given |= {"input_ids": ids[:, 5:6], "slots": np.array([-1]), "past_length": np.array([5])}
        found.append(
            [memory, first, session.run("decoder", given | {"logit_positions": np.array([0])}, state)["logits"]]
        )
    for want, got in zip(*found, strict=True):
        assert blocks.worst(got, want) < WIDE


def test_recurrent_states_are_float32_and_go_in_and_out(case: Any) -> None:
    package = case.sessions["float32"]._batch.package
    kinds = {"conv": "states", "recurrent": "inputs"}
    for state in case.sessions["float32"]._batch.graphs["decoder"].states:
        for function in (package.functions["decoder"], package.functions["decoder_step"]):
            held = getattr(function, kinds.get(state.kind, "states"))[state.name]
            assert held[0] == ("FLOAT32" if state.kind == "recurrent" else "FLOAT16")
            assert (f"{state.name}_out" in function.outputs) == (state.kind == "recurrent")
            assert -1 not in held[1]


def test_a_step_is_shorter_than_a_chunk(case: Any) -> None:
    ops = case.sessions["float32"]._batch.package.op_counts()
    assert sum(ops["decoder_step"].values()) <= sum(ops["decoder"].values())
