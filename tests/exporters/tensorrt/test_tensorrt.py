"""TensorRT: engines without a GPU, their weights, and the network they were built from against the reference."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import onnx_cases as forms
from helpers import tiny
from helpers.requests import asking
from helpers.tiny_families import FAMILIES
from onnx import TensorProto, helper

from edgewright.bundle import GraphSpec
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.compiler import export
from edgewright.errors import UserError
from edgewright.exporters.artefact import Artefact, Options
from edgewright.models.loading import load_dequantized, load_quantized
from edgewright.models.registry import build
from edgewright.ops.quantized import dequantize
from edgewright.pipeline.plan import plan
from edgewright.quant.overrides import Override
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.tensorrt.cuda import Device
from edgewright.runtimes.tensorrt.network import NetworkSession
from edgewright.runtimes.tensorrt.ports import GPU
from edgewright.runtimes.tensorrt.session import open_tensorrt
from edgewright.targets.tensorrt.driver import gpu_available
from edgewright.targets.tensorrt.engine_file import read_header

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed"
)
SMS = (86, 120)
CONTEXT = 64
WIDTHS = {
    r"layers\.0\..*[qkv]_proj": 2,
    r"layers\.0\..*o_proj": 5,
    r"layers\.0\..*(gate|up)_proj": 6,
    r"layers\.0\..*down_proj": 3,
    r"layers\.1\..*[qkv]_proj": 8,
    r"layers\.1\..*(gate|up)_proj": 4,
}


@dataclass
class Made:
    directory: Path
    graphs: list[Any]
    reference: EagerSession
    artefact: Artefact


def quantize(folder: Path, write: Any, overrides: tuple[Override, ...]) -> Path:
    """The checkpoint of a plan for TensorRT, whose scales are positive; no engine is built."""
    model = str(write(folder / "model"))
    wanted = asking(model, ("tensorrt",), bits=5.0, groups=(32,), widths=(2, 3, 4, 5, 6, 8), overrides=overrides)
    export(asking(model, plan=plan(wanted).plan, verify=False), folder / "bundle")
    return folder / "bundle" / "checkpoint"


@pytest.fixture(scope="module", params=["llama", pytest.param("t5gemma", marks=pytest.mark.slow)])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    from edgewright.exporters.tensorrt import export as tensorrt

    folder = tmp_path_factory.mktemp(request.param)
    mixed = tuple(Override(name, bits) for name, bits in WIDTHS.items())
    source = quantize(folder, getattr(tiny, f"write_tiny_{request.param}"), mixed)
    checkpoint = open_checkpoint(str(source))
    model, plain = build(checkpoint.config), build(checkpoint.config)
    load_quantized(model, checkpoint)
    load_dequantized(plain, checkpoint)
    graphs = model.graphs()
    target = folder / "tensorrt"
    target.mkdir()
    artefact = tensorrt.export(graphs, target, Options(CONTEXT, choices=SMS))
    return Made(target, graphs, EagerSession(plain.graphs()), artefact)


def quantized_modules(made: Made) -> dict[str, Any]:
    """Checkpoint name -> module with codes and scales, over all graphs."""
    return {
        g.checkpoint_name(f"{path}.weight"): module
        for g in made.graphs
        for path, module in g.module.named_modules()
        if hasattr(module, "codes")
    }


def sessions(made: Made, **options: Any) -> NetworkSession:
    return NetworkSession(made.directory, [GraphSpec.of(g) for g in made.graphs], threads=1, **options)


def test_weights_read_back_from_the_onnx_are_the_checkpoints_to_the_bit(made: Made) -> None:
    from edgewright.exporters.tensorrt.export import read_weights

    wanted, widths, seen = quantized_modules(made), set(), set()
    for name, value in read_weights(made.directory):
        module = wanted[name]
        assert value.dtype == torch.float32
        assert torch.equal(value, dequantize(module.codes, module.scales, module.bits, module.group_size)), name
        widths.add(module.bits)
        seen.add(module.codes.data_ptr())
    assert widths == {2, 3, 4, 5, 6, 8}
    assert seen == {m.codes.data_ptr() for m in wanted.values()}  # a tied head is its embedding


def test_every_weight_stands_in_the_engine_with_our_codes(made: Made) -> None:
    from edgewright.exporters.tensorrt.weights import codes_in_engine

    facts, count = made.artefact.facts, 0
    for graph in made.graphs:
        path = made.directory / f"{graph.name}.engine"
        found = codes_in_engine(path.with_suffix(".onnx"), path)
        assert all(found.values()), [n for n, there in found.items() if not there]
        count += len(found)
    assert facts["weights_in_engines"] == facts["weights_byte_for_byte_in_engines_measured"] == count > 0


def test_codes_that_are_not_in_the_engine_are_counted_out(made: Made, tmp_path: Path) -> None:
    from edgewright.exporters.tensorrt.weights import codes_in_engine

    plan = (made.directory / "decoder.engine").read_bytes()
    (tmp_path / "decoder.engine").write_bytes(plan.translate(bytes(b ^ 1 for b in range(256))))
    found = codes_in_engine(made.directory / "decoder.onnx", tmp_path / "decoder.engine")
    assert found
    assert not any(found.values())


def test_the_header_names_the_gpus_and_the_plan_names_inputs_and_outputs(made: Made) -> None:
    for graph in made.graphs:
        path = made.directory / f"{graph.name}.engine"
        header = read_header(path)
        assert header.sms == SMS
        assert header.version[:2] == (1, 7)
        assert header.payload_bytes <= path.stat().st_size
        assert header.ports == {*graph.input_names, *graph.output_names}
        assert header.profiles == (2 if graph.name == "decoder" else 1)
    assert made.artefact.facts["built_for"] == "SM 86, 120"


def logits(session: Any, made: Made) -> np.ndarray:
    """Prefill of 5 tokens, then steps, in a batch of 2 with padding."""
    ids = np.random.default_rng(0).integers(3, 60, (2, 5))
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    state = session.new_state(2, 16)
    extra = {}
    if any(g.name == "encoder" for g in made.graphs):
        encoded = session.run("encoder", {"input_ids": ids, "encoder_mask": mask}, state)
        session.run("cross_kv", encoded, state)
        extra = {"encoder_mask": mask}
    out, past = [], 0
    for tokens in (ids, ids[:, :1], ids[:, 2:3]):
        n = tokens.shape[1]
        feeds = {"input_ids": tokens, "past_length": np.array([past]), "logit_positions": np.arange(n), **extra}
        out.append(session.run("decoder", feeds, state)["logits"])
        past += n
    return np.concatenate(out, 1)


@pytest.mark.parametrize(("exact", "least", "most"), [(False, 2e-5, 5e-3), (True, 0.0, 2e-5)], ids=["float16", "wide"])
def test_the_network_given_to_the_builder_computes_what_the_reference_does(
    made: Made, exact: bool, least: float, most: float
) -> None:
    """Widened to float32 it must be the reference; in float16 it differs a little, a wrong graph would by far more."""
    network = sessions(made, exact=exact)
    want, got = logits(made.reference, made), logits(network, made)
    assert network.activations == ("float32" if exact else "float16")
    assert got.dtype == np.float32
    assert least * np.abs(want).max() <= np.abs(want - got).max() < most * np.abs(want).max()


def test_a_widened_network_has_the_codes_of_its_file_and_no_float16(made: Made) -> None:
    from edgewright.runtimes.tensorrt.network import _widened

    path = made.directory / "decoder.onnx"
    before, after = onnx.load(str(path), load_external_data=False), onnx.load_from_string(_widened(path))
    assert TensorProto.FLOAT16 not in {i.data_type for i in after.graph.initializer}
    assert len(before.graph.node) == len(after.graph.node)
    kinds = (TensorProto.INT4, TensorProto.INT8)
    for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True):
        if old.data_type in kinds:
            assert old == new
    assert TensorProto.FLOAT16 not in {v.type.tensor_type.elem_type for v in (*after.graph.input, *after.graph.output)}


def test_placement_counts_the_nodes_the_engine_must_hold(made: Made) -> None:
    network = sessions(made)
    placed = network.placement()
    assert placed.accelerator == GPU
    assert placed.accelerated == made.artefact.ops
    assert not placed.fallback
    assert not placed.host
    assert "was not run here" in placed.source
    assert "the engine itself was not run" in network.how


def test_a_port_that_the_bundle_names_and_the_engine_lacks_is_refused(made: Made, tmp_path: Path) -> None:
    for file in made.directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    plan = (made.directory / "decoder.engine").read_bytes()
    for old, new, said in (
        (b"k_cache_1_out", b"k_cache_9_out", "lacks the input or output k_cache_1_out"),
        (b"logits", b"zogits", "lacks the input or output logits"),
    ):
        (tmp_path / "decoder.engine").unlink()
        (tmp_path / "decoder.engine").write_bytes(plan.replace(old, new))
        with pytest.raises(UserError, match=said):
            open_tensorrt(tmp_path, [GraphSpec.of(g) for g in made.graphs], threads=1)


def test_a_port_that_the_bundle_names_and_the_network_lacks_is_refused(made: Made) -> None:
    specs = [GraphSpec.of(g) for g in made.graphs]
    odd = specs[-1].model_copy(update={"outputs": specs[-1].outputs[:0]})
    with pytest.raises(UserError, match="has, unknown to the bundle, the input or output logits"):
        NetworkSession(made.directory, [*specs[:-1], odd], threads=1)


def test_weights_that_do_not_fit_their_file_are_refused(made: Made, tmp_path: Path) -> None:
    from edgewright.exporters.tensorrt.export import read_weights

    (tmp_path / "decoder.onnx").write_bytes((made.directory / "decoder.onnx").read_bytes())
    (tmp_path / "weights.bin").write_bytes((made.directory / "weights.bin").read_bytes()[:100])
    with pytest.raises(UserError, match=r"weights\.bin: shorter than"):
        list(read_weights(tmp_path))
    model = onnx.load(str(made.directory / "decoder.onnx"), load_external_data=False)
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, tmp_path / "decoder.onnx")
    with pytest.raises(UserError, match="does not say which weight it holds"):
        list(read_weights(tmp_path))


def test_two_builds_are_byte_identical_but_for_the_order_of_caches(made: Made) -> None:
    """TensorRT-RTX 1.7 orders like cache writes anew in each build, in one thread and with fixed addresses too."""
    from edgewright.exporters.tensorrt.engine import build_engine, profiles

    graph = made.graphs[0]
    again = bytes(build_engine(made.directory / f"{graph.name}.onnx", SMS, profiles(graph, CONTEXT)))
    first = (made.directory / f"{graph.name}.engine").read_bytes()
    assert len(again) == len(first)
    differing = int((np.frombuffer(first, np.uint8) != np.frombuffer(again, np.uint8)).sum())
    assert differing <= (len(first) // 500 if graph.states else 0)


def test_profiles_are_one_for_prefill_and_one_for_the_step(made: Made) -> None:
    from edgewright.exporters.tensorrt.engine import profiles

    decoder = made.graphs[-1]
    prefill, step = profiles(decoder, CONTEXT)
    assert prefill["input_ids"] == ((1, 1), (1, 64), (16, 64))
    assert step["input_ids"] == ((1, 1), (1, 1), (16, 1))
    assert set(prefill) == set(decoder.input_names)


def test_states_are_float16_in_and_out_and_the_weights_int4_or_int8(made: Made) -> None:
    model = onnx.load(str(made.directory / "decoder.onnx"), load_external_data=False)
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    decoder = made.graphs[-1]
    for state in decoder.states:
        assert types[state.name] == TensorProto.FLOAT16
        if state.updated:
            assert types[f"{state.name}_out"] == TensorProto.FLOAT16
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    codes = [kinds[n.input[0]] for n in model.graph.node if n.op_type == "DequantizeLinear"]
    assert set(codes) == {TensorProto.INT4, TensorProto.INT8}


def test_an_unused_input_is_an_error(tmp_path: Path) -> None:
    from edgewright.exporters.tensorrt.engine import build_engine

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [1, 8]) for n in ("x", "idle", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:2], values[2:])
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), path)
    with pytest.raises(UserError, match=r"g\.onnx: an input was dropped.*idle"):
        build_engine(path, (86,), [])


def test_what_the_parser_refuses_is_reported(tmp_path: Path) -> None:
    from edgewright.exporters.tensorrt.engine import build_engine

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [1, 8]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Odd", ["x"], ["y"], domain="nowhere")], "g", values[:1], values[1:])
    path = tmp_path / "g.onnx"
    domains = [helper.make_opsetid("", 24), helper.make_opsetid("nowhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=11), path)
    with pytest.raises(UserError, match=r"g\.onnx is refused: .*Odd"):
        build_engine(path, (86,), [])


@pytest.mark.parametrize(("sms", "said"), [((), "no SM"), ((75,), "SM 75"), ((86, 90), "SM 90")])
def test_an_sm_that_cannot_run_it_is_refused_before_any_work(sms: tuple[int, ...], said: str, tmp_path: Path) -> None:
    from edgewright.exporters.tensorrt.export import export as export_tensorrt

    with pytest.raises(UserError, match=said):
        export_tensorrt([], tmp_path, Options(CONTEXT, choices=sms))
    assert not list(tmp_path.iterdir())


def test_a_cut_or_foreign_engine_is_refused(made: Made, tmp_path: Path) -> None:
    whole = (made.directory / "decoder.engine").read_bytes()
    (tmp_path / "cut.engine").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "other.engine").write_bytes(b"ONNX" + whole[4:100])
    with pytest.raises(UserError, match="where its header says"):
        read_header(tmp_path / "cut.engine")
    (tmp_path / "short.engine").write_bytes(whole[:20])
    for name in ("other", "short", "absent"):
        with pytest.raises(UserError, match="not a TensorRT-RTX engine"):
            read_header(tmp_path / f"{name}.engine")


@pytest.mark.skipif(gpu_available(), reason="this host has a GPU")
def test_without_a_driver_the_device_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"no NVIDIA driver|CUDA driver error"):
        Device()


@pytest.mark.slow
def test_linears_over_one_weight_do_not_share_its_constants(tmp_path: Path) -> None:
    """TensorRT-RTX 1.7's builder segfaults on attentions that do; the file has the bytes once."""
    from edgewright.exporters.onnx.weight_file import WeightFile
    from edgewright.exporters.tensorrt.lowerings import lower
    from edgewright.exporters.tensorrt.weights import NAMES

    config = FAMILIES["zamba2"] | {"layers_block_type": ["hybrid"] * 2, "num_hidden_layers": 2, "num_mem_blocks": 1}
    forms.quantize(tiny.write(tmp_path / "model", config), tmp_path / "checkpoint", {}, [(4, 32), (8, 0)])
    checkpoint = open_checkpoint(str(tmp_path / "checkpoint"))
    model = build(checkpoint.config)
    load_quantized(model, checkpoint)
    (graph,) = model.graphs()
    weights = WeightFile(tmp_path / "weights.bin")
    lower(graph, set(), weights, Options(CONTEXT), tmp_path)
    weights.close()
    network = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph
    parts: dict[str, list[list[str]]] = {}
    for node in network.node:
        if node.op_type == "DequantizeLinear":
            (names,) = [p.value for p in node.metadata_props if p.key == NAMES]
            parts.setdefault(names, []).append(list(node.input))
    shared = {
        names: inputs for names, inputs in parts.items() if "shared_transformer" in names and "adapter" not in names
    }
    assert len(shared) == 6  # q, k, v, o, gate with up, down
    places = {t.name: {e.key: e.value for e in t.external_data} for t in network.initializer}
    for first, second in shared.values():
        assert not set(first) & set(second)
        assert [places[name] for name in first] == [places[name] for name in second]
    users = [node.input[0] for node in network.node if node.op_type == "Transpose"]
    assert len(users) == len(set(users))
