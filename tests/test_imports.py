"""Who may import whom: the table of the rooms, no circle, no arrow up, backends' libraries in their own rooms alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_PRODUCT = {"tests", "benchmarks", "docs", "examples"}

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "system": {"errors"},
    "graph": {"errors", "system"},
    "ops": {"errors", "system"},
    "bundle": {"errors", "system", "graph"},
    "checkpoints": {"errors", "system"},
    "audio": {"errors", "system", "bundle"},
    "device_profiles": {"errors", "system"},
    "targets": {"errors", "system", "ops"},
    "models": {"errors", "system", "graph", "ops", "checkpoints"},
    "exporters": {"errors", "system", "graph", "ops", "targets"},
    "runtimes": {"errors", "system", "graph", "ops", "bundle", "audio", "checkpoints", "targets", "models"},
    "quant": {"errors", "system", "graph", "ops", "checkpoints", "device_profiles", "targets", "models"},
}
"""Room -> the rooms it may import, from the lowest up."""

_LOWER = set(MAY_IMPORT)
MAY_IMPORT["calibration"] = (_LOWER - {"exporters", "device_profiles", "targets"}) | {"targets"}
MAY_IMPORT["importance"] = _LOWER - {"exporters"} | {"calibration"}
MAY_IMPORT["verification"] = _LOWER - {"quant", "device_profiles"} | {"calibration"}
MAY_IMPORT["pipeline"] = _LOWER | {"calibration", "importance", "verification"}
MAY_IMPORT["rewrites"] = MAY_IMPORT["compiler"] = MAY_IMPORT["pipeline"] | {"pipeline"}
_ALL_BELOW = MAY_IMPORT["compiler"] | {"compiler", "rewrites", "serving", "measuring"}
MAY_IMPORT["serving"] = {"errors", "system", "bundle", "checkpoints", "runtimes"}
MAY_IMPORT["measuring"] = {"errors", "system", "bundle", "device_profiles"}
MAY_IMPORT["commands"] = MAY_IMPORT["reports"] = MAY_IMPORT["apps"] = _ALL_BELOW
MAY_IMPORT["cli"] = _ALL_BELOW | {"commands", "reports", "apps"}

EAGER_ALONE = {"runtimes.eager", "runtimes.session", "runtimes.generate", "runtimes.encoder_inputs"}
"""Of the runtimes, what calibration may import."""

LIBRARIES = {
    "executorch": ("executorch", "ethosu"),
    "torchao": ("executorch",),
    "coremltools": ("coreml",),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt",),
    "tensorrt_rtx_bindings": ("tensorrt",),
    "onnxruntime_qnn": ("qnn",),
    "ethosu": ("ethosu",),
    "tosa": ("ethosu",),
    "tosa_reference_model": ("ethosu",),
    "onnxscript": ("onnx",),
}
"""A backend's library -> the packages of exporters, runtimes and targets that may import it."""


@dataclass(frozen=True)
class Arrow:
    """One import: the module that has it, the module it names, where, and whether only the type checker sees it."""

    source: str
    target: str
    line: int
    types_only: bool


def product_files() -> dict[str, Path]:
    """Module name below `edgewright` -> file. The package itself is ""."""
    files = {}
    left_out = NOT_PRODUCT | {"build", "demo"}
    rooms = [p for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in left_out]
    for path in sorted([*ROOT.glob("*.py"), *(file for room in rooms for file in room.rglob("*.py"))]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        files[".".join(parts)] = path
    return files


@cache
def arrows() -> tuple[list[Arrow], list[tuple[str, str, int]]]:
    """(imports between the product's modules, imports of anything else as (module, library, line))."""
    files = product_files()
    inner: list[Arrow] = []
    outer: list[tuple[str, str, int]] = []
    for name, path in files.items():
        tree = ast.parse(path.read_text())
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        package = [part for part in package if part]
        typed = {
            id(inside)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            for inside in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                outer += [(name, alias.name.partition(".")[0], node.lineno) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                outer.append((name, (node.module or "").partition(".")[0], node.lineno))
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1]
                module = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    below = f"{module}.{alias.name}".strip(".")
                    target = below if below in files else module
                    inner.append(Arrow(name, target, node.lineno, id(node) in typed))
    return inner, outer


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_has_a_row_in_the_table() -> None:
    rooms = {room(name) for name in product_files()} - {""}
    assert rooms <= set(MAY_IMPORT), f"no row says what {rooms - set(MAY_IMPORT)} may import"


def test_the_root_holds_few_files() -> None:
    root = {path.name for path in ROOT.glob("*.py")}
    assert root <= {"__init__.py", "bundle.py", "cli.py", "compiler.py", "errors.py", "graph.py"}


def test_rooms_import_what_the_table_says() -> None:
    wrong = [
        f"{a.source}:{a.line} imports {a.target}"
        for a in arrows()[0]
        if room(a.source) != room(a.target)
        and a.target
        and a.source
        and room(a.target) not in MAY_IMPORT[room(a.source)]
    ]
    assert wrong == []


def test_calibration_runs_the_eager_session_alone() -> None:
    wrong = [
        f"{a.source}:{a.line} imports {a.target}"
        for a in arrows()[0]
        if room(a.source) == "calibration" and room(a.target) == "runtimes" and a.target not in EAGER_ALONE
    ]
    assert wrong == []


def _circles(edges: dict[str, set[str]]) -> Iterator[list[str]]:
    """Strongly connected components of more than one node (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(node: str) -> Iterator[list[str]]:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                yield from visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            component, stack[at:] = stack[at:], []
            if len(component) > 1:
                yield component

    for node in sorted(edges):
        if node not in index:
            yield from visit(node)


@pytest.mark.parametrize("level", ["modules", "rooms"])
def test_there_is_no_circle(level: str) -> None:
    edges: dict[str, set[str]] = {}
    for a in arrows()[0]:
        if a.types_only or not a.target or not a.source:
            continue
        source, target = (a.source, a.target) if level == "modules" else (room(a.source), room(a.target))
        if source != target:
            edges.setdefault(source, set()).add(target)
    assert list(_circles(edges)) == []


def test_a_backends_library_is_imported_in_its_own_rooms_alone() -> None:
    wrong = []
    for source, library, line in arrows()[1]:
        packages = LIBRARIES.get(library)
        parts = source.split(".")
        own = len(parts) > 1 and parts[0] in ("exporters", "runtimes", "targets") and parts[1] in (packages or ())
        if packages is not None and not own:
            wrong.append(f"{source}:{line} imports {library}")
    assert wrong == []
