"""Recurrent and mixed layers on ONNX Runtime: which kernels they become, and what they compute from call to call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import recurrent_blocks as blocks
from helpers import tiny
from helpers.tiny_families import FAMILIES
from torch import nn

from edgewright.bundle import GraphSpec
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.exporters.artefact import Artefact, Options
from edgewright.exporters.onnx.export import export
from edgewright.graph import Graph
from edgewright.models.causal import kv_states
from edgewright.models.layers.attention import AttentionSpec, CachedAttention
from edgewright.models.loading import load_original
from edgewright.models.registry import build
from edgewright.models.rope import Rope
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.onnx.session import OnnxSession

CONTEXT = 80
PIECES = (33, 1, 1, 7, 1, 30, 1)
CLOSE = 2e-5


class Wide(nn.Module):
    """Two attentions of a shape of our own."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        given: dict[str, Any] = {"hidden": blocks.HIDDEN, "heads": 4, "kv_heads": 2, "head_dim": 32, "scale": 0.2}
        self.attention = CachedAttention(AttentionSpec(**given | {"rope": Rope(1e4)} | changes))

    def states(self, layer: int) -> Any:
        return kv_states(layer, self.attention.spec.kv_heads, self.attention.spec.head_dim)

    def forward(self, h: torch.Tensor, past: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> Any:
        out, k_cache, v_cache = self.attention(h, past, k_cache, v_cache)
        return h + out, k_cache, v_cache


FORMS: dict[str, dict[str, Any]] = {
    "half of a head rotates": {"rotated": 16, "window": 6},
    "a quarter of a head rotates": {"rotated": 8, "softcap": 9.0},
    "nothing rotates": {"rotated": 0},
    "heads of 24": {"head_dim": 24, "softcap": 9.0},
    "heads of 24, windows": {"head_dim": 24, "rotated": 0, "window": 5},
}


def exported(graphs: list[Graph], folder: Path) -> tuple[EagerSession, OnnxSession, Artefact]:
    artefact = export(graphs, folder, Options(CONTEXT))
    return EagerSession(graphs), OnnxSession(folder, [GraphSpec.of(g) for g in graphs], threads=1), artefact


def agree(reference: EagerSession, session: OnnxSession, batch: int, pieces: tuple[int, ...], seed: int) -> None:
    ids = blocks.tokens(batch, sum(pieces), seed)
    want, got = (blocks.feed(s, s.new_state(batch, CONTEXT), ids, pieces) for s in (reference, session))
    assert blocks.worst(got, want) < CLOSE


@pytest.mark.parametrize("name", blocks.SOME)
def test_chunks_and_steps_are_the_reference(name: str, tmp_path: Path) -> None:
    reference, session, artefact = exported(blocks.BLOCKS[name](CONTEXT), tmp_path)
    grouped = "com.microsoft::GroupQueryAttention" in artefact.ops["decoder"]  # several rows of several tokens: refused
    for seed in (1, 2):
        agree(reference, session, 1, PIECES, seed)
        agree(reference, session, 2, (1, 1, 1, 1) if grouped else PIECES, seed)


@pytest.mark.parametrize(
    "form", [next(iter(FORMS)), *(pytest.param(f, marks=pytest.mark.slow) for f in list(FORMS)[1:])]
)
def test_attention_of_any_form_is_the_reference(form: str, tmp_path: Path) -> None:
    graphs = blocks.causal([Wide(**FORMS[form]), Wide(**FORMS[form])], CONTEXT)
    reference, session, artefact = exported(graphs, tmp_path)
    agree(reference, session, 1, PIECES, 1)
    ops = artefact.ops["decoder"]
    assert ops.get("com.microsoft::RotaryEmbedding", 0) == (
        4 if form in ("a quarter of a head rotates", "heads of 24") else 0
    )
    assert ("TensorScatter" in ops) == form.startswith("heads of 24") != ("com.microsoft::GroupQueryAttention" in ops)


@pytest.mark.slow
def test_two_streams_taking_turns_do_not_mix(tmp_path: Path) -> None:
    """States change places at each call: each stream keeps its own."""
    reference, session, _ = exported(blocks.BLOCKS["hybrid"](CONTEXT), tmp_path)
    made = []
    for s in (reference, session):
        streams, found = [s.new_state(1, CONTEXT) for _ in range(2)], []
        for step in range(5):
            for seed, state in enumerate(streams):
                ids = blocks.tokens(1, 5, seed)[:, step : step + 1]
                feeds = {"input_ids": ids, "past_length": np.array([step]), "logit_positions": np.array([0])}
                found.append(s.run("decoder", feeds, state)["logits"])
        made.append(np.concatenate(found, 1))
    assert blocks.worst(made[1], made[0]) < CLOSE


@pytest.mark.slow
def test_a_cache_is_one_buffer_and_a_recurrent_state_two(tmp_path: Path) -> None:
    _, session, _ = exported(blocks.BLOCKS["hybrid"](CONTEXT), tmp_path)
    state = session.new_state(1, CONTEXT)
    assert {name for name, held in state.items() if isinstance(held, list)} == {"conv_0", "recurrent_0", "recurrent_2"}


def test_the_recurrences_become_kernels(tmp_path: Path) -> None:
    wanted = {
        "delta": {"com.microsoft::CausalConvWithState": 1, "com.microsoft::LinearAttention": 1},
        "mamba": {"com.microsoft::CausalConvWithState": 1, "Scan": 1},
        "hgrn": {"com.microsoft::LinearAttention": 1},
    }
    for name, ops in wanted.items():
        (tmp_path / name).mkdir()
        artefact = export(blocks.BLOCKS[name](CONTEXT), tmp_path / name, Options(CONTEXT))
        assert ops.items() <= artefact.ops["decoder"].items()


@pytest.mark.parametrize("layer", [blocks.DeltaNet, pytest.param(blocks.Mamba, marks=pytest.mark.slow)])
def test_a_bfloat16_convolution_is_read_as_it_is(layer: type[Any], tmp_path: Path) -> None:
    """As checkpoints have it: numpy knows no bfloat16, and small ones are folded by torch.onnx."""
    graphs = blocks.causal([layer()], CONTEXT)
    for name, parameter in graphs[0].module.named_parameters():
        if name.endswith(("conv", "bias")):
            parameter.data = parameter.data.to(torch.bfloat16)
    reference, session, artefact = exported(graphs, tmp_path)
    assert artefact.ops["decoder"]["com.microsoft::CausalConvWithState"] == 1
    agree(reference, session, 1, PIECES, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["partial", *(pytest.param(n, marks=pytest.mark.slow) for n in ("hybrid", "mamba"))])
def test_an_op_without_a_row_comes_decomposed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from edgewright.exporters.onnx import export as exporter

    for op in ("LinearAttention", "GatedDeltaRule", "CausalConv", "SelectiveScan", "Rope"):
        monkeypatch.delitem(exporter.LOWERINGS, op)
    reference, session, artefact = exported(blocks.BLOCKS[name](CONTEXT), tmp_path)
    agree(reference, session, 1, PIECES, 1)
    assert not {"com.microsoft::LinearAttention", "Scan"} & set(artefact.ops["decoder"])


@pytest.mark.parametrize(("window", "softcap"), [(5, 9.0), pytest.param(0, 0.0, marks=pytest.mark.slow)])
def test_merged_attention_is_the_reference(window: int, softcap: float, tmp_path: Path) -> None:
    """A batch of two of different sources, several tokens and single ones."""
    reference, session, artefact = exported(blocks.merged(CONTEXT, window, softcap), tmp_path)
    rng = np.random.default_rng(0)
    encoded = {"encoder_hidden": rng.standard_normal((2, 9, blocks.HIDDEN)).astype(np.float32)}
    mask = np.ones((2, 9), bool)
    mask[1, 6:] = False
    ids, made = blocks.tokens(2, 12, 3), []
    for s in (reference, session):
        state = s.new_state(2, 20)
        s.run("cross_kv", encoded, state)
        made.append(blocks.feed(s, state, ids, (1, 1, 4, 6), {"encoder_mask": mask}))
    assert blocks.worst(made[1], made[0]) < CLOSE
    assert "Concat" not in {
        n.op_type for n in onnx.load(tmp_path / "decoder.onnx").graph.node if "cache" in str(n.input)
    }
    assert artefact.ops["decoder"]["TensorScatter"] == 2


@pytest.mark.slow
def test_queries_that_are_no_tokens_attend_to_all_tokens(tmp_path: Path) -> None:
    """A context pooled into groups: as many queries as groups, whatever the length of the input."""
    checkpoint = open_checkpoint(str(tiny.write(tmp_path / "model", FAMILIES["arc_encoder"])))
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    graphs = model.graphs()[:1]
    reference, session, artefact = exported(graphs, tmp_path)
    assert artefact.ops["context"]["Attention"] == 1
    for length in (1, 4, 5, 17):
        feeds = {"input_ids": blocks.tokens(2, length, length)}
        want, got = (s.run("context", feeds, {})["memory"] for s in (reference, session))
        assert got.shape == (2, -(-length // 4) + 1, 64)
        assert blocks.worst(got, want) < CLOSE


def test_a_memory_of_any_length_is_read(tmp_path: Path) -> None:
    reference, session, _ = exported(blocks.remembering(CONTEXT, 16), tmp_path)
    made = []
    for s in (reference, session):
        context = s.new_state(1, 12, "context")
        ids = blocks.tokens(1, 12, 5)
        feeds = {"input_ids": ids, "past_length": np.array([0]), "logit_positions": np.arange(5, 12)}
        memory = s.run("context", feeds, context)["memory"]
        assert memory.shape == (1, 7, blocks.HIDDEN)
        state = s.new_state(1, 20)
        for slots in ([-1, 0, 1, 2, 3, 4, 5, 6, -1], [-1]):
            past = 0 if len(slots) > 1 else 9
            feeds = {"input_ids": blocks.tokens(1, len(slots), 6), "past_length": np.array([past])}
            feeds |= {"logit_positions": np.arange(len(slots)), "memory": memory, "slots": np.array(slots)}
            made.append(s.run("decoder", feeds, state)["logits"])
    assert blocks.worst(np.concatenate(made[2:], 1), np.concatenate(made[:2], 1)) < CLOSE
