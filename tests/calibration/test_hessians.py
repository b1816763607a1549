"""The Hessian of keys and values: what it is made of, which weights have it, and that GPTQ and its prediction use it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.calibration import opened, samples_of
from helpers.family_table import CONFIGS

from edgewright.calibration.forward import CalibrationForward
from edgewright.calibration.hessians import KEY_VALUE_SHARE, hessian, key_value_hessian
from edgewright.importance.fisher import visit_factors
from edgewright.models.layers.linear import Linear
from edgewright.models.registry import build
from edgewright.pipeline.gptq import CodeStore, quantize_layerwise
from edgewright.quant.gptq import quantize_gptq
from edgewright.quant.hessian import Factor, damping_for, factor
from edgewright.quant.plan import BitPlan, Budget, Entry

PLAIN = {"modernbert", "modernbert embedding", "phi4flash", "mamba2", "rwkv7"}
"""Queries lie in one matrix with keys and values, or there is no attention."""


def plainly(rows: list[np.ndarray]) -> np.ndarray:
    """`key_value_hessian` token by token, of sequences [S, K]."""
    own = sum(np.outer(x, x) for xs in rows for x in xs) / sum(len(xs) for xs in rows)
    firsts = sum(np.outer(xs[0], xs[0]) for xs in rows)
    means = sum(np.outer(m, m) for xs in rows for i in range(len(xs)) for m in [xs[: i + 1].mean(0)])
    whole = own.trace()
    found: np.ndarray = own + KEY_VALUE_SHARE * whole * (firsts / firsts.trace() + means / means.trace())
    return found


@pytest.mark.parametrize("part", [2048, 1], ids=["together", "in parts"])
@pytest.mark.parametrize("family", ["llama", "t5gemma"])
def test_means_and_first_tokens_are_added(family: str, part: int, tmp_path: Path) -> None:
    """Of samples of different lengths: padding is neither in a mean nor a first token."""
    source = opened(family, tmp_path)
    source = replace(source, samples=samples_of(source.generation, 4), part_tokens=part)
    seen: dict[str, tuple[np.ndarray, int, np.ndarray, int]] = {}

    def visit(name: str, _: Linear, inputs: list[torch.Tensor]) -> None:
        rows = [
            x[i][part.real[i]].double().numpy()
            for x, part in zip(inputs, forward._parts, strict=True)
            for i in range(len(x) if x.shape[:-1] == part.real.shape else 0)
        ]
        if name in keys_values:
            found, count = key_value_hessian(forward, inputs)
            seen[name] = (found.numpy(), count, plainly(rows), sum(map(len, rows)))

    forward = CalibrationForward(model := source.build(), source, visit=visit)
    keys_values = model.key_value_weights()
    forward.to_head()
    assert seen.keys() == keys_values
    for got, count, want, tokens in seen.values():
        assert count == tokens
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_padding_anywhere_and_no_mask_at_all(tmp_path: Path) -> None:
    """What a module's own inputs may bring: tokens that are not real before or between those that are."""
    source = opened("llama", tmp_path)
    forward = CalibrationForward(source.build(), source.over(samples_of(source.generation, 2)))
    x = torch.randn(3, 5, 8)
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 0]], dtype=torch.bool)
    for mask, rows in ((real, [xs[r] for xs, r in zip(x, real, strict=True)]), (torch.zeros(0, 0).bool(), list(x))):
        forward._parts[0].real = mask
        found, count = key_value_hessian(forward, [x])
        assert count == sum(map(len, rows))
        np.testing.assert_allclose(found.numpy(), plainly([r.double().numpy() for r in rows]), rtol=1e-4, atol=1e-5)
    assert torch.equal(key_value_hessian(forward, [x[0]])[0], hessian(forward, [x[0]])[0])  # no sequence


@pytest.mark.parametrize("family", CONFIGS)
def test_every_attention_names_its_keys_and_values(family: str) -> None:
    model = build(CONFIGS[family])
    found = model.key_value_weights()
    named = {
        n
        for n, _ in model.named_parameters()
        if n.endswith(("k_proj.weight", "v_proj.weight", "k_linear.weight", "v_linear.weight"))
    }
    assert found == {
        n for n in named if n not in model.tied and "linear_attn" not in n and family != "rwkv7"
    }  # a decaying state is no attention
    assert bool(found) == (family not in PLAIN)


def test_gptq_and_what_is_predicted_of_it_use_it(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    source, checkpoint = source.over(samples_of(source.generation, 4)), source.checkpoint
    names = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"]
    entries = {n: Entry(4, 32, 1.0, "", "gptq") for n in names}
    store = CodeStore(tmp_path / "codes")
    made = BitPlan(1, "uniform", Budget("bits", 4.5), entries, 4.5, 0)
    quantize_layerwise(source, made, store)
    want: dict[str, list[torch.Tensor]] = {}

    def visit(name: str, _: Linear, inputs: list[torch.Tensor]) -> None:
        if name in names:
            want[name] = [
                quantize_gptq(checkpoint.tensor(name), factor(h, damping_for(len(h), n)), 4, 32).codes
                for h, n in (hessian(forward, inputs), key_value_hessian(forward, inputs))
            ]

    forward = CalibrationForward(source.build(), source, visit=visit)
    forward.to_head()
    for name in names:
        got = store.read(name, tuple(checkpoint.info(name).shape), entries[name])  # type: ignore[arg-type]
        assert got is not None
        plain, more = want[name]
        assert torch.equal(got.codes, plain if "q_proj" in name else more)
    assert any(not torch.equal(*want[n]) for n in names[1:])

    factors: dict[str, Factor] = {}
    visit_factors(source, set(names), factors.__setitem__)
    assert factors[names[1]] is factors[names[2]]
    for name, at in zip(names, (0, 1, 1), strict=True):
        assert torch.equal(quantize_gptq(checkpoint.tensor(name), factors[name], 4, 32).codes, want[name][at])
