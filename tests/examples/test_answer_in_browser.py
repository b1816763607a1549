"""The script by which `make demo` ends: a site served by `preview`, and its answer in headless Chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.apps import ROOT, TOOLS, project

from edgewright.runtimes.sampling import GREEDY
from edgewright.runtimes.text_generation import open_bundle

PACKAGES = TOOLS / "web" / "node_modules"


@pytest.mark.slow
def test_the_page_answers_as_the_bundle_does(app_bundles: Callable[[str], Path], tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None or not (PACKAGES / "playwright-core").is_dir():
        pytest.skip("no Chromium or playwright-core here: make apps-tools, apt-get install chromium")
    bundle = app_bundles("t5gemma-g2p")
    project(bundle, tmp_path / "site", "web", packages=PACKAGES)
    command = tmp_path / "edgewright"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m edgewright.cli "$@"\n')
    command.chmod(0o755)
    done = subprocess.run(
        ["node", ROOT / "examples" / "answer_in_browser.mjs", command, PACKAGES, chromium, tmp_path / "site", "c a t"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    want = "".join(open_bundle(bundle).generate("c a t", sampling=GREEDY))
    assert done.stdout.endswith(f": c a t -> {want}\n")
