"""Mu against a plain slow restatement of the paper's model: token by token, head by head, positions centred, float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.mu_model import loaded
from helpers.oracle import run_step, seq2seq_start, states_of
from helpers.reference_formulas import gelu_tanh, rms_norm
from helpers.tiny_families import FAMILIES

from edgewright.errors import UserError
from edgewright.models.registry import build, shorten

BASE = FAMILIES["mu"]


class Slow:
    """The paper's model for one row without padding."""

    def __init__(self, config: dict, weights: dict[str, np.ndarray]) -> None:
        self.c, self.w = config, weights

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, self.w[f"{name}.weight"], self.c["layer_norm_epsilon"])

    def turned(self, x: np.ndarray, position: int) -> np.ndarray:
        half = len(x) // 2
        out = np.empty_like(x)
        for i in range(half):
            angle = position * self.c["rope_theta"] ** (-2 * i / len(x))
            out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
        return out

    def attention(self, name: str, x, context, positions, causal: bool) -> np.ndarray:
        """positions: those of x and context alike, or None without RoPE."""
        q, k, v = (
            self.linear(f"{name}.q_linear", x),
            self.linear(f"{name}.k_linear", context),
            self.linear(f"{name}.v_linear", context),
        )
        d, out = self.c["d_kv"], np.zeros_like(q)
        for h in range(self.c["num_heads"]):
            shared = h % self.c["num_key_value_heads"]  # tiled: 0 1 2 0 1 2
            for i in range(len(x)):
                seen = range(i + 1) if causal else range(len(context))
                query = q[i, h * d : (h + 1) * d]
                scores = []
                for j in seen:
                    key = k[j, shared * d : (shared + 1) * d]
                    turned = (
                        (query, key)
                        if positions is None
                        else (self.turned(query, positions[i]), self.turned(key, positions[j]))
                    )
                    scores.append(turned[0] @ turned[1] / math.sqrt(d))
                weights = np.exp(np.array(scores) - max(scores))
                weights /= weights.sum()
                out[i, h * d : (h + 1) * d] = sum(
                    p * v[j, shared * d : (shared + 1) * d] for p, j in zip(weights, seen, strict=True)
                )
        return self.linear(f"{name}.out_linear", out)

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.linear(f"{name}.fc2", gelu_tanh(self.linear(f"{name}.fc1", x)))

    def logits(self, source: list[int], target: list[int]) -> np.ndarray:
        table = self.w["transformer.wte.weight"]
        e, centred = table[source], [p - (len(source) - 1) // 2 for p in range(len(source))]
        for i in range(self.c["num_layers"]):
            at = f"transformer.e.{i}"
            x = self.norm(f"{at}.ln1", e)
            e = e + self.attention(f"{at}.attn", x, x, centred, causal=False)
            e = e + self.mlp(f"{at}.mlp", self.norm(f"{at}.ln2", e))
        e = self.norm("transformer.ln_e", e)
        h = table[target]
        for i in range(self.c["num_decoder_layers"]):
            at = f"transformer.h.{i}"
            x = self.norm(f"{at}.ln1", h)
            h = h + self.attention(f"{at}.causal_attn", x, x, range(len(target)), causal=True)
            h = h + self.attention(f"{at}.cross_attn", self.norm(f"{at}.ln2", h), e, None, causal=False)
            h = h + self.mlp(f"{at}.mlp", self.norm(f"{at}.ln3", h))
        return self.norm("transformer.ln_f", h) @ table.T


def inputs(ids: torch.Tensor, past: int, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "input_ids": ids,
        "past_length": torch.tensor([past]),
        "encoder_mask": mask,
        "logit_positions": torch.arange(ids.shape[1]),
    }


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (4, 1), (4, 4), (6, 2)])
def test_logits_and_generation_equal_the_restatement_with_padding(heads, kv_heads):
    config = BASE | {"num_heads": heads, "num_key_value_heads": kv_heads}
    model, weights = loaded(config, 1)
    slow = Slow(config, weights)
    torch.manual_seed(2)
    lengths = (9, 6, 2)
    mask = torch.arange(9).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.where(mask, torch.randint(2, 80, (3, 9)), 0)
    target = torch.randint(2, 80, (3, 6))
    with torch.no_grad():
        for chunks in ((6,), (3, 1, 2)):
            decoder, states = seq2seq_start(model, ids, mask, capacity=8)
            got, past = [], 0
            for n in chunks:
                got.append(run_step(decoder, inputs(target[:, past : past + n], past, mask), states))
                past += n
            for row, n in enumerate(lengths):
                want = slow.logits(ids[row, :n].tolist(), target[row].tolist())
                np.testing.assert_allclose(torch.cat(got, 1)[row].numpy(), want, atol=1e-4, rtol=1e-4)
        decoder, states = seq2seq_start(model, ids, mask, capacity=8)
        mine = torch.full((3, 1), model.decoder_start)
        for past in range(5):
            logits = run_step(decoder, inputs(mine[:, -1:], past, mask), states)
            mine = torch.cat([mine, logits[:, -1].argmax(-1, keepdim=True)], 1)
    for row, n in enumerate(lengths):
        tokens = [model.decoder_start]
        for _ in range(5):
            tokens.append(int(slow.logits(ids[row, :n].tolist(), tokens)[-1].argmax()))
        assert mine[row].tolist() == tokens


def test_the_caches_hold_key_heads_only():
    model, _ = loaded(BASE, 3)
    decoder = model.graphs()[2]
    sizes = {"batch": 1, "source": 4, "capacity": 5}
    assert {tuple(s.shape) for s in states_of(decoder, sizes).values()} == {(1, 3, 5, 16), (1, 3, 4, 16)}


@pytest.mark.slow
def test_the_graphs_export_and_equal_their_modules():
    model, _ = loaded(BASE, 4)
    for graph in model.graphs():
        args = tuple(torch.rand_like(x) if x.is_floating_point() else x for x in graph.example_inputs())
        n = len(graph.inputs)
        with torch.no_grad():
            got = graph.export().module()(*args[:n], *([list(args[n:])] if graph.states else []))
            for a, b in zip(got, graph.call(args), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_published_sizes_are_the_defaults():
    model = build({"model_type": "mu"})
    parameters = {n: p for n, p in model.named_parameters() if n not in model.tied}
    assert (
        sum(p.numel() for p in parameters.values()) == 332_042_240
    )  # 20 layers of 9,577,216, 10 of 10,759,680, the embedding, two norms
    assert parameters["transformer.h.9.cross_attn.k_linear.weight"].shape == (192, 1024)


def test_shorten_keeps_the_first_layers():
    assert [len(s) for s in build(shorten(BASE, 1)).stacks().values()] == [1, 1]
    assert [len(s) for s in build(shorten({"model_type": "mu"}, 12)).stacks().values()] == [12, 10]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4"),
        ({"d_kv": 12}, "d_kv is 12"),
        ({"d_model": 0}, "d_model is 0"),
        ({"num_layers": 1 << 30}, "num_layers is 1073741824"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"rope_theta": "x"}, "rope_theta is 'x'"),
    ],
)
def test_bad_configs_are_one_line(changes, words):
    with pytest.raises(UserError) as error:
        build(BASE | changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
