"""The runner as one file: the modules of `on_device` in a zip, which Python runs as it is; the same modules give the same bytes."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

_PACKAGE = "edgewright_runner"
_MAIN = f"import sys\n\nfrom {_PACKAGE}.main import main\n\nsys.exit(main(sys.argv[1:]))\n"


def runner() -> bytes:
    """The file: `python3 FILE measure request.json`."""
    sources = sorted((Path(__file__).parent / "on_device").glob("*.py"))
    texts = {f"{_PACKAGE}/{source.name}": source.read_bytes() for source in sources}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in {"__main__.py": _MAIN.encode(), **texts}.items():
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_STORED)
    return packed.getvalue()


def runner_name() -> str:
    """Its name on a device, which its content determines."""
    return f"runner-{hashlib.sha256(runner()).hexdigest()[:16]}.pyz"
