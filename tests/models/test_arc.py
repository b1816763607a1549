"""ARC-Encoder against a plain slow restatement in float64: groups averaged one by one, attention head by head."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from helpers.mu_model import loaded
from helpers.oracle import run_step, states_of
from helpers.reference_formulas import attention, causal, rms_norm, rope, silu
from helpers.tiny_families import FAMILIES

from edgewright.errors import UserError
from edgewright.models.families.arc_encoder import groups
from edgewright.models.registry import build, shorten
from edgewright.runtimes.eager import EagerSession

BASE = FAMILIES["arc_encoder"]


class Slow:
    """One context and one prompt; every array [tokens, width]."""

    def __init__(self, config: dict, weights: dict[str, np.ndarray]) -> None:
        self.c, self.w = config, weights

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        out = x @ self.w[f"{name}.weight"].T
        return out + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else out

    def block(self, at: str, c: dict, queries: np.ndarray, x: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """queries [S, width] attend to x [T, width]; both count positions from 0."""
        d = c["head_dim"]
        inv = c["rope_parameters"]["rope_theta"] ** (-np.arange(0, d, 2) / d)

        def normed(which: str, of: np.ndarray) -> np.ndarray:
            return rms_norm(of, self.w[f"{at}.{which}.weight"], c["rms_norm_eps"])

        def heads(which: str, of: np.ndarray, turn: bool) -> np.ndarray:
            split = self.linear(f"{at}.self_attn.{which}", normed("input_layernorm", of)).reshape(1, len(of), -1, d)
            return rope(split, np.arange(len(of)), inv) if turn else split

        q, k, v = heads("q_proj", queries, True), heads("k_proj", x, True), heads("v_proj", x, False)
        h = queries + self.linear(f"{at}.self_attn.o_proj", attention(q, k, v, allowed, d**-0.5)[0])
        y = normed("post_attention_layernorm", h)
        gated = silu(self.linear(f"{at}.mlp.gate_proj", y)) * self.linear(f"{at}.mlp.up_proj", y)
        return h + self.linear(f"{at}.mlp.down_proj", gated)

    def memory(self, ids: list[int]) -> np.ndarray:
        c, factor = self.c["encoder_config"], self.c["pooling_factor"]
        h = self.w["encoder.embed_tokens.weight"][ids]
        last = c["num_hidden_layers"] - 1
        for i in range(last):
            h = self.block(f"encoder.layers.{i}", c, h, h, np.ones((1, len(h), len(h)), bool))
        means = np.stack([h[at : at + factor].mean(0) for at in range(0, len(h), factor)])
        pooled = self.block(f"encoder.layers.{last}", c, means, h, np.ones((1, len(means), len(h)), bool))
        rows = np.concatenate([pooled, self.w["cont_tok.weight"]])
        return self.linear("bridge.layer2", self.linear("bridge.layer1", rows))

    def logits(self, embeddings: np.ndarray) -> np.ndarray:
        h = embeddings
        for i in range(self.c["num_hidden_layers"]):
            h = self.block(f"model.layers.{i}", self.c, h, h, causal(1, len(h), 0))
        return self.linear("lm_head", rms_norm(h, self.w["model.norm.weight"], self.c["rms_norm_eps"]))


def decode(model, memory: torch.Tensor, ids: list[int], slots: list[int], chunks: list[int]) -> torch.Tensor:
    """Logits [1, S, vocab] of a prompt whose `slots` take rows of memory."""
    graph = model.graphs()[1]
    states = states_of(graph, {"batch": 1, "capacity": len(ids) + 8})
    out, past = [], 0
    for n in chunks:
        inputs = {
            "input_ids": torch.tensor([ids[past : past + n]]),
            "past_length": torch.tensor([past]),
            "logit_positions": torch.arange(n),
            "memory": memory,
            "slots": torch.tensor(slots[past : past + n]),
        }
        out.append(run_step(graph, inputs, states))
        past += n
    return torch.cat(out, 1)


@pytest.mark.parametrize("factor", [4, 8])
@pytest.mark.parametrize("length", [1, 3, 4, 8, 13, 16, 29])
def test_memory_equals_the_restatement(factor, length):
    config = BASE | {"pooling_factor": factor}
    model, weights = loaded(config, 1)
    ids = torch.randint(2, 80, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    with torch.no_grad():
        (memory,) = model.graphs()[0].call([torch.tensor([ids])])
    assert memory.shape == (1, -(-length // factor) + 1, config["hidden_size"])
    np.testing.assert_allclose(memory[0].numpy(), Slow(config, weights).memory(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_tokens_equal_the_restatement_however_the_prompt_is_cut(tied):
    config = BASE | {"tie_word_embeddings": tied}
    model, weights = loaded(config, 2)
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    slow = Slow(config, weights)
    context, prefix, question = list(range(3, 20)), [2], [30, 31, 7, 9]
    table = weights["model.embed_tokens.weight"]
    rows = slow.memory(context)
    with torch.no_grad():
        (memory,) = model.graphs()[0].call([torch.tensor([context])])
        m = memory.shape[1]
        ids, slots = [*prefix, *[0] * m, *question], [-1, *range(m), *[-1] * len(question)]
        want = slow.logits(np.concatenate([table[prefix], rows, table[question]]))
        for chunks in ([len(ids)], [1] * len(ids), [3, 4, len(ids) - 7]):
            got = decode(model, memory, ids, slots, chunks)[0].numpy()
            np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)
        mine, theirs = [], []
        for _ in range(5):
            logits = decode(model, memory, [*ids, *mine], [*slots, *[-1] * len(mine)], [len(ids), *[1] * len(mine)])
            mine.append(int(logits[0, -1].argmax()))
            embeddings = np.concatenate([table[prefix], rows, table[[*question, *theirs]]])
            theirs.append(int(slow.logits(embeddings)[-1].argmax()))
    assert mine == theirs


def test_the_generate_loop_runs_it():
    """Through `read_context` and `generate`, a context of several windows: memories side by side."""
    from edgewright.bundle import ContextSpec, Generation
    from edgewright.runtimes.generate import generate, read_context

    model, weights = loaded(BASE, 3)
    slow, window = Slow(BASE, weights), 9
    spec = Generation(
        task="memory",
        vocab=80,
        max_context=64,
        max_new_tokens=4,
        prefill_chunk=5,
        context=ContextSpec(
            hidden=BASE["hidden_size"],
            rows=64,
            vocab=80,
            **asdict(replace(model.context_spec(), window=window, prefix=(2,))),
        ),
    )
    context, question = list(range(3, 25)), [30, 31, 7]
    with torch.no_grad():
        session = EagerSession(model.graphs())
        memory = read_context(session, spec, context)
        tokens = list(generate(session, spec, question, 4, memory=memory))
    rows = np.concatenate([slow.memory(context[at : at + window]) for at in range(0, len(context), window)])
    np.testing.assert_allclose(memory[0], rows, atol=1e-4, rtol=1e-4)
    table, want = weights["model.embed_tokens.weight"], []
    for _ in range(4):
        embeddings = np.concatenate([table[[2]], rows, table[[*question, *want]]])
        want.append(int(slow.logits(embeddings)[-1].argmax()))
    assert tokens == want


def test_groups_of_every_length_and_an_empty_one():
    for length in range(1, 14):
        sizes = groups(length, 4, torch.device("cpu"))
        want = [[int(at <= t < at + 4) for t in range(length)] for at in range(0, length, 4)]
        assert sizes.tolist() == [*want, [0] * length]


def test_the_graphs_export_and_serve_other_lengths():
    model, _ = loaded(BASE, 4)
    context, decoder = model.graphs()
    program = context.export().module()
    args = decoder.example_inputs()
    n = len(decoder.inputs)
    with torch.no_grad():
        for length in (1, 4, 7, 23):
            ids = torch.randint(0, 80, (3, length))
            torch.testing.assert_close(program(ids)[0], context.call([ids])[0], atol=1e-5, rtol=1e-5)
        got = decoder.export().module()(*args[:n], list(args[n:]))
        for a, b in zip(got, decoder.call(args), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_each_graph_reaches_its_own_weights():
    model = build(BASE)
    context, decoder = model.graphs()
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert context.parameters() | decoder.parameters() == names
    assert not context.parameters() & decoder.parameters()


def test_shorten_keeps_the_first_layers():
    assert [len(s) for s in build(shorten(BASE, 1)).stacks().values()] == [1, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder_config": None}, "encoder_config is None, expected an object"),
        ({"pooling_factor": 1}, "pooling_factor is 1"),
        ({"pooling_factor": 1 << 40}, "pooling_factor is 1099511627776"),
        ({"context_window": 10**6}, "context_window is 1000000"),
        ({"prompt_prefix": [80]}, "prompt_prefix is [80]"),
        ({"prompt_prefix": "x"}, "prompt_prefix"),
        ({"bridge_hidden_size": 0}, "bridge_hidden_size is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        (
            {"encoder_config": BASE["encoder_config"] | {"num_key_value_heads": 3}},
            "encoder_config.num_key_value_heads is 3",
        ),
    ],
)
def test_bad_configs_are_one_line(changes, words):
    with pytest.raises(UserError) as error:
        build(BASE | changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
