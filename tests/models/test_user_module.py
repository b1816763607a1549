"""A user's own module: its replaced parts against PyTorch's, the whole through export and verify, and what is refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.requests import asking
from torch import nn

from edgewright import compiler
from edgewright.bundle import Bundle
from edgewright.cli import main
from edgewright.errors import UserError
from edgewright.models.opening import open_model
from edgewright.models.registry import build
from edgewright.models.user_module import module, replacements
from edgewright.verification.verify import VerifyOptions, verify

pytestmark = pytest.mark.exports


HERE = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{os.environ.get('PYTHONPATH', '')}")


def randomised(net: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1 if tensor.dim() == 1 else torch.randn_like(tensor))
    return net.eval()


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Linear(6, 5), (2, 6)),
        (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 9, 7)),
        (nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), bias=False), (2, 6, 9, 7)),
        (nn.Conv2d(6, 8, 4, padding="same", groups=2), (2, 6, 9, 7)),
        (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 9, 7)),
        (nn.Conv2d(6, 12, 3, groups=6), (2, 6, 9, 7)),
        (nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
        (nn.Conv1d(6, 8, 5, padding="valid", dilation=2), (2, 6, 13)),
        (nn.ConvTranspose2d(6, 4, 2, stride=2), (2, 6, 5, 3)),
        (nn.ConvTranspose2d(6, 4, (2, 3), stride=(2, 3), bias=False), (2, 6, 5, 3)),
        (nn.LayerNorm(7), (2, 6, 7)),
        (nn.LayerNorm((6, 7), elementwise_affine=False), (2, 6, 7)),
        (nn.GroupNorm(3, 6), (2, 6, 5, 4)),
        (nn.BatchNorm2d(6), (2, 6, 5, 4)),
        (nn.BatchNorm1d(6, affine=False), (2, 6, 5)),
        (nn.GELU(), (2, 6)),
        (nn.GELU("tanh"), (2, 6)),
        (nn.SiLU(), (2, 6)),
        (nn.Dropout(0.5), (2, 6)),
    ],
)
def test_a_replaced_module_computes_what_pytorchs_does(net: nn.Module, shape: tuple[int, ...]) -> None:
    net = randomised(net)
    x = torch.randn(shape)
    with torch.no_grad():
        want = net(x)
        ours = replacements.replaced(copy.deepcopy(net), "here:net")
        assert type(ours) is not type(net)
        got = ours(x)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()


def test_shared_modules_stay_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = self.one
            self.three = nn.Linear(4, 4)
            self.three.weight = self.one.weight

    net = replacements.replaced(Twice(), "here:net")
    assert net.one is net.two
    assert replacements.tied(net, "whole.")["whole.three.weight"] == "whole.one.weight"


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["helpers.user_modules:unet", "helpers.user_modules:speech"])
def test_export_verify_and_profile(factory: str, tmp_path: Path) -> None:
    made = compiler.export(asking(factory, bits=5.0), tmp_path / "bundle")
    assert made.report is not None
    (target,) = made.report.targets
    assert target.passed
    assert target.weights == made.planned.plan.entries.__len__()
    assert target.lowering.rms is not None
    assert target.lowering.rms < 1e-5
    assert 1e-5 < target.shipped.rms < 0.05  # int8 activations: not exact
    report = verify(tmp_path / "bundle", VerifyOptions(model=factory))
    assert report.quantization is not None
    assert 1e-3 < report.quantization.rms < 0.5  # about 5 bits a weight cost something
    result = CliRunner().invoke(main, ["profile", str(tmp_path / "bundle"), "-r", "2"])
    assert result.exit_code == 0
    assert "calls a second" in result.stdout


def test_the_original_is_what_the_factory_made() -> None:
    from helpers import user_modules

    net, inputs = user_modules.unet()
    want = net.eval()(inputs[0])
    checkpoint = open_model("helpers.user_modules:unet")
    model = build(checkpoint.config)
    from edgewright.models.loading import load_original

    load_original(model, checkpoint)
    (graph,) = model.graphs()
    (got,) = graph.call([inputs[0]])
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.slow
def test_a_bundle_never_runs_the_code_that_it_names(tmp_path: Path) -> None:
    compiler.export(asking("helpers.user_modules:speech", bits=6.0, verify=False), tmp_path / "bundle")
    command = [sys.executable, "-m", "edgewright.cli", "verify", str(tmp_path / "bundle")]
    for extra, code in (([], 2), (["-m", "helpers.user_modules:unet"], 2), (["-m", "helpers.user_modules:speech"], 0)):
        done = subprocess.run([*command, *extra], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
    answer = CliRunner().invoke(main, ["run", str(tmp_path / "bundle"), "--prompt", "hello"])
    assert answer.exit_code == 2
    assert "holds a module, which answers no prompt" in answer.stderr
    assert Bundle.open(tmp_path / "bundle").manifest.generation.task == "module"


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("helpers.user_modules:nothing", "has no attribute 'nothing'"),
        ("no_such_package:net", "No module named 'no_such_package'"),
        ("helpers.user_modules:broken", "the factory raised RuntimeError: no weights here"),
        ("helpers.user_modules:not_a_pair", "must return (module, example inputs)"),
        ("helpers.user_modules:undecided", "torch.export does not take the module"),
        ("helpers.user_modules:overlapping", "0: a transposed convolution needs kernel = stride"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(factory: str, words: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["export", "-m", factory, "-o", str(tmp_path / "bundle")])
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert not (tmp_path / "bundle").exists()


def test_examples_must_be_alike() -> None:
    with pytest.raises(UserError, match="shapes and dtypes of the first"):
        module._check("here:net", [{"x": torch.zeros(1, 2)}, {"x": torch.zeros(1, 3)}])
    with pytest.raises(UserError, match="float32, int64 or bool"):
        module._check("here:net", [{"x": torch.zeros(1, 2, dtype=torch.float64)}])
    with pytest.raises(UserError, match="no example inputs"):
        module._check("here:net", [])
