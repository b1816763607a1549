"""A step that counts to 100 % as a bar with the time left, on a terminal."""

from __future__ import annotations

import re

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_COUNTED = re.compile(r"([^:\n]{1,80}): (\d{1,3})%( \([^\n]*\))?")
"""`quantizing: 30% (model.layers.3.mlp.up_proj.weight)`."""


class Bar:
    """The bar of the step under way; lines are printed above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._label = ""

    def show(self, line: str) -> bool:
        """Whether `line` counts a step and is shown as a bar; another line ends the bar and is left to be printed."""
        counted = _COUNTED.fullmatch(line)
        if counted is None or int(counted[2]) > 100:
            self.close()
            return False
        if self._progress is None or counted[1] != self._label:
            self.close()
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:.0f}%"),
                TimeRemainingColumn(),
            )
            self._progress, self._label = Progress(*columns, console=self._console, transient=True), counted[1]
            self._task = self._progress.add_task(self._label, total=100)
            self._progress.start()
        assert self._task is not None
        self._progress.update(self._task, completed=int(counted[2]))
        return True

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = None
