"""From a target's name to its session: `open_session` of `runtimes/<name>/session.py`, or of the file `runtimes/<name>.py`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..bundle import Bundle, GraphSpec
from ..errors import UserError, VerificationFailure
from ..system.reading import one_line
from ..system.stages import Stage
from ..system.threads import default_threads
from ..targets.registry import TARGETS, require
from .guarded import Guarded
from .session import PlacedSession


class Opener(Protocol):
    """What a runtime offers: a session over the target's folder. exact: with float32 activations, where it has such."""

    def __call__(self, folder: Path, graphs: Sequence[GraphSpec], threads: int, exact: bool) -> PlacedSession: ...


def has_runtime(name: str) -> bool:
    """Whether anything here can run artefacts of this target."""
    return name in TARGETS and importlib.util.find_spec(f".{name}", __package__) is not None


Failure = type[UserError | VerificationFailure]


def open_session(bundle: Bundle, name: str, threads: int = 0, failure: Failure = UserError) -> PlacedSession:
    """The artefact of a target as it ships, reloaded from disk. threads 0: `default_threads`.

    failure: what the session raises where the artefact loads and then does not run. Raises UserError if the bundle has no such
    artefact, its runtime is not installed, or its files cannot be loaded or are not what an exporter writes.
    """
    return _open(bundle, name, threads, False, failure)


def open_exact(bundle: Bundle, name: str, threads: int = 0, failure: Failure = UserError) -> PlacedSession | None:
    """The same artefact with float32 activations, which judges the lowering alone; None where the runtime has none.

    Raises UserError as `open_session` does.
    """
    return _open(bundle, name, threads, True, failure) if name in TARGETS and TARGETS[name].exact else None


def _open(bundle: Bundle, name: str, threads: int, exact: bool, failure: Failure) -> PlacedSession:
    bundle.target(name)
    if not has_runtime(name):
        known = ", ".join(n for n in TARGETS if has_runtime(n))
        raise UserError(f"no runtime here runs {name} artefacts; choose from {known}")
    require(name)
    bundle.require_plain(name)
    graphs = bundle.manifest.graphs
    try:
        with Stage(f"{name}: loading"):
            session = _opener(name)(bundle.path / name, graphs, threads or default_threads(), exact)
        where = name if failure is VerificationFailure else f"{bundle.path}: the {name} artefact"
        return Guarded(session, name, graphs, where, failure)
    except UserError:
        raise
    except Exception as error:  # the runtimes raise a dozen types that share no base
        reason = one_line(error)[:200]
        raise UserError(
            f"{bundle.path}: the {name} artefact does not load ({reason}); run 'edgewright verify'"
        ) from error


def import_runtime(name: str) -> None:
    """Import a target's runtime ahead of its session. What stands against it is raised when the session is opened."""
    with contextlib.suppress(Exception):
        if has_runtime(name) and TARGETS[name].installed:
            _opener(name)


def _opener(name: str) -> Opener:
    module = importlib.import_module(f".{name}", __package__)
    if hasattr(module, "__path__"):
        module = importlib.import_module(".session", module.__name__)
    opener: Opener = module.open_session
    return opener
