"""Arm Ethos-U: the encoder delegated whole, its weights read back, computed by Arm's TOSA reference model, Vela's estimate."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import write_tiny_llama, write_tiny_t5gemma

from edgewright.bundle import GraphSpec
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError
from edgewright.exporters.artefact import Artefact, Options
from edgewright.models.loading import load_dequantized, load_quantized
from edgewright.models.registry import build
from edgewright.ops.quantized import dequantize
from edgewright.quant.plan import BitPlan, Budget, Entry
from edgewright.quant.quantize_checkpoint import quantize_checkpoint
from edgewright.quant.units import quantizable_units
from edgewright.runtimes.eager import EagerSession

pytest.importorskip("ethosu.vela")
pytest.importorskip("tosa_reference_model")

from edgewright.exporters.ethosu import export, vela
from edgewright.runtimes.ethosu.session import KERNELS, EthosUSession
from edgewright.runtimes.session import Joined
from edgewright.targets.ethosu.files import Program, TosaFile
from edgewright.targets.ethosu.names import HOST_OPS

CONTEXT = 16
SMALL, LARGE = "ethos-u55-128", "ethos-u85-256"
WIDTHS = (2, 3, 4, 5, 6, 8)
ERROR = 5e-3
"""Largest error over the largest value."""


def quantized(source: Path, out: Path, **fixed: tuple[int, int]) -> Any:
    """The model with its codes: widths in turn, one scale per channel but for the weights whose name ends as in `fixed`."""
    checkpoint = open_checkpoint(str(source))
    model = build(checkpoint.config)
    turn, entries = itertools.cycle(WIDTHS), {}
    for unit in quantizable_units(model):
        bits = next(turn)
        for w in unit.weights:
            chosen, group = fixed.get(w.name.split(".")[-2], (bits, w.shape[1]))
            entries[w.name] = Entry(chosen, group, 1.0, "")
    plan = BitPlan(1, "by hand", Budget("bits", 4.0), entries, 0.0, 0).validate(quantizable_units(model))
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    quantize_checkpoint(checkpoint, plan, model.tied, out, [n for n in names if n not in {*model.tied, *plan.entries}])
    model = build(open_checkpoint(str(out)).config)
    load_quantized(model, open_checkpoint(str(out)))
    return model


@dataclass
class Made:
    folder: Path
    graphs: list[Any]
    specs: list[GraphSpec]
    reference: EagerSession
    artefact: Artefact
    accelerators: tuple[str, ...]


ONE_LAYER = {"encoder": {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}}
"""The lowering's time grows with the layers, so that the fast tests have one."""


@pytest.fixture(scope="module", params=[(SMALL,), pytest.param((SMALL, LARGE), marks=pytest.mark.slow)], ids=len)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("ethosu")
    model = quantized(
        write_tiny_t5gemma(root / "source", **(ONE_LAYER if len(request.param) == 1 else {})), root / "checkpoint"
    )
    plain = build(open_checkpoint(str(root / "checkpoint")).config)
    load_dequantized(plain, open_checkpoint(str(root / "checkpoint")))
    folder = root / "ethosu"
    folder.mkdir()
    graphs = model.graphs()
    artefact = export.export(graphs, folder, Options(CONTEXT, choices=request.param))
    return Made(
        folder, graphs, [GraphSpec.of(g) for g in graphs], EagerSession(plain.graphs()), artefact, request.param
    )


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder, tmp_path / "copy"))


def test_weights_read_back_from_the_files_are_the_checkpoints_to_the_bit(made: Made) -> None:
    found, widths = dict(export.read_weights(made.folder)), set()
    encoder = made.graphs[0]
    held = {f"model.encoder.{path}.weight": m for path, m in encoder.module.named_modules() if hasattr(m, "codes")}
    assert set(found) == set(held)
    for name, module in held.items():
        assert torch.equal(found[name], dequantize(module.codes, module.scales, module.bits, module.group_size)), name
        widths.add(module.bits)
    assert widths == set(WIDTHS[: len(widths)])
    assert len(widths) >= 5
    assert all((made.folder / name).is_file() for name in made.artefact.files)


def test_the_program_computes_what_the_reference_does(made: Made) -> None:
    """A padded batch of three; what stands in the padding must not matter at all."""
    session = EthosUSession(made.folder, made.specs, accelerator=made.accelerators[-1])
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(3, 70, (3, 14)), np.ones((3, 14), bool)
    mask[1, 9:] = mask[2, 1:] = False
    want = made.reference.run("encoder", {"input_ids": ids, "encoder_mask": mask}, {})["encoder_hidden"]
    got = session.run("encoder", {"input_ids": ids, "encoder_mask": mask}, {})["encoder_hidden"]
    assert got.shape == want.shape
    assert np.abs(want).max() > 1
    assert np.abs(got - want)[mask].max() < ERROR * np.abs(want[mask]).max()
    other = np.where(mask, ids, rng.integers(3, 70, ids.shape))
    again = session.run("encoder", {"input_ids": other, "encoder_mask": mask}, {})["encoder_hidden"]
    assert (again[mask] == got[mask]).all()


def test_all_but_embedding_mask_and_fixed_point_is_one_delegate(made: Made) -> None:
    for accelerator in made.accelerators:
        placed = EthosUSession(made.folder, made.specs, accelerator=accelerator).placement()
        assert placed.accelerator == "EthosUBackend"
        assert placed.fallback == {}
        linears = sum(hasattr(m, "bias") for m in made.graphs[0].module.modules() if hasattr(m, "codes"))
        assert placed.accelerated["encoder"]["CONV2D"] == linears
        assert placed.host["encoder"]["quantized_decomposed::embedding_byte.dtype_out"] == 1
        assert set(placed.host["encoder"]) <= set(HOST_OPS) == set(KERNELS)
        listed = made.artefact.ops[f"encoder.{accelerator}"]
        assert listed["EthosUBackend: MATMUL"] == placed.accelerated["encoder"]["MATMUL"]
        assert b"/tmp" not in (made.folder / f"encoder.{accelerator}.pte").read_bytes()


def test_velas_estimate_names_its_memory_mode_and_is_the_same_each_time(made: Made) -> None:
    for accelerator in made.accelerators:
        facts: Any = made.artefact.facts
        estimate = facts["vendor_simulated"]["programs"][f"encoder on {accelerator}"]
        assert estimate["memory_mode"] == vela.family(accelerator).memory
        assert estimate["milliseconds"] == pytest.approx(1e3 * estimate["cycles"] / estimate["clock_hz"])
        assert estimate["sram_bytes_moved"] > 0
        assert (
            estimate["dram_bytes_moved"] + estimate["off_chip_flash_bytes_moved"] > estimate["weight_bytes_encoded"] / 2
        )
        tosa = TosaFile(made.folder / f"encoder.{accelerator}.tosa")
        assert vela.command_stream(tosa.data, accelerator)[1] == estimate


def test_executorchs_own_memory_mode_for_the_u85_would_hide_dram(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    from executorch.backends.arm.ethosu import EthosUCompileSpec

    monkeypatch.setattr(vela, "compile_spec", EthosUCompileSpec)
    tosa = made.folder / f"encoder.{made.accelerators[-1]}.tosa"
    estimate = vela.command_stream(tosa.read_bytes(), LARGE)[1]
    assert estimate["memory_mode"] == "Sram_Only"
    assert estimate["dram_bytes_moved"] == 0


def test_other_sizes_of_a_family_take_the_same_tosa(made: Made) -> None:
    tosa = (made.folder / f"encoder.{SMALL}.tosa").read_bytes()
    cycles = [vela.command_stream(tosa, name)[1]["cycles"] for name in ("ethos-u55-32", SMALL, "ethos-u65-512")]
    assert len(set(cycles)) == 3


def test_a_program_that_another_tosa_made_is_refused(made: Made, copy: Path) -> None:
    path = copy / f"encoder.{SMALL}.tosa"
    (linear, *_) = TosaFile(path).linears()
    data = bytearray(path.read_bytes())
    at = data.find(linear.codes.numpy().tobytes())
    assert at > 0
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"was not compiled from the \.tosa beside it"):
        export.read_weights(copy)


@pytest.mark.parametrize("kind", ["tosa", "pte"])
@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "gone"])
def test_damaged_files_are_refused_in_one_line(copy: Path, kind: str, damage: str) -> None:
    path = copy / f"encoder.{SMALL}.{kind}"
    data = path.read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, len(data), np.uint8).tobytes()
    changed = {"empty": b"", "cut": data[: len(data) // 2], "noise": data[:8] + noise[8:]}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    with pytest.raises(UserError, match="export again") as raised:
        export.read_weights(copy)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "names no program"),
        ({"programs": {"ethos-u99-1": {}}}, "no Ethos-U configuration"),
        ({"programs": {"../x": {}}}, "no Ethos-U configuration"),
        ({"programs": {SMALL: {"linears": [], "table": "t"}}}, "does not name the weights"),
        ({"programs": {SMALL: {"linears": {"a": "b"}, "table": "t"}}}, "is no number"),
        ({"programs": {SMALL: {"linears": {"a": 1.0}, "table": "t"}}}, "linears, not those of"),
    ],
)
def test_a_list_of_weights_that_says_something_else_is_refused(copy: Path, value: object, said: str) -> None:
    (copy / export.NAMES).write_text(json.dumps(value))
    with pytest.raises(UserError, match=said):
        export.read_weights(copy)


def test_the_program_refuses_what_it_was_not_made_for(made: Made) -> None:
    session = EthosUSession(made.folder, made.specs)
    long = {"input_ids": np.zeros((1, CONTEXT + 1), np.int64), "encoder_mask": np.ones((1, CONTEXT + 1), bool)}
    with pytest.raises(UserError, match=f"a source of {CONTEXT + 1} tokens; this program takes {CONTEXT}"):
        session.run("encoder", long, {})
    with pytest.raises(UserError, match="holds the encoder alone"):
        session.run("cross_kv", {}, {})
    with pytest.raises(UserError, match=r"no encoder\.ethos-u65-512\.pte"):
        EthosUSession(made.folder, made.specs, accelerator="ethos-u65-512")


def test_the_rest_of_the_bundle_runs_elsewhere(made: Made) -> None:
    session = Joined(EthosUSession(made.folder, made.specs, made.accelerators[-1]), ("encoder",), made.reference)
    state = session.new_state(1, 4)
    ids, mask = np.array([[5, 6, 7]]), np.ones((1, 3), bool)
    session.run("cross_kv", session.run("encoder", {"input_ids": ids, "encoder_mask": mask}, state), state)
    feeds = {"input_ids": np.array([[2]]), "past_length": np.array([0]), "logit_positions": np.array([0])}
    logits = session.run("decoder", {**feeds, "encoder_mask": mask}, state)["logits"]
    assert logits.shape == (1, 1, 70)


@pytest.mark.slow
def test_products_of_activations_in_16_bits_are_refused_by_the_smaller_npus(made: Made) -> None:
    """Why `narrow_matmul` exists, and that an op which the NPU leaves to the CPU is named."""
    program, _ = export.fixed(made.graphs[0], Options(CONTEXT), narrow_matmul=False)
    with pytest.raises(UserError, match=f"{SMALL} does not take aten::bmm"):
        export._lower(program, SMALL)


@pytest.mark.parametrize(
    ("fixed", "said"),
    [
        (
            {"down_proj": (4, 32)},
            r"model\.encoder\.layers\.0\.mlp\.down_proj\.weight has a scale for every 32 .*--group-size",
        ),
        ({"embed_tokens": (4, 32)}, r"model\.encoder\.embed_tokens\.weight has a scale for every 32"),
        ({"o_proj": (16, 64)}, r"model\.encoder\.layers\.0\.self_attn\.o_proj\.weight is not quantized"),
        ({"embed_tokens": (16, 96)}, r"model\.encoder\.embed_tokens\.weight is not quantized"),
    ],
)
def test_weights_that_the_npu_cannot_hold_are_refused_by_name(
    tmp_path: Path, fixed: dict[str, tuple[int, int]], said: str
) -> None:
    model = quantized(write_tiny_t5gemma(tmp_path / "source"), tmp_path / "checkpoint", **fixed)
    with pytest.raises(UserError, match=said):
        export.export(model.graphs(), tmp_path, Options(CONTEXT, choices=(LARGE,)))


def test_a_model_without_an_encoder_is_refused(tmp_path: Path) -> None:
    model = quantized(write_tiny_llama(tmp_path / "source"), tmp_path / "checkpoint")
    with pytest.raises(UserError, match="this model has none"):
        export.export(model.graphs(), tmp_path, Options(CONTEXT, choices=(LARGE,)))


@pytest.mark.parametrize("asked", [(), ("ethos-u77-128",), (LARGE, "ethos-u85-100"), ("",)])
def test_an_unknown_configuration_is_refused_before_any_work(
    made: Made, asked: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="Ethos-U configuration"):
        export.export(made.graphs, tmp_path, Options(CONTEXT, choices=asked))
    assert not list(tmp_path.iterdir())


def test_the_program_holds_the_embedding_as_int8_rows(made: Made) -> None:
    codes, scales = Program(made.folder / f"encoder.{made.accelerators[-1]}.pte").table()
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert codes.shape == (70, 96)
