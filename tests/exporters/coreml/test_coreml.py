"""The Core ML target: whole exports judged by the evaluator, weights read back bit for bit, sizes, failures."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.requests import asking, changed
from safetensors.torch import load_file, save_file

from edgewright.bundle import CHECKPOINT, Bundle
from edgewright.checkpoints.checkpoint import Checkpoint
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.compiler import Exported, export
from edgewright.errors import UserError
from edgewright.exporters.coreml import export as coreml
from edgewright.exporters.coreml.describe import AUTHOR, LICENSE
from edgewright.models.loading import quantized_parts
from edgewright.models.registry import build
from edgewright.ops.quantized import dequantize
from edgewright.quant.overrides import Override
from edgewright.runtimes.coreml.evaluator import Evaluator, _updates_in_place, through_half
from edgewright.runtimes.coreml.session import ACCELERATOR, CoremlEvaluator, open_coreml
from edgewright.system.version import __version__
from edgewright.targets.coreml.package import PACKAGE, Package, Stored
from edgewright.verification.checking import verify_here

pytestmark = pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools is not installed")

WIDTHS = {"q_proj|k_proj|v_proj": 3, "o_proj": 2, "layers.0.mlp.(gate|up)": 5, "layers.0.mlp.down": 6}
WIDTHS |= {"layers.1.mlp.(gate|up)": 8, "layers.1.mlp.down": 16, "lm_head": 16, "layers.2": 4, "embed": 6}


def _export(model: Path, out: Path, **options: object) -> Exported:
    return export(asking(str(model), formats=("coreml",), **options), out)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny Llama with every width in it."""
    folder = tmp_path_factory.mktemp("mixed")
    model = tiny.write_tiny_llama(folder / "model")
    overrides = tuple(Override(regex, bits, None if bits == 16 else 32) for regex, bits in WIDTHS.items())
    overrides = tuple(Override(o.regex, o.bits, 0 if o.bits == 8 else o.group) for o in overrides)
    return _export(model, folder / "out", overrides=overrides, bits=6.075)


@pytest.fixture(scope="module")
def t5gemma(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("t5gemma")
    return _export(tiny.write_tiny_t5gemma(folder / "model"), folder / "out", bits=4.5)


def _quantized(exported: Exported) -> Checkpoint:
    return open_checkpoint(str(exported.path / CHECKPOINT))


@pytest.mark.slow
def test_mixed_widths_match_the_reference(mixed: Exported) -> None:
    assert mixed.report is not None
    (target,) = mixed.report.targets
    assert {e.bits for e in mixed.planned.plan.entries.values()} == {2, 3, 4, 5, 6, 8, 16}
    assert target.activations == "float32"
    assert target.passed
    assert target.lowering.max_relative_error < 1e-4
    assert target.shipped.max_relative_error < 0.03
    assert target.shipped.max_relative_error > target.lowering.max_relative_error  # the rounding mode does round


@pytest.mark.slow
def test_t5gemma_matches_the_reference(t5gemma: Exported) -> None:
    assert t5gemma.report is not None
    (target,) = t5gemma.report.targets
    assert target.passed
    assert target.lowering.max_relative_error < 1e-4
    assert set(Package(t5gemma.path / "coreml" / PACKAGE).functions) == {
        "encoder",
        "cross_kv",
        "decoder",
        "decoder_step",
    }
    if sys.platform != "darwin":
        assert (target.placement.known, target.placement.accelerator) == (False, ACCELERATOR)
        assert target.placement.accelerated == {}
        assert "on a Mac" in target.placement.source
        assert "no Mac" in target.how
    assert verify_here(t5gemma.path).passed


@pytest.mark.slow
def test_the_package_describes_itself(t5gemma: Exported) -> None:
    """Who made it and what each input, output and state is, read from the specification as Xcode does."""
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString((t5gemma.path / "coreml" / PACKAGE / "Data/com.apple.CoreML/model.mlmodel").read_bytes())
    said = spec.description.metadata
    assert (said.author, said.versionString, said.license) == (AUTHOR, __version__, LICENSE)
    assert "encoder, cross_kv, decoder" in said.shortDescription
    functions = {f.name: f for f in spec.description.functions}
    assert set(functions) == {"encoder", "cross_kv", "decoder", "decoder_step"}
    texts = {p.name: p.shortDescription for f in functions.values() for p in (*f.input, *f.output, *f.state)}
    assert texts["input_ids"] == "token ids"
    assert texts["cross_k_0"] == "keys of the prompt for layer 0"
    assert texts["k_cache_0"].startswith("keys of layer 0")
    assert all(texts.values())


@pytest.mark.slow
def test_gemma3_matches_the_reference(tmp_path: Path) -> None:
    exported = _export(tiny.write_tiny_gemma3(tmp_path / "model"), tmp_path / "out", bits=4.5)
    assert exported.report is not None
    assert exported.report.targets[0].passed
    assert exported.report.targets[0].lowering.max_relative_error < 1e-4


def test_weights_in_the_package_are_the_checkpoint_bit_for_bit(mixed: Exported) -> None:
    stored = dict(coreml.read_weights(mixed.path / "coreml"))
    assert {v.dtype for v in stored.values()} == {torch.float32}
    checkpoint = _quantized(mixed)
    seen = set()
    for unit in mixed.planned.units:
        for weight in unit.weights:
            bits = mixed.planned.plan.entries[weight.name].bits
            seen.add(bits)
            if bits == 16:
                want = checkpoint.tensor(weight.name)
                got = stored[weight.name]
                assert torch.equal(got, want.to(torch.float16).to(torch.float32))
                # Below the normal range of float16 a bf16 value loses digits; nothing else may differ.
                assert torch.equal(got[want.abs() >= 2**-14], want.to(torch.float32)[want.abs() >= 2**-14])
                assert (got - want.to(torch.float32)).abs().max() <= 2**-25
            else:
                codes, scales, found, group = quantized_parts(checkpoint, weight.name, weight.shape)
                assert found == bits
                assert torch.equal(stored[weight.name], dequantize(codes, scales, bits, group))
    assert seen == {2, 3, 4, 5, 6, 8, 16}
    parameters = {n for n, _ in build(checkpoint.config).named_parameters(remove_duplicate=False)}
    assert set(stored) == parameters  # under the checkpoint's own names, and nothing else
    assert torch.equal(stored["model.norm.weight"], checkpoint.tensor("model.norm.weight").float())


@pytest.mark.slow
def test_weights_that_are_alike_keep_all_their_names(tmp_path: Path) -> None:
    model = tiny.write_tiny_llama(tmp_path / "model", num_hidden_layers=2)
    tensors = load_file(model / "model.safetensors")
    for name in [n for n in tensors if ".layers.1." in n]:
        tensors[name] = tensors[name.replace(".layers.1.", ".layers.0.")].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    exported = export(asking(str(model), formats=("coreml",), bits=4.5, importance="uniform"), tmp_path / "out")
    assert exported.report is not None
    assert exported.report.targets[0].passed
    assert set(tensors) == set(dict(coreml.read_weights(exported.path / "coreml")))


@pytest.mark.slow
def test_tied_embedding_and_both_decoder_functions_share_their_bytes(t5gemma: Exported) -> None:
    package = Package(t5gemma.path / "coreml" / PACKAGE)
    outputs = [op.outputs[0][0] for op in package.functions["decoder"].ops if op.outputs]
    embedded = [name for name in outputs if "embed_tokens" in name and not name.endswith(("_codes", "_scales"))]
    assert len(embedded) == 1  # one constexpr, for the gather and for the head
    offsets = []
    for name in ("decoder", "decoder_step"):
        ops = [op for op in package.functions[name].ops if op.kind == "constexpr_blockwise_shift_scale"]
        offsets.append({op.inputs["scale"][0].offset for op in ops if isinstance(op.inputs["scale"][0], Stored)})
    assert offsets[0] == offsets[1]
    assert offsets[0]


@pytest.mark.slow
def test_size_is_within_three_percent_of_codes_and_scales(tmp_path: Path) -> None:
    widths = {r"layers\.0\..*(gate|up)_proj": 2, r"layers\.1\..*(gate|up)_proj": 3, r"layers\.2\..*(gate|up)_proj": 6}
    widths |= {r"layers\.3\..*(gate|up)_proj": 8}
    overrides = tuple(Override(name, bits) for name, bits in widths.items())
    request = asking(str(tiny.EXAMPLE), formats=("coreml",), bits=4.5, widths=(2, 3, 4, 6, 8), overrides=overrides)
    exported = export(changed(request, verify=False), tmp_path / "out")
    blob = exported.path / "coreml" / PACKAGE / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    other = sum(_quantized(exported).tensor(n).numel() * 2 for n in exported.planned.other)
    ideal = exported.planned.plan.total_bytes + other
    assert {e.bits for e in exported.planned.plan.entries.values()} == {2, 3, 4, 6, 8}
    assert ideal <= blob.stat().st_size <= 1.03 * ideal


def test_shapes_are_static_or_bounded(mixed: Exported) -> None:
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    path = mixed.path / "coreml" / PACKAGE / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec.ParseFromString(path.read_bytes())
    functions = {f.name: f for f in spec.description.functions}
    assert set(functions) == {"decoder", "decoder_step"}
    ids = next(i for i in functions["decoder"].input if i.name == "input_ids").type.multiArrayType
    assert [(r.lowerBound, r.upperBound) for r in ids.shapeRange.sizeRanges] == [(1, 1), (1, 64)]
    step = Package(mixed.path / "coreml" / PACKAGE).functions["decoder_step"]
    assert all(-1 not in shape for _, shape in step.inputs.values())
    assert "logit_positions" not in step.inputs
    assert all(dtype == "FLOAT16" and shape == (1, 2, 64, 16) for dtype, shape in step.states.values())
    assert spec.specificationVersion == 9  # iOS 18


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = tiny.write_tiny_llama(tmp_path / "model", num_hidden_layers=1)
    request = asking(str(model), formats=("coreml",), bits=4.5)
    hashes = [export(changed(request, verify=False), tmp_path / name).manifest.files for name in ("a", "b")]
    assert hashes[0] == hashes[1]
    assert all(p.stat().st_mode & 0o444 == 0o444 for p in (tmp_path / "a" / "coreml").rglob("*") if p.is_file())


def test_more_tokens_than_the_caches_hold_is_refused(mixed: Exported) -> None:
    session = CoremlEvaluator(mixed.path / "coreml", Bundle.open(mixed.path).manifest.graphs)
    session.new_state(1, 64)
    with pytest.raises(UserError, match="65 tokens do not fit the package's caches of 64"):
        session.new_state(1, 65)


def test_rows_of_a_batch_are_independent(mixed: Exported) -> None:
    session = CoremlEvaluator(mixed.path / "coreml", Bundle.open(mixed.path).manifest.graphs, "float16")
    tokens = np.array([[5, 6, 7], [50, 60, 70]])

    def logits(ids: np.ndarray) -> np.ndarray:
        state = session.new_state(len(ids), 8)
        first = {"past_length": np.array([0]), "logit_positions": np.array([1])}
        session.run("decoder", {"input_ids": ids[:, :2]} | first, state)
        then = {"past_length": np.array([2]), "logit_positions": np.array([0])}
        return session.run("decoder", {"input_ids": ids[:, 2:]} | then, state)["logits"]

    together = logits(tokens)
    np.testing.assert_array_equal(together[1:], logits(tokens[1:]))
    assert np.array_equal(together, together.astype(np.float16).astype(np.float32))  # rounded, as declared


def test_damaged_and_missing_packages_are_refused(mixed: Exported, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Core ML package"):
        list(coreml.read_weights(tmp_path))
    inside = tmp_path / PACKAGE / "Data" / "com.apple.CoreML"
    (inside / "weights").mkdir(parents=True)
    good = mixed.path / "coreml" / PACKAGE / "Data" / "com.apple.CoreML"
    (inside / "model.mlmodel").write_bytes((good / "model.mlmodel").read_bytes())
    blob = (good / "weights" / "weight.bin").read_bytes()
    (inside / "weights" / "weight.bin").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(UserError, match=r"weight\.bin"):
        list(coreml.read_weights(tmp_path))
    (inside / "model.mlmodel").write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="damaged"):
        list(coreml.read_weights(tmp_path))


def _hostile(mixed: Exported, folder: Path, change: Any) -> Path:
    """A copy of the package whose program `change` has altered; its weights are those of `mixed`."""
    from coremltools.proto import Model_pb2

    good = mixed.path / "coreml" / PACKAGE / "Data" / "com.apple.CoreML"
    inside = folder / PACKAGE / "Data" / "com.apple.CoreML"
    (inside / "weights").mkdir(parents=True)
    (inside / "weights" / "weight.bin").symlink_to(good / "weights" / "weight.bin")
    spec = Model_pb2.Model()
    spec.ParseFromString((good / "model.mlmodel").read_bytes())
    change(spec)
    (inside / "model.mlmodel").write_bytes(spec.SerializeToString())
    return folder


def _ops(spec: Any, kind: str) -> list[Any]:
    block = next(iter(spec.mlProgram.functions["decoder"].block_specializations.values()))
    return [op for op in block.operations if op.type == kind]


def _huge(spec: Any) -> None:
    value = _ops(spec, "constexpr_blockwise_shift_scale")[0].inputs["scale"].arguments[0].value
    for dimension in value.type.tensorType.dimensions:
        dimension.constant.size = 1 << 40


def _far(spec: Any) -> None:
    _ops(spec, "constexpr_blockwise_shift_scale")[0].inputs["scale"].arguments[0].value.blobFileValue.offset = 1 << 62


def _elsewhere(spec: Any) -> None:
    value = _ops(spec, "constexpr_blockwise_shift_scale")[0].inputs["scale"].arguments[0].value
    value.blobFileValue.offset += 64


def _other_type(spec: Any) -> None:
    value = _ops(spec, "constexpr_blockwise_shift_scale")[0].inputs["scale"].arguments[0].value
    value.type.tensorType.dataType = 30  # a type of the enumeration that is as wide


def _no_scale(spec: Any) -> None:
    del _ops(spec, "constexpr_blockwise_shift_scale")[0].inputs["scale"]


def _labels(spec: Any) -> None:
    spec.description.metadata.userDefined["edgewright.weights"] = '{"w": 3}'


def _two_blocks(spec: Any) -> None:
    blocks = spec.mlProgram.functions["decoder"].block_specializations
    blocks["iOS99"].CopyFrom(next(iter(blocks.values())))


@pytest.mark.parametrize("change", [_huge, _far, _elsewhere, _other_type, _no_scale, _labels, _two_blocks])
def test_a_hostile_program_is_refused_in_one_line(mixed: Exported, tmp_path: Path, change: Any) -> None:
    folder = _hostile(mixed, tmp_path, change)
    with pytest.raises(UserError) as caught:
        list(coreml.read_weights(folder))
    assert "\n" not in str(caught.value)


def _renamed_input(spec: Any) -> None:
    spec.mlProgram.functions["decoder"].inputs[0].name = "odd"


def _no_function(spec: Any) -> None:
    del spec.mlProgram.functions["decoder"]


@pytest.mark.parametrize(
    ("change", "said"), [(_renamed_input, "decoder (lacks|has)"), (_no_function, "no function 'decoder'")]
)
def test_a_package_that_is_not_the_bundles_is_refused(mixed: Exported, tmp_path: Path, change: Any, said: str) -> None:
    folder = _hostile(mixed, tmp_path, change)
    with pytest.raises(UserError, match=said):
        open_coreml(folder, Bundle.open(mixed.path).manifest.graphs, exact=True)


def _bad_operand(spec: Any) -> None:
    _ops(spec, "linear")[0].inputs["x"].arguments[0].name = "nowhere"


def test_an_operation_that_cannot_be_computed_is_named(mixed: Exported, tmp_path: Path) -> None:
    session = CoremlEvaluator(_hostile(mixed, tmp_path, _bad_operand), Bundle.open(mixed.path).manifest.graphs)
    feeds = {"input_ids": np.array([[5, 6]]), "past_length": np.array([0]), "logit_positions": np.array([1])}
    with pytest.raises(UserError, match=r"linear .* cannot be computed"):
        session.run("decoder", feeds, session.new_state(1, 8))


def test_rounding_to_float16_is_numpys_for_every_float16_and_what_lies_between() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    between = [np.nextafter(halves, np.float32(way)) for way in (-np.inf, np.inf)]
    with np.errstate(over="ignore"):
        middle = halves + np.spacing(halves.astype(np.float16)).astype(np.float32) / 2
    edges = [np.nextafter(middle, np.float32(way)) for way in (-np.inf, np.inf)]
    rare = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65519.9, 65520.0, -65520.0, 1e-30, 3e38], np.float32)
    values = np.concatenate([halves, *between, middle, *edges, rare]).reshape(2, -1)
    with np.errstate(over="ignore", invalid="ignore"):
        want = values.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(through_half(values), want)
        np.testing.assert_array_equal(np.signbit(through_half(values)), np.signbit(want))


def test_caches_are_written_in_place_and_only_where_nothing_can_tell(mixed: Exported) -> None:
    package = Package(mixed.path / "coreml" / PACKAGE)
    function = package.functions["decoder_step"]
    assert len(_updates_in_place(function)) == len(function.states) > 0
    state = next(iter(function.states))
    reading = next(op for op in function.ops if op.kind == "read_state" and op.inputs["input"] == [state])
    twice = replace(function, ops=[reading, *function.ops])
    assert len(_updates_in_place(twice)) == len(function.states) - 1

    program = Evaluator(package, "decoder_step", rounding=True)
    carried = {n: np.zeros(shape, np.float32) for n, (_, shape) in function.states.items()}
    before = dict(carried)
    program.run({"input_ids": np.array([[5]]), "past_length": np.array([3])}, carried)
    for name, array in carried.items():
        assert array is before[name]
        assert np.flatnonzero(np.abs(array).sum((0, 1, 3))).tolist() == [3]
        assert np.array_equal(array, array.astype(np.float16).astype(np.float32))


def test_coremltools_own_reader_finds_the_same_weights(mixed: Exported) -> None:
    """A second opinion on the package: Apple's reader takes every function, type-checks it, and sees our numbers."""
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.proto import Model_pb2

    inside = mixed.path / "coreml" / PACKAGE / "Data" / "com.apple.CoreML"
    spec = Model_pb2.Model()
    spec.ParseFromString((inside / "model.mlmodel").read_bytes())
    program = load(spec, spec.specificationVersion, str(inside / "weights"))
    assert set(program.functions) == {"decoder", "decoder_step"}
    ours = dict(coreml.read_weights(mixed.path / "coreml"))
    seen = set()
    for op in program.functions["decoder"].find_ops(op_type="constexpr_blockwise_shift_scale"):
        theirs = op.materialized_val_inference()
        (name,) = [n for n in ours if f"w_{n.replace('.', '_')}" == op.outputs[0].name]
        # Apple's formula in float16, as Core ML computes it.
        np.testing.assert_array_equal(theirs, ours[name].to(torch.float16).numpy())
        seen.add(name)
    assert len(seen) == sum(len(u.weights) for u in mixed.planned.units) - sum(
        mixed.planned.plan.entries[w.name].bits == 16 for u in mixed.planned.units for w in u.weights
    )
