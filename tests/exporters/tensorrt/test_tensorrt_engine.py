"""How engines are run on a GPU: the calls to TensorRT and the driver, with ONNX Runtime in their place. No GPU ran here."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from helpers import tiny
from helpers.requests import asking

from edgewright.bundle import GraphSpec
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.compiler import export
from edgewright.errors import UserError
from edgewright.exporters.artefact import Options
from edgewright.graph import Graph
from edgewright.models.loading import load_quantized
from edgewright.models.registry import build
from edgewright.pipeline.plan import plan
from edgewright.runtimes.tensorrt import engine
from edgewright.runtimes.tensorrt import session as sessions
from edgewright.runtimes.tensorrt.network import NetworkSession
from edgewright.runtimes.tensorrt.session import open_tensorrt
from edgewright.targets import tensorrt as target
from edgewright.targets.registry import TARGETS

LIBRARY = "tensorrt_rtx_bindings"
pytestmark = pytest.mark.skipif(importlib.util.find_spec(LIBRARY) is None, reason="TensorRT-RTX is not installed")

memory: dict[int, np.ndarray] = {}
"""Address -> what lies there; memory of the host plays that of the GPU."""


class FakeBuffer:
    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.address = array, array.shape, 4096 + len(memory)
        memory[self.address] = array

    def numpy(self) -> np.ndarray:
        return self.array.copy()


class FakeDevice:
    """`cuda.Device`; what is empty holds rubbish until it is written."""

    def synchronize(self) -> None: ...

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> FakeBuffer:
        return FakeBuffer(np.full(shape, 77, dtype))

    def zeros(self, shape: Sequence[int], dtype: np.dtype[Any]) -> FakeBuffer:
        return FakeBuffer(np.zeros(shape, dtype))

    def put(self, array: np.ndarray) -> FakeBuffer:
        return FakeBuffer(np.array(array))


class FakeContext:
    """An execution context with the engine's rules: shapes within the profile, nothing written where it is read."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.bounds = engine, engine.profiles[0]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.bounds = self.engine.profiles[profile]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        least, _, most = self.bounds[name]
        return all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        session = self.engine.session
        feeds = {i.name: memory[self.addresses[i.name]] for i in session.get_inputs()}
        names = [o.name for o in session.get_outputs()]
        assert not {self.addresses[n] for n in names} & {self.addresses[n] for n in feeds}
        for name, value in zip(names, session.run(names, feeds), strict=True):
            there = memory[self.addresses[name]]
            assert (there.shape, there.dtype) == (value.shape, value.dtype)
            there[...] = value
        self.engine.ran.append(self.bounds["input_ids"][2][1] if "input_ids" in feeds else 0)
        return True


class FakeEngine:
    def __init__(self, network: Path, profiles: list[Any]) -> None:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self.session = ort.InferenceSession(str(network), options, providers=["CPUExecutionProvider"])
        self.profiles, self.num_optimization_profiles = profiles, len(profiles)
        self.names = [p.name for p in (*self.session.get_inputs(), *self.session.get_outputs())]
        self.num_io_tensors = len(self.names)
        self.ran: list[int] = []

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Graph]]:
    """The artefact of a tiny encoder-decoder; in place of its engines stand their names."""
    from edgewright.exporters.tensorrt import export as exporter

    folder = tmp_path_factory.mktemp("engines")
    source = str(tiny.write_tiny_t5gemma(folder / "model"))
    made = plan(asking(source, ("tensorrt",), bits=5.0, groups=(32,)))
    export(asking(source, plan=made.plan, verify=False), folder / "bundle")
    checkpoint = open_checkpoint(str(folder / "bundle" / "checkpoint"))
    model = build(checkpoint.config)
    load_quantized(model, checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "build_engine", lambda path, *_: path.stem.encode())
        exporter.export(model.graphs(), folder, Options(64, choices=(86, 89, 120)))
    return folder, model.graphs()


@pytest.fixture
def made(
    artefact: tuple[Path, list[Graph]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[GraphSpec], list[FakeEngine]]:
    """A copy of it, its graphs, and the engines that were loaded: fakes around their networks. The host has a GPU now."""
    from edgewright.exporters.tensorrt import export as exporter

    source, graphs = artefact
    for file in [*source.glob("*.onnx"), *source.glob("*.engine"), source / "weights.bin"]:
        shutil.copyfile(file, tmp_path / file.name)
    engines = {g.name.encode(): (tmp_path / f"{g.name}.onnx", exporter.profiles(g, 64)) for g in graphs}
    loaded: list[FakeEngine] = []

    def deserialize(self: Any, plan: bytes) -> FakeEngine | None:
        if plan in engines:
            loaded.append(FakeEngine(*engines[plan]))
        return loaded[-1] if plan in engines else None

    runtime = type("Runtime", (), {"__init__": lambda self, log: None, "deserialize_cuda_engine": deserialize})
    fake: Any = SimpleNamespace(
        Runtime=runtime, Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    )
    fake.__spec__ = importlib.util.find_spec(LIBRARY)
    monkeypatch.setitem(sys.modules, LIBRARY, fake)
    monkeypatch.setattr(engine, "Device", FakeDevice)
    monkeypatch.setattr(target, "gpu_available", lambda: True)
    monkeypatch.setattr(sessions, "gpu_available", lambda: True)
    return tmp_path, [GraphSpec.of(g) for g in graphs], loaded


def answer(session: Any) -> np.ndarray:
    """Logits of a prefill and two steps behind it, two rows, one of them padded."""
    ids = np.array([[5, 6, 7], [8, 9, 0]])
    mask = np.array([[True] * 3, [True, True, False]])
    state = session.new_state(2, 8)
    hidden = session.run("encoder", {"input_ids": ids, "encoder_mask": mask}, state)
    session.run("cross_kv", hidden, state)
    out = []
    for past, tokens in ((0, ids), (3, ids[:, :1]), (4, ids[:, 1:2])):
        feeds = {"input_ids": tokens, "past_length": np.array([past]), "encoder_mask": mask}
        out.append(session.run("decoder", feeds | {"logit_positions": np.arange(tokens.shape[1])}, state)["logits"])
    return np.concatenate(out, 1)


@pytest.mark.slow
def test_engines_carry_their_states_from_call_to_call(made: tuple[Path, list[GraphSpec], list[FakeEngine]]) -> None:
    folder, graphs, engines = made
    session = open_tensorrt(folder, graphs)
    assert isinstance(session, engine.EngineSession)
    network = NetworkSession(folder, graphs, threads=1, exact=True)
    want = answer(network)
    assert np.abs(answer(session) - want).max() < 5e-3 * np.abs(want).max()
    assert engines[-1].ran == [64, 1, 1]  # prefill in its profile, steps in theirs
    assert "runs on this GPU" in session.placement().source
    assert session.placement().accelerated == network.placement().accelerated
    assert TARGETS["tensorrt"].describe() == "exports, runs the engines on this NVIDIA GPU and verifies them"


@pytest.mark.slow
def test_what_an_engine_was_not_built_for_is_refused(made: tuple[Path, list[GraphSpec], list[FakeEngine]]) -> None:
    folder, graphs, _ = made
    session = open_tensorrt(folder, graphs)
    ids = np.full((1, 65), 5)
    with pytest.raises(UserError, match=r"encoder: input_ids of \[1, 65\] is outside what the engine was built for"):
        session.run("encoder", {"input_ids": ids, "encoder_mask": ids > 0}, session.new_state(1, 8))


@pytest.mark.slow
def test_an_engine_that_lacks_a_port_is_refused(
    made: tuple[Path, list[GraphSpec], list[FakeEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, graphs, _ = made
    monkeypatch.setattr(FakeEngine, "get_tensor_name", lambda self, i: self.names[max(i, 1)])
    with pytest.raises(UserError, match=r"encoder\.engine lacks the input or output input_ids"):
        open_tensorrt(folder, graphs)


@pytest.mark.slow
def test_an_engine_of_another_gpu_is_refused(made: tuple[Path, list[GraphSpec], list[FakeEngine]]) -> None:
    folder, graphs, _ = made
    (folder / "decoder.engine").write_bytes(b"of another GPU")
    with pytest.raises(UserError, match=r"decoder\.engine"):
        open_tensorrt(folder, graphs)
