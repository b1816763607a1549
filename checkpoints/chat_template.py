"""Chat templates: jinja source that strangers wrote, rendered in a child process with limits of time, memory and output.

jinja's sandbox stops attributes, not work: three nested loops, `"x" * 3e9` or a tower of powers take any time and memory, the last
even while the template is compiled. The child (`chat_renderer.py`) stays for later prompts and ends with its template.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..system.reading import MEBIBYTE, one_line, read_bytes

CPU_SECONDS = 5.0
"""CPU time of one rendering, and one more second a MiB of messages."""

WALL_SECONDS = 20.0
"""Time of one rendering as a clock tells it, the start of the process included, and four more seconds a MiB of messages."""

MEMORY = 512 * MEBIBYTE
"""Bytes that a rendering may take, beside 32 for each byte of the messages."""

OUTPUT = 4 * MEBIBYTE
"""Characters that a template may give, beside 8 for each byte of the messages."""

LONGEST_SOURCE = MEBIBYTE
"""Characters of a template."""

_RENDERER = Path(__file__).with_name("chat_renderer.py")
_PROGRAM = (
    "import sys; file = sys.argv[1]; sys.path += sys.argv[2:];"
    " exec(compile(open(file, encoding='utf-8').read(), file, 'exec'), {'__name__': '__main__'})"
)
"""Runs a file by its path, so that neither this package nor the folder it lies in must be found again."""

_KEPT = {"PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "LANG", "LANGUAGE", "TZ"}
"""Variables that the child inherits, with those that begin with LC_: what Python needs to start, and nothing secret."""

_OUT_OF_TIME = -int(getattr(signal, "SIGXCPU", 1 << 16))
"""The return code of a process that met its limit of CPU time; one that none has where there is no such limit."""

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")

_WAY_OUT = "use a plain prompt"

_early: list[subprocess.Popen[bytes]] = []
"""A process that no template has taken yet. It ends with this one."""


def start_early(folder: Path) -> None:
    """Start a process now if the tokenizer in `folder` seems to have a chat template; the first that is rendered takes it.

    For a command that has much to import first. What is wrong with the folder, the tokenizer's reader says.
    """
    try:
        settings = folder / "tokenizer_config.json"
        named = settings.is_file() and b'"chat_template"' in read_bytes(settings, 16 * MEBIBYTE)
        if named or (folder / "chat_template.jinja").is_file():
            start_early_for(("default",))
    except (UserError, OSError, ValueError):
        return


def start_early_for(templates: Collection[str]) -> None:
    """Start a process now for the first of `templates` that is rendered; without templates, do nothing."""
    try:
        if templates and not _early:
            _early.append(_start())
    except UserError:
        return  # `render` says so, if it comes to that


class ChatTemplate:
    """A template and the process that renders it. Threads may share one; their renderings go one after the other.

    source: jinja source.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Any] | None = None

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        """The prompt that the template makes of `messages`. variables: further ones, such as bos_token and tools.

        Raises UserError if the template is no valid jinja, refuses the messages, fails on them, or meets a limit.
        """
        if len(self.source) > LONGEST_SOURCE:
            raise UserError(
                f"the model's chat template has {len(self.source)} characters, {LONGEST_SOURCE} are read; {_WAY_OUT}"
            )
        try:
            plain = [_message(message) for message in messages]
            said = json.dumps({**variables, "messages": plain}, ensure_ascii=False)
            given = [plain, *(value for key in ("tools", "documents") if (value := variables.get(key)))]
            size = sum(len(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")) for value in given)
            seconds, memory, output = CPU_SECONDS + size / MEBIBYTE, MEMORY + 32 * size, OUTPUT + 8 * size
            rest = {"template": self.source, "add_generation_prompt": add_generation_prompt}
            rest |= {"seconds": seconds, "memory": memory, "output": output}
            line = f'{json.dumps(rest, ensure_ascii=False)[:-1]}, "variables": {said}}}\n'.encode(
                "utf-8", "surrogatepass"
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise _failed(type(error).__name__, str(error)) from None
        with self._lock:
            answer = self._ask(line, WALL_SECONDS + 4 * size / MEBIBYTE, 6 * output + MEBIBYTE)
        match answer:
            case {"text": str(prompt)}:
                return prompt
            case {"error": [True, _, text]}:
                raise UserError(f"the model's chat template: {one_line(text, 160)}; use a plain prompt instead")
            case {"error": [_, name, text]}:
                raise _failed(str(name), str(text))
            case {"limit": "time"}:
                raise _limited(f"takes more than {seconds:.0f} seconds")
            case {"limit": "memory"}:
                raise _limited(f"takes more than {memory // MEBIBYTE} MiB of memory")
            case {"limit": "output"}:
                raise _limited(f"gives more than {output} characters")
            case _:
                raise _limited("gives no answer")

    def _ask(self, line: bytes, seconds: float, longest: int) -> object:
        """Send a request and read its answer of at most `longest` bytes. Raises UserError after so many seconds."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        data = b""
        try:
            process.stdin.write(line)
            process.stdin.flush()
            data = process.stdout.readline(longest)
        except OSError:  # it has ended before it read all
            pass
        finally:
            timer.cancel()
            if not data.endswith(b"\n") or data.startswith(b'{"limit"'):
                self.close()  # also after Ctrl-C: the process may still be at it
        if data.endswith(b"\n"):
            try:
                answer: object = json.loads(data.decode("utf-8", "surrogatepass"))
            except (ValueError, RecursionError):
                return None
            return answer
        if len(data) >= longest:
            return {"limit": "output"}
        code = process.returncode
        if late.is_set() or code == _OUT_OF_TIME:
            return {"limit": "time"}
        raise _limited(f"ended the process that renders it ({f'signal {-code}' if code < 0 else f'status {code}'})")

    def close(self) -> None:
        """End the process, if there is one. The next rendering starts another."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _running(self) -> subprocess.Popen[bytes]:
        """The process, started if there is none. Raises UserError if the system lets none start."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        try:
            self._process = _early.pop()
        except IndexError:
            self._process = _start()
        self._end = weakref.finalize(self, _ended, self._process, os.getpid())
        return self._process


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers gives it to a template: no key is None, and thoughts have each name that templates read."""
    kept = {key: value for key, value in message.items() if value is not None}
    thoughts = next((kept[key] for key in _THOUGHTS if key in kept), None)
    return kept if thoughts is None else {"thinking": thoughts, **kept, "reasoning_content": thoughts}


def _start() -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            # -P: a jinja2.py in the user's current folder must not be run. -S: what an installation adds to each start takes
            # a fifth of this one, and may see secrets; the child is told where its packages are.
            [sys.executable, "-S", "-P", "-c", _PROGRAM, str(_RENDERER), *_paths()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            process_group=0 if os.name == "posix" else None,  # Ctrl-C is for the parent, which then ends it
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"no process can be started to render the model's chat template in ({one_line(error, 120)}); {_WAY_OUT}"
        ) from None


def _paths() -> list[str]:
    """Folders of jinja2 and what it needs, as this process would find them."""
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    files = [spec.origin for spec in specs if spec is not None and spec.origin is not None]
    return list(dict.fromkeys(str(Path(file).parents[1]) for file in files))


def _ended(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kill a process and forget it; in a fork of the process that started it, do nothing."""
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        try:
            if stream is not None:
                stream.close()
        except OSError:  # a request that it never read
            continue


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key in _KEPT or key.startswith("LC_")}
    return kept | {"PYTHONSAFEPATH": "1"}


def _limited(how: str) -> UserError:
    return UserError(f"the model's chat template {how}; {_WAY_OUT}")


def _failed(name: str, text: str) -> UserError:
    reason = f"{one_line(name, 40)}: {one_line(text, 120)}"
    return UserError(f"the model's chat template fails on these messages ({reason}); {_WAY_OUT}")
