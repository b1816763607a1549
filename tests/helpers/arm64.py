"""Debian's arm64 Python under qemu-user: packages fetched by apt into a folder of its own, nothing installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_PACKAGES = (
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libgcc-s1", "libstdc++6"),
    *("zlib1g", "libexpat1", "libffi8", "libssl3", "libbz2-1.0", "liblzma5", "libuuid1"),
)
_CPUINFO = (
    "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
    "CPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n\n"
)


def arm64_python(folder: Path) -> Path:
    """A program that runs an arm64 Python 3.11. Skips where qemu or the packages cannot be had.

    EDGEWRIGHT_ARM64: a folder to keep it in.
    """
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("no qemu-aarch64 here: apt-get install qemu-user")
    folder = Path(os.environ.get("EDGEWRIGHT_ARM64", folder))
    root, program = folder / "root", folder / "python3"
    if not program.exists():
        _fetch(folder)
        for package in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg", "-x", package, root], check=True)
        # qemu 7.2 shows the host's, at which onnxruntime's cpuinfo ends the process
        (root / "proc").mkdir()
        (root / "proc" / "cpuinfo").write_text(_CPUINFO)
        library = f"{root}/usr/lib/aarch64-linux-gnu"
        program.write_text(
            f"#!/bin/sh\nexec qemu-aarch64 -cpu max -E PYTHONHOME={root}/usr -E LD_LIBRARY_PATH={library} "
            f'-L {root} {root}/usr/bin/python3.11 "$@"\n'
        )
        program.chmod(0o755)
    return program


def _fetch(folder: Path) -> None:
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    config = folder / "apt.conf"
    config.write_text(
        f'Dir::State "{folder}/state";\nDir::Cache "{folder}/cache";\nDir::State::status "/dev/null";\n'
        'APT::Architecture "arm64";\nAPT::Architectures { "arm64"; };\n'
    )
    env = os.environ | {"APT_CONFIG": str(config)}
    for command in (["apt-get", "update"], ["apt-get", "download", *_PACKAGES]):
        try:
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, timeout=600, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            pytest.skip("Debian's arm64 packages cannot be had here")
        if done.returncode:
            pytest.skip("Debian's arm64 packages cannot be had here")
