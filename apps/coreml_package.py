"""The Core ML package of a bundle, for platforms that run it beside the graphs."""

from __future__ import annotations

from pathlib import Path

from ..bundle import Bundle
from ..errors import UserError
from ..system.reading import one_line
from .contract import AppCoreml, file_facts

FORMAT = "coreml"


def read_package(bundle: Bundle, check: bool) -> tuple[AppCoreml | None, dict[str, Path]]:
    """What app.json says of the package, and path in the app's folder -> file; None and nothing where a bundle has none.

    check: whether its files are hashed first. Raises UserError for what no export writes, VerificationFailure for other files.
    """
    entry = next((entry for entry in bundle.manifest.targets if entry.format == FORMAT), None)
    if entry is None:
        return None, {}
    if check:
        bundle.check_files(entry.files)
        bundle.require_plain(FORMAT)
    files = {name.removeprefix(f"{FORMAT}/"): bundle.path / name for name in sorted(entry.files)}
    folders = {name.partition("/")[0] for name in files}
    functions = entry.facts.get("functions")
    if len(folders) != 1 or not isinstance(functions, list) or not all(isinstance(f, str) for f in functions):
        raise UserError(
            f"{one_line(bundle.path)}: its Core ML artefact is not as it was written; export the bundle again"
        )
    return AppCoreml(package=folders.pop(), functions=tuple(functions), files=file_facts(files)), files
