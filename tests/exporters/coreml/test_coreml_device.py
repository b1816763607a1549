"""How a package is run on a Mac: the calls to Core ML, with the evaluator in Core ML's place. Core ML itself never ran here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import tiny
from helpers.requests import asking, changed

from edgewright.bundle import Bundle
from edgewright.compiler import export
from edgewright.runtimes.coreml import session as coreml
from edgewright.runtimes.coreml.device import ACCELERATORS, CoremlDevice
from edgewright.runtimes.coreml.evaluator import Evaluator
from edgewright.targets.coreml.package import PACKAGE, Package
from edgewright.targets.registry import TARGETS

pytestmark = pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools is not installed")

TYPES = {"INT32": np.int32, "FLOAT16": np.float16}


class FakeCompiled:
    """`CompiledMLModel` with its rules: inputs of the declared type, a state made by one function and taken by another."""

    def __init__(self, path: str, function_name: str) -> None:
        self.program = Evaluator(Package(Path(path)), function_name, rounding=True)

    def make_state(self) -> dict[str, np.ndarray]:
        return {n: np.zeros(shape, np.float32) for n, (_, shape) in self.program.function.states.items()}

    def predict(self, data: dict[str, np.ndarray], state: Any = None) -> dict[str, np.ndarray]:
        wanted = self.program.function.inputs
        assert data.keys() == wanted.keys()
        for name, (dtype, _) in wanted.items():
            assert data[name].dtype == TYPES[dtype]
        assert (state is None) == (not self.program.function.states)
        return self.program.run(data, {} if state is None else state)


class FakeModel:
    def __init__(self, path: str) -> None:
        self.path = path

    def get_compiled_model_path(self) -> str:
        return self.path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    request = asking(str(tiny.write_tiny_t5gemma(folder / "model")), formats=("coreml",), bits=4.5)
    return export(changed(request, verify=False), folder / "out").path


@pytest.fixture
def bundle(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A tiny encoder-decoder; from here on this host calls itself a Mac."""
    import coremltools as ct

    monkeypatch.setattr(ct.models, "MLModel", FakeModel)
    monkeypatch.setattr(ct.models, "CompiledMLModel", FakeCompiled)
    monkeypatch.setattr("sys.platform", "darwin")
    return Bundle.open(exported)


def answer(session: Any) -> np.ndarray:
    """Logits of a prefill and a step behind it, two rows, one of them padded."""
    ids = np.array([[5, 6, 7], [8, 9, 0]])
    mask = np.array([[True] * 3, [True, True, False]])
    state = session.new_state(2, 8)
    hidden = session.run("encoder", {"input_ids": ids, "encoder_mask": mask}, state)
    session.run("cross_kv", hidden, state)
    made = []
    for past, tokens in ((0, ids[:, :2]), (2, ids[:, 2:])):
        feeds = {"input_ids": tokens, "past_length": np.array([past]), "encoder_mask": mask}
        made.append(session.run("decoder", feeds | {"logit_positions": np.arange(tokens.shape[1])}, state)["logits"])
    return np.concatenate(made, 1)


def test_a_mac_runs_the_artefact_with_one_state_for_each_row(bundle: Bundle) -> None:
    graphs, folder = bundle.manifest.graphs, bundle.path / "coreml"
    shipped = coreml.open_coreml(folder, graphs, exact=False)
    assert isinstance(shipped, CoremlDevice)
    assert not shipped.stand_in
    assert shipped.activations == "float16"
    np.testing.assert_array_equal(answer(shipped), answer(coreml.CoremlEvaluator(folder, graphs, "float16")))
    assert TARGETS["coreml"].describe() == "exports, runs and verifies in Core ML"
    assert isinstance(coreml.open_coreml(folder, graphs, exact=True), coreml.CoremlEvaluator)


def test_placement_on_a_mac_is_the_compute_plans(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from coremltools.models import compute_device, compute_plan

    assert all(hasattr(compute_device, name) for name in ACCELERATORS)
    npu, gpu = (type(name, (), {})() for name in ACCELERATORS)
    cpu = type("MLCPUComputeDevice", (), {})()
    plan = {"linear": npu, "softmax": gpu, "gather": cpu, "const": None}
    operations = [SimpleNamespace(operator_name=f"ios18.{n}", device=d) for n, d in plan.items()]

    class FakePlan:
        model_structure = SimpleNamespace(
            program=SimpleNamespace(
                functions={"decoder": SimpleNamespace(block=SimpleNamespace(operations=operations * 2))}
            )
        )

        @staticmethod
        def load_from_path(path: str) -> FakePlan:
            assert path.endswith(PACKAGE)
            return FakePlan()

        def get_compute_device_usage_for_mlprogram_operation(self, op: Any) -> Any:
            return None if op.device is None else SimpleNamespace(preferred_compute_device=op.device)

    monkeypatch.setattr(compute_plan, "MLComputePlan", FakePlan)
    placed = coreml.open_coreml(bundle.path / "coreml", bundle.manifest.graphs, exact=False).placement()
    assert placed.known
    assert placed.accelerated == {"decoder": {"ios18.linear": 2, "ios18.softmax": 2}}
    assert placed.fallback == {"decoder": {"ios18.gather": 2}}
