"""Tables that rows are looked up in: what GPTQ knows of their errors, alone and beside the inputs of a head."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.calibration import opened, samples_of
from helpers.family_table import CONFIGS
from helpers.requests import asking

from edgewright.calibration.embedding_hessians import DRAWS, embedding_hessian_bytes, embedding_hessians
from edgewright.calibration.forward import CalibrationForward
from edgewright.calibration.hessians import EMBEDDING_SHARE, InputHessians, hessian
from edgewright.calibration.samples import Sample
from edgewright.checkpoints.checkpoint import Checkpoint
from edgewright.importance.fisher import visit_factors
from edgewright.models.layers.linear import Embedding, Linear
from edgewright.models.loading import load_original
from edgewright.models.registry import build
from edgewright.pipeline.allocate import by_gptq
from edgewright.pipeline.gptq import CodeStore, quantize_layerwise
from edgewright.pipeline.plan import plan
from edgewright.quant.gptq import hessian_error, quantize_gptq
from edgewright.quant.hessian import Factor, damping_for, factor
from edgewright.quant.plan import BitPlan, Budget, Entry
from edgewright.quant.rtn import quantize_rtn
from edgewright.runtimes.eager import EagerSession


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
    source = opened(family, tmp_path)
    if source.generation.task == "module":
        pytest.skip("no loop, and so no samples")
    source = source.over(samples_of(source.generation, 3))
    model = source.build()
    names = {n for n, _ in model.named_parameters()}
    found = embedding_hessians(model, source, names)
    assert found.keys() == {
        model.tied.get(f"{p}.weight", f"{p}.weight") for p, m in model.named_modules() if isinstance(m, Embedding)
    }
    assert tied(model) <= found.keys()
    assert all(embedding_hessian_bytes(model, 9))
    for name, (value, draws) in found.items():
        assert draws >= DRAWS
        assert value.shape == (source.checkpoint.info(name).shape[1],) * 2
        assert float(value.trace()) == pytest.approx(1.0, rel=1e-4)
        assert float(torch.linalg.eigvalsh(value.double()).min()) > -1e-6
    for name, (value, draws) in found.items():  # a run that goes on asks for fewer, and gives the same
        alone = embedding_hessians(model, source, {name})
        assert alone.keys() == {name}
        assert alone[name][1] == draws
        assert torch.equal(alone[name][0], value)
    assert embedding_hessians(model, source, set()) == {}
    assert embedding_hessians(model, source.over([]), names) == {}


def outputs_of(checkpoint: Checkpoint, tokens: tuple[int, ...], row: int, error: torch.Tensor) -> list[torch.Tensor]:
    """What the linears of the first layer give, [S, N] each, with `error` [K] added to one row of the table."""
    model = build(checkpoint.config)
    load_original(model, checkpoint)
    weight = model.model.embed_tokens.weight.clone()
    weight[row] += error
    model.model.embed_tokens.weight = torch.nn.Parameter(weight, requires_grad=False)
    seen: list[torch.Tensor] = []
    for module in model.model.layers[0].modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda _, __, y: seen.append(y[0].double()))
    inputs = {
        "input_ids": np.array([tokens]),
        "past_length": np.zeros(1, np.int64),
        "logit_positions": np.zeros(1, np.int64),
    }
    session = EagerSession(model.graphs())
    session.run("decoder", inputs, session.new_state(1, len(tokens)))
    return seen


@pytest.mark.slow
def test_it_says_what_an_error_does_to_the_first_layer(tmp_path: Path) -> None:
    """Measured for each token's row alone, over samples of different lengths: tokens that read others, and padding."""
    source = opened("gemma3_text", tmp_path)
    checkpoint, model = source.checkpoint, source.build()
    name = next(iter(tied(model)))
    samples = [Sample((7, 5, 9, 11)), Sample((8,))]
    found = embedding_hessians(model, source.over(samples), {name}, draws=4096)[name][0]
    torch.manual_seed(1)
    errors = 1e-3 * torch.randn(6, len(found)) * checkpoint.tensor(name).float().std()
    plain = {s: outputs_of(checkpoint, s.tokens, 0, torch.zeros(len(found))) for s in samples}
    sizes = [sum(float(y.square().sum()) for y in of) for of in zip(*plain.values(), strict=True)]
    ratios = []
    for error in errors:
        measured = 0.0
        for sample, before in plain.items():
            for row in sample.tokens:
                after = outputs_of(checkpoint, sample.tokens, row, error)
                changes = [float((b - a).square().sum()) for a, b in zip(before, after, strict=True)]
                measured += sum(c / size for c, size in zip(changes, sizes, strict=True))
        ratios.append(measured / float(error @ found @ error))
    assert max(ratios) < 1.15 * min(ratios)  # up to the trace, one number for all errors


def test_one_long_sample_does_not_decide_how_little_is_read(tmp_path: Path) -> None:
    source = opened("gemma3_text", tmp_path)
    model = source.build()
    name = next(iter(tied(model)))
    samples = [Sample((7,) * 39), *[Sample((i, i + 1, i + 2)) for i in range(4, 44)]]
    _, draws = embedding_hessians(model, replace(source, samples=samples, part_tokens=40), {name})[name]
    assert 8 * DRAWS <= draws <= 40 * DRAWS


def test_a_run_that_was_killed_between_two_tables_gives_the_same(tmp_path: Path) -> None:
    source = opened("arc_encoder", tmp_path)
    source, checkpoint = source.over(samples_of(source.generation, 4)), source.checkpoint
    names = ["encoder.embed_tokens.weight", "model.embed_tokens.weight"]
    made = BitPlan(1, "uniform", Budget("bits", 4.0), dict.fromkeys(names, Entry(3, 16, 1.0, "", "gptq")), 4.0, 0)
    store = CodeStore(tmp_path / "codes")

    def quantized() -> list[torch.Tensor]:
        assert quantize_layerwise(source, made, store) == []
        got = [store.read(n, tuple(checkpoint.info(n).shape), made.entries[n]) for n in names]  # type: ignore[arg-type]
        return [value.clone() for q in got if q is not None for value in (q.codes, q.scales)]

    whole = quantized()
    assert len(whole) == 2 * len(names)
    for name in names:
        store._path(name).unlink()
        assert all(torch.equal(a, b) for a, b in zip(quantized(), whole, strict=True))


def test_an_encoder_whose_only_layer_is_never_called(tmp_path: Path) -> None:
    """ARC's last layer is run inside the pooling: the encoder's table is seen through the decoder alone, which has its own."""
    config = copy.deepcopy(CONFIGS["arc_encoder"])
    encoder = next(v for k, v in config.items() if isinstance(v, dict) and "num_hidden_layers" in v and "encoder" in k)
    encoder["num_hidden_layers"] = 1
    path = tiny.write(tmp_path / "model", config)
    planned = plan(asking(str(path), bits=6.0, max_context=48))
    source = planned.source.over(samples_of(planned.generation, 3))
    names = ("encoder.embed_tokens.weight", "model.embed_tokens.weight")
    found = embedding_hessians(source.build(), source, names)
    assert names[1] in found


def test_gptq_of_a_tied_table_counts_its_lookups(tmp_path: Path) -> None:
    source = opened("gemma3_text", tmp_path)
    source, checkpoint = source.over(samples_of(source.generation, 4)), source.checkpoint
    model = source.build()
    name = next(iter(tied(model)))
    entry = Entry(4, 32, 1.0, "", "gptq")
    made = BitPlan(1, "uniform", Budget("bits", 4.5), {name: entry}, 4.5, 0)
    store = CodeStore(tmp_path / "codes")
    quantize_layerwise(source, made, store)
    shape = tuple(checkpoint.info(name).shape)
    got = store.read(name, shape, entry)  # type: ignore[arg-type]
    assert got is not None

    embeddings = embedding_hessians(model, source, {name})
    seen: dict[bool, torch.Tensor] = {}

    def visit(visited: str, _: Linear, inputs: list[torch.Tensor]) -> None:
        if visited != name:
            return
        plain, tokens = hessian(forward, inputs)
        more = factors.of(name, inputs)
        want = plain + EMBEDDING_SHARE * plain.trace() * embeddings[name][0]
        torch.testing.assert_close(more.hessian, want, rtol=1e-5, atol=1e-6)
        for by_lookups, made_of in ((False, factor(plain, damping_for(len(plain), tokens))), (True, more)):
            seen[by_lookups] = quantize_gptq(checkpoint.tensor(name), made_of, 4, 32).codes

    forward = CalibrationForward(model, source, visit=visit)
    factors = InputHessians(forward, model, embeddings)
    forward.to_head()
    assert torch.equal(got.codes, seen[True])
    assert not torch.equal(seen[True], seen[False])


def test_gptq_of_a_table_that_no_linear_multiplies(tmp_path: Path) -> None:
    """It loses less of what the first layer computes than rounding to nearest, and its predicted loss is GPTQ's too."""
    source = opened("llama", tmp_path)
    source, checkpoint = source.over(samples_of(source.generation, 4)), source.checkpoint
    name = "model.embed_tokens.weight"
    entry = Entry(3, 32, 1.0, "", "gptq")
    made = BitPlan(1, "uniform", Budget("bits", 3.5), {name: entry}, 3.5, 0)
    store = CodeStore(tmp_path / "codes")
    assert quantize_layerwise(source, made, store) == []
    got = store.read(name, tuple(checkpoint.info(name).shape), entry)  # type: ignore[arg-type]
    assert got is not None
    value, draws = embedding_hessians(source.build(), source, {name})[name]
    weight = checkpoint.tensor(name).float()
    want = quantize_gptq(weight, factor(value, damping_for(len(value), draws)), 3, 32)
    assert torch.equal(got.codes, want.codes)
    ours, nearest = (float(hessian_error(weight, q, value).sum()) for q in (got, quantize_rtn(weight, 3, 32)))
    assert ours < nearest

    factors: dict[str, Factor] = {}
    visit_factors(source, {name}, factors.__setitem__)
    assert factors.keys() == {name}


def test_without_samples_a_table_is_left_to_rounding(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    entry = Entry(4, 32, 1.0, "", "gptq")
    name = "model.embed_tokens.weight"
    made = BitPlan(1, "uniform", Budget("bits", 4.5), {name: entry}, 4.5, 0)
    store = CodeStore(tmp_path / "codes")
    assert quantize_layerwise(source, made, store) == [name]


def test_a_plan_by_gptq_takes_embeddings_along(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    names = ("model.embed_tokens.weight", "lm_head.weight", "something.else.weight")
    made = BitPlan(1, "uniform", Budget("bits", 4.5), dict.fromkeys(names, Entry(4, 32, 1.0, "")), 4.5, 0)
    chosen = by_gptq(made, source.build()).entries
    assert [chosen[n].quantizer for n in names] == ["gptq", "gptq", "rtn"]
