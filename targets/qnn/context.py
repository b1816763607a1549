"""onnxruntime-qnn's HTP backend, compiling or running, and the list of programs beside the binaries.

It imports no torch. On Qualcomm hardware the backend is the NPU, on x86 the vendor's
emulator of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import UserError
from ...system.reading import one_line, read_json_object
from . import emulated

NAME = "QNNExecutionProvider"
HOST_OPS = ("GatherBlockQuantized",)
"""What the lowering keeps on the CPU: the embedding's rows are looked up where its packed codes lie."""
PROGRAMS = "programs.json"

Stem = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Word = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.:]{0,127}$")]
Nodes = Annotated[int, Field(ge=0, le=1 << 24)]
Size = Annotated[int, Field(ge=1, le=1 << 24)]
Symbol = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Program(_Strict):
    """One static program: the graph it is of, and what each symbolic dimension of the graph is in it."""

    graph: Stem
    sizes: dict[Symbol, Size]


class Programs(_Strict):
    """`programs.json`: the programs, and HTP version -> program -> provider -> op -> nodes as assigned when compiled."""

    programs: Annotated[dict[Stem, Program], Field(min_length=1, max_length=64)]
    placement: Annotated[dict[int, dict[Stem, dict[Word, dict[Word, Nodes]]]], Field(min_length=1, max_length=16)]

    @staticmethod
    def read(directory: Path) -> Programs:
        """Raises UserError if the file is absent or damaged, or a file it speaks of is not there."""
        path = directory / PROGRAMS
        raw = read_json_object(path)
        try:  # JSON has no integer keys
            placed = raw.get("placement")
            if isinstance(placed, dict):
                raw["placement"] = {int(v) if v.isdecimal() and len(v) < 4 else v: p for v, p in placed.items()}
            found = Programs.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = one_line(".".join(str(p) for p in first["loc"]), 120)
            raise UserError(f"{path}: {where}: {one_line(first['msg'], 160)}; export again") from None
        for version, programs in found.placement.items():
            if set(programs) != set(found.programs):
                raise UserError(f"{path}: HTP v{version} does not have the programs that are listed; export again")
            for stem in programs:
                if not (directory / compiled(stem, version)).is_file():
                    raise UserError(f"{directory}: {compiled(stem, version)} is missing; export again")
        return found


def compiled(stem: str, version: int) -> str:
    """The file name of a program for an HTP version."""
    return f"{stem}.v{version}.onnx"


def session(path: Path, options: Mapping[str, str], config: Mapping[str, str], threads: int = 0) -> Any:
    """An onnxruntime session over `path`, the QNN provider first, the CPU for what it leaves.

    options: the provider's own; config: session entries. Raises what onnxruntime raises, ImportError without the package.
    """
    import onnxruntime as ort
    import onnxruntime_qnn

    if not any(d.ep_name == NAME for d in ort.get_ep_devices()):
        ort.register_execution_provider_library(NAME, onnxruntime_qnn.get_library_path())
    devices = [d for d in ort.get_ep_devices() if d.ep_name == NAME]
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in config.items():
        settings.add_session_config_entry(key, value)
    settings.add_provider_for_devices(devices, {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **options})
    with _stdout_as_stderr():
        loaded = ort.InferenceSession(str(path), settings)
    loaded.disable_fallback()  # a run that fails would be repeated on the CPU, silently
    return loaded


@contextlib.contextmanager
def _stdout_as_stderr() -> Iterator[None]:
    """The emulator greets on the C standard output, which is for results alone."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc is None or not emulated():
        yield
        return
    sys.stdout.flush()
    libc.fflush(None)
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def units(loaded: Any) -> dict[str, dict[str, int]]:
    """Provider -> op -> nodes of a session, as the runtime itself assigned them."""
    counts: dict[str, Counter[str]] = {}
    for part in loaded.get_provider_graph_assignment_info():
        counts.setdefault(part.ep_name, Counter()).update(n.op_type for n in part.get_nodes())
    return {provider: dict(ops) for provider, ops in counts.items()}
