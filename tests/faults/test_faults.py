"""Exports and runs under bad conditions: one line or the right result, and nothing left behind."""

from __future__ import annotations

import gc
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from helpers.cli_runner import edgewright, passed
from helpers.requests import asking
from helpers.tiny import EXAMPLE, write_tiny_llama

from edgewright import compiler
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError
from edgewright.pipeline import resume
from edgewright.runtimes.text_generation import open_bundle
from edgewright.system.resumable import ResumableExport
from faults.kill import Export, killed_once, whole

PLAN = ("plan", "--bits", "5", "-m")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    compiler.export(asking(str(model), verify=False), path)
    return path


@pytest.mark.slow
def test_exports_killed_at_random_moments(model: Path, tmp_path: Path) -> None:
    """`python -m faults` kills hundreds, with calibration and to five targets too."""
    export = Export(model, ("--bits", "5", "--max-context", "64", "--no-verify", "--format", "onnx", "--format", "qnn"))
    reference, rng = whole(export, tmp_path / "whole"), random.Random(0)
    assert [killed_once(export, reference, tmp_path / str(i), rng) for i in range(8)] == [None] * 8


BUS_ERROR = """
import sys
from pathlib import Path
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.commands.exit_codes import _shrunk_files
checkpoint = open_checkpoint(sys.argv[1])
with _shrunk_files():
    name = "model.embed_tokens.weight"
    tensor = checkpoint.tensor(name)
    checkpoint.files[0].open("r+b").truncate(4096)
    print(tensor.float().sum(), checkpoint.tensor("lm_head.weight").float().sum())
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no SIGBUS")
def test_a_weight_file_that_shrinks_while_it_is_mapped(tmp_path: Path) -> None:
    wide = write_tiny_llama(tmp_path / "wide", num_hidden_layers=1, vocab_size=4096)
    done = subprocess.run([sys.executable, "-c", BUS_ERROR, str(wide)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.startswith("error: a weight file was cut off while it was read")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("change", ["touched", "replaced", "removed"])
def test_a_weight_file_that_changes_while_it_is_read(change: str, model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    checkpoint = open_checkpoint(str(copy))
    checkpoint.require_unchanged()
    file = copy / "model.safetensors"
    if change == "touched":
        os.utime(file, ns=(0, 0))
    elif change == "replaced":
        shutil.copyfile(file, copy / "new")
        (copy / "new").replace(file)
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors was changed while it was read"):
        checkpoint.require_unchanged()


def test_an_export_whose_source_changes_says_so(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))

    def progress(line: str) -> None:
        if line.startswith("quantizing"):
            os.utime(copy / "model.safetensors", ns=(0, 0))

    with pytest.raises(UserError, match="was changed while it was read"):
        compiler.export(asking(str(copy), verify=False), tmp_path / "out", progress)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_two_commands_for_one_output(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    first = ResumableExport(tmp_path / "out", resume._job(asking(str(model)), open_checkpoint(str(model))))
    with pytest.raises(UserError, match=r"another command is writing .*out; wait for it, or choose another -o"):
        compiler.export(asking(str(model), bits=6.0), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [first.path]
    first.leave()
    compiler.export(asking(str(model), bits=6.0, verify=False), tmp_path / "out")
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("stage", ["quantizing", "onnx"])
def test_the_folder_removed_while_it_is_filled(stage: str, model: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()

    def progress(line: str) -> None:
        if line.startswith(stage):
            shutil.rmtree(place, ignore_errors=True)

    with pytest.raises(UserError) as caught:
        compiler.export(asking(str(model), verify=False), place / "out", progress)
    assert "\n" not in str(caught.value)
    assert not (place / "out").exists()


def plan_in(model: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgewright.cli", *PLAN, str(model)]
    return subprocess.run(command, capture_output=True, text=True, **settings)  # type: ignore[call-overload, no-any-return]


@pytest.mark.slow
def test_no_home_and_no_temporary_folder(model: Path) -> None:
    kept = {key: os.environ[key] for key in ("PYTHONPATH",) if key in os.environ}
    done = plan_in(model, env=kept)
    assert done.returncode == 0, done.stderr
    done = plan_in(model, env={**kept, "HOME": "/nowhere", "TMPDIR": "/nowhere"})
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("most", [12, 20, 40])
def test_few_file_descriptors(model: Path, most: int) -> None:
    done = plan_in(model, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)))
    assert done.returncode in (0, 2), done.stderr
    if done.returncode == 2:
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in done.stderr


def test_temporary_files_lie_in_the_unfinished_folder(model: Path, tmp_path: Path) -> None:
    seen: set[Path] = set()
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    compiler.export(asking(str(model), verify=False), tmp_path / "out", lambda _: seen.add(Path(tempfile.gettempdir())))
    (folder,) = (path for path in seen if tmp_path in path.parents)
    assert folder.name == "tmp"
    assert not folder.exists()
    assert (os.environ.get("TMPDIR"), tempfile.tempdir) == before


def _held(count: int, bundle: Path) -> tuple[int, int, int]:
    """Descriptors, threads and temporary files after `count` runs of a bundle."""
    for _ in range(count):
        passed(edgewright("run", bundle, "--prompt", "k n", "-n", "2", "--threads", "1"))
    gc.collect()
    files = sum(1 for p in Path(tempfile.gettempdir()).iterdir() if not p.name.startswith("pytest"))
    return len(os.listdir("/proc/self/fd")), threading.active_count(), files


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_runs_in_a_row_hold_nothing(bundle: Path) -> None:
    _held(3, bundle)
    before = _held(3, bundle)
    after = _held(12, bundle)
    assert all(n <= m + 2 for n, m in zip(after, before, strict=True)), (before, after)


@pytest.mark.slow
def test_a_thousand_runs_in_a_row(bundle: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    _held(50, bundle)
    before, memory = _held(1, bundle), resident()
    after = _held(1000, bundle)
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 1
    assert resident() - memory < 64 << 20


@pytest.mark.slow
def test_four_processes_on_one_bundle(bundle: Path) -> None:
    commands = [("verify", str(bundle)), ("run", str(bundle), "--prompt", "k n", "-n", "4")] * 2
    running = [
        subprocess.Popen([sys.executable, "-m", "edgewright.cli", *c], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for c in commands
    ]
    ends = [(p.communicate(), p.returncode) for p in running]
    assert [code for _, code in ends] == [0] * 4, ends
    assert ends[1][0][0] == ends[3][0][0]
    assert not list((bundle / "reports").glob(".*"))


def test_an_open_bundle_answers_again_and_again(bundle: Path) -> None:
    opened = open_bundle(bundle)
    first = "".join(opened.generate("k n", max_new_tokens=3))
    assert {"".join(opened.generate("k n", max_new_tokens=3)) for _ in range(20)} == {first}
