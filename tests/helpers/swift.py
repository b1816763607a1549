"""Swift's toolchain, of this machine or of a Debian in a folder (`make apps-tools-swift`), and a package built once."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from .apps import ONNXRUNTIME, TOOLS

CHROOT = Path(os.environ.get("EDGEWRIGHT_SWIFT", TOOLS / "swift"))
SWIFTLINT = TOOLS / "swiftlint" / "node_modules" / "@expo" / "swiftlint" / "bin" / "linux-x64" / "swiftlint"
_LIBRARIES = "/usr/libexec/swift/lib"  # where Debian has Swift's own, which swiftlint wants
HOW = "make apps-tools-swift, as root"
# A mount namespace of its own: nothing stays mounted. $1: Debian's folder. $2: what it shares with this machine.
_ENTER = """
set -e; root=$1; shared=$2; shift 2
mkdir -p "$root$shared"
mount -t proc proc "$root/proc"
mount --bind "$shared" "$root$shared"
exec chroot "$root" /usr/bin/env "$@"
"""


@dataclass(frozen=True)
class Swift:
    """shared: a folder that commands see under the same path: all they read and write lies in it."""

    shared: Path

    def run(
        self, *command: object, at: Path | None = None, variables: Mapping[str, str] | None = None, limit: int = 3000
    ) -> subprocess.CompletedProcess[str]:
        """A command of the toolchain, in the folder `at`."""
        values = {"HOME": str(self.shared), "TMPDIR": str(self.shared), **(variables or {})}
        words = [f"--chdir={at or self.shared}", *(f"{k}={v}" for k, v in values.items()), *map(str, command)]
        prefix = ["env"]
        if shutil.which("swift") is None:
            prefix = ["unshare", "--mount", "sh", "-c", _ENTER, "enter", str(CHROOT.resolve()), str(self.shared)]
        return subprocess.run([*prefix, *words], capture_output=True, text=True, timeout=limit)


def open_toolchain(shared: Path) -> Swift:
    """Skips where there is none, or no ONNX Runtime to build with."""
    if not (ONNXRUNTIME / "include" / "onnxruntime_c_api.h").is_file():
        pytest.skip("no headers of ONNX Runtime here: make apps-tools")
    if shutil.which("swift") is None:
        if not os.path.lexists(CHROOT / "usr" / "bin" / "swift"):  # a link that leads somewhere in there
            pytest.skip(f"no Swift here: {HOW} (EDGEWRIGHT_SWIFT names another folder)")
        if os.geteuid() != 0 or shutil.which("unshare") is None:
            pytest.skip("Swift lies in a folder that root alone can enter")
    return Swift(shared)


def runtime_flags(folder: Path) -> list[str]:
    """What `swift build` needs of ONNX Runtime, of which a copy lies in `folder`: the toolchain sees nothing else."""
    copy = folder / "onnxruntime"
    if not copy.is_dir():
        shutil.copytree(ONNXRUNTIME, copy)
    flags = [f"-I{copy / 'include'}"]
    words = ["-Xcc", *flags]
    # the last one: Debian's libswiftObservation asks for a symbol that no library of its has
    for flag in (f"-L{copy / 'lib'}", "-rpath", str(copy / "lib"), "--allow-shlib-undefined"):
        words += ["-Xlinker", flag]
    return words


@dataclass(frozen=True)
class SwiftClient:
    """The command line and the tests of a package, built once: only what lies in `model` differs."""

    swift: Swift
    package: Path
    flags: tuple[str, ...]

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return self.swift.run(self.package / ".build" / "debug" / "edgewright-app", *arguments, limit=600)

    def tests(self, model: Path) -> subprocess.CompletedProcess[str]:
        return self.swift.run(
            "swift", "test", "--skip-build", *self.flags, at=self.package, variables={"EDGEWRIGHT_MODEL": str(model)}
        )


def swiftlint(client: SwiftClient, folder: Path) -> subprocess.CompletedProcess[str]:
    """The package under swiftlint's rules. folder: for a copy of it. Skips where it is not installed."""
    if not SWIFTLINT.is_file() or shutil.which("swift") is not None:
        pytest.skip(f"no swiftlint here: {HOW}")
    shutil.copy(SWIFTLINT, folder)
    variables = {"LD_LIBRARY_PATH": f"{_LIBRARIES}/swift/linux:{_LIBRARIES}", "LINUX_SOURCEKIT_LIB_PATH": _LIBRARIES}
    command = (folder / "swiftlint", "lint", "--strict", "--quiet", "--config", "swiftlint.yml")
    return client.swift.run(*command, at=client.package, variables=variables)


def build(swift: Swift, package: Path, folder: Path) -> SwiftClient:
    """Built with all warnings as errors, tests and all."""
    flags = ["-Xswiftc", "-warnings-as-errors", *runtime_flags(folder)]
    done = swift.run("swift", "build", "--build-tests", *flags, at=package)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "warning:" not in done.stdout
    return SwiftClient(swift, package, tuple(flags))
