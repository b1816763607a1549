"""One target's artefact from the quantized checkpoint, in this process or in one of its own. All rooms but the compiler enter.

Several targets go apart: what one backend's library holds and leaves behind would count for the next, and one that
crashes ends as one line. `python -m edgewright.pipeline.lower JOB RESULT` is the other process; both are JSON files.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..exporters.artefact import Artefact, Options, Progress
from ..models.language_model import LanguageModel
from ..system.reading import one_line
from ..targets.storage import SIGNED

_SAID = "edgewright: "
"""How a line of progress begins on the process's standard output; libraries print there too."""


def lower(format: str, checkpoint: Path, directory: Path, options: Options, progress: Progress) -> Artefact:
    """Write the artefact of `format` into `directory`, from the quantized checkpoint. Raises UserError as exporters do."""
    from ..checkpoints.opening import open_checkpoint
    from ..exporters.registry import exporter
    from ..models.kv_cache import stored_as
    from ..models.loading import load_quantized
    from ..models.registry import build

    quantized = open_checkpoint(str(checkpoint))
    model = build(quantized.config)
    load_quantized(model, quantized)
    _refuse_signed(format, model)
    graphs = stored_as(model.graphs(), options.kv_cache)
    made: Artefact = exporter(format).export(graphs, directory, options, progress)
    return made


def _refuse_signed(format: str, model: LanguageModel) -> None:
    """Raise UserError for a checkpoint of another plan: its scales may be negative where the target does not hold such."""
    from ..models.layers.linear import QuantizedEmbedding, QuantizedLinear

    if format in SIGNED:
        return
    for path, module in model.named_modules():
        if (
            isinstance(module, QuantizedLinear | QuantizedEmbedding)
            and float(torch.as_tensor(module.scales).min()) < 0.0
        ):
            raise UserError(
                f"--format {format}: {path} has negative scales, which it does not hold; export the model again"
            )


def lower_apart(
    format: str, checkpoint: Path, directory: Path, options: Options, progress: Progress, code: str | None = None
) -> Artefact:
    """`lower` in a process of its own. code: the factory whose code the user lets run there (`models.module`).

    Raises UserError for what `lower` raises, and if the process dies.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, result, errors = (Path(folder, name) for name in ("job.json", "result.json", "errors.txt"))
        request = {"format": format, "checkpoint": str(checkpoint.resolve()), "directory": str(directory.resolve())}
        job.write_text(json.dumps(request | {"code": code, "options": asdict(options)}))
        command = [sys.executable, "-m", f"{__package__}.lower", str(job), str(result)]
        with errors.open("wb") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    said = line.decode("utf-8", "replace").rstrip("\n")
                    if said.startswith(_SAID):
                        progress(said.removeprefix(_SAID))
            except BaseException:
                process.kill()
                raise
        if process.returncode or not result.is_file():
            told = [one_line(line) for line in errors.read_text("utf-8", "replace").splitlines() if line.strip()]
            how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
            raise UserError(
                f"--format {format}: lowering ended with {how} ({told[-1] if told else 'it said nothing'}); "
                "leave this target out, or ask for it alone to see more"
            )
        found = json.loads(result.read_text())
    if "error" in found:
        raise UserError(found["error"])
    return Artefact(tuple(found["files"]), found["ops"], found["facts"])


def main(job: Path, result: Path) -> None:
    request = json.loads(job.read_text())
    given: dict[str, Any] = {key: _tuple(value) for key, value in request["options"].items()}

    if request["code"] is not None:
        from ..models.user_module.module import allow

        allow(request["code"])

    def say(message: str) -> None:
        print(f"{_SAID}{message}", flush=True)

    try:
        made = lower(request["format"], Path(request["checkpoint"]), Path(request["directory"]), Options(**given), say)
    except UserError as error:
        result.write_text(json.dumps({"error": str(error)}))
    else:
        result.write_text(json.dumps(asdict(made)))


def _tuple(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
