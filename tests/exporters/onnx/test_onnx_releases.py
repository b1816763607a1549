"""The lowest opset of a graph, the oldest ONNX Runtime that opens it, and `--onnxruntime`: by the schemas and by real wheels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from helpers import tiny
from helpers.onnx_cases import quantize
from helpers.tiny_families import FAMILIES
from onnx import TensorProto, helper

from edgewright.bundle import GraphSpec
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError
from edgewright.exporters.artefact import Options
from edgewright.exporters.onnx import export as exporter
from edgewright.exporters.onnx.linear import Stack
from edgewright.exporters.onnx.lowering import Lowering
from edgewright.exporters.onnx.opset import lower_opset, lowest_opset
from edgewright.exporters.onnx.weight_file import WeightFile
from edgewright.models.kv_cache import stored_as
from edgewright.models.loading import load_quantized
from edgewright.models.registry import build
from edgewright.runtimes.onnx.session import OnnxSession
from edgewright.targets.onnx.oldest import oldest
from edgewright.targets.onnx.releases import OLDEST, check_asked, has, parse, reaches
from edgewright.targets.registry import TARGETS

WHEELS = (
    *("1.23.2", "1.24.1", "1.24.3", "1.24.4", "1.25.0", "1.25.1", "1.26.0", "1.27.0"),
    *("1.28.0", "1.29.0", "1.30.0", "1.31.0", "1.32.0"),
)
CASES = (
    "dolphin",
    "llama",
    "llama int8",
    "qwen3_5_text",
    "t5gemma",
    "dolphin 1.23.2",
    "qwen3_5_text 1.24",
    "t5gemma 1.24",
)
"""A tiny model, how its caches are stored, the release that is asked for."""
CONTEXT = 48


# ---- opsets ---------------------------------------------------------------------------------------------------------


def model(op: str, kind: int = TensorProto.FLOAT, inputs: int = 1, **attributes: int) -> ir.Model:
    names = [f"x{i}" for i in range(inputs)]
    node = helper.make_node(op, names, ["y"], **attributes)
    ports = [helper.make_tensor_value_info(n, kind, [2]) for n in names]
    graph = helper.make_graph([node], "g", ports, [helper.make_tensor_value_info("y", kind, [2])])
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]))


@pytest.mark.parametrize(
    ("op", "kind", "attributes", "opset"),
    [
        ("Identity", TensorProto.FLOAT, {}, 14),  # from then on more types alone
        ("Tanh", TensorProto.FLOAT, {}, 6),
        ("Tanh", TensorProto.BFLOAT16, {}, 13),
        ("Cast", TensorProto.FLOAT, {"to": TensorProto.INT64}, 13),
        ("Cast", TensorProto.FLOAT, {"to": TensorProto.BFLOAT16}, 13),
        ("Cast", TensorProto.FLOAT, {"to": TensorProto.FLOAT8E4M3FN, "saturate": 0}, 19),
        ("Gelu", TensorProto.FLOAT, {}, 20),
        ("RMSNormalization", TensorProto.FLOAT, {}, 23),
        ("Swish", TensorProto.FLOAT, {}, 24),
    ],
)
def test_the_lowest_opset_of_an_op(op: str, kind: int, attributes: dict[str, int], opset: int) -> None:
    assert lowest_opset(model(op, kind, **attributes)) == opset
    schema, newest = (onnx.defs.get_schema(op, version) for version in (opset, 24))
    assert set(attributes) <= set(schema.attributes)
    assert [p.name for p in schema.inputs] == [p.name for p in newest.inputs]


def test_an_op_that_changed_its_inputs_stays() -> None:
    """Axes are an input since 13 or 18, and an attribute before."""
    assert lowest_opset(model("Squeeze", inputs=2)) == 13
    assert lowest_opset(model("ReduceMean", inputs=2)) == 18


def test_the_version_of_the_format_follows_the_opset() -> None:
    for op, version in (("Tanh", 10), ("RMSNormalization", 11), ("Swish", 12)):
        lowered = model(op)
        lower_opset(lowered)
        assert lowered.ir_version == version
        assert oldest(lowered).release == ("1.24.1" if version == 12 else OLDEST)


# ---- releases -------------------------------------------------------------------------------------------------------


def test_releases_compare_by_their_numbers() -> None:
    assert parse("1.9.2") < parse("1.24")
    assert reaches("1.25", "1.25.1")  # the last of its line
    assert not reaches("1.25.0", "1.25.1")
    assert has("1.30.0", "GroupQueryAttention", "causal")
    assert not has("1.29", "GroupQueryAttention", "causal")
    assert has("1.24", "GroupQueryAttention")
    assert has("1.24", "MatMulNBits", "bits=2")
    assert not has("1.23.2", "MatMulNBits", "bits=2")
    assert has("1.26", "GatherBlockQuantized", "bits=4")
    assert not has("1.26", "GatherBlockQuantized", "bits=2")


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("1.22", f"--onnxruntime 1.22: graphs are written for {OLDEST} and later; ask for such a release"),
        ("new", "'new' is no version of ONNX Runtime; write 1.24 or 1.24.3"),
        ("1." + "9" * 40, "is no version of ONNX Runtime; write 1.24 or 1.24.3"),
    ],
)
def test_a_release_that_cannot_be_had_is_refused(asked: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        check_asked((asked,))
    assert line in str(caught.value)
    option = TARGETS["onnx"].option
    assert option is not None
    assert option.check is check_asked


def test_a_foreign_op_has_no_release() -> None:
    node = helper.make_node("Anything", ["x"], ["y"], domain="com.microsoft")
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy"]
    proto = helper.make_model(helper.make_graph([node], "g", ports[:1], ports[1:]))
    with pytest.raises(UserError, match="Anything of com"):
        oldest(ir.serde.deserialize_model(proto))


# ---- real graphs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    folder: Path
    specs: tuple[GraphSpec, ...]
    releases: dict[str, str]


def exported(case: str, root: Path) -> Exported:
    """A tiny model through the exporter, its weights in the forms of every width that a table and a linear may have."""
    name, *rest = case.split()
    source = tiny.write(root / "model", {"llama": tiny.LLAMA, "t5gemma": tiny.T5GEMMA, **FAMILIES}[name])
    quantize(source, root / "checkpoint", {}, [(4, 32), (8, 0), (2, 32)])
    checkpoint = open_checkpoint(str(root / "checkpoint"))
    built = build(checkpoint.config)
    load_quantized(built, checkpoint)
    stored = "int8" if "int8" in rest else "float32"
    graphs = stored_as(built.graphs(), stored)
    (root / "onnx").mkdir()
    asked = tuple(word for word in rest if word != "int8")
    artefact = exporter.export(graphs, root / "onnx", Options(CONTEXT, choices=asked))
    facts = artefact.facts["onnxruntime at least"]
    assert facts == exporter.read_facts(root / "onnx")["onnxruntime at least"]
    assert isinstance(facts, dict)
    releases = {graph: found["release"] for graph, found in facts.items()}
    return Exported(root / "onnx", tuple(map(GraphSpec.of, graphs)), releases)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    return {case: exported(case, tmp_path_factory.mktemp("case")) for case in CASES}


@pytest.mark.parametrize(
    ("asked", "bits"), [("1.23.2", (4, 4)), ("1.24.1", (2, 4)), ("1.26", (2, 4)), ("1.27", (2, 2)), (None, (2, 2))]
)
def test_two_bits_lie_in_four_where_a_release_has_no_two(
    asked: str | None, bits: tuple[int, int], tmp_path: Path
) -> None:
    low = Lowering(ir.Graph([], [], nodes=[]), WeightFile(tmp_path / "weights.bin"), CONTEXT, runtime=asked)
    codes = torch.randint(0, 255, (32, 64 * 2 // 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stack = Stack(["w"], [codes], [torch.rand(32, 2)], 2, 64)
    found = [stack.initializers(low, embedding) for embedding in (False, True)]
    low.weights.close()
    assert tuple(wide for *_, wide in found) == bits
    want = torch.stack([codes >> shift & 3 for shift in (0, 2, 4, 6)], -1).reshape(32, 64).to(torch.int64) - 2
    for stored, _, wide in found:
        raw = torch.from_numpy(stored.const_value.numpy().reshape(32, -1).copy())  # type: ignore[union-attr]
        parts = [raw >> shift & (1 << wide) - 1 for shift in range(0, 8, wide)]
        assert torch.equal(torch.stack(parts, -1).reshape(32, 64).to(torch.int64) - (1 << wide - 1), want)


@pytest.mark.slow
def test_an_older_release_gets_forms_that_it_has(cases: dict[str, Exported]) -> None:
    """The same outputs from other nodes; a recurrence is decomposed."""
    for case in (c for c in CASES if c[-1].isdigit() and "int8" not in c):
        name, asked = case.split()
        old, new = cases[case], cases[name]
        assert all(reaches(asked, release) for release in old.releases.values()), case
        assert any(not reaches(asked, release) for release in new.releases.values()), case
        sessions = [OnnxSession(c.folder, c.specs, threads=1, activations="float32") for c in (old, new)]
        for spec in old.specs:
            want, got = (_outputs(s.sessions[spec.name], spec) for s in reversed(sessions))
            for a, b in zip(want, got, strict=True):
                assert np.abs(a - b).max() <= 1e-4 * max(1.0, np.abs(a).max()), (case, spec.name)


def _outputs(session: object, spec: GraphSpec) -> list[np.ndarray]:
    return session.run(None, _inputs(spec))  # type: ignore[attr-defined,no-any-return]


def _inputs(spec: GraphSpec) -> dict[str, np.ndarray]:
    rng, sizes = (
        np.random.default_rng(0),
        {"batch": 1, "sequence": 3, "capacity": 7, "source": 5, "logits": 2, "rows": 4},
    )
    made = {}
    for port in (*spec.inputs, *spec.states):
        shape = [d if isinstance(d, int) else sizes.get(d, 3) for d in port.shape]
        whole = np.ones(shape) if port.dtype == "bool" or port.name == "input_ids" else np.zeros(shape)
        noise = port.dtype == "float32" and "cache" not in port.name
        made[port.name] = (rng.standard_normal(shape) if noise else whole).astype(port.dtype)
    return made


def test_a_release_without_any_form_is_refused_in_one_line(tmp_path: Path) -> None:
    lowered = model("Swish")
    lower_opset(lowered)
    with pytest.raises(UserError, match=r"^--onnxruntime 1.23.2: g has opset 24, which 1.24.1 first has; ask for that"):
        exporter._require(lowered, "1.23.2")


OPEN = """
import json, sys
import numpy as np
import onnxruntime as ort
found = {}
for path in sys.argv[1:]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        given = dict(np.load(path + ".inputs.npz"))
        out = session.run(None, {i.name: given[i.name] for i in session.get_inputs()})
        found[path] = [float(np.abs(o.astype(np.float64)).sum()) for o in out]
    except Exception as error:
        found[path] = str(error)
print(json.dumps([ort.__version__, found]))
"""


def _wheel(version: str, folder: Path) -> Path:
    """Where `onnxruntime` of a version lies, fetched if it is not there. Skips where it cannot be had."""
    where = folder / f"v{version}"
    if not where.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(where)]
        fetched = subprocess.run([*command, f"onnxruntime=={version}"], capture_output=True, text=True, timeout=600)
        if fetched.returncode:
            pytest.skip(f"onnxruntime {version} cannot be had here")
    return where


@pytest.mark.slow
@pytest.mark.parametrize("version", WHEELS)
def test_what_a_wheel_opens_is_what_the_facts_say(
    version: str, cases: dict[str, Exported], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every graph opens from the release that it claims on, not before; what it computes is about what the newest does."""
    folder = Path(os.environ.get("EDGEWRIGHT_WHEELS", tmp_path_factory.getbasetemp() / "wheels"))
    where = _wheel(version, folder)
    claims: dict[str, str] = {}
    for made in cases.values():
        for spec in made.specs:
            path = made.folder / f"{spec.name}.onnx"
            np.savez(f"{path}.inputs.npz", **_inputs(spec))  # type: ignore[arg-type]
            claims[str(path)] = made.releases[spec.name]
    ran, found = _run(claims, where)
    assert ran == version
    opened = {path: not isinstance(result, str) for path, result in found.items()}
    expected = {path: reaches(version, release) for path, release in claims.items()}
    wrong = {p: (claims[p], found[p]) for p in claims if opened[p] != expected[p]}
    assert wrong == {}
    _, here = _run(claims, None)
    for path in (p for p in claims if opened[p]):
        assert found[path] == pytest.approx(here[path], rel=0.05), path


def _run(paths: dict[str, str], where: Path | None) -> tuple[str, dict[str, list[float] | str]]:
    env = os.environ | ({} if where is None else {"PYTHONPATH": str(where)})
    done = subprocess.run([sys.executable, "-c", OPEN, *paths], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    version, found = json.loads(done.stdout)
    return version, found
