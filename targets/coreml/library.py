"""coremltools, imported without the libraries whose models it converts: they take seconds to import, and none is used here."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_FRONT_ENDS = ("executorch", "torchao", "transformers", "sklearn", "xgboost", "tensorflow")


@contextmanager
def quiet() -> Iterator[None]:
    """coremltools warns on import about every library it was not tested with and about not being on a Mac."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Libraries that an import finds missing, unless they are loaded already."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


with quiet(), _hidden(*_FRONT_ENDS):
    import coremltools as ct
    from coremltools.converters.mil.backend.mil.load import load as write_program
    from coremltools.converters.mil.mil import Builder, Function, Placeholder, Program, Var, get_new_symbol, types
    from coremltools.proto import MIL_pb2, Model_pb2

__all__ = [
    "Builder",
    "Function",
    "MIL_pb2",
    "Model_pb2",
    "Placeholder",
    "Program",
    "Var",
    "ct",
    "get_new_symbol",
    "types",
    "write_program",
]
