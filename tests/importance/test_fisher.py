"""The Fisher information against measured divergences, losses against full computations, divergences against the model."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.allocation import allocated
from helpers.calibration import heard, opened
from helpers.family_table import CONFIGS
from helpers.gguf_files import write_gguf
from helpers.requests import asking
from torch import nn

from edgewright.bundle import Generation
from edgewright.calibration.samples import Sample, evenly
from edgewright.errors import UserError
from edgewright.importance.candidates import Candidates, extrapolated, fill_unreached
from edgewright.importance.fisher import Fisher, fisher, fisher_bytes, predicted_losses
from edgewright.importance.fisher_losses import Curvature, Gradients, WeightLosses
from edgewright.importance.kl import kl_of_each, measured_kl
from edgewright.models.loading import load_original
from edgewright.models.registry import build
from edgewright.pipeline.plan import plan
from edgewright.quant.hessian import factor
from edgewright.quant.plan import Choice, Unit, WeightSpec
from edgewright.quant.rtn import quantize_rtn
from edgewright.quant.units import quantizable_units
from edgewright.runtimes.eager import EagerSession
from edgewright.system.workers import Workers

LOGIT_FAMILIES = [family for family in CONFIGS if build(CONFIGS[family]).task != "module"]


def samples_of(spec: Generation, count: int = 4, length: int = 12) -> list[Sample]:
    rng = random.Random(2)
    made = []
    for _ in range(count):
        tokens = tuple(rng.randrange(4, spec.vocab) for _ in range(length))
        decoded = (spec.decoder_start or 0, *tokens[1:]) if spec.task == "seq2seq" else ()
        context = tuple(rng.randrange(4, spec.context.vocab) for _ in range(7)) if spec.context is not None else ()
        sample = Sample(tokens, decoded, context)
        made.append(sample if spec.speech is None else dataclasses.replace(sample, **heard(spec, len(made))))
    return made


# ---- the backward pass ----


@pytest.mark.parametrize("family", LOGIT_FAMILIES)
def test_every_quantizable_weight_of_every_family_has_a_curvature(family: str, tmp_path: Path) -> None:
    source = opened(family, tmp_path)
    units = quantizable_units(source.build())
    found = fisher(source.over(samples_of(source.generation)), 6)
    assert {w.name for u in units for w in u.weights} <= set(found.weights)
    for unit in units:
        for weight in unit.weights:
            for use in found.weights[weight.name]:
                assert tuple(use.rows.shape) == (weight.shape[0],)
                assert tuple(use.inputs.shape) == (weight.shape[1],) * 2
                assert float(use.inputs.trace()) == pytest.approx(1.0, abs=1e-4)
                assert float(use.rows.min()) >= 0.0
                torch.testing.assert_close(use.inputs, use.inputs.T)


@pytest.mark.parametrize(
    "leaf",
    ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
)
def test_a_random_error_costs_the_divergence_that_is_predicted(leaf: str, tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    source = source.over(samples_of(source.generation, 32, 24))
    found = fisher(source, 6)
    name = next(n for n in found.weights if n.split(".")[-2] == leaf)
    torch.manual_seed(97)
    weight = source.checkpoint.tensor(name).float()
    ratios = []
    for _ in range(4):
        error = 0.05 * weight.square().mean().sqrt() * torch.randn_like(weight)

        def transform(stored: str, _: nn.Module, value: torch.Tensor, error: torch.Tensor = error) -> torch.Tensor:
            return value.float() + error if stored == name else value

        (measured,) = measured_kl(source, [transform])
        predicted = sum(float((u.rows * ((error @ u.inputs) * error).sum(1)).sum()) / 2 for u in found.weights[name])
        ratios.append(predicted / measured)
    assert 0.6 < float(np.mean(ratios)) < 1.6, ratios


def test_what_a_tied_weight_costs_is_the_sum_of_its_uses(tmp_path: Path) -> None:
    source = opened("llama", tmp_path, tie_word_embeddings=True)
    found = fisher(source.over(samples_of(source.generation)))
    (name,) = [n for n in found.weights if "embed_tokens" in n]
    assert len(found.weights[name]) == 2
    weight = source.checkpoint.tensor(name)
    whole, *parts = [
        WeightLosses(weight, uses).at(Choice(4, 32)) or 0.0
        for uses in (found.weights[name], *([use] for use in found.weights[name]))
    ]
    assert whole == pytest.approx(sum(parts))
    assert min(parts) > 0.0


def test_the_same_data_give_the_same_curvature(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    first, second = (fisher(source.over(samples_of(source.generation))) for _ in range(2))
    assert all(
        torch.equal(a.rows, b.rows) and torch.equal(a.inputs, b.inputs)
        for n in first.weights
        for a, b in zip(first.weights[n], second.weights[n], strict=True)
    )


def test_gradients_of_rows_and_of_the_whole_add_up_alike() -> None:
    torch.manual_seed(1)
    gradient = torch.randn(7, 16)
    gradient[[0, 3, 4]] = 0.0
    kept = torch.tensor([1, 2, 5, 6])
    whole, rows = Gradients(7, 16), Gradients(7, 16)
    whole.add(gradient)
    rows.add(gradient[kept], kept)
    a, b = whole.curvature(5), rows.curvature(5)
    assert a is not None
    assert b is not None
    torch.testing.assert_close(a.rows, b.rows)
    torch.testing.assert_close(a.inputs, b.inputs)
    torch.testing.assert_close(a.rows, gradient.square().sum(1) / 5)
    assert Gradients(3, 16).curvature(5) is None  # nothing came
    whole.add(torch.full((7, 16), float("nan")))
    assert whole.curvature(5) is None


# ---- losses of choices ----


def curvature(rows: int, columns: int) -> Curvature:
    torch.manual_seed(rows)
    x = torch.randn(400, columns) * torch.logspace(0, -2, columns)
    inputs = x.T @ x
    return Curvature(torch.rand(rows), inputs / inputs.trace())


def test_a_loss_is_half_the_quadratic_form_of_the_real_error() -> None:
    weight, use = torch.randn(40, 64), curvature(40, 64)
    losses = WeightLosses(weight, [use])
    error = quantize_rtn(weight, 3, 32).dequantize() - weight
    want = 0.5 * float(torch.einsum("i,ij,jk,ik->", use.rows, error, use.inputs, error))
    assert losses.at(Choice(3, 32)) == pytest.approx(want, rel=1e-4)
    assert losses.at(Choice(3, 32, "gptq")) is None  # no Hessian
    bits = [losses.at(Choice(b, 0 if b in (8, 16) else 32)) or 0.0 for b in (2, 3, 4, 5, 6, 8, 16)]
    assert bits == sorted(bits, reverse=True)
    assert bits[-1] > 0.0
    narrow = WeightLosses(torch.randn(8, 36), [curvature(8, 36)])
    assert narrow.at(Choice(3, 0)) is None  # 36 codes of three bits are no whole bytes


def test_a_sample_of_rows_estimates_the_loss_of_all() -> None:
    torch.manual_seed(3)
    weight = torch.randn(3000, 64) * torch.logspace(0, -1, 3000).unsqueeze(1)
    use = curvature(3000, 64)
    for choice in (Choice(2, 32), Choice(4, 64), Choice(8, 0)):
        sampled, whole = (WeightLosses(weight, [use], count=n).at(choice) for n in (128, 3000))
        assert sampled == pytest.approx(whole, rel=0.15)


def test_gptq_is_predicted_to_cost_less_where_inputs_go_together() -> None:
    torch.manual_seed(4)
    x = torch.randn(2000, 64) @ torch.randn(64, 64) * torch.logspace(0, -1.5, 64)
    hessian = x.T @ x / len(x)
    losses = WeightLosses(torch.randn(64, 64), [Curvature(torch.ones(64), hessian / hessian.trace())], factor(hessian))
    by_gptq, by_rtn = losses.at(Choice(3, 32, "gptq")), losses.at(Choice(3, 32))
    assert by_gptq is not None
    assert by_rtn is not None
    assert by_gptq < 0.8 * by_rtn
    assert losses.at(Choice(16, 0, "gptq")) is None


def test_units_without_data_count_as_the_middle_of_the_others() -> None:
    units = [Unit(f"u{i}", [WeightSpec(f"u{i}.weight", (32, 64), 0, "decoder")]) for i in range(4)]
    choices = [Choice(4, 64), Choice(3, 64), Choice(4, 64, "gptq"), Choice(16, 0)]
    losses = {f"u{i}": extrapolated(units[i], choices[:2], choices[0], float(10**i), False) for i in range(3)}
    filled = fill_unreached(Candidates(units, choices), losses)
    assert filled["u0"] == losses["u0"]
    assert filled["u3"][Choice(4, 64)] == pytest.approx(10.0)
    assert filled["u3"][Choice(3, 64)] == pytest.approx(losses["u1"][Choice(3, 64)])
    assert Choice(4, 64, "gptq") not in filled["u3"]
    assert Choice(16, 0) in filled["u3"]


@pytest.mark.parametrize("family", ["llama", pytest.param("t5gemma", marks=pytest.mark.slow)])
def test_predicted_losses_serve_the_allocator(family: str, tmp_path: Path) -> None:
    source = opened(family, tmp_path)
    units = quantizable_units(source.build())
    source = source.over(samples_of(source.generation, 8))
    choices = [Choice(b, g, q) for b in (3, 4) for g in (32, 64) for q in ("rtn", "gptq")]
    choices += [Choice(8, 0), Choice(16, 0)]
    predicted = predicted_losses(fisher(source, 6), source, Candidates(units, choices))
    losses = predicted.units
    linears = {u.name for u in units if "embed" not in u.name}
    for unit in units:
        of = losses[unit.name]
        assert (
            of[Choice(3, 32)] > of[Choice(4, 32)] > of[Choice(8, 0)] > of[Choice(16, 0)] == 0.0
        )  # the weights are bfloat16
        assert (Choice(3, 32, "gptq") in of) or unit.name not in linears
    assert set(predicted.linears) == {w.name for u in units for w in u.weights}
    weights = {u.name: 1.0 for u in units}
    made = allocated(units, weights, bits=5.0, widths=(3, 4, 8, 16), losses=losses)
    assert made.average_bits <= 5.0
    assert len({e.bits for e in made.entries.values()}) > 1


def test_a_weight_no_data_reached_is_said_aloud(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    units = quantizable_units(source.build())
    source = source.over(samples_of(source.generation))
    found = fisher(source)
    lost = units[3]
    kept = {n: uses for n, uses in found.weights.items() if n not in {w.name for w in lost.weights}}
    said: list[str] = []
    choices = [Choice(3, 32), Choice(4, 64)]
    reached = Fisher(kept, found.tokens, found.samples)
    losses = predicted_losses(reached, source, Candidates(units, choices), said.append).units
    assert set(losses[lost.name]) == set(choices)
    assert any(lost.name in line for line in said)


# ---- measured divergence ----


def test_the_divergence_of_a_plan_is_that_of_the_model_with_its_weights(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    checkpoint, units = source.checkpoint, quantizable_units(source.build())
    samples = samples_of(source.generation)
    weights = {u.name: 1.0 for u in units}
    plans = [allocated(units, weights, bits=b, widths=(2, 4, 8, 16)) for b in (3.0, 6.0, 16.0)]
    found = measured_kl(source.over(samples), plans)
    assert found[0] > found[1] > found[2] >= 0.0
    original, rounded = build(checkpoint.config), build(checkpoint.config)
    for model in (original, rounded):
        load_original(model, checkpoint)
    parameters = dict(rounded.named_parameters(remove_duplicate=False))
    for name, entry in plans[0].entries.items():
        value = checkpoint.tensor(name)
        made = value.bfloat16() if entry.bits == 16 else quantize_rtn(value, entry.bits, entry.group_size).dequantize()
        parameters[name].data = made.float()
    ids = np.array([s.tokens for s in samples])
    logs = []
    for model in (original, rounded):
        session = EagerSession(model.graphs())
        inputs = {"input_ids": ids, "past_length": np.zeros(1, np.int64), "logit_positions": np.arange(ids.shape[1])}
        logits = session.run("decoder", inputs, session.new_state(*ids.shape))["logits"]
        logs.append(torch.log_softmax(torch.from_numpy(logits).double(), -1))
    want = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    assert found[0] == pytest.approx(want, rel=1e-3)


def test_any_number_of_workers_measures_the_same(tmp_path: Path) -> None:
    source = opened("t5gemma", tmp_path)
    units = quantizable_units(source.build())[:4]
    source = source.over(samples_of(source.generation))
    parts = [{w.name: (3, 64, False) for w in u.weights} for u in units]
    one, two = (kl_of_each(source, parts, Workers(n)) for n in (1, 2))
    assert one == two
    assert all(value > 0.0 for value in one)
    assert len(set(one)) == len(one)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_a_model_behind_a_link_is_measured(tmp_path: Path) -> None:
    """As in caches of downloads, where what `m.gguf` leads to has a hash for a name."""
    write_gguf(tmp_path / "blob", "llama")
    (tmp_path / "m.gguf").symlink_to("blob")
    planned = plan(asking(str(tmp_path / "m.gguf"), quantizer="rtn", importance="uniform", max_context=64))
    parts = [{planned.units[0].weights[0].name: (2, 32, False)}]
    samples = [Sample(tuple(range(4, 20)))]
    (found,) = kl_of_each(planned.source.over(samples), parts)
    assert found > 0.0


def test_without_data_there_is_no_divergence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="calibration text"):
        measured_kl(opened("llama", tmp_path), [])


def test_samples_are_spread_and_memory_grows_with_the_window(tmp_path: Path) -> None:
    spec = opened("llama", tmp_path).generation
    samples = samples_of(spec, 10)
    assert evenly(samples, 3) == [samples[0], samples[3], samples[6]]
    assert evenly(samples, 99) == samples
    model = build(CONFIGS["llama"])
    few, many = (fisher_bytes(model, n) for n in (4, 40))
    assert 4 * sum(p.numel() for p in model.parameters()) < few < many
