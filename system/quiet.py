"""Standard error without the messages of libraries: it is for Edgewright's own notes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

_LOGGERS = ("torchao", "torch.utils._pytree")


def quiet_torchao() -> None:
    """Silence torchao's warnings about GPU kernels and enums, which it prints at every import."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Standard error goes nowhere within this context, for a library that prints while it loads. Exceptions pass.

    C++ code prints to file descriptor 2, Python code to `sys.stderr`; both are redirected.
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
