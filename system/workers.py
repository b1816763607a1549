"""Independent pieces of work over processes here, or over a Ray cluster. Top-level: joblib enters, and ray where it is asked for.

Results are those of one process, to the bit: a piece is computed with one thread and depends on nothing beside it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import joblib  # type: ignore[import-untyped]

from ..errors import UserError
from .reading import one_line


@dataclass(frozen=True)
class Workers:
    """How many processes, and where: cluster None is this machine, else the address of a Ray cluster (`ray://host:10001`)."""

    count: int = 1
    cluster: str | None = None

    @property
    def alone(self) -> bool:
        return self.count == 1 and self.cluster is None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within this context `over` has its workers. Raises UserError when the cluster cannot be reached."""
        if self.alone:
            yield
            return
        if self.cluster is None:
            with self._backend():
                yield
            return
        if importlib.util.find_spec("ray") is None:
            raise UserError("--cluster needs ray, which is not installed: pip install 'edgewright[cluster]'")
        import ray
        from ray.util.joblib import register_ray

        try:
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
        """`work(*piece)` of every piece, in order. Called within `running`, unless there is one worker."""
        if self.alone or len(pieces) == 1:
            return [work(*piece) for piece in pieces]
        with self._backend():  # of `running` another thread knows nothing
            return list(joblib.Parallel()(joblib.delayed(_alone)(work, piece) for piece in pieces))

    def _backend(self) -> Any:
        if self.cluster is None:
            return joblib.parallel_config(backend="loky", n_jobs=self.count, inner_max_num_threads=1)
        return joblib.parallel_config(backend="ray", n_jobs=self.count)


def _alone(work: Callable[..., Any], piece: tuple[Any, ...]) -> Any:
    """In a worker: with one thread, as everywhere (Ray's processes are not told)."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work(*piece)
    finally:
        torch.set_num_threads(threads)  # joblib may have run it in this very process


ONE = Workers()
"""This process alone."""
