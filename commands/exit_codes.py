"""How a command ends: its exit code, its last line, and what an interrupt does."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ..errors import UserError, VerificationFailure
from ..system.reading import nearest, one_line, printable
from .help import Command

if TYPE_CHECKING:
    from .progress import Bar

DEBUG = "EDGEWRIGHT_DEBUG"
"""With this variable set, an error that nobody foresaw is shown with its traceback."""

_LONGEST_LINE = 1000
_interrupted = threading.Event()
"""Set by the first SIGINT: one that a library's callback swallowed still ends the command at its next step."""


class Commands(click.Group):
    """Turns every way to end into its exit code: 1 for a failed verification alone, 2 for trouble, 130 for an interrupt."""

    command_class = Command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Here an unknown command is answered with the nearest known one."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"there is no command {one_line(repr(args[0]), 60)}{nearest(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Here --help and --version are printed, and perhaps cannot be."""
        try:
            return super().parse_args(ctx, args)
        except OSError as error:
            _end_by(error, ctx)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _telling_notes(), _shrunk_files():
                result = super().invoke(ctx)
            if _bar.cache_info().currsize:
                _bar().close()
            sys.stdout.flush()  # here, as at exit a full disk would go unseen
            return result
        except UserError as error:
            _say(f"error: {error}")
            ctx.exit(2)
        except VerificationFailure as error:
            _say(f"verification failed: {error}")
            ctx.exit(1)
        except click.UsageError as error:
            if isinstance(error, click.exceptions.NoArgsIsHelpError):
                raise
            where = error.ctx.command_path if error.ctx is not None else "edgewright"
            _say(f"error: {error.format_message()} (see '{where} --help')")
            ctx.exit(2)
        except KeyboardInterrupt:
            _say("interrupted")
            ctx.exit(130)  # 1 would say that a verification failed
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except OSError as error:
            _end_by(error, ctx)
        except MemoryError:
            _say("error: not enough memory; close other programs, or give --memory-limit and a smaller model")
            ctx.exit(2)
        except Exception as error:
            if os.environ.get(DEBUG):
                traceback.print_exc()
            _say(
                f"error: unforeseen {type(error).__name__}: {one_line(error, 300)}; "
                f"please report it with what {DEBUG}=1 prints"
            )
            ctx.exit(2)


def note(message: str) -> None:
    """Progress, to standard error; on a terminal a step that counts is a bar."""
    if _interrupted.is_set():
        raise KeyboardInterrupt
    shown = printable(message)
    bar = _bar() if sys.stderr.isatty() else None
    if bar is None or not bar.show(shown):
        _echo(shown)


@functools.cache
def _bar() -> Bar:
    from rich.console import Console  # not needed where nobody looks

    from .progress import Bar

    return Bar(Console(stderr=True))


def _say(message: str) -> None:
    """The last line of a command, or a note that goes with it."""
    if _bar.cache_info().currsize:
        _bar().close()
    _echo(one_line(message, _LONGEST_LINE))


def _echo(text: str) -> None:
    """Print to standard error; that it cannot be printed is no reason to stop."""
    try:
        click.echo(text, err=True)
    except OSError:
        _replace_by_nowhere(2)


def _end_by(error: OSError, ctx: click.Context) -> NoReturn:
    _discard_output()
    _say(f"error: {_system_error(error)}")
    ctx.exit(2)


def _system_error(error: OSError) -> str:
    """What the system refused, and the file or the stream that it was about."""
    if isinstance(error, BrokenPipeError):
        return "whoever read the output has gone, so not all of it was written"
    where = f"{one_line(error.filename, 200)}: " if error.filename is not None else "standard output or a file: "
    return f"{where}{error.strerror or one_line(error)}; mend that and run the command again"


def _discard_output() -> None:
    """What is left in standard output's buffer goes nowhere; otherwise the interpreter complains about it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        _replace_by_nowhere(1)


def _replace_by_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextmanager
def cleaning_up() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as an exception does, so that an export removes its folder, or says why it is kept."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    def interrupt(number: int, frame: FrameType | None) -> None:
        _interrupted.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    handlers = {signal.SIGTERM: stop, signal.SIGINT: interrupt}
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:  # nohup ignores it
        handlers[hangup] = stop
    before = {number: signal.signal(number, to) for number, to in handlers.items()}
    try:
        yield
    finally:
        _interrupted.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _shrunk_files() -> Iterator[None]:
    """A mapped file that was cut off ends the process by SIGBUS when its lost part is read; here with a line and exit code 2."""
    bus_error = getattr(signal, "SIGBUS", None)
    if bus_error is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    # Python's own handlers run between instructions, and the one that failed would be tried again for ever.
    def end(number: int) -> None:
        os.write(2, b"error: a weight file was cut off while it was read; run the command again on a file that stays\n")
        os._exit(2)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    handlers = ctypes.CDLL(None).signal
    handlers.restype, handlers.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    before = handlers(bus_error, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        handlers(bus_error, before)


@contextmanager
def _telling_notes() -> Iterator[None]:
    """What a failure brings along, such as where work is kept, is printed before the failure itself, a line each."""
    try:
        yield
    except BaseException as error:
        for line in getattr(error, "__notes__", ()):
            _say(line)
        raise
