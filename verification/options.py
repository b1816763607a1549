"""What is asked of `verify`. No torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..bundle import Bundle, TargetEntry
from ..errors import UserError
from ..targets.registry import TARGETS

Against = Literal["auto", "transformers", "none"]
"""Whether a checkpoint's reading is compared with transformers; "auto": where it can be."""

TEXT_WINDOWS = 16
"""Windows of a text that are scored unless another number is asked for."""


@dataclass(frozen=True)
class VerifyOptions:
    """What is checked, and what quality is measured on.

    model: the original checkpoint, for the quantization loss; adapter: the folder of what was merged into it. task: a task
    file, of which the first `task_limit` lines count.
    text: a text file, of which the first `text_windows` windows are scored: next-token distributions are compared with the
    original's, or without `model` with the reference's. formats: the targets to check; without, all whose library is
    installed. threads: of the runtimes; 0 is OMP_NUM_THREADS, else all cores. against: whether the reading of `model` is
    compared with transformers; "auto": where it is installed and knows the model.
    """

    model: str | None = None
    task: Path | None = None
    task_limit: int | None = None
    text: Path | None = None
    text_windows: int = TEXT_WINDOWS
    formats: Sequence[str] = ()
    threads: int = 0
    against: Against = "auto"
    adapter: str | None = None

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        paths = {key: None if values[key] is None else str(values[key]) for key in _PATHS}
        return values | paths | {"formats": list(self.formats)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> VerifyOptions:
        paths = {key: None if values[key] is None else Path(values[key]) for key in _PATHS}
        return VerifyOptions(**{**values, **paths})


_PATHS = ("task", "text")


def chosen_entries(bundle: Bundle, formats: Sequence[str]) -> tuple[list[TargetEntry], list[str]]:
    """The targets to check, and a note for each that cannot be checked here.

    Raises UserError if one was asked for that is not there, or none can be checked here.
    """
    if formats:
        return [bundle.target(name) for name in dict.fromkeys(formats)], []
    entries, notes = [], []
    for entry in bundle.manifest.targets:
        target = TARGETS.get(entry.format)
        if target is not None and target.installed:
            entries.append(entry)
        else:
            way = target.install if target is not None else "this edgewright does not know it"
            notes.append(f"{entry.format} was not checked here: {way}")
    if not entries:
        raise UserError(f"{bundle.path}: none of its targets can be checked here; {notes[0]}")
    return entries, notes
