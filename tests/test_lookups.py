"""A table that is embedding and head at once: what its lookups add to GPTQ's Hessian, and when."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import CONFIGS
from test_calibration import opened, samples_of

from edgewright import sensitivity
from edgewright.bundle import Generation
from edgewright.calibration import Sample
from edgewright.checkpoint import Checkpoint
from edgewright.factors import LOOKUP_SHARE, Factors, hessian
from edgewright.layerwise import CodeStore, quantize_layerwise
from edgewright.lookups import DRAWS, lookup_bytes, lookup_hessians
from edgewright.models import build
from edgewright.models.layers import Embedding, Linear
from edgewright.models.loading import load_original
from edgewright.quant.gptq import damping_for, factor, hessian_error, quantize_gptq
from edgewright.quant.hessian import Factor
from edgewright.quant.plan import BitPlan, Budget, Entry
from edgewright.quant.rtn import quantize_rtn
from edgewright.runtimes.eager import EagerSession
from edgewright.walk import Walk


def tied(model: object) -> set[str]:
    """The stored names that an embedding and a linear share, from the model's own table of aliases."""
    modules = dict(model.named_modules())  # type: ignore[attr-defined]
    by_name: dict[str, set[type]] = {}
    for path, module in modules.items():
        if isinstance(module, Embedding | Linear):
            name = model.tied.get(f"{path}.weight", f"{path}.weight")  # type: ignore[attr-defined]
            by_name.setdefault(name, set()).add(type(module))
    return {name for name, kinds in by_name.items() if len(kinds) == 2}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_familys_tables_are_reached(family: str, tmp_path: Path) -> None:
    """Through whatever the first layers are: attention, recurrences, both stacks."""
    checkpoint, spec = opened(family, tmp_path)
    if spec.task == "module":
        pytest.skip("no loop, and so no samples")
    model = build(checkpoint.config)
    names = {n for n, _ in model.named_parameters()}
    found = lookup_hessians(build(checkpoint.config), checkpoint, spec, samples_of(spec, 3), names)
    assert found.keys() == {
        model.tied.get(f"{p}.weight", f"{p}.weight") for p, m in model.named_modules() if isinstance(m, Embedding)
    }
    assert tied(model) <= found.keys()
    assert bool(lookup_bytes(model)) == bool(found)
    for name, (value, draws) in found.items():
        assert draws >= DRAWS
        assert value.shape == (checkpoint.info(name).shape[1],) * 2
        assert float(value.trace()) == pytest.approx(1.0, rel=1e-4)
        assert float(torch.linalg.eigvalsh(value.double()).min()) > -1e-6
    assert lookup_hessians(build(checkpoint.config), checkpoint, spec, samples_of(spec, 3), set()) == {}
    assert lookup_hessians(build(checkpoint.config), checkpoint, spec, [], names) == {}


def relative_change(checkpoint: Checkpoint, spec: Generation, tokens: tuple[int, ...], error: torch.Tensor) -> float:
    """The sum over the first layer's linears of the relative squared change of their outputs, for `error` [K] on all rows."""
    outputs: list[list[torch.Tensor]] = []
    for change in (0.0, 1.0):
        model = build(checkpoint.config)
        load_original(model, checkpoint)
        table = model.model.embed_tokens
        table.weight = torch.nn.Parameter(table.weight + change * error, requires_grad=False)
        seen: list[torch.Tensor] = []
        for module in model.model.layers[0].modules():
            if isinstance(module, Linear):
                module.register_forward_hook(lambda _, __, y, seen=seen: seen.append(y[0].double()))
        session = EagerSession(model.graphs())
        inputs = {
            "input_ids": torch.tensor([tokens]).numpy(),
            "past_length": torch.zeros(1, dtype=torch.int64).numpy(),
            "logit_positions": torch.zeros(1, dtype=torch.int64).numpy(),
        }
        session.run("decoder", inputs, session.new_state(1, len(tokens)))
        outputs.append(seen)
    return sum(float((b - a).square().sum() / a.square().sum()) for a, b in zip(*outputs, strict=True))


def test_it_says_what_an_error_does_to_the_first_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token a sample, so that a change of all rows is one of the token's own row; over random small errors of it."""
    monkeypatch.setattr("edgewright.lookups.DRAWS", 4096)
    checkpoint, spec = opened("gemma3_text", tmp_path)
    sample = Sample((7,))
    model = build(checkpoint.config)
    name = next(iter(tied(model)))
    found = lookup_hessians(model, checkpoint, spec, [sample], {name})[name][0]
    torch.manual_seed(1)
    errors = 1e-3 * torch.randn(6, len(found)) * checkpoint.tensor(name).float().std()
    predicted = [float(e @ found @ e) for e in errors]
    measured = [relative_change(checkpoint, spec, sample.tokens, e) for e in errors]
    ratios = [m / p for m, p in zip(measured, predicted, strict=True)]
    assert max(ratios) < 1.15 * min(ratios)  # up to the trace, one number for all errors


def test_gptq_of_a_tied_table_counts_its_lookups(tmp_path: Path) -> None:
    checkpoint, spec = opened("gemma3_text", tmp_path)
    samples = samples_of(spec, 4)
    model = build(checkpoint.config)
    name = next(iter(tied(model)))
    entry = Entry(4, 32, 1.0, "", "gptq")
    made = BitPlan(1, "uniform", Budget("bits", 4.5), {name: entry}, 4.5, 0)
    store = CodeStore(tmp_path / "codes")
    quantize_layerwise(checkpoint, copy.deepcopy(model), made, spec, samples, (), store)
    shape = tuple(checkpoint.info(name).shape)
    got = store.read(name, shape, entry)  # type: ignore[arg-type]
    assert got is not None

    lookups = lookup_hessians(copy.deepcopy(model), checkpoint, spec, samples, {name})
    seen: dict[bool, torch.Tensor] = {}

    def visit(visited: str, _: Linear, inputs: list[torch.Tensor]) -> None:
        if visited != name:
            return
        plain, tokens = hessian(walk, inputs)
        more = factors.of(name, inputs)
        want = plain + LOOKUP_SHARE * plain.trace() * lookups[name][0]
        torch.testing.assert_close(more.hessian, want, rtol=1e-5, atol=1e-6)
        for by_lookups, made_of in ((False, factor(plain, damping_for(len(plain), tokens))), (True, more)):
            seen[by_lookups] = quantize_gptq(checkpoint.tensor(name), made_of, 4, 32).codes

    walk = Walk(model, checkpoint, spec, samples, visit=visit)
    factors = Factors(walk, model, lookups)
    walk.to_head()
    assert torch.equal(got.codes, seen[True])
    assert not torch.equal(seen[True], seen[False])


def test_gptq_of_a_table_that_no_linear_multiplies(tmp_path: Path) -> None:
    """It loses less of what the first layer computes than rounding to nearest, and its predicted loss is GPTQ's too."""
    checkpoint, spec = opened("llama", tmp_path)
    samples = samples_of(spec, 4)
    name = "model.embed_tokens.weight"
    entry = Entry(3, 32, 1.0, "", "gptq")
    made = BitPlan(1, "uniform", Budget("bits", 3.5), {name: entry}, 3.5, 0)
    store = CodeStore(tmp_path / "codes")
    assert quantize_layerwise(checkpoint, build(checkpoint.config), made, spec, samples, (), store) == []
    got = store.read(name, tuple(checkpoint.info(name).shape), entry)  # type: ignore[arg-type]
    assert got is not None
    value, draws = lookup_hessians(build(checkpoint.config), checkpoint, spec, samples, {name})[name]
    weight = checkpoint.tensor(name).float()
    want = quantize_gptq(weight, factor(value, damping_for(len(value), draws)), 3, 32)
    assert torch.equal(got.codes, want.codes)
    ours, nearest = (float(hessian_error(weight, q, value).sum()) for q in (got, quantize_rtn(weight, 3, 32)))
    assert ours < nearest

    factors: dict[str, Factor] = {}
    sensitivity._walk_hessians(
        checkpoint, checkpoint.config, spec, samples, (), {name}, factors.__setitem__, lambda _: None
    )
    assert factors.keys() == {name}


def test_data_that_never_look_a_row_up_leave_it_to_rounding(tmp_path: Path) -> None:
    checkpoint, spec = opened("llama", tmp_path)
    entry = Entry(4, 32, 1.0, "", "gptq")
    name = "model.embed_tokens.weight"
    made = BitPlan(1, "uniform", Budget("bits", 4.5), {name: entry}, 4.5, 0)
    store = CodeStore(tmp_path / "codes")
    assert quantize_layerwise(checkpoint, build(checkpoint.config), made, spec, [], (), store) == [name]
