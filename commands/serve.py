"""`serve`: a bundle behind OpenAI's HTTP interface. No torch is imported."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.prompt import AS_IT_IS, ChatOptions
from ..errors import UserError
from ..runtimes.text_generation import open_bundle
from ..system.memory import no_more_than_available
from ..system.reading import one_line


@dataclass(frozen=True)
class ServeOptions:
    """host, port: where to listen; port 0 is a free one. name: of the model; None: the bundle's folder. waiting: requests that may
    wait. The rest as of `open_bundle`."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key: str | None = None
    chat: ChatOptions = AS_IT_IS
    waiting: int = 256
    format: str | None = None
    threads: int = 0
    check: bool = True


def serve(path: Path, options: ServeOptions, note: Callable[[str], None]) -> None:
    """Answer requests until SIGINT or SIGTERM. Raises UserError for a bundle without text, or an address that is taken."""
    try:
        import uvicorn

        from ..serving.app import Service
        from ..serving.engine import Engine
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'edgewright[serve]'") from None
    opened = open_bundle(path, options.format, options.threads, options.check)
    _ = opened.tokenizer
    with contextlib.closing(_listening(options.host, options.port)) as listening, no_more_than_available(opened.size):
        if opened.session.stand_in:
            note(opened.session.how)
        engine = Engine(opened, options.waiting)
        name = options.name or path.resolve().name
        app = Service(engine, name, options.api_key, options.chat).app()
        host, port = listening.getsockname()[:2]
        if not _is_loopback(host) and options.api_key is None:
            note(f"anybody who reaches {host} can use the model; --api-key KEY asks for a key")
        shown = f"[{host}]" if ":" in host else host
        note(f"serving {name} at http://{shown}:{port}/v1 (Ctrl-C ends)")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))
        server.run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises UserError if it cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        listening = socket.socket(family, kind)
    except OSError as error:
        raise UserError(f"--host {one_line(host, 80)} is no address of this machine ({one_line(error, 80)})") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise UserError(
            f"{one_line(host, 80)}:{port} cannot be served ({one_line(error.strerror or error, 80)}); give another --port"
        ) from None
    return listening


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
