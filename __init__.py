"""Edgewright: an on-device deployment compiler for small language models.

The public API; `docs/api.md` has examples. A name is loaded when it is first used: `import edgewright` imports no torch.
"""

import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    # `python -m edgewright.cli` in a folder with a numpy.py would run that. Nothing else is imported before this line.
    del sys.path[0]

import importlib
from typing import TYPE_CHECKING, Any

from .system.version import __version__

if TYPE_CHECKING:
    from .bundle import Bundle
    from .commands.profile import ProfileLengths, profile
    from .compiler import Exported, export
    from .errors import UserError, VerificationFailure
    from .pipeline.plan import plan
    from .pipeline.planned import Planned
    from .pipeline.request import BudgetOptions, CalibrationOptions, CheckOptions, Request, TargetOptions
    from .runtimes.sampling import Sampling
    from .runtimes.text_generation import OpenBundle, open_bundle
    from .verification.report import Report
    from .verification.verify import VerifyOptions, verify

__all__ = [
    "BudgetOptions",
    "Bundle",
    "CalibrationOptions",
    "CheckOptions",
    "Exported",
    "OpenBundle",
    "Planned",
    "ProfileLengths",
    "Report",
    "Request",
    "Sampling",
    "TargetOptions",
    "UserError",
    "VerificationFailure",
    "VerifyOptions",
    "__version__",
    "export",
    "open_bundle",
    "plan",
    "profile",
    "verify",
]

_MODULES = {
    "bundle": ("Bundle",),
    "commands.profile": ("ProfileLengths", "profile"),
    "compiler": ("Exported", "export"),
    "errors": ("UserError", "VerificationFailure"),
    "pipeline.plan": ("plan",),
    "pipeline.planned": ("Planned",),
    "pipeline.request": ("BudgetOptions", "CalibrationOptions", "CheckOptions", "Request", "TargetOptions"),
    "runtimes.sampling": ("Sampling",),
    "runtimes.text_generation": ("OpenBundle", "open_bundle"),
    "verification.report": ("Report",),
    "verification.verify": ("VerifyOptions", "verify"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'edgewright' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
