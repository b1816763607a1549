"""The npm packages that a site is shipped with: found on this machine, copied whole, never fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..system.reading import one_line, read_json_object, require_regular

FOLDER = "vendor"
ONNXRUNTIME, TOKENIZERS = "onnxruntime-web", "@huggingface/tokenizers"
FILES = {
    ONNXRUNTIME: ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
    TOKENIZERS: ("tokenizers.min.mjs",),
}
"""Package -> the files of its `dist` that the client loads."""

HOW = "npm install onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0, then name its folder: --packages node_modules"
_CHECKOUT = Path(__file__).parent.parent / ".tools" / "web" / "node_modules"
_LARGEST = 64 << 20


@dataclass(frozen=True)
class Vendored:
    """files: path in the project -> what is copied. runtime: the version of onnxruntime-web. packages: `name version (licence)`."""

    files: dict[str, Path]
    runtime: str
    packages: tuple[str, ...]


def find_packages(named: Path | None) -> Vendored:
    """The packages in a node_modules folder: the one that is named, else this folder's, else the checkout's `.tools`.

    Raises UserError, saying how to get them, where they are not there.
    """
    folders = [named] if named is not None else [Path("node_modules"), _CHECKOUT]
    whole = [f for f in folders if all((f / package / "package.json").is_file() for package in FILES)]
    if not whole:
        where = f"--packages {one_line(named)} holds" if named is not None else "this folder has"
        raise UserError(f"{where} no onnxruntime-web and @huggingface/tokenizers, which a site is shipped with: {HOW}")
    files: dict[str, Path] = {}
    facts = {package: read_json_object(whole[0] / package / "package.json") for package in FILES}
    for package, names in FILES.items():
        for name in names:
            path = whole[0] / package / "dist" / name
            require_regular(path, _LARGEST)
            files[f"{FOLDER}/{name}"] = path
    packages = tuple(
        f"{p} {one_line(f.get('version'), 20)} ({one_line(f.get('license'), 20)})" for p, f in facts.items()
    )
    return Vendored(files, str(facts[ONNXRUNTIME].get("version")), packages)
