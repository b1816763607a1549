"""Independent pieces of work in several processes on this machine, or on a Ray cluster.

The results are the same, bit for bit, as in one process: each piece is computed with one thread and depends on nothing else.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import joblib  # type: ignore[import-untyped]

from ..errors import UserError
from .reading import one_line
from .subprocesses import end_with_parent, safe_paths


@dataclass(frozen=True)
class Workers:
    """How many processes, and where. cluster: the address of a Ray cluster (`ray://host:10001`); None is this machine."""

    count: int = 1
    cluster: str | None = None

    @property
    def alone(self) -> bool:
        return self.count == 1 and self.cluster is None

    @contextmanager
    def running(self) -> Iterator[None]:
        """The context in which `over` has its workers. Raises UserError if the cluster cannot be reached."""
        if self.alone:
            yield
            return
        if self.cluster is None:
            with safe_paths(), self._backend():
                yield
            return
        if importlib.util.find_spec("ray") is None:
            raise UserError("--cluster needs ray, which is not installed: pip install 'edgewright[cluster]'")
        import ray
        from ray.util.joblib import register_ray

        try:
            with safe_paths():
                ray.init(address=self.cluster, logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:  # connection, version and runtime errors share no base
            raise UserError(f"--cluster {one_line(self.cluster)} cannot be reached ({one_line(error, 120)})") from None
        try:
            register_ray()  # type: ignore[no-untyped-call]
            with self._backend():
                yield
        finally:
            ray.shutdown()

    def over(self, work: Callable[..., Any], pieces: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`work(*piece)` for every piece, in order. Call it within `running`, unless there is one worker."""
        if self.alone or len(pieces) == 1:
            return [work(*piece) for piece in pieces]
        with safe_paths(), self._backend():  # another thread does not know the context of `running`
            return list(joblib.Parallel()(joblib.delayed(_alone)(work, piece) for piece in pieces))

    def _backend(self) -> Any:
        if self.cluster is None:
            return joblib.parallel_config(backend="loky", n_jobs=self.count, inner_max_num_threads=1)
        return joblib.parallel_config(backend="ray", n_jobs=self.count)


def _alone(work: Callable[..., Any], piece: tuple[Any, ...]) -> Any:
    """Run a piece in a worker, with one thread: Ray does not set that itself."""
    import torch

    _end_worker_with_parent()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work(*piece)
    finally:
        torch.set_num_threads(threads)  # joblib may run it in this process


@functools.cache
def _end_worker_with_parent() -> None:
    """Once in each of joblib's processes; it may also run a piece in the main one, whose parent is no business of ours."""
    if any("popen_loky" in argument for argument in sys.orig_argv):
        end_with_parent()


ONE = Workers()
"""This process alone."""
