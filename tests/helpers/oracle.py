"""transformers' models as oracles, and the steps of ours."""

from __future__ import annotations

import torch

from edgewright.models.language_model import LanguageModel
from edgewright.models.loading import fill
from edgewright.models.registry import build


def adopt(oracle: torch.nn.Module, config: dict) -> LanguageModel:
    """Our model of `config` with the oracle's weights, read by the oracle's parameter names."""
    weights = dict(oracle.state_dict())
    model = build(config)

    class Source:
        pass

    fill(model, Source(), lambda name, shape: weights[name].clone().reshape(shape))
    return model


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
