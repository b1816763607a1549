"""The Android client on a desktop: compiled, and run on a JVM over the AAR's own JNI. Tools that are not here skip a test."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from .apps import ROOT, TOOLS

AGE = "1.29"
"""Of the newest ONNX Runtime for Android."""

ANDROID = TOOLS / "android"
HERE = ROOT / "tests" / "apps" / "android"
AAR = ANDROID / "aar"
KOTLIN = ANDROID / "node_modules" / "kotlin-compiler" / "lib"
KTLINT = ANDROID / "node_modules" / "@naturalcycles" / "ktlint" / "resources" / "ktlint"
LIBRARIES = (AAR / "classes.jar", KOTLIN / "kotlin-stdlib.jar", KOTLIN / "kotlinx-coroutines-core-jvm.jar")
ONNXRUNTIME = ANDROID / "python" / "onnxruntime" / "capi" / "libonnxruntime.so.1.29.0"
API = ANDROID / "python" / "android-stubs"
MODEL = Path("app/src/main/assets/model")
CORE = Path("edgewright/src/main/kotlin/edgewright")
SCREEN = Path("app/src/main/kotlin/edgewright/app")
SHIMS = {
    "libc.so": ("-DC", "LIBC"),
    "libdl.so": ("-DDL", "LIBC"),
    "libm.so": ("", "LIBC"),
    "libonnxruntime.so": ("-DORT", "VERS_1.29.0"),
}


def require(*programs: str) -> None:
    """Skip where the Android tools, or a program, are missing."""
    if not (AAR / "classes.jar").is_file() or not KOTLIN.is_dir() or not ONNXRUNTIME.is_file():
        pytest.skip("no Kotlin compiler and onnxruntime-android here: make apps-tools-android")
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here: apt-get install {PACKAGES[program]}")


PACKAGES = {
    "java": "default-jre-headless",
    "javac": "default-jdk-headless",
    "gcc": "gcc",
    "aapt2": "aapt android-framework-res",
}


def passed(*command: object, timeout: int = 600) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def kotlinc(sources: Iterable[Path], output: Path, *classpath: Path) -> Path:
    """Classes of Kotlin sources; a warning is an error."""
    require("java")
    compiler = "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler"
    against = os.pathsep.join(map(str, (*LIBRARIES, *classpath)))
    options = ("-no-stdlib", "-no-reflect", "-Werror", "-jvm-target", "11", "-cp", against, "-d", output)
    passed("java", "-Xmx1500m", "-cp", KOTLIN / "*", compiler, *options, *sorted(sources))
    return output


def natives(folder: Path) -> Path:
    """The AAR's x86_64 JNI, beside shims of the libraries of Android that it asks for."""
    require("gcc")
    folder.mkdir()
    shutil.copy(AAR / "jni" / "x86_64" / "libonnxruntime4j_jni.so", folder)
    for name, (part, version) in SHIMS.items():
        script = folder / f"{name}.map"
        script.write_text(f"{version} {{ }};\n")
        flags = ("-shared", "-fPIC", "-O1", "-fno-builtin", f"-Wl,-soname,{name}", f"-Wl,--version-script,{script}")
        passed("gcc", *flags, *filter(None, [part]), "-o", folder / name, HERE / "shims.c")
    return folder


@dataclass(frozen=True)
class Client:
    """The command line of tests/apps/android/Main.kt."""

    classes: Path
    natives: Path

    def run(self, *commands: tuple[object, ...], as_on_android: bool = False) -> list[str]:
        """What each command printed; a failure is its line behind "error: ".

        as_on_android: without the fast path of GroupQueryAttention, as the thin layer sets it; near ties may fall otherwise then.
        """
        lines = ["\t".join(str(w).replace("\n", "\\n").replace("\t", "\\t") for w in words) for words in commands]
        classpath = os.pathsep.join(map(str, (self.classes, *LIBRARIES)))
        options = ("-Xmx1g", f"-Donnxruntime.native.path={self.natives}", "-cp", classpath)
        environment = os.environ | {
            "LD_LIBRARY_PATH": str(self.natives),
            "EDGEWRIGHT_ONNXRUNTIME": str(ONNXRUNTIME),
            "ORT_GQA_DISABLE_FLASH_ATTENTION": str(int(as_on_android)),
        }
        done = subprocess.run(
            ["java", *options, "MainKt"],
            input="\n".join(lines) + "\n",
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
        )
        said = done.stdout.split("----\n")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert len(said) == len(commands) + 1, done.stdout[-2000:] + done.stderr[-3000:]
        return [part.removesuffix("\n") for part in said[:-1]]


def client_of(project: Path, folder: Path) -> Client:
    """The core and the sample's pure part of a project, compiled without anything of Android's, with the test's command line."""
    sources = [*(project / CORE).glob("*.kt"), project / SCREEN / "Session.kt", HERE / "Main.kt"]
    return Client(kotlinc(sources, folder / "classes"), natives(folder / "natives"))
