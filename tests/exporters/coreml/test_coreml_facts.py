"""The numbers that coremltools changes silently, one test each: the evaluator sees the error, our lowering has none.

`by_frontend` converts a module with coremltools' own torch frontend, `by_us` exports it as a graph of ours; both packages are
saved, reloaded and evaluated in float32. When a new coremltools mends one, the first half of its test fails and says so.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgewright import ops
from edgewright.errors import UserError
from edgewright.exporters.artefact import Options
from edgewright.exporters.coreml import export
from edgewright.graph import Graph, Port, State
from edgewright.runtimes.coreml.evaluator import Evaluator
from edgewright.runtimes.coreml.ops import OPS
from edgewright.targets.coreml.library import quiet
from edgewright.targets.coreml.package import PACKAGE, Package

pytestmark = pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools is not installed")

EW = torch.ops.edgewright
X = torch.linspace(-4, 4, 64).reshape(4, 16)
Function = Callable[[torch.Tensor], torch.Tensor]


class Wrapped(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Wrapped1(Wrapped):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:  # type: ignore[override]
        return (self.function(x),)


def by_frontend(function: Function, x: torch.Tensor, folder: Path) -> np.ndarray:
    """What coremltools makes of `function` by itself, in float32 throughout."""
    with quiet():
        import coremltools as ct

        program = torch.export.export(Wrapped(function), (x,)).run_decompositions({})
        model = ct.convert(
            program,
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        model.save(str(folder / PACKAGE))
    return evaluate(folder, "main", x)


def by_us(function: Function, x: torch.Tensor, folder: Path) -> np.ndarray:
    """What our lowering makes of it; intermediate float16 tensors are not rounded."""
    ports = [Port(name, torch.float32, tuple(v.shape)) for name, v in (("x", x), ("y", function(x)))]
    graph = Graph("made", Wrapped1(function), (ports[0],), (ports[1],))
    export.export([graph], folder, Options(max_positions=8))
    return evaluate(folder, "made", x)


def evaluate(folder: Path, name: str, x: torch.Tensor) -> np.ndarray:
    program = Evaluator(Package(folder / PACKAGE), name, rounding=False)
    (port,) = program.function.inputs
    (value,) = program.run({port: x.numpy()}, {}).values()
    return np.asarray(value)


def error(got: np.ndarray, want: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(got - want.numpy()).max() / want.abs().max())


def _two(tmp_path: Path) -> tuple[Path, Path]:
    made = tmp_path / "theirs", tmp_path / "ours"
    for folder in made:
        folder.mkdir()
    return made


def test_what_is_right_stays_right(tmp_path: Path) -> None:
    """The evaluator does not find errors where there are none."""
    theirs, ours = _two(tmp_path)
    assert error(by_frontend(F.gelu, X, theirs), F.gelu(X)) < 1e-6
    assert error(by_us(torch.tanh, X, ours), torch.tanh(X)) < 1e-6


def test_tanh_gelu_becomes_the_exact_one(tmp_path: Path) -> None:
    theirs, ours = _two(tmp_path)
    want = F.gelu(X, approximate="tanh")
    got = by_frontend(lambda x: F.gelu(x, approximate="tanh"), X, theirs)
    assert np.abs(got - want.numpy()).max() > 4e-4
    assert np.abs(got - F.gelu(X).numpy()).max() < 1e-6
    assert np.abs(by_us(lambda x: EW.gelu_tanh(x), X, ours) - want.numpy()).max() < 1e-4


def test_gelu_of_large_inputs_is_finite(tmp_path: Path) -> None:
    x = torch.tensor([[-60000.0, -300.0, -11.0, 0.0, 11.0, 300.0, 60000.0]])
    got = by_us(lambda x: EW.gelu_tanh(x), x, tmp_path)
    program = Evaluator(Package(tmp_path / PACKAGE), "made", rounding=True)
    rounded = program.run({"x": x.numpy()}, {})["y"]
    want = ops.pointwise.gelu_tanh(x).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(rounded, want, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("function", [lambda x: 1.0 / x, torch.reciprocal], ids=["1/x", "reciprocal"])
def test_one_over_x_adds_an_epsilon(function: Function, tmp_path: Path) -> None:
    theirs, ours = _two(tmp_path)
    x = torch.full((4, 16), 1e-3)
    assert error(by_frontend(function, x, theirs), function(x)) > 0.05
    assert error(by_us(function, x, ours), function(x)) < 1e-6


@pytest.mark.parametrize("factor", [1e-3, 0.0, 1e-7, 3e4], ids=["small", "zero", "tiny", "large"])
def test_rms_norm_scales_before_adding_eps(factor: float, tmp_path: Path) -> None:
    theirs, ours = _two(tmp_path)
    x, weight = X * factor / 4, torch.linspace(0.5, 2.0, 16).to(torch.float16).to(torch.float32)
    want = F.rms_norm(x, (16,), weight, 1e-6)
    got = by_frontend(lambda x: F.rms_norm(x, (16,), weight, 1e-6), x, theirs)
    if factor == 0.0:
        assert np.isnan(got).all()
    elif factor < 1.0:
        assert error(got, want) > 0.3
    for rounding, most in ((False, 5e-4), (True, 5e-3)):  # the constant sqrt(eps) is a float16 in both
        if rounding and 0.0 < factor < 1e-4:
            continue  # below what float16 holds
        by_us(lambda x: EW.rms_norm(x, weight, 1e-6, 0.0), x, ours) if not rounding else None
        made = Evaluator(Package(ours / PACKAGE), "made", rounding).run({"x": x.numpy()}, {})["y"]
        assert np.abs(made - want.numpy()).max() <= most * float(want.abs().max())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.add(x, x * x, alpha=3.0),
        lambda x: torch.sub(x, x * x, alpha=3.0),
        lambda x: torch.rsub(x, x * x, alpha=3.0),
    ],
    ids=["add", "sub", "rsub"],
)
def test_alpha_is_dropped(function: Function, tmp_path: Path) -> None:
    theirs, ours = _two(tmp_path)
    assert error(by_frontend(function, X, theirs), function(X)) > 0.1
    assert error(by_us(function, X, ours), function(X)) < 1e-6


def test_log_softmax_is_the_log_of_a_softmax(tmp_path: Path) -> None:
    theirs, ours = _two(tmp_path)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(x * 100.0, -1)

    assert error(by_frontend(function, X, theirs), function(X)) > 0.3
    assert error(by_us(function, X, ours), function(X)) < 1e-6


def test_a_masked_score_is_lowered_by_30000_only(tmp_path: Path) -> None:
    theirs, ours = _two(tmp_path)
    allowed = torch.tensor([True, False, True, True]).reshape(1, 1, 1, 4)
    x = X.clone()
    x[1] *= 100.0  # the masked key wins where it is only lowered

    def scaled_dot(x: torch.Tensor) -> torch.Tensor:
        heads = x.reshape(1, 1, 4, 16)
        mask = allowed.expand(1, 1, 4, 4)
        return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask, scale=1.0).reshape(4, 16)

    def cross(x: torch.Tensor) -> torch.Tensor:
        heads = x.reshape(1, 4, 1, 16)
        return EW.cross_attention(heads, heads.transpose(1, 2), heads.transpose(1, 2), allowed, 1.0, 0.0).reshape(4, 16)

    assert torch.allclose(scaled_dot(x), cross(x))
    assert error(by_frontend(scaled_dot, x, theirs), scaled_dot(x)) > 0.5
    assert error(by_us(cross, x, ours), scaled_dot(x)) < 1e-6


def test_rotary_angles_hold_at_long_positions(tmp_path: Path) -> None:
    """Angles are float32 and brought near zero first; the numbers are those of the reference at any position."""
    inv_freq = 10000.0 ** -(torch.arange(0, 16, 2) / 16.0)
    positions = torch.tensor([0, 1, 1000, 32000])

    def function(x: torch.Tensor) -> torch.Tensor:
        return EW.rope(x.reshape(1, 4, 1, 16), positions, inv_freq).reshape(4, 16)

    exact = function(X.double().float())
    assert error(by_us(function, X, tmp_path), exact) < 1e-3
    assert "cos" in Package(tmp_path / PACKAGE).op_counts()["made"]


class Accumulate(nn.Module):
    def forward(self, x: torch.Tensor, states: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return states[0] * 2.0, states[0] + x


def test_a_state_that_no_attention_writes_is_read_before_and_written_after(tmp_path: Path) -> None:
    f32 = torch.float32
    state = State("sum", "conv", f32, (4, 16), updated=True)
    graph = Graph("made", Accumulate(), (Port("x", f32, (4, 16)),), (Port("y", f32, (4, 16)),), (state,))
    export.export([graph], tmp_path, Options(max_positions=8))
    program = Evaluator(Package(tmp_path / PACKAGE), "made", rounding=False)
    carried = {"sum": np.zeros((4, 16), np.float32)}
    for calls in range(3):
        made = program.run({"x": X.numpy()}, carried)["y"]
        np.testing.assert_allclose(made, 2 * calls * X.numpy(), rtol=1e-6)
    np.testing.assert_allclose(carried["sum"], 3 * X.numpy(), rtol=1e-6)


def test_two_float16_factors_stand_for_one_number() -> None:
    from edgewright.exporters.coreml.builder import halves

    for factor in (24**-0.5, 256**-0.5, 640**0.5, 1 / 3, -0.7, 1e-3, 0.0, 30.0):
        first, second = halves(factor)
        assert float(np.float16(first)) == first
        assert float(np.float16(second)) == second
        assert first * second == pytest.approx(factor, rel=2e-6, abs=0)


def test_a_residual_beyond_float16_does_not_overflow(tmp_path: Path) -> None:
    """Sums are held shrunk by a power of two: 20 branches of 6000 make 120000, which a norm brings back."""
    weight = torch.linspace(0.5, 2.0, 16).to(torch.float16).to(torch.float32)

    def function(x: torch.Tensor) -> torch.Tensor:
        h = x
        for _ in range(19):
            h = h + x
        return EW.rms_norm(h, weight, 1e-6, 0.0)

    x = X * 1500.0
    by_us(function, x, tmp_path)
    program = Evaluator(Package(tmp_path / PACKAGE), "made", rounding=True)
    assert error(program.run({"x": x.numpy()}, {})["y"], function(x)) < 5e-3


@pytest.mark.parametrize("factor", [1e-2, 1.0, 100.0])
def test_a_sum_that_is_held_shrunk_is_the_sum_wherever_it_goes(factor: float, tmp_path: Path) -> None:
    weight = torch.linspace(0.5, 2.0, 16).to(torch.float16).to(torch.float32)
    rows = torch.tensor([2, 0])

    def function(x: torch.Tensor) -> torch.Tensor:
        h = x + x.abs()
        picked = (h + h).index_select(0, rows)
        return torch.cat([h * 0.5, picked, EW.rms_norm(picked, weight, 1e-6, 1.0), torch.tanh(h + 1.0)], 0)

    x = X * factor
    got = by_us(function, x, tmp_path)
    for part, want in zip(np.split(got, [4, 6, 8]), np.split(function(x).numpy(), [4, 6, 8]), strict=True):
        np.testing.assert_allclose(part, want, rtol=5e-4, atol=1e-6)


def test_an_op_without_a_lowering_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="uses aten::gelu, which has no lowering; leave this target out"):
        by_us(lambda x: F.gelu(x, approximate="tanh"), X, tmp_path)
    assert not (tmp_path / PACKAGE).exists()


def test_padding_is_before_and_after_each_dimension(tmp_path: Path) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return F.pad(F.pad(x, (1, 2, 0, 3)), (2, 0), value=1.5)

    np.testing.assert_allclose(by_us(function, X, tmp_path), function(X).numpy(), rtol=1e-6)


def test_padding_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"padding \(reflect, 1\) has no lowering; leave this target out"):
        by_us(lambda x: F.pad(x, (1, 1), mode="reflect"), X, tmp_path)


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    huge = torch.full((16,), 70000.0)
    with pytest.raises(UserError, match="beyond float16"):
        by_us(lambda x: x + huge, X, tmp_path)


def test_the_evaluator_refuses_an_operation_it_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_us(torch.tanh, X, tmp_path)
    known: dict[str, Any] = {name: fn for name, fn in OPS.items() if name != "tanh"}
    monkeypatch.setattr("edgewright.runtimes.coreml.evaluator.OPS", known)
    with pytest.raises(UserError, match="does not know the operation 'tanh'"):
        evaluate(tmp_path, "made", X)


def test_no_pass_of_coremltools_repeats_the_lookup_table(tmp_path: Path) -> None:
    """Below iOS 26 a default pass stores the table once per group of scales; ours is stored once a program."""
    from edgewright.ops.packing import pack

    generator = torch.Generator().manual_seed(0)
    codes = pack(torch.randint(0, 64, (128, 256), generator=generator, dtype=torch.uint8), 6)
    scales = torch.rand(128, 8, generator=generator).to(torch.bfloat16) + 0.5
    x = torch.linspace(-1, 1, 512).reshape(2, 256)
    got = by_us(lambda x: EW.quantized_linear(x, codes, scales, None, 6, 32), x, tmp_path)
    assert error(got, EW.quantized_linear(x, codes, scales, None, 6, 32)) < 1e-5
    blob = tmp_path / PACKAGE / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    assert blob.stat().st_size <= 1.04 * (128 * 256 * 6 / 8 + 128 * 8 * 2)


def test_the_library_is_loaded_without_what_it_converts_from() -> None:
    """And those libraries can be imported afterwards."""
    code = (
        "import sys, edgewright.targets.coreml.library\n"
        "assert not {'executorch', 'torchao', 'transformers', 'sklearn'} & set(sys.modules)\n"
        "import torchao"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
