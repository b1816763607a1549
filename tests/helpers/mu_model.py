"""A Mu model with random weights."""

from __future__ import annotations

import torch

from edgewright.models.loading import fill
from edgewright.models.registry import build
from helpers.oracle import randomise


def loaded(config: dict, seed: int):
    """(our model with random weights, the same weights as float64 arrays by name)."""
    shapes = {n: p.shape for n, p in build(config).named_parameters(remove_duplicate=False)}
    holder = torch.nn.ParameterDict(
        {n.replace(".", "/"): torch.nn.Parameter(torch.empty(s)) for n, s in shapes.items()}
    )
    weights = {n.replace("/", "."): p.detach() for n, p in randomise(holder, seed).items()}
    model = build(config)
    fill(model, None, lambda name, shape: weights[name].reshape(shape))
    return model, {n: w.double().numpy() for n, w in weights.items()}
