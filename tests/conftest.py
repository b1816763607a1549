"""Shared by all tests: one torch thread (the suite runs two workers on two cores), and models that are made once."""

import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.android import AGE, Client, client_of, require
from helpers.apps import bundle_for, make_bundle, project
from helpers.cli_runner import edgewright, passed
from helpers.onnx_cases import Case, shared_case
from helpers.shared import shared_bundle
from helpers.tiny import write_tiny_t5gemma
from hypothesis import settings

from edgewright.cli import main

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the runtimes too, and of what is started from here

settings.register_profile("untimed", deadline=None)  # no test depends on how busy the machine is
settings.load_profile("untimed")

for command in (main.commands["export"], main.commands["verify"]):
    # Comparing with transformers takes seconds; its own tests are in tests/verification/test_against.py.
    next(p for p in command.params if p.name == "against").default = "none"

for command in (main.commands["export"], main.commands["plan"]):
    # Tiny models of random weights have nothing to calibrate; tests/pipeline/test_shipped_text.py asks for the text.
    next(p for p in command.params if p.name == "calibration").default = "none"

TESTS = Path(__file__).parent
EXPORTING = (
    *(
        "apps",
        "benchmarks",
        "calibration",
        "cli",
        "examples",
        "exporters",
        "importance",
        "models",
        "pipeline",
        "rewrites",
    ),
    "verification",
)
"""Folders of tests that run an exporter, a whole command or every family: `make test-fast` leaves them out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in those folders, and what uses a model that went through an exporter."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in EXPORTING or {"onnx_cases", "plan_file"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.exports)


def pytest_collection_finish() -> None:
    """Modules and test items stay: the collector need not walk through them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny checkpoint and the plan that `plan -o` wrote for it."""
    folder = tmp_path_factory.mktemp("planned")
    model = write_tiny_t5gemma(folder / "model")
    passed(edgewright("plan", "-m", model, "--bits", 5, "-o", folder / "plan.json"))
    return model, folder / "plan.json"


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder of this run that all workers have."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if hasattr(request.config, "workerinput") else own


@pytest.fixture(scope="module")
def tiny_bundle(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """ "llama" or "t5gemma" -> (checkpoint, bundle for ONNX) of one layer a stack, a copy for each file of tests."""
    return functools.cache(lambda name: shared_bundle(run_folder, name, tmp_path_factory.mktemp(name) / "shared"))


@pytest.fixture(scope="session")
def app_bundles(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The name of an example, or of a writer of a tiny model -> its bundle for apps, made once."""
    return functools.cache(lambda name: make_bundle(name, tmp_path_factory.mktemp(name), run_folder))


@pytest.fixture(scope="session")
def android_bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same for bundles that Android's runtime opens."""
    return functools.cache(lambda name: bundle_for(AGE, name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def android_projects(
    tmp_path_factory: pytest.TempPathFactory, android_bundles: Callable[[str], Path]
) -> Callable[[str], Path]:
    """Name -> the Android project of its bundle, made once. Skips without the tools."""
    require("java", "gcc")

    @functools.cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "app"
        project(android_bundles(name), folder, "android")
        return folder

    return made


@pytest.fixture(scope="session")
def android_client(tmp_path_factory: pytest.TempPathFactory, android_projects: Callable[[str], Path]) -> Client:
    """The client's core and the sample's pure part, compiled once: of all models the sources are the same."""
    return client_of(android_projects("t5gemma"), tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="session")
def onnx_cases(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Architecture -> its tiny model through the ONNX exporter, made once."""

    return functools.cache(lambda name: shared_case(run_folder, name, tmp_path_factory.mktemp(name) / "case"))
