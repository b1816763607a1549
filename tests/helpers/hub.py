"""A hub on this machine: what huggingface_hub asks for, for repositories of small files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """endpoint: for HF_ENDPOINT; sent: names of the files that were fetched."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.repositories = repositories
        self.sent: list[str] = []
        self.endpoint = ""

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers."""
        for repository, files in self.repositories.items():
            api = f"/api/models/{repository}"
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                siblings = [{"rfilename": name} for name in files]
                return self._json({"id": repository, "sha": COMMIT, "siblings": siblings})
            if path.startswith(f"{api}/tree/"):
                return self._json(
                    [{"type": "file", "path": n, "size": len(b), "oid": self._tag(b)} for n, b in files.items()]
                )
            for revision in ("main", COMMIT):
                name = path.removeprefix(f"/{repository}/resolve/{revision}/")
                if name != path and name in files:
                    return 200, files[name], {"ETag": f'"{self._tag(files[name])}"', "X-Repo-Commit": COMMIT}
        return 404, b"", {"X-Error-Code": "RepoNotFound"}

    @staticmethod
    def _tag(data: bytes) -> str:
        return hashlib.sha1(data).hexdigest()

    @staticmethod
    def _json(value: object) -> tuple[int, bytes, dict[str, str]]:
        return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


@contextmanager
def hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """A hub that holds repositories, name -> file -> bytes, while the context lasts."""
    held = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._send(body=False)

        def do_GET(self) -> None:
            self._send(body=True)

        def _send(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            status, data, headers = held.answer(path)
            if body and status == 200 and "/resolve/" in path:
                held.sent.append(path.partition("/resolve/")[2].partition("/")[2])
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    held.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
