"""The process in which chat templates are rendered: a JSON request a line on standard input, its answer a line on standard output.

`chat_template.py` starts it. It imports jinja2 and the standard library alone, and ends when standard input does. jinja's immutable
sandbox keeps a template from Python's attributes; the limits here keep it from the machine's time, memory and disk.
"""

from __future__ import annotations

import faulthandler
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

if sys.platform != "win32":
    import resource

_MESSAGE = 4096
"""Characters of an exception's text that an answer has."""


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks what a training scores. Its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """jinja as chat templates expect it: whitespace control, loop controls, and the functions that templates call."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _to_json  # jinja's own escapes HTML
    made.globals["raise_exception"] = _raise_exception
    made.globals["dict"] = _Dict()
    made.globals["namespace"] = _Namespace
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """`dict` without the class's own attributes."""

    def __call__(self, *pairs: Any, **items: Any) -> dict[Any, Any]:
        return dict(*pairs, **items)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """jinja's namespace, without names that begin with an underscore: Python's own attributes would be among them."""

    def __init__(*args: Any, **items: Any) -> None:
        self, pairs = args[0], args[1:]
        attributes = dict(*pairs, **items)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        Namespace.__setitem__(self, name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no attribute {name!r}; names with an underscore in front are Python's")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def answer(line: bytes) -> bytes:
    """The answer to a request: `text`; or the `limit` that was met; or the `error` as [whether jinja's, its class, its text]."""
    try:
        request = json.loads(line.decode("utf-8", "surrogatepass"))
        _limit(request["seconds"], request["memory"])
        return _encoded({"text": _rendered(request)})
    except _TooLong:
        return _encoded({"limit": "output"})
    except MemoryError:
        return _encoded({"limit": "memory"})
    except Exception as error:  # a template can fail in any way Python can
        return _failed(error)
    finally:
        _unlimit()


class _TooLong(Exception):
    """The template gives more text than was asked for."""


def _rendered(request: Mapping[str, Any]) -> str:
    template = _compiled(request["template"])
    pieces, left = [], request["output"]
    asked = {**request["variables"], "add_generation_prompt": request["add_generation_prompt"]}
    for piece in template.generate(asked):
        left -= len(piece)
        if left < 0:
            raise _TooLong
        pieces.append(piece)
    return "".join(pieces)


@lru_cache(maxsize=1)
def _compiled(source: str) -> Template:
    return environment().from_string(source)


def _failed(error: Exception) -> bytes:
    try:
        text = str(error)[:_MESSAGE]
    except Exception:
        text = ""
    return _encoded({"error": [isinstance(error, TemplateError), type(error).__name__, text]})


def _encoded(value: Mapping[str, Any]) -> bytes:
    # Lone surrogates go through: whoever reads the text refuses them.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _limit(seconds: float, memory: int) -> None:
    """From now on at most so many seconds of CPU time, and so many bytes more than now."""
    # For a system without these limits, and a parent that is gone: a thread that needs no interpreter to end the process.
    faulthandler.dump_traceback_later(8 * seconds, exit=True)
    if sys.platform != "win32":
        _set(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds))
        _set(resource.RLIMIT_AS, _address_space() + memory)


def _unlimit() -> None:
    """Until the next request: reading it may take memory."""
    faulthandler.cancel_dump_traceback_later()
    if sys.platform != "win32":
        _set(resource.RLIMIT_AS, resource.RLIM_INFINITY)


if sys.platform != "win32":

    def _set(kind: int, soft: int) -> None:
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            soft = hard if soft == resource.RLIM_INFINITY else min(soft, hard)
        try:
            resource.setrlimit(kind, (soft, hard))
        except (OSError, ValueError):  # macOS has no limit of the address space
            return


def _address_space() -> int:
    """Bytes of this process's address space now; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def main() -> None:
    sys.dont_write_bytecode = True  # no file can be written from here on
    if sys.platform != "win32":
        _set(resource.RLIMIT_FSIZE, 0)
        _set(resource.RLIMIT_CORE, 0)
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(answer(line))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
