"""From an artefact's format to the session that runs it: the tables of runtimes. No torch enters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..bundle import Bundle, GraphSpec
from ..errors import UserError
from ..system.reading import one_line
from ..targets.libraries import require
from .session import PlacedSession

Opener = Callable[[Path, Sequence[GraphSpec], int], PlacedSession]
"""(the target's folder, the bundle's graphs, threads) -> a session; its library is imported inside."""


def open_session(bundle: Bundle, format: str, threads: int = 0) -> PlacedSession:
    """The artefact of `format` as it ships, reloaded from disk. threads 0: all cores.

    Raises UserError if the bundle has no such artefact, its runtime is not installed, or its files cannot be loaded.
    """
    return _open(SHIPPED, bundle, format, threads)


def open_exact(bundle: Bundle, format: str, threads: int = 0) -> PlacedSession | None:
    """The same artefact with float32 activations, which judges the lowering alone; None where the runtime has none.

    Raises UserError as `open_session` does.
    """
    return _open(EXACT, bundle, format, threads) if format in EXACT else None


def _open(table: dict[str, Opener], bundle: Bundle, format: str, threads: int) -> PlacedSession:
    bundle.target(format)
    if format not in table:
        raise UserError(f"no runtime here runs {format} artefacts; choose from {', '.join(table)}")
    require(format)
    try:
        return table[format](bundle.path / format, bundle.manifest.graphs, threads)
    except UserError:
        raise
    except Exception as error:  # the runtimes raise a dozen types that share no base
        reason = one_line(error)[:200]
        raise UserError(
            f"{bundle.path}: the {format} artefact does not load ({reason}); run 'edgewright verify'"
        ) from error


def _onnx(folder: Path, graphs: Sequence[GraphSpec], threads: int) -> PlacedSession:
    from .onnx.session import OnnxSession

    return OnnxSession(folder, graphs, threads)


def _onnx_exact(folder: Path, graphs: Sequence[GraphSpec], threads: int) -> PlacedSession:
    from .onnx.session import OnnxSession

    return OnnxSession(folder, graphs, threads, "float32")


def _executorch(folder: Path, graphs: Sequence[GraphSpec], threads: int) -> PlacedSession:
    from .executorch.session import ExecuTorchSession

    return ExecuTorchSession(folder, graphs, threads)


def _coreml(folder: Path, graphs: Sequence[GraphSpec], threads: int) -> PlacedSession:
    from .coreml.session import open_coreml

    return open_coreml(folder, graphs, exact=False)


def _coreml_exact(folder: Path, graphs: Sequence[GraphSpec], threads: int) -> PlacedSession:
    from .coreml.session import open_coreml

    return open_coreml(folder, graphs, exact=True)


def _tensorrt(folder: Path, graphs: Sequence[GraphSpec], threads: int) -> PlacedSession:
    from .tensorrt.session import open_tensorrt

    return open_tensorrt(folder, graphs, threads)


def _tensorrt_exact(folder: Path, graphs: Sequence[GraphSpec], threads: int) -> PlacedSession:
    from .tensorrt.session import open_tensorrt

    return open_tensorrt(folder, graphs, threads, exact=True)


def _qnn(folder: Path, graphs: Sequence[GraphSpec], threads: int) -> PlacedSession:
    from .qnn.session import QnnSession

    return QnnSession(folder, graphs, threads)


def _ethosu(folder: Path, graphs: Sequence[GraphSpec], threads: int) -> PlacedSession:
    from .ethosu.session import EthosUSession

    return EthosUSession(folder, graphs)


SHIPPED: dict[str, Opener] = {
    "onnx": _onnx,
    "executorch": _executorch,
    "coreml": _coreml,
    "tensorrt": _tensorrt,
    "qnn": _qnn,
    "ethosu": _ethosu,
}
EXACT: dict[str, Opener] = {"onnx": _onnx_exact, "coreml": _coreml_exact, "tensorrt": _tensorrt_exact}
