"""A target is whole: its facts, its exporter, its session, its extra; and every list of targets is the registry's."""

from __future__ import annotations

import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from edgewright.runtimes.registry import has_runtime
from edgewright.targets.registry import NAMES, TARGETS
from edgewright.targets.target import GROUP_SIZES, Target

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def module_of(room: str, name: str, file: str) -> str:
    """The module that a registry finds: a package's file, or the module itself."""
    found = importlib.util.find_spec(f"edgewright.{room}.{name}")
    assert found is not None, f"{room}/{name}.py or {room}/{name}/{file}.py is missing"
    return f"edgewright.{room}.{name}.{file}" if found.submodule_search_locations else f"edgewright.{room}.{name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_target_states_its_facts(name: str) -> None:
    target = TARGETS[name]
    assert isinstance(target, Target)
    assert target.name == name, f"targets/{name}: TARGET.name is {target.name}"
    assert target.describe()
    assert {row.bits for row in target.storage} == {2, 3, 4, 5, 6, 8}, f"targets/{name}: storage lacks a width"
    for row in target.storage:
        assert row.container >= row.bits
        assert set(row.groups) <= set(GROUP_SIZES)


@pytest.mark.parametrize("name", NAMES)
def test_a_target_has_an_exporter(name: str) -> None:
    module = module_of("exporters", name, "export")
    if TARGETS[name].installed:
        exporter = importlib.import_module(module)
        for function in ("export", "read_weights"):
            assert callable(getattr(exporter, function, None)), f"{module} lacks {function}"


@pytest.mark.parametrize("name", [n for n in NAMES if has_runtime(n)])
def test_a_runtime_opens_sessions(name: str) -> None:
    module = module_of("runtimes", name, "session")
    if TARGETS[name].installed:
        assert callable(getattr(importlib.import_module(module), "open_session", None)), f"{module} lacks open_session"


def test_no_exporter_or_runtime_is_of_no_target() -> None:
    for room, file in (("exporters", "export.py"), ("runtimes", "session.py")):
        packages = {p.parent.name for p in (ROOT / room).glob(f"*/{file}")}
        assert packages <= set(NAMES), f"{room}: {packages - set(NAMES)} is in no line of targets/registry.py"
    files = {p.stem for p in (ROOT / "targets").glob("*.py")} - {
        "__init__",
        "registry",
        "storage",
        "target",
        "libraries",
    }
    packages = {p.parent.name for p in (ROOT / "targets").glob("*/__init__.py")}
    assert files | packages == set(NAMES), "targets/ and NAMES in targets/registry.py differ"


@pytest.mark.parametrize("name", NAMES)
def test_an_extra_that_an_install_command_names_exists(name: str) -> None:
    extras = PROJECT["optional-dependencies"]
    for extra in re.findall(r"edgewright\[(\w+)\]", TARGETS[name].install):
        assert extra in extras, f"pyproject.toml has no extra {extra}"
        assert extra in extras["all"][0], f"the extra `all` lacks {extra}"


def test_the_packages_of_the_wheel_are_the_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    apart = {"tests", "benchmarks", "docs", "examples"}
    folders = {
        ".".join(("edgewright", *p.parent.relative_to(ROOT).parts))
        for p in ROOT.glob("**/__init__.py")
        if not (apart & set(p.relative_to(ROOT).parts))
        and not any(q.startswith(".") for q in p.relative_to(ROOT).parts)
    }
    assert set(listed) == folders
