"""What verification must see: both paths, padding, long prompts, infinities; and the numbers it reports, computed plainly."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.formula_session import TABLE, VOCAB, Formula
from helpers.generations import CAUSAL, SEQ2SEQ

from edgewright.bundle import Generation
from edgewright.errors import UserError, VerificationFailure
from edgewright.graph import Graph, Port
from edgewright.models.layers.linear import Linear
from edgewright.runtimes.eager import Int8Session
from edgewright.runtimes.generate import generate
from edgewright.runtimes.session import Array, Placement
from edgewright.verification.compare import compare
from edgewright.verification.report import AGREEMENT, SLACK, TOLERANCE, Agreement, Report, TargetReport, require

PROMPTS = [[3, 4, 5, 6], [7], [8, 9], [10, 11, 12, 13, 14, 15, 16], [5] * 9]


def one(candidate: Formula, spec: Generation, prompts: Sequence[Sequence[int]] = PROMPTS) -> Agreement:
    (result,) = compare(Formula(), [candidate], spec, prompts)
    return result


def agreement(**changes: Any) -> Agreement:
    return Agreement(**({"max_relative_error": 0.0, "mean_kl": 0.0, "top1": 1.0, "prompts": 4} | changes))


def target(lowering: Agreement, activations: str = "float32") -> TargetReport:
    return TargetReport("onnx", activations, lowering, lowering, Placement("CPU", {}), 1, 1)


@pytest.mark.parametrize("spec", [CAUSAL, SEQ2SEQ])
def test_a_session_agrees_with_itself(spec: Generation) -> None:
    first, second = compare(Formula(), [Formula(), Formula()], spec, PROMPTS)
    assert first == second
    assert (first.max_relative_error, first.mean_kl, first.top1) == (0.0, 0.0, 1.0)
    assert first.prompts_identical == first.prompts >= len(PROMPTS)
    tokens = [list(generate(Formula(), spec, p, spec.max_new_tokens)) for p in PROMPTS]
    assert first.positions >= sum(len(t) + 1 for t in tokens)
    if spec.task == "seq2seq":
        assert (first.prompts, first.positions) == (len(PROMPTS), sum(len(t) + 1 for t in tokens))


def test_the_numbers_are_what_their_names_say() -> None:
    """Over the positions behind each prompt, one prompt at a time, in plain loops."""

    def shifted(logits: Array, past: int, new: int) -> Array:
        return logits + 0.4 * np.sin(np.arange(VOCAB) + past)

    result = one(Formula(shifted), SEQ2SEQ)
    worst = scale = kl = 0.0
    same = positions = 0
    for prompt in PROMPTS:
        tokens = [2, *generate(Formula(), SEQ2SEQ, prompt, SEQ2SEQ.max_new_tokens)]
        source = TABLE[prompt].sum(0)
        for end in range(1, len(tokens) + 1):
            want = sum(0.7 ** (end - 1 - i) * TABLE[t] for i, t in enumerate(tokens[:end])) + 0.1 * source
            got = want + 0.4 * np.sin(np.arange(VOCAB) + end - 1)
            p, q = np.exp(want) / np.exp(want).sum(), np.exp(got) / np.exp(got).sum()
            worst, scale = max(worst, np.abs(want - got).max()), max(scale, np.abs(want).max())
            kl += float((p * np.log(p / q)).sum())
            same += int(want.argmax() == got.argmax())
            positions += 1
    assert result.positions == positions
    assert result.max_relative_error == pytest.approx(worst / scale, rel=1e-4)
    assert result.mean_kl == pytest.approx(kl / positions, rel=1e-4)
    assert result.top1 == pytest.approx(same / positions)


@pytest.mark.parametrize("spec", [CAUSAL, SEQ2SEQ])
def test_a_fault_in_the_decode_step_alone_is_seen(spec: Generation) -> None:
    result = one(Formula(lambda logits, past, new: logits[:, ::-1] if new == 1 and past > 1 else logits), spec)
    assert result.prompts_identical < result.prompts
    assert not target(result).passed


@pytest.mark.parametrize("spec", [CAUSAL, SEQ2SEQ])
def test_a_fault_in_the_prefill_alone_is_seen(spec: Generation) -> None:
    result = one(Formula(lambda logits, past, new: logits[:, ::-1] if new > 1 else logits), spec)
    assert result.max_relative_error > TOLERANCE
    assert not target(result).passed


def test_padding_that_is_read_is_seen() -> None:
    assert not target(one(Formula(reads_padding=True), SEQ2SEQ)).passed
    alone = one(Formula(reads_padding=True), SEQ2SEQ, [[3, 4, 5]])
    assert target(alone).passed  # nothing is padded there: it is the batch that finds the fault


def test_a_fault_that_only_long_prompts_meet_is_seen() -> None:
    spec = CAUSAL.model_copy(update={"max_context": 1024})
    result = one(Formula(lambda logits, past, new: -logits if past > 300 else logits), spec)
    assert result.prompts == len(PROMPTS) + 1
    assert result.prompts_identical == len(PROMPTS)
    assert not target(result).passed


def test_a_prompt_that_fills_the_context_is_compared() -> None:
    spec = CAUSAL.model_copy(update={"max_context": 10})
    assert target(one(Formula(), spec, [[5] * 9])).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_candidate_that_is_not_finite_fails_and_reads_as_json(value: float) -> None:
    def broken(logits: Array, past: int, new: int) -> Array:
        return np.where(np.arange(VOCAB) == 18, value, logits)

    report = Report([target(one(Formula(broken), CAUSAL))])
    assert not report.passed
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["passed"] is False
    with pytest.raises(VerificationFailure, match="onnx: as shipped its logits are not finite"):
        require(report)


def test_a_reference_that_is_not_finite_is_no_reference() -> None:
    with pytest.raises(UserError, match="not finite"):
        compare(Formula(lambda logits, past, new: logits * math.nan), [Formula()], CAUSAL, PROMPTS)


@pytest.mark.parametrize(
    ("changes", "activations", "passes"),
    [
        ({}, "float32", True),
        ({"max_relative_error": TOLERANCE}, "float32", True),
        ({"max_relative_error": TOLERANCE * 1.01}, "float32", False),
        ({"prompts_identical": 3}, "float32", False),
        ({"top1": AGREEMENT, "prompts_identical": 0, "max_relative_error": 0.2}, "int8", True),
        ({"top1": AGREEMENT - 0.005, "positions": 400}, "int8", False),
    ],
)
def test_what_passes(changes: dict[str, Any], activations: str, passes: bool) -> None:
    lowering = agreement(**({"prompts_identical": 4, "positions": 40} | changes))
    report = Report([target(lowering, activations)])
    assert report.passed is passes
    values = report.to_json()
    assert values["passed"] is values["targets"][0]["passed"] is passes
    if passes:
        require(report)
    else:
        with pytest.raises(VerificationFailure, match=r"^onnx: "):
            require(report)


@pytest.mark.parametrize(
    ("positions", "others", "kl", "passes"),
    [
        (50, 0, 0.0, True),
        (50, 1, 1e-4, True),
        (50, 1, 1e-2, False),
        (50, 2, 1e-4, False),
        (300, 3, 1e-4, True),
        (300, 4, 1e-4, False),
    ],
)
def test_of_few_positions_one_near_tie_may_differ(positions: int, others: int, kl: float, passes: bool) -> None:
    lowering = agreement(top1=1 - others / positions, positions=positions, prompts_identical=0, mean_kl=kl)
    assert target(lowering, "float16").passed is passes


@pytest.mark.parametrize(
    ("top1", "kl", "passes"),
    [(0.85, 0.1, True), (0.8 - SLACK, 0.2, True), (0.8 - SLACK - 0.001, 0.1, False), (0.85, 0.201, False)],
)
def test_int8_activations_may_cost_what_they_cost_the_reference(top1: float, kl: float, passes: bool) -> None:
    alone = target(agreement(top1=top1, mean_kl=kl, prompts_identical=1, positions=4000), "int8")
    assert not alone.passed
    emulated = agreement(top1=0.8, mean_kl=0.1, prompts_identical=1, positions=4000)
    beside = replace(alone, arithmetic=emulated)
    assert beside.passed is passes
    assert "77.00%" in beside.allowed


def test_of_few_positions_two_standard_errors_may_be_missing() -> None:
    alone = target(agreement(top1=0.71, mean_kl=0.1, prompts_identical=1, positions=50), "int8")
    emulated = agreement(top1=0.8, mean_kl=0.1, prompts_identical=1, positions=50)
    few = replace(alone, arithmetic=emulated)
    assert few.passed
    assert "70.00%" in few.allowed  # two standard errors would be 0.16
    more = replace(alone, arithmetic=replace(emulated, positions=200))
    assert "72.00%" in more.allowed  # 0.8 - 2 * sqrt(2 * 0.8 * 0.2 / 200)
    assert not more.passed


def test_what_ships_must_be_finite_and_on_its_own_device_near() -> None:
    good = agreement(prompts_identical=4, positions=40)
    infinite = agreement(max_relative_error=sys.float_info.max, prompts_identical=0, positions=40)
    far = agreement(top1=0.9, prompts_identical=0, positions=40)
    overflowing = replace(target(good), shipped=infinite)
    with pytest.raises(VerificationFailure, match="onnx: as shipped its logits are not finite"):
        require(Report([overflowing]))
    elsewhere = replace(target(good), shipped=far)
    require(Report([elsewhere]))
    with pytest.raises(VerificationFailure, match=r"top-1 agreement 90\.00%"):
        require(Report([replace(elsewhere, on_device=True)]))


def test_the_reference_with_int8_activations_rounds_each_row_of_the_quantized_linears_inputs(tmp_path: Path) -> None:
    """One linear by the formula of a scale and a zero point; a name that is not asked for stays as it is."""

    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rounded, self.exact = Linear(8, 4), Linear(8, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.rounded(x), self.exact(x)

    torch.manual_seed(0)
    module = One()
    for linear in (module.rounded, module.exact):
        linear.weight = torch.nn.Parameter(torch.randn(4, 8), requires_grad=False)
    port = Port("x", torch.float32, (3, 8))
    outputs = (Port("a", torch.float32, (3, 4)), Port("b", torch.float32, (3, 4)))
    session = Int8Session([Graph("one", module, (port,), outputs)], {"rounded.weight"})
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32) * 5
    x[2] = np.abs(x[2]) + 1  # zero is among the steps though nothing of the row is near
    outputs = session.run("one", {"x": x}, {})
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = (high - low) / 255
    zero = np.rint(-128 - low / scale)
    steps = (np.clip(np.rint(x / scale) + zero, -128, 127) - zero) * scale
    assert 0 < np.abs(steps - x).max() <= scale.max()
    np.testing.assert_allclose(outputs["a"], steps @ module.rounded.weight.numpy().T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outputs["b"], x @ module.exact.weight.numpy().T, rtol=1e-5, atol=1e-5)
    assert not module.rounded._forward_pre_hooks


def test_the_first_target_that_fails_is_named() -> None:
    good = target(agreement(prompts_identical=4, positions=40))
    bad = replace(target(agreement(prompts_identical=1, positions=40)), format="second")
    with pytest.raises(VerificationFailure, match=r"^second: .* 1 of 4 prompts give the same tokens"):
        require(Report([good, bad, bad]))
