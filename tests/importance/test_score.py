"""Layer scores of real (tiny) models against direct computations, and the units bits are chosen for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import GEMMA3, LLAMA, T5GEMMA, merged, write_tiny_gemma3, write_tiny_llama, write_tiny_t5gemma

from edgewright.bundle import Generation
from edgewright.calibration.prompts import Prompts
from edgewright.calibration.samples import Sample
from edgewright.calibration.source import Source
from edgewright.checkpoints.checkpoint import Checkpoint
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError
from edgewright.importance.candidates import Candidates
from edgewright.importance.layer_scores import lim_streamed, score_layers, unit_weights
from edgewright.importance.lim_zd import importance_weights, lim, zd
from edgewright.importance.score import REFERENCE, ScoreOptions, Scores
from edgewright.importance.score import score as score_by
from edgewright.models.loading import load_original
from edgewright.models.registry import build
from edgewright.quant.plan import Choice, Unit
from edgewright.quant.units import quantizable_units

PROMPTS = [[5, 9, 40, 3, 17, 33], [60], [8, 8, 21, 30, 4, 55, 12, 6, 7]]
WRITERS = [write_tiny_t5gemma, write_tiny_llama, write_tiny_gemma3]
Layer = tuple[str, int]


def opened(writer: Callable[[Path], Path], folder: Path) -> tuple[Checkpoint, Any, list[Unit], Generation]:
    checkpoint = open_checkpoint(str(writer(folder)))
    model = build(checkpoint.config)
    spec = Generation(
        task=model.task,
        decoder_start=model.decoder_start,
        eos_ids=(1,),
        vocab=checkpoint.config["vocab_size"],
        max_context=64,
        max_new_tokens=5,
    )
    return checkpoint, model, quantizable_units(model), spec


def score(method: str, parts: tuple[Checkpoint, Any, list[Unit], Generation], prompts: list[list[int]]) -> Any:
    checkpoint, _, units, spec = parts
    source = Source(checkpoint, checkpoint.config, spec)
    return score_layers(method, source, units, Prompts(prompts), lambda _: None)


# ---- LIM ----


def observed_lim(model: Any, run: Callable[[], None]) -> dict[Layer, float]:
    """LIM of every layer over all tokens that pass it during `run`."""
    seen: dict[Layer, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def hook(key: Layer) -> Callable[..., None]:
        def keep(_: Any, args: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            seen.setdefault(key, []).append((args[0].flatten(0, 1), after.flatten(0, 1)))

        return keep

    handles = [
        layer.register_forward_hook(hook((stack, i)))
        for stack, layers in model.stacks().items()
        for i, layer in enumerate(layers)
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return {key: lim(*(torch.cat(part) for part in zip(*pairs, strict=True))) for key, pairs in seen.items()}


@pytest.mark.parametrize("writer", [write_tiny_llama, write_tiny_gemma3])
def test_lim_of_a_decoder_is_over_every_token_of_every_prompt(writer: Callable[[Path], Path], tmp_path: Path) -> None:
    parts = opened(writer, tmp_path)
    found = score("lim", parts, PROMPTS)
    model = build(parts[0].config)
    load_original(model, parts[0])
    (graph,) = model.graphs()

    def run() -> None:
        for prompt in PROMPTS:  # the whole prompt in one forward, caches just large enough
            n = len(prompt)
            caches = [torch.zeros(1, s.shape[1], n, s.shape[3]) for s in graph.states]
            graph.call([torch.tensor([prompt]), torch.tensor([0]), torch.arange(n), *caches])

    want = observed_lim(model, run)
    assert list(found) == [("decoder", 0), ("decoder", 1), ("decoder", 2)]
    assert found == pytest.approx(want, abs=1e-6)
    assert len({round(v, 3) for v in found.values()}) == 3  # layers differ, so a mix-up would show


def test_lim_of_an_encoder_decoder_sees_the_prompt_and_its_own_answer(tmp_path: Path) -> None:
    parts = opened(write_tiny_t5gemma, tmp_path)
    checkpoint, _, _, spec = parts
    found = score("lim", parts, PROMPTS)
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    encoder, cross, decoder = model.graphs()

    def run() -> None:
        for prompt in PROMPTS:
            mask = torch.ones(1, len(prompt), dtype=torch.bool)
            (hidden,) = encoder.call([torch.tensor([prompt]), mask])
            projected = dict(zip(cross.output_names, cross.call([hidden]), strict=True))
            tokens = [spec.decoder_start]
            states = {s.name: torch.zeros(1, s.shape[1], 8, s.shape[3]) for s in decoder.states if s.updated}
            for past in range(spec.max_new_tokens):
                values = {
                    "input_ids": torch.tensor([[tokens[-1]]]),
                    "past_length": torch.tensor([past]),
                    "encoder_mask": mask,
                    "logit_positions": torch.tensor([0]),
                }
                given = [{**values, **states, **projected}[n] for n in decoder.input_names]
                out = dict(zip(decoder.output_names, decoder.call(given), strict=True))
                states = {n: out[f"{n}_out"] for n in states}
                tokens.append(int(out["logits"][0, -1].argmax()))
                if tokens[-1] in spec.eos_ids:
                    break

    want = observed_lim(model, run)
    assert set(found) == {("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1), ("decoder", 2)}
    assert found == pytest.approx(want, abs=1e-6)


def test_lim_leaves_no_hooks_and_only_reads_the_original_weights(tmp_path: Path) -> None:
    parts = opened(write_tiny_llama, tmp_path)
    first = score("lim", parts, PROMPTS)
    assert all(not module._forward_hooks for module in parts[1].modules())
    assert score("lim", parts, PROMPTS) == first


def test_a_prompt_longer_than_the_context_is_cut(tmp_path: Path) -> None:
    parts = opened(write_tiny_llama, tmp_path)
    long = [3 + i % 70 for i in range(200)]
    assert score("lim", parts, [long]) == score("lim", parts, [long[:63]])


# ---- ZD and the rest ----


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("two_sided", [False, True])
def test_zd_is_over_the_matrices_of_each_layer(writer: Callable[[Path], Path], two_sided: bool, tmp_path: Path) -> None:
    parts = opened(writer, tmp_path)
    checkpoint, model = parts[:2]
    paths = {"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"}
    if model.task == "causal":
        paths = {"decoder": "model.layers"}
    want = {
        (stack, i): zd(
            (
                checkpoint.tensor(n)
                for n in checkpoint.names()
                if n.startswith(f"{path}.{i}.") and len(checkpoint.info(n).shape) == 2
            ),
            two_sided=two_sided,
        )
        for stack, path in paths.items()
        for i in range(len(model.stacks()[stack]))
    }
    found = score("zd-two-sided" if two_sided else "zd", parts, [])
    assert found == pytest.approx(want, abs=1e-12)
    assert all(0.1 < v < 0.4 for v in found.values())
    assert all(p.is_meta for p in model.parameters())  # read from the file, the model untouched


def test_refusals(tmp_path: Path) -> None:
    parts = opened(write_tiny_llama, tmp_path)
    assert score("uniform", parts, []) == {}
    with pytest.raises(UserError, match=r"--importance magic .*lim, zd, zd-two-sided, uniform"):
        score("magic", parts, [])
    with pytest.raises(UserError, match="--calibration"):
        score("lim", parts, [])


@pytest.mark.parametrize("method", ["lim", "zd", "zd-two-sided"])
def test_unit_weights_rank_all_stacks_together(method: str) -> None:
    units = quantizable_units(build(T5GEMMA))
    scores = {("encoder", 0): -0.2, ("encoder", 1): -0.9, ("decoder", 0): -0.5, ("decoder", 1): -0.1}
    scores["decoder", 2] = -0.7
    order = list(scores)
    by_rank = importance_weights({i: scores[k] for i, k in enumerate(order)}, "lim" if method == "lim" else "zd")
    found = unit_weights(units, scores, method)
    assert set(found) == {u.name for u in units}
    for unit in units:
        first = unit.weights[0]
        want = 4.0 if first.layer is None else by_rank[order.index((first.stack, first.layer))]
        assert found[unit.name] == pytest.approx(want)
    best = ("decoder", 1) if method == "lim" else ("encoder", 1)  # highest LIM, lowest ZD
    assert all(found[u.name] == 16.0 for u in units if (u.weights[0].stack, u.weights[0].layer) == best)
    assert set(unit_weights(units, {}, "uniform").values()) == {math.sqrt(16.0)}


# ---- units ----


def names(config: dict[str, Any]) -> list[list[str]]:
    return [[w.name for w in u.weights] for u in quantizable_units(build(config))]


def layer_units(prefix: str, cross: bool = False) -> list[list[str]]:
    """A layer's units as its architecture file says: q, k and v together; gate and up together."""
    found = [
        [f"{prefix}.self_attn.{p}_proj.weight" for p in "qkv"],
        [f"{prefix}.self_attn.o_proj.weight"],
    ]
    if cross:
        found += [
            [f"{prefix}.cross_attn.{p}_proj.weight" for p in "kv"],  # they share the encoder's output, q does not
            [f"{prefix}.cross_attn.q_proj.weight"],
            [f"{prefix}.cross_attn.o_proj.weight"],
        ]
    return [
        *found,
        [f"{prefix}.mlp.gate_proj.weight", f"{prefix}.mlp.up_proj.weight"],
        [f"{prefix}.mlp.down_proj.weight"],
    ]


def test_units_of_a_decoder_with_its_own_head() -> None:
    layers = [u for i in range(3) for u in layer_units(f"model.layers.{i}")]
    assert names(LLAMA) == [["model.embed_tokens.weight"], *layers, ["lm_head.weight"]]


@pytest.mark.parametrize("config", [GEMMA3, merged(LLAMA, {"tie_word_embeddings": True})], ids=["gemma3", "llama"])
def test_a_tied_head_is_no_unit_of_its_own(config: dict[str, Any]) -> None:
    layers = [u for i in range(3) for u in layer_units(f"model.layers.{i}")]
    assert names(config) == [["model.embed_tokens.weight"], *layers]


@pytest.mark.parametrize("tied", [True, False])
def test_units_of_an_encoder_decoder(tied: bool) -> None:
    found = names(merged(T5GEMMA, {"tie_word_embeddings": tied}))
    want = [["model.encoder.embed_tokens.weight"]]
    want += [u for i in range(2) for u in layer_units(f"model.encoder.layers.{i}")]
    want += [["model.decoder.embed_tokens.weight"]]
    want += [u for i in range(3) for u in layer_units(f"model.decoder.layers.{i}", cross=True)]
    want += [] if tied else [["lm_head.out_proj.weight"]]
    assert sorted(found) == sorted(want)  # nothing twice, nothing left out


def test_units_know_their_layer_and_stack() -> None:
    units = quantizable_units(build(T5GEMMA))
    places = {w.name: (w.stack, w.layer) for u in units for w in u.weights}
    assert places["model.encoder.layers.1.mlp.down_proj.weight"] == ("encoder", 1)
    assert places["model.decoder.layers.2.cross_attn.k_proj.weight"] == ("decoder", 2)
    assert places["model.decoder.embed_tokens.weight"][1] is None
    shapes = {w.name: w.shape for u in units for w in u.weights}
    assert shapes["model.decoder.layers.0.cross_attn.k_proj.weight"] == (32, 96)  # reads the wider encoder
    assert len({u.name for u in units}) == len(units)


def test_layer_10_is_not_taken_for_layer_1() -> None:
    units = quantizable_units(build(merged(LLAMA, {"num_hidden_layers": 12})))
    for unit in units:
        for w in unit.weights:
            assert (f".layers.{w.layer}." in w.name) == (w.layer is not None)


def test_a_weight_whose_inputs_are_no_multiple_of_16_is_left_out() -> None:
    found = [n for unit in names(merged(LLAMA, {"intermediate_size": 40})) for n in unit]
    assert not [n for n in found if "down_proj" in n]  # 40 inputs
    assert "model.layers.0.mlp.up_proj.weight" in found  # 40 outputs, 64 inputs
    narrow = merged(LLAMA, {"hidden_size": 40})
    assert [n for unit in names(narrow) for n in unit] == [
        f"model.layers.{i}.{n}.weight" for i in range(3) for n in ("self_attn.o_proj", "mlp.down_proj")
    ]
    odd = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}  # 24 inputs of o_proj
    assert names(merged(LLAMA, {"hidden_size": 40, "intermediate_size": 40} | odd)) == []


# ---- every method through one door ----


SAMPLES = [Sample(tuple(3 + (7 * i + j * j) % 70 for j in range(12))) for i in range(6)]
CHOICES = [Choice(3, 32), Choice(4, 32), Choice(3, 32, "gptq"), Choice(8, 0), Choice(16, 0)]


def scored(method: str, folder: Path, samples: Sequence[Sample] = SAMPLES, **changes: Any) -> tuple[Scores, list[str]]:
    checkpoint, _, units, spec = opened(write_tiny_llama, folder)
    said: list[str] = []
    source = Source(checkpoint, checkpoint.config, spec, samples)
    options = ScoreOptions(method, **{"windows": 6} | changes)
    found = score_by(options, source, Candidates(units, CHOICES), Prompts(PROMPTS if samples else []), said.append)
    assert set(found.weights) == {u.name for u in units}
    assert all(w > 0 for w in found.weights.values())
    return found, said


@pytest.mark.parametrize("method", ["fisher", "kl"])
def test_measured_methods_give_every_unit_and_layer_a_loss(method: str, tmp_path: Path) -> None:
    found, _ = scored(method, tmp_path)
    assert found.method == method
    assert found.losses is not None
    assert set(found.losses) == set(found.units) == set(found.weights)
    assert list(found.layers) == [("decoder", 0), ("decoder", 1), ("decoder", 2)]
    for name, of in found.losses.items():
        assert of[Choice(3, 32)] > of[Choice(4, 32)] > of[Choice(8, 0)] > 0.0
        assert found.units[name] == of[REFERENCE] > 0.0
    assert (len(found.linears) > len(found.units)) == (method == "fisher")


def test_the_costliest_units_are_scaled_to_what_they_measure(tmp_path: Path) -> None:
    plain, _ = scored("fisher", tmp_path, checked_share=2.0)
    checked, said = scored("fisher", tmp_path, checked_share=0.1)
    changed = [n for n in plain.units if checked.units[n] != plain.units[n]]
    total = sum(plain.units.values())
    assert set(changed) == {n for n, v in plain.units.items() if v > 0.1 * total}
    assert changed
    assert any(f"{len(changed)} of the costliest" in line for line in said)
    by_kl = scored("kl", tmp_path)[0]
    assert plain.losses is not None
    assert checked.losses is not None
    for name in changed:
        assert 0.4 < checked.units[name] / by_kl.units[name] < 2.5
        by_gptq = Choice(3, 32, "gptq")
        assert checked.losses[name].get(by_gptq) == plain.losses[name].get(by_gptq)


def test_both_measures_agree_on_what_a_layer_costs(tmp_path: Path) -> None:
    by_fisher, by_kl = (scored(m, tmp_path / m)[0] for m in ("fisher", "kl"))
    for layer, loss in by_kl.layers.items():
        assert 0.3 < by_fisher.layers[layer] / loss < 3.0
    ratios = [by_fisher.units[n] / by_kl.units[n] for n in by_kl.units]
    assert 0.5 < sorted(ratios)[len(ratios) // 2] < 2.0


def test_auto_takes_what_data_and_memory_allow_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    found, said = scored("auto", tmp_path / "a")
    assert found.method == "fisher"
    assert "fisher" in said[0]
    found, said = scored("auto", tmp_path / "b", memory=100_000)
    assert (found.method, found.losses) == ("lim", None)
    assert "GiB" in said[0]
    found, said = scored("auto", tmp_path / "c", [])
    assert found.method == "zd"
    assert "no calibration data" in said[0]
    with pytest.raises(UserError, match="--calibration"):
        scored("fisher", tmp_path / "d", [])
    refusal = (
        r"--importance fisher would take about .* GiB of the 0\.0 there are; give --importance lim, or more memory"
    )
    with pytest.raises(UserError, match=refusal):
        scored("fisher", tmp_path / "f", memory=100_000)
    with pytest.raises(UserError, match="choose from auto, fisher"):
        scored("magic", tmp_path / "e")


def test_lim_with_weights_on_demand_is_lim(tmp_path: Path) -> None:
    parts = opened(write_tiny_llama, tmp_path)
    checkpoint, spec = parts[0], parts[3]
    prompts = [list(s.tokens) for s in SAMPLES[:3]] + [[5, 9, 40]]  # a short one: padding
    whole = score("lim", parts, prompts)
    samples = [Sample(tuple(p)) for p in prompts]
    streamed = lim_streamed(Source(checkpoint, checkpoint.config, spec, samples))
    assert streamed == pytest.approx(whole, abs=1e-6)
