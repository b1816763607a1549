"""SambaY against its formulas restated plainly in float64: token by token, head by head, every layer for every position."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import reference_formulas
from helpers.oracle import causal_logits, opened, run_step, states_of

from edgewright.errors import UserError
from edgewright.models.families.sambay import Difference
from edgewright.models.registry import build, shorten

TINY = {
    "model_type": "phi4flash",
    "hidden_size": 64,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-05,
    "mamba_d_state": 4,
    "max_position_embeddings": 128,
    "mb_per_layer": 2,
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "num_key_value_heads": 4,
    "sliding_window": 5,
    "tie_word_embeddings": True,
    "vocab_size": 61,
}


def filled(config: dict, seed: int = 0):
    """The model of a file with random weights, and those weights in float64 by name."""
    rng = np.random.default_rng(seed)
    model, weights = build(config), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in model.tied:
            value = rng.standard_normal(tuple(parameter.shape)) * (0.25 if parameter.dim() > 1 else 0.3)
            if name.endswith(("norm.weight", "subln.weight")):
                value += 1.0
            weights[name] = value.astype(np.float32).astype(np.float64)
    return opened(config, stored(weights, torch.float32)), weights


def stored(weights: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value.astype(np.float32)).to(dtype) for name, value in weights.items()}


class Plain:
    """papers: SambaY 2507.06607, Mamba 2312.00752, differential attention 2410.05258; one row of tokens at once."""

    def __init__(self, config: dict, weights: dict[str, np.ndarray]) -> None:
        self.config, self.w = config, weights
        self.layers, self.heads, self.kv = (
            config[k] for k in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        )
        self.dim = config["hidden_size"] // self.heads

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def layer_norm(self, name: str, x: np.ndarray) -> np.ndarray:
        deviation = np.sqrt(x.var(-1, keepdims=True) + self.config["layer_norm_eps"])
        return (x - x.mean(-1, keepdims=True)) / deviation * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def mamba(self, name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, z = np.split(self.linear(f"{name}.in_proj", x), 2, -1)
        kernel = self.w[f"{name}.conv1d.weight"][:, 0]
        conv = np.zeros_like(u)
        for t in range(len(u)):
            for back in range(min(t + 1, kernel.shape[1])):
                conv[t] += kernel[:, -1 - back] * u[t - back]
        u = reference_formulas.silu(conv + self.w[f"{name}.conv1d.bias"])
        n = self.config.get("mamba_d_state", 16)
        low = self.linear(f"{name}.x_proj", u)
        dt = np.log1p(np.exp(self.linear(f"{name}.dt_proj", low[:, : -2 * n])))
        b, c = low[:, -2 * n : -n], low[:, -n:]
        a, state, scan = -np.exp(self.w[f"{name}.A_log"]), np.zeros((u.shape[1], n)), np.zeros_like(u)
        for t in range(len(u)):
            state = np.exp(dt[t][:, None] * a) * state + (dt[t] * u[t])[:, None] * b[t]
            scan[t] = state @ c[t] + self.w[f"{name}.D"] * u[t]
        return self.linear(f"{name}.out_proj", scan * reference_formulas.silu(z)), scan

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int) -> np.ndarray:
        """softmax(q k) v of one head, [T, D] each, token by token."""
        out = np.zeros((len(q), v.shape[1]))
        for t in range(len(q)):
            first = max(0, t + 1 - window) if window else 0
            scores = k[first : t + 1] @ q[t] / math.sqrt(self.dim)
            weights = np.exp(scores - scores.max())
            out[t] = weights @ v[first : t + 1] / weights.sum()
        return out

    def difference(self, name: str, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int) -> np.ndarray:
        """q [T, heads, D]; k, v [T, kv, D]: even heads are q1, k1, v1, odd ones q2, k2, v2."""
        w = {n: self.w[f"{name}.inner_cross_attn.{n}"] for n in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")}
        start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        rate = np.exp(w["lambda_q1"] @ w["lambda_k1"]) - np.exp(w["lambda_q2"] @ w["lambda_k2"]) + start
        out = []
        for j in range(self.heads // 2):
            at = j // (self.heads // self.kv)
            value = np.concatenate([v[:, 2 * at], v[:, 2 * at + 1]], -1)
            one = self.attend(q[:, 2 * j], k[:, 2 * at], value, window)
            two = self.attend(q[:, 2 * j + 1], k[:, 2 * at + 1], value, window)
            gamma = self.w[f"{name}.inner_cross_attn.subln.weight"]
            out.append((1 - start) * reference_formulas.rms_norm(one - rate * two, gamma, 1e-5))
        return self.linear(f"{name}.out_proj", np.concatenate(out, -1))

    def logits(self, ids: list[int]) -> np.ndarray:
        h = self.w["model.embed_tokens.weight"][ids]
        half, memory, shared = self.layers // 2, None, None
        for i in range(self.layers):
            name = f"model.layers.{i}"
            x = self.layer_norm(f"{name}.input_layernorm", h)
            if i % 2 == 0 and i <= half:
                mixed, memory = self.mamba(f"{name}.attn", x)
            elif i % 2 == 0:
                gated = memory * reference_formulas.silu(self.linear(f"{name}.attn.in_proj", x))
                if self.config.get("gmu_norm"):
                    gated = reference_formulas.rms_norm(
                        gated, self.w[f"{name}.attn.norm.weight"], self.config["layer_norm_eps"]
                    )
                mixed = self.linear(f"{name}.attn.out_proj", gated)
            else:
                qkv = self.linear(f"{name}.attn.Wqkv", x).reshape(len(ids), -1, self.dim)
                if i <= half + 1:
                    shared = qkv[:, self.heads : self.heads + self.kv], qkv[:, self.heads + self.kv :]
                window = self.config["sliding_window"] if i < half else 0
                mixed = self.difference(f"{name}.attn", i, qkv[:, : self.heads], *shared, window)
            h = h + mixed
            gate, y = np.split(
                self.linear(f"{name}.mlp.fc1", self.layer_norm(f"{name}.post_attention_layernorm", h)), 2, -1
            )
            h = h + self.linear(f"{name}.mlp.fc2", y * reference_formulas.silu(gate))
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return self.layer_norm("model.final_layernorm", h) @ head.T


def make_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 12, "sliding_window": 100},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "gmu_norm": True},
        {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False},
        {"mamba_d_state": 16, "mamba_d_conv": 2, "mamba_expand": 3, "mamba_dt_rank": 7, "sliding_window": 2},
    ],
)
def test_logits_equal_the_plain_formulas(change):
    config = TINY | change
    model, weights = filled(config)
    ids = make_ids(2, 23)
    want = np.stack([Plain(config, weights).logits(row) for row in ids.tolist()])
    assert np.abs(want).max() > 1.0
    np.testing.assert_allclose(causal_logits(model, ids, [23]).numpy(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_prefill_in_pieces_is_prefill_at_once(size):
    model, weights = filled(TINY, seed=2)
    ids = make_ids(1, 70)
    pieces = [min(size, 70 - at) for at in range(0, 70, size)]
    want = Plain(TINY, weights).logits(ids[0].tolist())
    np.testing.assert_allclose(causal_logits(model, ids, pieces)[0].numpy(), want, atol=1e-4, rtol=1e-4)


def test_the_cross_decoder_runs_for_the_asked_positions_alone():
    model, _ = filled(TINY, seed=3)
    ids, (graph,) = make_ids(2, 30), model.graphs()
    every = causal_logits(model, ids, [30])
    seen = []
    for i in (5, 6, 7):
        model.model.layers[i].mlp.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    inputs = {"input_ids": ids, "past_length": torch.tensor([0])}
    for asked in ([29], [4, 29]):
        states = states_of(graph, {"batch": 2, "capacity": 30})
        got = run_step(graph, inputs | {"logit_positions": torch.tensor(asked)}, states)
        torch.testing.assert_close(got, every[:, asked], atol=1e-5, rtol=1e-5)
    assert seen == [30, 1, 1, 30, 2, 2]  # the layer of full attention sees all, those behind it what is asked


def test_greedy_tokens_equal_the_plain_formulas():
    model, weights = filled(TINY, seed=4)
    want, (graph,) = make_ids(1, 9)[0].tolist(), model.graphs()
    got, states = list(want), states_of(graph, {"batch": 1, "capacity": 32})
    fed = 0
    for _ in range(20):
        want.append(int(Plain(TINY, weights).logits(want)[-1].argmax()))
        inputs = {
            "input_ids": torch.tensor([got[fed:]]),
            "past_length": torch.tensor([fed]),
            "logit_positions": torch.tensor([len(got) - fed - 1]),
        }
        fed = len(got)
        got.append(int(run_step(graph, inputs, states)[0, -1].argmax()))
    assert got == want
    assert len(set(got[9:])) > 3


def test_weights_stored_in_16_bits_compute_in_float32():
    _, weights = filled(TINY, seed=7)
    half = stored(weights, torch.bfloat16)
    narrow, wide = opened(TINY, half), opened(TINY, {n: w.to(torch.float32) for n, w in half.items()})
    ids = make_ids(1, 12)
    torch.testing.assert_close(
        causal_logits(narrow, ids, [11, 1]), causal_logits(wide, ids, [11, 1]), atol=1e-6, rtol=1e-6
    )


def test_the_graph_has_one_growing_cache_and_holds_every_key_once():
    (graph,) = build(TINY).graphs()
    kinds = {s.name: s for s in graph.states}
    assert list(kinds) == ["conv_0", "recurrent_0", "k_window_1", "v_window_1", "conv_2", "recurrent_2", "k_window_3",
                           "v_window_3", "conv_4", "recurrent_4", "k_cache_5", "v_cache_5"]  # fmt: skip
    assert kinds["k_cache_5"].shape == ("batch", 2, "capacity", 16)  # 4 heads of 8, in pairs
    assert kinds["k_window_3"].shape == ("batch", 2, TINY["sliding_window"] - 1, 16)
    assert kinds["recurrent_4"].shape == ("batch", 128, 4)
    assert kinds["conv_4"].shape == ("batch", 128, 3)
    assert graph.bounds == {"batch": (1, 1024), "sequence": (1, 64), "logits": (1, 64), "capacity": (1, 128)}


@pytest.mark.slow
def test_the_program_exports_with_dynamic_lengths():
    model, _ = filled(TINY, seed=5)
    (graph,) = model.graphs()
    program = graph.export()
    ids = make_ids(3, 11)
    states = [torch.randn(s.shape) for s in states_of(graph, {"batch": 3, "capacity": 20}).values()]
    args = (ids, torch.tensor([5]), torch.tensor([0, 7, 10]))
    for got, want in zip(program.module(check_guards=False)(*args, states), graph.call([*args, *states]), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_parameters_bear_the_checkpoint_names_and_shapes_of_the_release():
    release = {
        "model_type": "phi4flash",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "max_position_embeddings": 262144,
        "mb_per_layer": 2,
        "num_attention_heads": 40,
        "num_hidden_layers": 32,
        "num_key_value_heads": 20,
        "sliding_window": 512,
        "vocab_size": 200064,
    }
    model = build(release)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n not in model.tied}
    wide = ("A_log", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")  # float32 in the release, the rest bfloat16
    sizes = [math.prod(shape) * (4 if name.endswith(wide) else 2) for name, shape in shapes.items()]
    assert sum(sizes) == 7706608640  # the total size that the release's weight index gives
    expected = {
        "16.attn.in_proj.weight": (10240, 2560),
        "16.attn.conv1d.weight": (5120, 1, 4),
        "16.attn.x_proj.weight": (192, 5120),
        "16.attn.dt_proj.weight": (5120, 160),
        "16.attn.A_log": (5120, 16),
        "16.attn.D": (5120,),
        "15.attn.Wqkv.weight": (5120, 2560),
        "15.attn.out_proj.bias": (2560,),
        "18.attn.in_proj.weight": (5120, 2560),
        "18.attn.out_proj.weight": (2560, 5120),
        "19.attn.Wqkv.weight": (2560, 2560),
        "19.attn.inner_cross_attn.subln.weight": (128,),
        "31.mlp.fc1.weight": (20480, 2560),
    }
    assert {name: shapes[f"model.layers.{name}"] for name in expected} == expected
    assert {"model.embed_tokens.weight", "model.final_layernorm.bias", "model.layers.0.input_layernorm.bias"} < set(
        shapes
    )


def test_the_start_of_lambda_follows_the_layer():
    assert [round(float(Difference(4, i).start), 6) for i in (0, 1, 17)] == [0.2, 0.355509, 0.796342]


@pytest.mark.parametrize(("layers", "kept"), [(1, 1), (5, 5), (6, 6), (7, 7), (100, 8)])
def test_a_shortened_model_keeps_the_kinds_of_its_layers(layers, kept):
    whole, weights = filled(TINY, seed=6)
    model = opened(shorten(TINY, layers), stored(weights, torch.float32))
    assert len(model.stacks()["decoder"]) == kept
    assert causal_logits(model, make_ids(1, 6), [4, 2]).isfinite().all()
    assert {n for n, _ in model.named_parameters()} <= {n for n, _ in whole.named_parameters()}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_hidden_layers": 6}, "num_hidden_layers is 6"),
        ({"mb_per_layer": 4}, "mb_per_layer"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"num_key_value_heads": 6}, "num_key_value_heads"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 16, "num_key_value_heads": 16}, "hidden_size"),
        ({"sliding_window": None}, "sliding_window"),
        ({"mamba_d_state": 0}, "mamba_d_state"),
        ({"mamba_d_conv": 1}, "mamba_d_conv"),
        ({"mamba_expand": 10**9}, "mamba_expand"),
        ({"mamba_dt_rank": "big"}, "mamba_dt_rank"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias"),
        ({"mamba_conv_bias": False}, "mamba_conv_bias"),
        ({"num_kept_layers": 9}, "num_kept_layers"),
        ({"hidden_act": "swishy"}, "swishy"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps"),
    ],
)
def test_a_bad_config_is_one_line_naming_the_value(change, word):
    with pytest.raises(UserError, match=word) as caught:
        build(TINY | change)
    assert "\n" not in str(caught.value)
