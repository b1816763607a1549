"""Core ML: one multifunction ML program for iOS 18, `model.mlpackage`.

Settle shapes -> translate each graph into one or two functions -> save. All functions share one weight file. No pass of
coremltools rewrites the program.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ...graph import Graph
from ...targets.coreml.package import LABELS, PACKAGE, Package
from ..artefact import Artefact, Options, Progress


def export(graphs: Sequence[Graph], directory: Path, options: Options, progress: Progress = lambda _: None) -> Artefact:
    """Write `model.mlpackage` into `directory` (which must exist), with a function for each graph and one-token step.

    `options.max_positions` is the size of the KV caches and the upper bound of every dynamic length, in tokens.
    Raises UserError for an op without a lowering.
    """
    from ...targets.coreml.library import Builder, Program, ct, quiet, write_program

    with quiet(), tempfile.TemporaryDirectory(dir=directory, prefix=".coreml-") as scratch:
        from .describe import describe
        from .translate import shaped, translate
        from .weights import WeightStore

        Builder.name_count.clear()  # it counts through all of a process, but the same model must give the same bytes
        store = WeightStore(Path(scratch), _names(graphs))
        program = Program()
        for graph in graphs:
            for item in shaped(graph, options.max_positions):
                progress(f"coreml: {item.function}")
                program.add_function(item.function, translate(item, store))
        program.default_function_name = graphs[-1].name
        program.export_as_multifunction = True
        progress("coreml: writing the package")
        weights = Path(scratch) / "weights"
        weights.mkdir()
        spec = write_program(
            program,
            str(weights),
            specification_version=ct.target.iOS18,
            convert_to="mlprogram",
            convert_from="milinternal",
        )
        describe(spec, graphs)
        spec.description.metadata.userDefined[LABELS] = json.dumps(store.labels, sort_keys=True)
        ct.utils.save_spec(spec, str(directory / PACKAGE), weights_dir=str(weights))
    _fix_identifiers(directory / PACKAGE)
    package = Package(directory / PACKAGE)
    files = sorted(p for p in (directory / PACKAGE).rglob("*") if p.is_file())
    for file in files:
        file.chmod(0o644)  # coremltools writes the program for its owner alone
    names = tuple(file.relative_to(directory).as_posix() for file in files)
    return Artefact(names, package.op_counts(), {"functions": sorted(package.functions)})


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, float32 values) of every parameter as the package in `directory` stores it.

    Quantized ones, [N, K], are code times scale; the others are rounded to float16. Reads the package's files without
    coremltools' reader. Raises UserError for a damaged package.
    """
    for name, values in Package(directory / PACKAGE).weights():
        yield name, torch.from_numpy(values)


def _names(graphs: Sequence[Graph]) -> dict[int, str]:
    """Data pointer of each tensor of the checkpoint -> its name. For a quantized weight the pointer is that of its codes.

    A tied weight has the name under which it is stored, which comes first.
    """
    names: dict[int, str] = {}
    for graph in graphs:
        for path, tensor in graph.module.state_dict(keep_vars=True).items():
            name = f"{path.removesuffix('.codes')}.weight" if path.endswith(".codes") else path
            if not path.endswith(".scales"):
                names.setdefault(tensor.data_ptr(), graph.checkpoint_name(name))
    return names


def _fix_identifiers(package: Path) -> None:
    """Replace the random identifiers of the package's manifest by ones from its contents: the same input gives the same bytes."""
    path = package / "Manifest.json"
    manifest = json.loads(path.read_text())
    fixed = {k: str(uuid.uuid5(uuid.NAMESPACE_URL, v["path"])).upper() for k, v in manifest["itemInfoEntries"].items()}
    manifest["itemInfoEntries"] = {fixed[k]: v for k, v in manifest["itemInfoEntries"].items()}
    manifest["rootModelIdentifier"] = fixed[manifest["rootModelIdentifier"]]
    path.write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")
