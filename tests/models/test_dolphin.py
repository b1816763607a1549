"""Qwen2 against transformers, and Dolphin against a plain restatement: transformers' Qwen2 twice, everything run anew."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
import transformers as tf
from helpers.oracle import adopt, causal_logits, opened, randomise, run_step, states_of

from edgewright.errors import UserError
from edgewright.models.registry import build, shorten

STACK = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
}
TINY = STACK | {
    "model_type": "dolphin",
    "encoder_config": STACK | {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 70, "rope_theta": 10000.0},
    "num_memory_tokens": 4,
    "memory_token_ids": [66, 67, 68, 69],
    "prompt_prefix": [7],
    "context_window": 30,
    "tie_word_embeddings": False,
}


# ---- Qwen2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "windows",
    [
        {},
        {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * 2},
        {"use_sliding_window": True, "sliding_window": None},
    ],
)
def test_qwen2_logits_and_generation_equal_transformers(tied, windows):
    keys = STACK | {"num_hidden_layers": 4, "vocab_size": 37, "tie_word_embeddings": tied} | windows
    config = tf.Qwen2Config(**keys)
    oracle = randomise(tf.Qwen2ForCausalLM(config), 3)
    ids = torch.randint(0, 37, (2, 11))
    with torch.no_grad():
        want = oracle(ids).logits
        tokens = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    for written in (config.to_dict(), {"model_type": "qwen2", "rms_norm_eps": 1e-6} | keys):  # new keys and old ones
        model = adopt(oracle, written)
        torch.testing.assert_close(causal_logits(model, ids, [11]), want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(causal_logits(model, ids, [6, 1, 3, 1]), want, atol=1e-4, rtol=1e-4)
        mine = ids
        for _ in range(6):
            mine = torch.cat([mine, causal_logits(model, mine, [mine.shape[1]])[:, -1].argmax(-1, keepdim=True)], 1)
        assert mine.tolist() == tokens.tolist()


def test_qwen2_has_biases_on_q_k_and_v_alone():
    names = {n.rpartition("layers.0.")[2] for n, _ in build(STACK | {"model_type": "qwen2"}).named_parameters()}
    biases = {f"self_attn.{p}_proj.bias" for p in "qkv"}
    assert {n for n in names if n.endswith("bias") and not n.startswith("model.")} == biases


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "head_dim"),
        ({"use_sliding_window": "yes"}, "use_sliding_window"),
        ({"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers"),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 0}, "sliding_window"),
        ({"layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_scaling": {"type": "by parts", "factor": 4.0}}, "by parts"),
    ],
)
def test_a_bad_qwen2_config_is_one_line_naming_the_value(change, word):
    with pytest.raises(UserError, match=word) as caught:
        build(STACK | {"model_type": "qwen2"} | change)
    assert "\n" not in str(caught.value)


# ---- Dolphin ----------------------------------------------------------------------------------------------------------


def qwen(keys: dict, seed: int) -> torch.nn.Module:
    return randomise(tf.Qwen2ForCausalLM(tf.Qwen2Config(**{**keys, "tie_word_embeddings": False})), seed)


class Oracle:
    """Dolphin as the authors run it: no cache, the whole context and the whole prompt for every token."""

    def __init__(self, config: dict, seed: int = 0) -> None:
        self.config = config
        self.encoder, self.main = qwen(config["encoder_config"], seed), qwen(config, seed + 1)
        wide, narrow = config["hidden_size"], config["encoder_config"]["hidden_size"]
        shapes = [(wide, narrow), (wide,)]
        shapes += [(wide, wide), (wide,)] if config.get("projector") == "mlp" else []
        torch.manual_seed(seed + 2)
        self.projector = [torch.randn(s) * 0.3 for s in shapes]
        if config["tie_word_embeddings"]:
            self.main.lm_head.weight = self.main.model.embed_tokens.weight

    def weights(self) -> dict[str, torch.Tensor]:
        """Under the names of the checkpoint."""
        projection = "model.context_encoder.projector.context_projection"
        layers = ["0.", "2."] if len(self.projector) == 4 else [""]
        names = [f"{projection}.{layer}{kind}" for layer in layers for kind in ("weight", "bias")]
        encoder = {f"model.context_encoder.encoder.{n}": w for n, w in self.encoder.state_dict().items()}
        return dict(self.main.state_dict()) | encoder | dict(zip(names, self.projector, strict=True))

    def memory(self, context: list[int]) -> torch.Tensor:
        """[M, hidden] of one window."""
        ids = torch.tensor([context + self.config["memory_token_ids"]])
        x = self.encoder.model(input_ids=ids).last_hidden_state[0, -self.config["num_memory_tokens"] :]
        x = x @ self.projector[0].T + self.projector[1]
        if len(self.projector) == 4:
            x = torch.nn.functional.gelu(x) @ self.projector[2].T + self.projector[3]
        return x

    def logits(self, memory: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        """[P + M + n, vocab] of the prefix, the slots and `tokens`."""
        prefix = self.config["prompt_prefix"]
        prompt = [*prefix, *[-1] * len(memory), *tokens]
        h = self.main.model.embed_tokens(
            torch.tensor([prompt]).clamp(min=0)
        ).clone()  # a slot's own embedding is id 0's
        before = (
            self.config.get("splice", "released") == "released"
        )  # the authors find where the run of slots begins, less 1
        first = len(prefix) - (1 if before else 0)
        h[0, first : first + len(memory)] = memory
        return self.main.lm_head(self.main.model(inputs_embeds=h).last_hidden_state[0])

    def answer(self, memory: torch.Tensor, question: list[int], count: int) -> list[int]:
        tokens = list(question)
        for _ in range(count):
            tokens.append(int(self.logits(memory, tokens)[-1].argmax()))
        return tokens[len(question) :]


def pair(seed: int = 0, **change):
    """The oracle, and our model of its weights in a file."""
    oracle = Oracle(TINY | change, seed)
    return oracle, opened(TINY | change, oracle.weights())


def graphs_of(model) -> dict:
    return {g.name: g for g in model.graphs()}


def read_context(model, context: list[int], size: int) -> torch.Tensor:
    """[1, M, hidden] of one window, fed `size` tokens a call; the memory tokens' hidden states are asked where they fall."""
    graph, spec = graphs_of(model)["context"], model.context_spec()
    ids = torch.tensor([[*context, *spec.tokens]])
    states, rows = states_of(graph, {"batch": 1, "capacity": ids.shape[1]}), []
    for at in range(0, ids.shape[1], size):
        part = ids[:, at : at + size]
        wanted = [i for i in range(part.shape[1]) if at + i >= len(context)]
        inputs = {
            "input_ids": part,
            "past_length": torch.tensor([at]),
            "logit_positions": torch.tensor(wanted or [0]),
        }
        out = run_step(graph, inputs, states)
        rows += [out] if wanted else []
    return torch.cat(rows, 1)


def lay_out(model, rows: int, tokens: list[int]) -> tuple[list[int], list[int]]:
    """(ids, slots) of the prompt for a memory of `rows` rows, from `context_spec` alone."""
    spec = model.context_spec()
    ids = [*spec.prefix, *[0] * rows, *tokens]
    first = len(spec.prefix) - (spec.splice == "released")
    return ids, [j - first if first <= j < first + rows else -1 for j in range(len(ids))]


def decode(model, memory: torch.Tensor, tokens: list[int], pieces: list[int], new: int = 0):
    """(logits of the whole prompt [P + M + n, vocab], greedy tokens after it)."""
    graph = graphs_of(model)["decoder"]
    ids, slots = lay_out(model, memory.shape[1], tokens)
    states, out = states_of(graph, {"batch": 1, "capacity": len(ids) + new}), []

    def feed(part: list[int], where: list[int], past: int) -> torch.Tensor:
        inputs = {
            "input_ids": torch.tensor([part]),
            "past_length": torch.tensor([past]),
            "logit_positions": torch.arange(len(part)),
            "memory": memory,
            "slots": torch.tensor(where),
        }
        return run_step(graph, inputs, states)[0]

    at = 0
    for size in pieces:
        out.append(feed(ids[at : at + size], slots[at : at + size], at))
        at += size
    answer: list[int] = []
    for _ in range(new):
        answer.append(int((feed([answer[-1]], [-1], len(ids) + len(answer) - 1) if answer else out[-1])[-1].argmax()))
    return torch.cat(out), answer


CONTEXT = [int(i) for i in torch.randint(0, 66, (23,), generator=torch.Generator().manual_seed(9))]
QUESTION = [3, 14, 15, 9, 26]


@pytest.mark.parametrize("projector", ["linear", "mlp"])
@pytest.mark.parametrize("size", [1, 5, 27])
def test_memory_of_a_context_fed_in_pieces_equals_the_oracle(projector, size):
    oracle, model = pair(projector=projector)
    with torch.no_grad():
        want = oracle.memory(CONTEXT)
    torch.testing.assert_close(read_context(model, CONTEXT, size)[0], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("splice", ["released", "exact"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefix", [[7], [7, 8, 9]])
def test_logits_and_answers_equal_the_oracle(splice, tied, prefix):
    oracle, model = pair(1, splice=splice, tie_word_embeddings=tied, prompt_prefix=prefix)
    memory = read_context(model, CONTEXT, 27)
    total = len(prefix) + 4 + len(QUESTION)
    with torch.no_grad():
        kept = oracle.memory(CONTEXT)
        want, tokens = oracle.logits(kept, QUESTION), oracle.answer(kept, QUESTION, 8)
    got, answer = decode(model, memory, QUESTION, [total], new=8)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert answer == tokens
    got, answer = decode(model, memory, QUESTION, [2, 1, total - 3], new=8)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert answer == tokens


def test_the_released_splice_covers_the_space_and_leaves_the_last_slot_with_id_0():
    _, model = pair(2, splice="released")
    ids, slots = lay_out(model, 4, QUESTION)
    assert ids == [7, 0, 0, 0, 0, *QUESTION]
    assert slots == [0, 1, 2, 3, -1, -1, -1, -1, -1, -1]
    memory = torch.randn(1, 4, 64)
    embedded = []
    model.model.layers[0].register_forward_hook(lambda _, args, out: embedded.append(args[0][0]))
    decode(model, memory, QUESTION, [10])
    table = model.model.embed_tokens.weight
    torch.testing.assert_close(embedded[0][:4], memory[0])
    torch.testing.assert_close(embedded[0][4:], table[[0, *QUESTION]])
    _, model = pair(2, splice="exact")
    assert lay_out(model, 4, QUESTION)[1] == [-1, 0, 1, 2, 3, -1, -1, -1, -1, -1]


def test_a_memory_is_asked_twice_and_without_a_prefix():
    oracle, model = pair(3, splice="exact", prompt_prefix=[])
    memory = read_context(model, CONTEXT, 27)
    kept = memory.clone()
    with torch.no_grad():
        for question in (QUESTION, [40, 2]):
            want = oracle.answer(oracle.memory(CONTEXT), question, 6)
            assert decode(model, memory, question, [4 + len(question)], new=6)[1] == want
    assert torch.equal(memory, kept)


@pytest.mark.parametrize("splice", ["released", "exact"])
def test_memories_of_several_windows_stand_one_behind_the_other(splice):
    oracle, model = pair(4, splice=splice)
    windows = [CONTEXT, CONTEXT[::-1], CONTEXT[:2]]
    memory = torch.cat([read_context(model, w, 9) for w in windows], 1)
    with torch.no_grad():
        kept = torch.cat([oracle.memory(w) for w in windows])
        want, tokens = oracle.logits(kept, QUESTION), oracle.answer(kept, QUESTION, 6)
    got, answer = decode(model, memory, QUESTION, [18], new=6)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert answer == tokens
    assert not torch.allclose(got[-1], decode(model, memory[:, :4], QUESTION, [10])[0][-1], atol=1e-2)


def test_contexts_of_one_length_are_read_as_a_batch():
    oracle, model = pair(5)
    rows = [CONTEXT, CONTEXT[::-1]]
    graph = graphs_of(model)["context"]
    ids = torch.tensor([row + TINY["memory_token_ids"] for row in rows])
    inputs = {"input_ids": ids, "past_length": torch.tensor([0]), "logit_positions": torch.arange(23, 27)}
    got = run_step(graph, inputs, states_of(graph, {"batch": 2, "capacity": 27}))
    with torch.no_grad():
        torch.testing.assert_close(got, torch.stack([oracle.memory(r) for r in rows]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_weights_stored_in_16_bits_compute_in_float32(projector):
    stored = {n: w.to(torch.bfloat16) for n, w in Oracle(TINY | {"projector": projector}, 8).weights().items()}
    config = TINY | {"projector": projector}
    narrow, wide = opened(config, stored), opened(config, {n: w.to(torch.float32) for n, w in stored.items()})
    memories = [read_context(model, CONTEXT, 27) for model in (narrow, wide)]
    torch.testing.assert_close(*memories, atol=1e-6, rtol=1e-6)
    logits = [decode(model, memories[0], QUESTION, [10])[0] for model in (narrow, wide)]
    torch.testing.assert_close(*logits, atol=1e-6, rtol=1e-6)


def test_the_programs_export_with_dynamic_lengths():
    _, model = pair(6)
    context, decoder = model.graphs()
    made = {
        "context": [torch.randint(0, 66, (3, 9)), torch.tensor([2]), torch.tensor([5, 7, 8])],
        "decoder": [
            torch.randint(0, 80, (3, 6)),
            torch.tensor([2]),
            torch.tensor([5]),
            torch.randn(3, 11, 64),
            torch.tensor([-1, 10, 0, 3, -1, -1]),
        ],
    }
    for graph in (context, decoder):
        states = [torch.randn(s.shape) for s in states_of(graph, {"batch": 3, "capacity": 20}).values()]
        args = [*made[graph.name], *states]
        n = len(graph.inputs)
        got = graph.export().module(check_guards=False)(*args[:n], args[n:])
        for a, b in zip(got, graph.call(args), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_graphs_name_their_parameters_as_the_checkpoint_does():
    oracle, model = pair(7)
    stored = set(oracle.weights())
    assert set(model.names.resolve(stored, set()).left_out) == {n for n in stored if "encoder.lm_head" in n}
    assert {n for n in stored if "encoder.lm_head" not in n} == {n for n, _ in model.named_parameters()}
    context, decoder = model.graphs()
    assert context.parameters() == {n for n in stored if n.startswith("model.context_encoder.") and "lm_head" not in n}
    assert {"lm_head.weight", "model.layers.0.self_attn.q_proj.bias"} <= decoder.parameters() <= stored


def test_the_release_needs_no_keys_of_ours():
    model = build(
        {
            "model_type": "dolphin",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 131072,
        }
    )
    assert asdict(model.context_spec()) == {
        "window": 131072 - 32,
        "tokens": tuple(range(151646, 151678)),
        "prefix": (220,),
        "splice": "released",
    }
    assert model.model.context_encoder.projector.context_projection.weight.shape == (3584, 896)
    # The shards of the release take 16.22 GB of bfloat16: the linear projector fits, an MLP or a second head does not.
    assert abs(2e-9 * sum(p.numel() for p in model.parameters()) - 16.22) < 0.01
    assert [len(s) for s in build(shorten({**TINY}, 1)).stacks().values()] == [1, 1]
    assert list(model.stacks()) == ["context", "decoder"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"encoder_config": [1]}, "encoder_config"),
        ({"encoder_config": STACK | {"hidden_size": None}}, "encoder_config.hidden_size"),
        ({"num_memory_tokens": 5}, "memory_token_ids"),
        ({"num_memory_tokens": 10**6}, "num_memory_tokens"),
        ({"memory_token_ids": None}, "memory_token_ids is 'absent'"),
        ({"memory_token_ids": [66, 67, 68, 70]}, "memory_token_ids"),
        ({"memory_token_ids": "66"}, "memory_token_ids"),
        ({"memory_token_ids": [0] * 10**6}, "memory_token_ids"),
        ({"prompt_prefix": None}, "prompt_prefix"),
        ({"prompt_prefix": [-1]}, "prompt_prefix"),
        ({"prompt_prefix": []}, "prompt_prefix"),
        ({"projector": "conv"}, "projector"),
        ({"splice": "both"}, "splice"),
        ({"context_window": 125}, "context_window"),
        ({"encoder_config": TINY["encoder_config"] | {"max_position_embeddings": 4}}, "num_memory_tokens"),
    ],
)
def test_a_bad_dolphin_config_is_one_line_naming_the_value(change, word):
    build(TINY)
    with pytest.raises(UserError, match=word) as caught:
        build(TINY | change)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 240
