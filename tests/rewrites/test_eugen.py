"""EUGens: the estimates are unbiased, orthogonal blocks vary less, the merge is exact, and rewritten models deploy."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.requests import asking
from helpers.tiny import EXAMPLE, LLAMA, write_tiny_gemma3, write_tiny_llama, write_tiny_t5gemma

from edgewright.calibration.prompts import random_prompts
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.compiler import export
from edgewright.errors import UserError
from edgewright.models.eugen import EUGen, EUGenSize
from edgewright.models.layers.activations import ACTIVATIONS, gelu_tanh
from edgewright.models.layers.mlp import GatedMLP
from edgewright.models.loading import load_original
from edgewright.models.registry import build, shorten
from edgewright.rewrites.eugen.features import augment, bernstein, closed_form, draw, gaussian, gaussian_orthogonal
from edgewright.rewrites.eugen.rewrite import EUGenSpec, rewrite_eugen
from edgewright.rewrites.eugen.transfer import HELD, TRAIN, TUNE, transfer

POLYNOMIAL = (0.3, -0.7, 0.5, -0.2)
"""Signs of both kinds, so that a sign on the wrong side shows."""


def unit_rows(rows: int, columns: int, seed: int) -> torch.Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def polynomial(z: torch.Tensor) -> torch.Tensor:
    return sum(a * z**i for i, a in enumerate(POLYNOMIAL))  # type: ignore[return-value]


@pytest.mark.parametrize("matrix", [gaussian, gaussian_orthogonal])
@pytest.mark.parametrize("norm", [False, True])
def test_estimates_are_unbiased(matrix, norm):
    x = augment(unit_rows(3, 6, 1), norm=norm)
    w = augment(unit_rows(4, 6, 2), one=torch.tensor([0.2, -0.4, 0.0, 0.6]), norm=norm)
    generator = torch.Generator().manual_seed(3)
    draws = []
    for _ in range(1000):
        features = draw(POLYNOMIAL, 64, x.shape[1], generator, matrix)
        draws.append(features.g(w) @ features.f(x).T)
    estimates = torch.stack(draws)
    spread = estimates.std(0) / len(draws) ** 0.5
    assert bool(((estimates.mean(0) - polynomial(w @ x.T)).abs() < 5 * spread).all())
    assert float(spread.max()) < 0.08  # so tight that a factor 2 in any coefficient would show


def test_an_ordinary_dense_layer_has_no_norm_column():
    x, w, bias = unit_rows(3, 6, 1), unit_rows(4, 6, 2), torch.tensor([0.1, 0.2, -0.3, 0.4], dtype=torch.float64)
    products = augment(w, one=bias, norm=False) @ augment(x, norm=False).T
    torch.testing.assert_close(products, w @ x.T + bias.unsqueeze(1))


def test_orthogonal_blocks_vary_less():
    x, w = augment(unit_rows(8, 14, 1)), augment(unit_rows(8, 14, 2))

    def variance(matrix) -> float:
        generator = torch.Generator().manual_seed(5)
        draws = [draw((0.0, 1.0), 16, 16, generator, matrix) for _ in range(400)]
        return float(torch.stack([f.g(w) @ f.f(x).T for f in draws]).var(0).mean())

    assert variance(gaussian_orthogonal) < 0.8 * variance(gaussian)
    block = gaussian_orthogonal(40, 16, 1.0, torch.Generator().manual_seed(6))
    for rows in (block[:16], block[16:32], block[32:]):
        products = rows @ rows.T
        torch.testing.assert_close(products, torch.diag(products.diagonal()), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["relu", "silu", "gelu_pytorch_tanh"])
def test_bernstein_fits_within_its_bound(name):
    low, high = -3.0, 2.0
    z = torch.linspace(low, high, 501, dtype=torch.float64)
    values = ACTIVATIONS[name](z)
    steepest = float((values.diff() / z.diff()).abs().max())
    errors = []
    for degree in (2, 4, 8, 16):
        fitted = sum(a * z**i for i, a in enumerate(bernstein(ACTIVATIONS[name], degree, low, high)))
        errors.append(float((fitted - values).abs().max()))
        assert errors[-1] <= steepest * (high - low) / (2 * degree**0.5)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.25


def test_bernstein_keeps_lines_and_refuses_no_interval():
    torch.testing.assert_close(
        torch.tensor(bernstein(lambda z: 2 * z - 1, 3, -1.0, 4.0)), torch.tensor([-1.0, 2.0, 0.0, 0.0])
    )
    with pytest.raises(ValueError, match="non-empty"):
        bernstein(gelu_tanh, 3, 1.0, 1.0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_merge_with_the_next_linear_is_exact(k):
    x, generator = unit_rows(5, 32, 1), torch.Generator().manual_seed(2)
    w, following = augment(unit_rows(12, 32, 3)), unit_rows(32, 12, 4)
    features = draw(POLYNOMIAL[: k + 1], 16, 34, generator)
    bias = torch.linspace(-1, 1, 32, dtype=torch.float64)
    layer = closed_form(features, w, following, bias)
    expected = (following @ (features.g(w) @ features.f(augment(x)).T)).T + bias
    torch.testing.assert_close(layer(x), expected)
    assert {name for name, _ in layer.named_parameters()} == {
        *("features.weight", "features.bias", "norm_column", "out.weight", "out.bias")
    }


def block_and_rows(hidden: int = 32, intermediate: int = 48) -> tuple[GatedMLP, torch.Tensor]:
    block = GatedMLP(hidden, intermediate, "gelu_pytorch_tanh")
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return block, torch.randn(4000, hidden, generator=generator)


def test_transfer_comes_nearer_with_orders_features_and_the_blocks_own_directions():
    block, x = block_and_rows()
    part = torch.tensor([TRAIN] * 6 + [TUNE, HELD]).repeat(500)

    def error(m: int, k: int, g: str) -> float:
        layer = EUGen(32, EUGenSize(m, k))
        fit = transfer(block, x, part, layer, g, 0, torch.float32)
        y = block(x[part == HELD])
        seen = float((layer(x[part == HELD]) - y).norm() / y.norm())
        assert fit.error == pytest.approx(seen, rel=1e-3)  # the sums tell the truth about the layer itself
        return fit.error

    assert error(32, 2, "random") < error(32, 1, "random")
    assert error(48, 2, "block") < error(16, 2, "block") < error(16, 2, "random")
    assert error(48, 3, "block") < error(48, 2, "block") < 0.6 * error(48, 1, "block")


def test_transfer_rounds_to_what_is_stored_and_is_repeatable():
    block, x = block_and_rows()
    part = torch.tensor([TRAIN] * 6 + [TUNE, HELD]).repeat(500)
    layers = [EUGen(32, EUGenSize(16, 2)) for _ in range(2)]
    for layer in layers:
        transfer(block, x, part, layer, "random", 7, torch.bfloat16)
    for name, value in layers[0].named_parameters():
        assert torch.equal(value, value.to(torch.bfloat16).float()), name
        assert torch.equal(value, layers[1].get_parameter(name)), name
    with pytest.raises(UserError, match="not finite"):
        transfer(block, x * float("inf"), part, EUGen(32, EUGenSize(16, 1)), "random", 0, torch.float32)


MODELS = {
    "llama": (write_tiny_llama, r"layers\.[12]\.mlp", 2),
    "gemma3_text": (write_tiny_gemma3, "mlp", 3),
    "t5gemma": (write_tiny_t5gemma, r"\.1\.mlp", 2),
}


def calibration(vocab: int = 70) -> list[list[int]]:
    return random_prompts(vocab, 64, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if n == "llama" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_a_rewritten_model_exports_and_verifies(name, tmp_path):
    write, regex, count = MODELS[name]
    source = write(tmp_path / "source")
    told: list[str] = []
    report = rewrite_eugen(str(source), f"{regex}:m=32,k=2", calibration(), tmp_path / "new", progress=told.append)
    assert len(report.layers) == count == len(told) - 1
    assert report.tokens >= sum(len(p) for p in calibration())
    assert report.bytes[1] == (tmp_path / "new" / "model.safetensors").stat().st_size < report.bytes[0]
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["edgewright"]["eugen"] == {layer.path: {"m": 32, "k": 2} for layer in report.layers}
    for layer in report.layers:
        hidden = {"t5gemma": 96 if "encoder" in layer.path else 64}.get(name, 64)
        assert layer.parameters[1] == 3 * 32 * hidden + 2 * 96 + 64 * hidden + hidden
        assert layer.flops[1] == 2 * (3 * 32 * hidden + 64 * hidden) < layer.flops[0]
        assert layer.bytes == (2 * layer.parameters[0], 2 * layer.parameters[1])
        assert 0 < layer.fit.error < 1
    exported = export(asking(str(tmp_path / "new"), widths=(4, 8)), tmp_path / "bundle")
    assert exported.report is not None  # compared, or it would have raised
    planned = set(exported.planned.plan.entries)
    assert {f"{layer.path}.{part}.weight" for layer in report.layers for part in ("features", "out")} <= planned


def test_what_flows_on_reaches_the_later_fits(tmp_path):
    source = str(write_tiny_llama(tmp_path / "source"))
    reports = {
        flow: rewrite_eugen(source, "mlp:m=16,k=1", calibration(80), tmp_path / flow, flow=flow)
        for flow in ("rewritten", "original")
    }
    first, later = ([r.layers[i].fit.error for r in reports.values()] for i in (0, 2))
    assert first[0] == first[1]
    assert later[0] != later[1]


def test_the_walk_sees_what_the_whole_model_computes(tmp_path):
    """A block's recorded inputs lead, through the loaded model, to the very fit that the report states."""
    source = write_tiny_llama(tmp_path / "source")
    prompts = [p[:4] for p in calibration(80)]
    report = rewrite_eugen(str(source), r"layers\.2\.mlp:m=16,k=2", prompts, tmp_path / "new")
    model = build(open_checkpoint(str(source)).config)
    load_original(model, open_checkpoint(str(source)))
    new = build(open_checkpoint(str(tmp_path / "new")).config)
    load_original(new, open_checkpoint(str(tmp_path / "new")))
    seen: list[torch.Tensor] = []
    model.model.layers[2].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    graph = model.graphs()[0]
    held = [p for i, p in enumerate(prompts) if i % 8 == 7]
    states = [torch.zeros(len(held), 2, 4, 16) for _ in graph.states]
    graph.call([torch.tensor(held), torch.zeros(1, dtype=torch.int64), torch.tensor([0]), *states])
    want, got = model.model.layers[2].mlp(seen[0]), new.model.layers[2].mlp(seen[0])
    assert float((got - want).norm() / want.norm()) == pytest.approx(report.layers[0].fit.error, rel=1e-3)


def test_a_shorter_rehearsal_leaves_out_what_is_gone(tmp_path):
    config = LLAMA | {"edgewright": {"eugen": {f"model.layers.{i}.mlp": {"m": 16, "k": 1} for i in (0, 2)}}}
    short = shorten(config, 1)
    assert list(short["edgewright"]["eugen"]) == ["model.layers.0.mlp"]
    assert isinstance(build(short).model.layers[0].mlp, EUGen)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "edgewright is"),
        ({"eugen": 3}, "edgewright.eugen is 3"),
        ({"eugen": {"model.layers.0.mlp": 3}}, "expected an object"),
        ({"eugen": {"model.layers.9.mlp": {"m": 16, "k": 1}}}, "no feed-forward block"),
        ({"eugen": {"model.layers.0.self_attn": {"m": 16, "k": 1}}}, "no feed-forward block"),
        ({"eugen": {"a\nb" * 999: {"m": 16, "k": 1}}}, "no path of a module"),
        ({"eugen": {"model.layers.0.mlp": {"m": 1 << 40, "k": 1}}}, "from 16 to 65536"),
        ({"eugen": {"model.layers.0.mlp": {"m": 24, "k": 1}}}, "a multiple of 16"),
        ({"eugen": {"model.layers.0.mlp": {"m": 16, "k": 4}}}, "from 1 to 3"),
        ({"eugen": {"model.layers.0.mlp": {"m": True, "k": 1}}}, "from 16 to 65536"),
        ({"eugen": {"model.layers.0.mlp": {"m": 16, "k": 1, "run": "x"}}}, "m and k alone"),
    ],
)
def test_hostile_configs_are_refused_in_one_line(value, message):
    with pytest.raises(UserError, match=message) as refused:
        build(LLAMA | {"edgewright": value})
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mlp", "is not 'regex:m"),
        (":m=16,k=1", "is not 'regex:m"),
        ("mlp:m=16", "is not 'regex:m"),
        ("mlp:m=8,k=1", "--eugen: m is 8"),
        ("mlp:m=17,k=1", "a multiple of 16"),
        ("mlp:m=131072,k=1", "from 16 to 65536"),
        ("mlp:m=16,k=0", "--eugen: k is 0"),
        ("mlp:m=16,k=1,g=best", "choose from block, random"),
        ("(:m=16,k=1", "not a regular expression"),
        ("nothing:m=16,k=1", "matches no feed-forward block; there are model.layers.0.mlp"),
    ],
)
def test_bad_requests_are_refused(spec, message, tmp_path):
    source = write_tiny_llama(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        rewrite_eugen(str(source), spec, calibration(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_bad_calibration_is_refused_and_leaves_nothing(tmp_path):
    source = str(write_tiny_llama(tmp_path / "source"))
    spec = EUGenSpec.parse("mlp:m=16,k=1")
    (tmp_path / "text.txt").write_text("some text")
    for given, message in (
        (calibration()[:3], "at least 8"),
        ([[1, 2, 99]] * 9, "token 99"),
        ([[1] * 64] * 9, "1 to 63"),
        (tmp_path / "text.txt", "no tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            rewrite_eugen(source, spec, given, tmp_path / "new")
    with pytest.raises(UserError, match="choose a smaller m or k"):
        rewrite_eugen(source, replace(spec, size=EUGenSize(1 << 16, 3)), calibration(), tmp_path / "new")
    with pytest.raises(UserError, match="exists already"):
        rewrite_eugen(source, spec, calibration(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "text.txt"]


@pytest.mark.slow
def test_the_example_still_spells(tmp_path):
    """Two blocks of the real encoder-decoder, a task file as calibration: it deploys, and most words stay right."""
    task = tmp_path / "task.tsv"
    lines = (EXAMPLE / "task.tsv").read_text().splitlines()
    task.write_text("\n".join(lines[:400]) + "\n")
    report = rewrite_eugen(str(EXAMPLE), r"(en|de)coder\.layers\.1\.mlp:m=128,k=2", task, tmp_path / "new")
    assert [layer.path for layer in report.layers] == ["model.encoder.layers.1.mlp", "model.decoder.layers.1.mlp"]
    assert report.layers[0].fit.error < 0.25
    exported = export(asking(str(tmp_path / "new"), widths=(4, 8)), tmp_path / "bundle")
    assert exported.report is not None  # compared, or it would have raised
    (tmp_path / "held.tsv").write_text("\n".join(lines[400:500]) + "\n")
    from edgewright.verification.checking import VerifyOptions, verify_here

    (target,) = verify_here(tmp_path / "bundle", VerifyOptions(task=tmp_path / "held.tsv")).targets
    assert target.task_accuracy is not None
    assert target.task_accuracy > 0.5  # 0.75 before
