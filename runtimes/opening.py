"""From an artefact's format to the session that runs it: the table of runtimes. No torch enters."""

from __future__ import annotations

from ..bundle import Bundle
from ..errors import UserError
from .session import PlacedSession


def open_session(bundle: Bundle, format: str, threads: int = 0, exact: bool = False) -> PlacedSession:
    """The artefact of `format`, reloaded from disk. `exact` asks for float32 activations, threads 0 for all cores.

    Raises UserError if the bundle has no such artefact or its files cannot be loaded.
    """
    bundle.target(format)
    if format == "onnx":
        from .onnxruntime import OnnxSession

        try:
            return OnnxSession(bundle.path / format, bundle.manifest.graphs, threads, "float32" if exact else "int8")
        except Exception as error:  # onnxruntime raises a dozen types that share no base
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{bundle.path}: the onnx artefact does not load ({reason}); run 'edgewright verify'"
            ) from error
    raise UserError(f"no runtime here runs {format} artefacts")
