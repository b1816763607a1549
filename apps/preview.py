"""`preview`: a site served on this machine alone, with the headers that threads need."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..errors import UserError
from ..system.reading import one_line
from .contract import APP

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
HOST = "127.0.0.1"


class Handler(SimpleHTTPRequestHandler):
    """Files of one folder, read alone."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".webmanifest": "application/manifest+json",
        ".onnx": "application/octet-stream",
    }

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the browser shows what it asks for."""


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of a site, at 127.0.0.1 alone. port 0: a free one. Raises UserError for what is no site, and a taken port."""
    if not (folder / "index.html").is_file() or not (folder / "model" / APP).is_file():
        raise UserError(f"{one_line(folder)} is no site; make one with 'edgewright embed BUNDLE --platform web -o DIR'")
    try:
        return ThreadingHTTPServer((HOST, port), partial(Handler, directory=str(folder.resolve())))
    except OSError as error:
        raise UserError(
            f"{HOST}:{port} cannot be served ({one_line(error.strerror, 80)}); give another --port"
        ) from None


def preview(folder: Path, port: int, note: Callable[[str], None]) -> None:
    """Serve a site until it is interrupted. Raises UserError as `server` does."""
    with server(folder, port) as serving:
        note(f"serving {one_line(folder)} at http://{HOST}:{serving.server_port}/ (Ctrl-C ends)")
        with contextlib.suppress(KeyboardInterrupt):
            serving.serve_forever()
