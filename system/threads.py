"""How many CPU threads a runtime takes where none are asked for."""

from __future__ import annotations

import os


def default_threads() -> int:
    """OMP_NUM_THREADS, which torch follows too; 0, which is all cores, where it is not set to a number."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() and len(first) <= 4 else 0
