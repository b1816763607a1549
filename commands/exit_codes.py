"""How a command ends: its exit code, its last line, and what an interrupt does."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from ..errors import UserError, VerificationFailure
from ..system.reading import one_line

_interrupted = threading.Event()
"""Set by the first SIGINT: one that a library's callback swallowed still ends the command at its next step."""


class Commands(click.Group):
    """Turns the two kinds of failure into their exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _telling_notes():
                return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except VerificationFailure as error:
            click.echo(f"verification failed: {error}", err=True)
            ctx.exit(1)
        except click.UsageError as error:
            if isinstance(error, click.exceptions.NoArgsIsHelpError):
                raise
            where = error.ctx.command_path if error.ctx is not None else "edgewright"
            click.echo(f"error: {one_line(error.format_message())} (see '{where} --help')", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)  # 1 would say that a verification failed
        except BrokenPipeError:
            sys.stderr.close()  # the reader went away; the interpreter must not complain about it at exit
            ctx.exit(0)


def note(message: str) -> None:
    """Progress, to standard error."""
    if _interrupted.is_set():
        raise KeyboardInterrupt
    click.echo(message, err=True)


@contextmanager
def cleaning_up() -> Iterator[None]:
    """SIGTERM ends the block as an exception does, so that an export removes its unfinished folder, or says why it is kept."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    def interrupt(number: int, frame: FrameType | None) -> None:
        _interrupted.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = {n: signal.signal(n, to) for n, to in ((signal.SIGTERM, stop), (signal.SIGINT, interrupt))}
    try:
        yield
    finally:
        _interrupted.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _telling_notes() -> Iterator[None]:
    """What a failure brings along, such as where work is kept, is printed before the failure itself, a line each."""
    try:
        yield
    except BaseException as error:
        for line in getattr(error, "__notes__", ()):
            click.echo(line, err=True)
        raise
