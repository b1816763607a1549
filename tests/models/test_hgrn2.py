"""HGRN-2, which transformers lacks, against a plain restatement in float64: token by token, head by head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.oracle import causal_logits

from edgewright.models.families.hgrn2 import forget
from edgewright.models.loading import fill
from edgewright.models.registry import build, shorten

LENGTH = 70  # more than a chunk of the recurrences

HGRN2: dict[str, Any] = {
    "model_type": "hgrn2",
    "expand_ratio": 16,
    "hidden_size": 48,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "num_hidden_layers": 3,
    "vocab_size": 37,
}
ATTN = {"layers": [1], "num_heads": 6, "num_kv_heads": 2, "qkv_bias": True, "window_size": 5, "rope_theta": 500.0}
HGRN2_CASES = {
    "bounded": {},
    "unbounded, tied": {"use_lower_bound": False, "tie_word_embeddings": True},
    "heads by number": {"expand_ratio": None, "num_heads": 2},
    "one attention layer": {"attn": ATTN},
    "attention without window": {"attn": {"layers": [0, 2], "num_heads": 3}},
}


def hgrn2(changes: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """A model of random weights, its weights by the release's names, and its config."""
    config = HGRN2 | changes
    model = build(config)
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: torch.randn(p.shape, generator=generator) * 0.4 + ("norm" in name)
        for name, p in model.named_parameters(remove_duplicate=False)
        if name not in model.tied
    }
    fill(model, object(), lambda name, shape: weights[name])
    return model, weights, config


def plain_hgrn2(weights: dict[str, torch.Tensor], config: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Logits [S, vocab] of ids [S], token by token and head by head, in float64."""
    w = {name: value.double() for name, value in weights.items()}
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    width = config["expand_ratio"] or hidden // config["num_heads"]
    attn = config.get("attn") or {"layers": []}
    shares = torch.softmax(w["model.lower_bounds"], 0) if config.get("use_lower_bound", True) else None
    h = w["model.embeddings.weight"][ids]
    for i in range(layers):
        part = {k.removeprefix(f"model.layers.{i}."): v for k, v in w.items() if k.startswith(f"model.layers.{i}.")}
        x = plain_norm(h, part["attn_norm.weight"], 1e-6)
        if i in attn["layers"]:
            h = h + plain_attention(part, attn, x)
        else:
            bound = torch.zeros(hidden).double() if shares is None else shares[1 : i + 1].sum(0)
            h = h + plain_linear(part, x, bound, width)
        x = plain_norm(h, part["mlp_norm.weight"], 1e-6)
        gate = torch.nn.functional.silu(x @ part["mlp.gate_proj.weight"].T)
        h = h + (gate * (x @ part["mlp.up_proj.weight"].T)) @ part["mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embeddings.weight"])
    return plain_norm(h, w["model.norm.weight"], 1e-6) @ head.T


def plain_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_linear(part: dict[str, torch.Tensor], x: torch.Tensor, bound: torch.Tensor, width: int) -> torch.Tensor:
    queries = torch.nn.functional.silu(x @ part["attn.q_proj.weight"].T)
    kept = bound + (1 - bound) * torch.sigmoid(x @ part["attn.f_proj.weight"].T)
    values = x @ part["attn.i_proj.weight"].T
    out = torch.zeros_like(x)
    for head in range(0, x.shape[1], width):
        at = slice(head, head + width)
        state = torch.zeros(width, width).double()
        for t in range(len(x)):
            state = torch.diag(kept[t, at]) @ state + torch.outer(1 - kept[t, at], values[t, at])
            out[t, at] = queries[t, at] @ state / width**0.5
    return plain_norm(out, part["attn.g_norm.weight"], 1e-5) @ part["attn.o_proj.weight"].T


def plain_attention(part: dict[str, torch.Tensor], attn: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    heads, (length, hidden) = attn["num_heads"], x.shape
    kv_heads, width = attn.get("num_kv_heads", heads), hidden // heads

    def projected(name: str, count: int) -> torch.Tensor:
        bias = part.get(f"attn.{name}.bias", torch.zeros(1))
        return (x @ part[f"attn.{name}.weight"].T + bias).view(length, count, width)

    def turned(y: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(width // 2).double() * 2 / width
        angle = torch.arange(length).double()[:, None, None] * attn.get("rope_theta", 10000.0) ** -steps
        left, right = y[..., : width // 2], y[..., width // 2 :]
        return torch.cat(
            (left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()),
            -1,
        )

    q, k = turned(projected("q_proj", heads)), turned(projected("k_proj", kv_heads))
    v = projected("v_proj", kv_heads)
    out = torch.zeros(length, heads, width).double()
    for head in range(heads):
        group = head * kv_heads // heads
        for t in range(length):
            first = max(0, t + 1 - attn.get("window_size", length))
            scores = k[first : t + 1, group] @ q[t, head] / width**0.5
            out[t, head] = torch.softmax(scores, 0) @ v[first : t + 1, group]
    return out.reshape(length, hidden) @ part["attn.o_proj.weight"].T


@pytest.mark.parametrize("case", HGRN2_CASES)
def test_hgrn2_is_its_plain_restatement(case):
    model, weights, config = hgrn2(HGRN2_CASES[case])
    ids = torch.randint(0, 37, (2, LENGTH), generator=torch.Generator().manual_seed(6))
    want = torch.stack([plain_hgrn2(weights, config, row) for row in ids]).float()
    with torch.no_grad():
        for chunks in ([LENGTH], [64, LENGTH - 64], [3] * 23 + [1], [1] * LENGTH):
            torch.testing.assert_close(causal_logits(model, ids, chunks), want, atol=1e-4, rtol=1e-4)


def test_a_shortened_hgrn2_keeps_the_first_layers_and_their_bounds():
    whole, weights, config = hgrn2({"attn": ATTN | {"layers": [1, 2]}})
    short = build(shorten(config, 2))
    fill(short, object(), lambda name, shape: weights[name])
    assert [tuple(p.shape) for n, p in short.named_parameters() if n.endswith("lower_bounds")] == [(3, 48)]
    bounds, wanted = short.model.bounds(), whole.model.bounds()
    assert bounds[0] is None
    assert torch.equal(bounds[1], wanted[1])
    assert build(shorten(shorten(config, 2), 1)).model.lower_bounds.shape == (3, 48)


@pytest.mark.parametrize("bound", [None, 0.0, 1e-4, 0.5, 0.97, 0.9995])
def test_the_forget_gate_holds_long_memories_in_half_precision(bound):
    f = torch.linspace(-40, 12, 5001)
    low = None if bound is None else torch.tensor(bound)
    exact = (bound or 0.0) + (1.0 - (bound or 0.0)) * torch.sigmoid(f.double())
    fade, lost = forget(f, low)
    assert (fade.exp() - exact).abs().max() <= 2e-6
    torch.testing.assert_close(lost.double(), 1 - exact, atol=1e-7, rtol=1e-5)
    some = f.abs() <= 6
    half, _ = forget(f[some].half(), None if low is None else low.half())
    least = 0.0 if low is None else low.half().double()
    want = torch.log(least + (1.0 - least) * torch.sigmoid(f[some].half().double()))
    torch.testing.assert_close(half.double(), want, atol=1e-7, rtol=8e-3)
