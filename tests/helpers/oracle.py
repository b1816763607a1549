"""transformers' models as oracles, and the steps of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from edgewright.models.language_model import LanguageModel
from edgewright.models.loading import load_original
from edgewright.models.opening import open_model
from edgewright.models.registry import build


def opened(config: dict, weights: Mapping[str, torch.Tensor]) -> LanguageModel:
    """Our model of a checkpoint with these weights, written to files and opened as a user's."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file({n: w.contiguous().clone() for n, w in weights.items()}, Path(folder) / "model.safetensors")
        checkpoint = open_model(folder)
        model = build(checkpoint.config)
        load_original(model, checkpoint)
    return model


def adopt(oracle: torch.nn.Module, config: dict) -> LanguageModel:
    """Our model of `config` with the oracle's weights, under the oracle's names in a file."""
    return opened(config, oracle.state_dict())


def randomise(oracle: torch.nn.Module, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in oracle.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.25))
    return oracle.eval()


def states_of(graph, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    return {
        s.name: torch.zeros([d if isinstance(d, int) else sizes[d] for d in s.shape], dtype=s.dtype)
        for s in graph.states
    }


def run_step(graph, inputs: dict[str, torch.Tensor], states: dict[str, torch.Tensor]) -> torch.Tensor:
    """One call of a graph; updated states are written back. Returns the first output."""
    out = dict(zip(graph.output_names, graph.call([{**inputs, **states}[n] for n in graph.input_names]), strict=True))
    for s in graph.states:
        if s.updated:
            states[s.name] = out[f"{s.name}_out"]
    return out[graph.outputs[0].name]


def causal_logits(model, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """All logits of ids [B, S], fed in chunks through the cache."""
    (graph,) = model.graphs()
    states = states_of(graph, {"batch": ids.shape[0], "capacity": ids.shape[1] + 3})
    out, past = [], 0
    for n in chunks:
        inputs = {
            "input_ids": ids[:, past : past + n],
            "past_length": torch.tensor([past]),
            "logit_positions": torch.arange(n),
        }
        out.append(run_step(graph, inputs, states))
        past += n
    return torch.cat(out, 1)


def seq2seq_start(model, ids: torch.Tensor, mask: torch.Tensor, capacity: int):
    graphs = {g.name: g for g in model.graphs()}
    (hidden,) = graphs["encoder"].call([ids, mask])
    cross = dict(zip(graphs["cross_kv"].output_names, graphs["cross_kv"].call([hidden]), strict=True))
    sizes = {"batch": ids.shape[0], "source": ids.shape[1], "capacity": capacity}
    return graphs["decoder"], states_of(graphs["decoder"], sizes) | cross
