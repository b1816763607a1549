"""Single operations through the ExecuTorch exporter: the forms that XNNPACK holds, and what its kernels compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgewright.errors import UserError
from edgewright.exporters.artefact import Options
from edgewright.graph import Graph, Port
from edgewright.ops.packing import pack
from edgewright.ops.quantized import dequantize

pytest.importorskip("executorch")

from edgewright.exporters.executorch import export as exporter
from edgewright.exporters.executorch import lowerings, xnnpack
from edgewright.exporters.executorch.passes import rewrite
from edgewright.targets.executorch.program import ProgramFile

CONTEXT = 32


def test_forms_that_xnnpack_lacks_are_refused() -> None:
    assert [lowerings.container(b, g, 64) for b, g in [(2, 32), (3, 64), (4, 64), (5, 64), (8, 64)]] == [4, 4, 4, 8, 8]
    assert lowerings.container(4, 48, 48) == 8
    for bits, group in [(8, 32), (5, 32), (4, 16)]:
        with pytest.raises(UserError, match="do not exist for executorch"):
            lowerings.container(bits, group, 64)


def test_tables_have_the_nibble_order_of_their_kernel() -> None:
    packed = torch.tensor([[0x21, 0x43]], dtype=torch.uint8)  # 4-bit codes 1, 2, 3, 4, lowest bits first
    assert lowerings.table(packed, 4, 4, 4).tolist() == [[0x12, 0x34]]
    assert lowerings.table(packed, 4, 8, 4).tolist() == [[1 - 8, 2 - 8, 3 - 8, 4 - 8]]
    assert lowerings.table(packed, 2, 2, 8).tolist() == packed.tolist()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_embedding_kernel_is_exact(bits: int, tmp_path: Path) -> None:
    from executorch.exir import EdgeCompileConfig, to_edge
    from executorch.extension.pybindings import portable_lib

    generator = torch.Generator().manual_seed(bits)
    packed = pack(torch.randint(0, 1 << bits, (9, 64), generator=generator).to(torch.uint8), bits)
    scales = (torch.rand(9, 2, generator=generator) * 0.1 + 0.01).to(torch.bfloat16)

    class Lookup(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", lowerings.table(packed, bits, bits, 64))
            self.register_buffer("scales", scales.to(torch.float16))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return lowerings.quantized_embedding(ids, self.table, self.scales, bits)

    ids = torch.arange(9).unsqueeze(0)
    edge = to_edge(
        torch.export.export(Lookup(), (ids,)),
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    (tmp_path / "lookup.pte").write_bytes(edge.to_executorch().buffer)
    program = portable_lib._load_program(str(tmp_path / "lookup.pte"))
    (found,) = program.load_method("forward")([ids])
    assert torch.equal(found[0], dequantize(packed, scales, bits, 32))


def computed(module: torch.nn.Module, x: torch.Tensor, folder: Path) -> torch.Tensor:
    """What ExecuTorch's runtime makes of a module of one input."""
    from executorch.extension.pybindings import portable_lib

    with (folder / "one.pte").open("wb") as file:
        exporter.lower({"forward": torch.export.export(module, (x,))}).write_to_file(file)
    (found,) = portable_lib._load_program(str(folder / "one.pte")).load_method("forward")([x])
    return found  # type: ignore[no-any-return]


class Tanh(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


class Gelu(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.edgewright.gelu_tanh(x)
        return out


def test_xnnpacks_own_gelu_is_not_the_tanh_formula_and_ours_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn

    x = torch.linspace(-6, 6, 2001).reshape(1, 3, -1)
    want = torch.nn.functional.gelu(x.double(), approximate="tanh").float()
    assert float((computed(Gelu(), x, tmp_path) - want).abs().max()) < 1e-6
    monkeypatch.setitem(xnnpack._UNARY, torch.ops.aten.tanh.default, xnn.XNNGelu)
    assert 5e-5 < float((computed(Tanh(), x, tmp_path) - want).abs().max()) < 1e-3


def test_an_exact_gelu_is_one_op_of_xnnpack(tmp_path: Path) -> None:
    class Exact(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * x * (1.0 + torch.erf(x * 0.5**0.5))

    class Other(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.25 * x * (1.0 + torch.erf(x * 0.5**0.5))

    x = torch.linspace(-6, 6, 2001).reshape(1, 3, -1)
    for module, count in ((Exact(), 1), (Other(), 0)):
        traced = torch.export.export(module, (x,)).module(check_guards=False)
        assert isinstance(traced, torch.fx.GraphModule)
        rewritten = rewrite(traced, CONTEXT)
        targets = [n.target for n in rewritten.graph.nodes]
        assert targets.count(torch.ops.aten.gelu.default) == count
        assert targets.count(torch.ops.aten.erf.default) == 1 - count
        want = module(x.double()).float()
        assert float((computed(rewritten, x, tmp_path) - want).abs().max()) < 2e-6


class Vision(torch.nn.Module):
    """What a user's module has around its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [1, 4, 5, 8]
        x = torch.nn.functional.pad(x * 2.0, (0, 0, 1, 2), value=0.5)  # [1, 4, 8, 8]
        y = torch.matmul(x.permute(0, 2, 3, 1).reshape(1, 8, 2, 4, 4)[:, :, 1].sum((1, 3)), x[:, 0, :4])  # [1, 4, 8]
        x = x.mean((1, 2)) + y.mean(1)
        return torch.relu(torch.matmul(x, self.matrix.t())).unsqueeze(1).expand(1, 3, 6) - x.mean(1, keepdim=True)


def test_sums_paddings_selections_and_products_are_xnnpacks(tmp_path: Path) -> None:
    """Also of results with fewer than three dimensions."""
    x, module = torch.randn(1, 4, 5, 8, generator=torch.Generator().manual_seed(1)), Vision()
    traced = torch.export.export(module, (x,)).module(check_guards=False)
    assert isinstance(traced, torch.fx.GraphModule)
    found = computed(rewrite(traced, CONTEXT), x, tmp_path)
    want = module(x)
    assert float((found - want).abs().max()) < 1e-5 * float(want.abs().max())
    (units,) = ProgramFile(tmp_path / "one.pte").placement().values()
    assert units["CPU"] == {}


def test_a_number_may_stand_where_a_kernel_wants_a_tensor(tmp_path: Path) -> None:
    """With integers, which stay with ExecuTorch's kernels."""

    class Positions(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([3 - x, 4 + x, x - 1, 5 * x, (6 / x).to(torch.int64), x // 2])

    x = torch.tensor([1, 2, 3])
    assert torch.equal(computed(Positions(), x, tmp_path), Positions()(x))


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (torch.erfinv, "aten::erfinv.out"),
        (lambda x: torch.fft.rfft(x).real, "aten::view_as_real"),
        (torch.linalg.inv, "aten._linalg_check_errors.default"),
    ],
)
def test_an_op_without_a_kernel_is_refused_in_one_line(function: Any, op: str, tmp_path: Path) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (function(x),)

    ports = [(Port(name, torch.float32, (1, 8, 8)),) for name in "xy"]
    with pytest.raises(UserError) as error:
        exporter.export([Graph("module", Module(), *ports)], tmp_path, Options(CONTEXT))
    said = str(error.value)
    assert said.startswith(f"--format executorch: the graph 'module' uses {op}")
    assert said.endswith("has no kernel; leave this target out")
    assert "\n" not in said


def test_xnnpacks_sine_and_cosine_hold_at_large_angles(tmp_path: Path) -> None:
    """Rotary embedding relies on it."""

    class Waves(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat((x.sin(), x.cos()), -1)

    x = torch.arange(32768, dtype=torch.float32).reshape(1, 8, -1)
    want = torch.cat((x.double().sin(), x.double().cos()), -1).float()
    assert float((computed(Waves(), x, tmp_path) - want).abs().max()) < 1e-6


def test_scales_that_xnnpack_would_round_are_refused() -> None:
    with pytest.raises(ValueError, match="not exact"):
        xnnpack._exact(torch.tensor([[0.1]]), torch.bfloat16)
