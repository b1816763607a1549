"""Keeping libraries' own chatter off standard error, which is for our notes. A leaf: the standard library alone."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

_LOGGERS = ("torchao", "torch.utils._pytree")


def quiet_torchao() -> None:
    """torchao warns, each time it is imported, about kernels for GPUs and of enums that nobody here can act on."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Standard error goes nowhere while a library loads: C++ prints to file descriptor 2, bindings to `sys.stderr`.

    Errors come as exceptions all the same.
    """
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # no standard error at all
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
