"""GPTQ through a whole export, and an export that is killed and goes on: the bytes are those of one that was not."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.cli_runner import edgewright
from helpers.killed_export import EXAMPLES, Killed, contents, request
from helpers.requests import asking, changed

from edgewright import compiler
from edgewright.bundle import CHECKPOINT
from edgewright.calibration import samples
from edgewright.compiler import export
from edgewright.errors import UserError, VerificationFailure
from edgewright.pipeline import check, gptq, resume, write_bundle
from edgewright.quant.plan import BitPlan
from edgewright.system.resumable import ResumableExport
from edgewright.verification.checking import VerifyOptions, verify_here


def killed_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The next run dies when it has written `count` weights' codes, leaving all as it is."""
    left = count
    write = gptq.CodeStore.write

    def dying(self: gptq.CodeStore, name: str, made: Any) -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        write(self, name, made)

    monkeypatch.setattr(gptq.CodeStore, "write", dying)
    monkeypatch.setattr(ResumableExport, "discard", ResumableExport.leave)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("t5gemma-g2p", "deltanet-g2p")]


@pytest.mark.slow
@pytest.mark.parametrize("example", ["dolphin-packages", *SLOW])
def test_a_killed_run_goes_on_to_the_same_bytes(example: str, tmp_path: Path) -> None:
    told: list[str] = []
    layers = 4 if example == "deltanet-g2p" else 2
    whole = export(changed(request(example, layers), verify=False), tmp_path / "whole")
    entries = whole.planned.plan.entries.values()
    by_gptq = sum(e.quantizer == "gptq" and e.bits < 16 for e in entries)
    assert by_gptq > 20
    for count in (0, by_gptq // 2):
        with pytest.MonkeyPatch.context() as patched:
            killed_at(patched, max(0, count - len(list(tmp_path.glob(".killed.*/.work/codes/*.safetensors")))))
            with pytest.raises(Killed):
                export(changed(request(example, layers), verify=False), tmp_path / "killed")
        assert not (tmp_path / "killed").exists()
        (partial,) = tmp_path.glob(".killed.*.partial")
        assert len(list(partial.glob(".work/codes/*.safetensors"))) == count
    export(changed(request(example, layers), verify=False), tmp_path / "killed", progress=told.append)
    assert any("weights are done already" in line for line in told)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.slow
def test_what_was_lowered_is_not_lowered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Core ML's and TensorRT's own files differ from build to build
    asked = asking(
        str(tiny.write_tiny_llama(tmp_path / "model", num_hidden_layers=1)), ("executorch", "onnx"), max_context=64
    )
    export(changed(asked, verify=False), tmp_path / "whole")
    lower_apart = write_bundle.lower_apart

    def dying(name: str, *rest: Any) -> Any:
        if name == "onnx":
            raise Killed
        return lower_apart(name, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(write_bundle, "lower_apart", dying)
        patched.setattr(ResumableExport, "discard", ResumableExport.leave)
        with pytest.raises(Killed):
            export(changed(asked, verify=False), tmp_path / "killed")
    told: list[str] = []
    export(changed(asked, verify=False), tmp_path / "killed", progress=told.append)
    assert {"quantized already", "executorch: lowered already"} <= set(told)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_sigkill_in_the_middle_of_it(tmp_path: Path) -> None:
    folder = EXAMPLES / "t5gemma-g2p"
    task = tmp_path / "task.tsv"
    task.write_text("\n".join((folder / "task.tsv").read_text().splitlines()[:40]) + "\n")
    command = [sys.executable, "-m", "edgewright.cli", "export", "-m", str(folder), "--task", str(task)]
    command += ["--importance", "zd", "--bits", "4.5", "--no-verify", "--max-context", "64", "--num-layers", "2"]
    command += ["--calibration-tokens", "600", "-o"]
    child = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list(tmp_path.glob(".killed.*/.work/codes/*.safetensors"))) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    for name in ("killed", "whole"):
        done = subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert ("going on with the unfinished run" in done.stderr) == (name == "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_two_runs_of_one_command_do_not_mix(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    asked = request("deltanet-g2p")
    checkpoint = compiler.open_model(asked.model)
    first = ResumableExport(tmp_path / "bundle", resume._job(asked, checkpoint))
    with pytest.raises(UserError, match="another run of this command is writing"):
        export(changed(asked, verify=False), tmp_path / "bundle")
    assert first.path.exists()
    first.discard()


@pytest.mark.parametrize(
    ("error", "seen", "line"),
    [
        pytest.param(KeyboardInterrupt(), KeyboardInterrupt, None, marks=pytest.mark.slow),
        pytest.param(
            OSError(28, "No space left on device"),
            UserError,
            r"bundle cannot be written \(.*No space left on device\)",
            marks=pytest.mark.slow,
        ),
        pytest.param(UserError("the caches do not fit"), UserError, "the caches do not fit", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_ends_early_keeps_codes_and_says_so(
    error: BaseException,
    seen: type[BaseException],
    line: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = gptq.CodeStore.write
    count = 0

    def interrupt(self: gptq.CodeStore, name: str, made: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise error
        write(self, name, made)

    monkeypatch.setattr(gptq.CodeStore, "write", interrupt)
    told: list[str] = []
    with pytest.raises(seen, match=line) as raised:
        export(changed(request("deltanet-g2p"), verify=False), tmp_path / "bundle")
    (partial,) = tmp_path.glob(".bundle.*.partial")
    assert raised.value.__notes__ == [f"what is done is kept in {partial}: the same command goes on from there"]
    monkeypatch.setattr(gptq.CodeStore, "write", write)
    export(changed(request("deltanet-g2p", num_layers=1), verify=False), tmp_path / "bundle", progress=told.append)
    assert f"{partial} is left from another run; remove it if it is not wanted" in told
    shutil.rmtree(tmp_path / "bundle")
    export(changed(request("deltanet-g2p"), verify=False), tmp_path / "bundle", progress=told.append)
    assert any(re.fullmatch(r"gptq: 3 of \d+ weights are done already", line) for line in told)
    assert list(tmp_path.iterdir()) == [tmp_path / "bundle"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT")
def test_ctrl_c_says_where_the_codes_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = gptq.CodeStore.write

    def interrupted(self: gptq.CodeStore, name: str, made: Any) -> None:
        write(self, name, made)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(gptq.CodeStore, "write", interrupted)
    folder = EXAMPLES / "deltanet-g2p"
    options = ("--task", folder / "task.tsv", "--importance", "zd", "--max-context", 64)
    result = edgewright("export", "-m", folder, *options, "-o", tmp_path / "bundle")
    assert result.exit_code == 130
    (partial,) = tmp_path.glob(".bundle.*.partial")
    said = f"what is done is kept in {partial}: the same command goes on from there"
    assert result.stderr.splitlines()[-2:] == [said, "interrupted"]


@pytest.mark.slow
def test_an_output_that_appears_meanwhile_costs_nothing(tmp_path: Path) -> None:
    refuse = compiler.refuse_too_large

    def meanwhile(*args: Any) -> None:
        refuse(*args)
        (tmp_path / "bundle").mkdir()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compiler, "refuse_too_large", meanwhile)
        with pytest.raises(UserError, match=r"bundle cannot be written .*File exists"):
            export(changed(request("deltanet-g2p"), verify=False), tmp_path / "bundle")
    (tmp_path / "bundle").rmdir()
    told: list[str] = []
    export(changed(request("deltanet-g2p"), verify=False), tmp_path / "bundle", progress=told.append)
    assert {"quantized already", "onnx: lowered already"} <= set(told)


@pytest.mark.slow
def test_a_target_that_fails_its_check_is_lowered_anew(tmp_path: Path) -> None:
    def failing(*_: Any) -> None:
        raise VerificationFailure("onnx: not what it should be")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(check, "require", failing)
        with pytest.raises(VerificationFailure):
            export(request("deltanet-g2p"), tmp_path / "bundle")
    told: list[str] = []
    export(changed(request("deltanet-g2p"), verify=False), tmp_path / "bundle", progress=told.append)
    assert "quantized already" in told
    assert "onnx: lowered already" not in told


@pytest.mark.slow
def test_codes_of_another_plan_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patched:
        killed_at(patched, 6)
        with pytest.raises(Killed):
            export(changed(request("deltanet-g2p"), verify=False), tmp_path / "bundle")
    for path in tmp_path.glob(".bundle.*/.work/codes/*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"not the codes of .*; remove .* and start anew"):
        export(changed(request("deltanet-g2p"), verify=False), tmp_path / "bundle")
    (left,) = tmp_path.glob(".bundle.*.partial")
    shutil.rmtree(left / ".work" / "codes")  # as it says
    export(changed(request("deltanet-g2p"), verify=False), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [tmp_path / "bundle"]


@pytest.mark.slow
def test_gptq_is_better_than_rounding_and_verified(tmp_path: Path) -> None:
    """On the artefact, at 3 bits: the words that it gets right."""
    folder = EXAMPLES / "t5gemma-g2p"
    right = {}
    for quantizer in ("rtn", "gptq"):
        made = export(
            asking(
                str(folder),
                bits=2.6,
                groups=(64,),
                widths=(2, 3),
                task=folder / "task.tsv",
                quantizer=quantizer,
                max_context=64,
            ),
            tmp_path / quantizer,
        )
        assert made.report is not None
        report = verify_here(tmp_path / quantizer, VerifyOptions(str(folder), folder / "task.tsv", 300))
        right[quantizer] = report.targets[0].task_accuracy
    assert right["gptq"] > right["rtn"]


def test_a_plan_that_needs_data_says_so(tmp_path: Path) -> None:
    planned = compiler.plan(request("deltanet-g2p", None))
    assert planned.plan.calibration is not None
    folder = EXAMPLES / "deltanet-g2p"
    again = compiler.plan(asking(str(folder), plan=planned.plan, task=folder / "task.tsv", max_context=64))
    assert again.plan == planned.plan
    text = tmp_path / "other.tsv"
    text.write_text("\n".join((folder / "task.tsv").read_text().splitlines()[5:50]) + "\n")
    with pytest.raises(UserError, match="planned on other calibration data; give the same --calibration"):
        compiler.plan(asking(str(folder), plan=planned.plan, task=text, max_context=64))
    with pytest.raises(UserError, match="gptq needs data: give --calibration FILE"):
        compiler.plan(asking(str(folder), plan=planned.plan, max_context=64))
    with pytest.raises(UserError, match="gptq needs data"):
        compiler.plan(asking(str(tiny.write_tiny_llama(tmp_path / "llama")), quantizer="gptq", max_context=64))
    assert BitPlan.from_json(planned.plan.to_json()) == planned.plan


@pytest.mark.parametrize(
    ("quantizer", "refusal"),
    [
        ("gptq", r"--memory-limit 0\.48 GiB is too little for GPTQ"),
        ("rtn", r"--format onnx: its library takes memory: about .* leave this target out"),
    ],
)
def test_a_memory_limit_is_refused_at_the_start(tmp_path: Path, quantizer: str, refusal: str) -> None:
    """In a process of its own: this one may hold more than the limit by now, which is another refusal."""
    folder = EXAMPLES / "deltanet-g2p"
    arguments = ["export", "-m", folder, "-o", tmp_path / "bundle", "--quantizer", quantizer, "--memory-limit", "512m"]
    if quantizer == "gptq":
        arguments += ["--task", folder / "task.tsv"]
    command = [sys.executable, "-m", "edgewright.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.search(refusal, " ".join(done.stderr.split()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_calibration_of_a_module_of_ones_own(tmp_path: Path) -> None:
    made = export(asking("helpers.user_modules:unet", bits=5.0, quantizer="gptq"), tmp_path / "bundle")
    assert made.report is not None
    assert made.planned.plan.calibration is not None
    assert (tmp_path / "bundle" / CHECKPOINT / "plan.json").read_text().count('"gptq"') > 3
    assert samples.MOST_TOKENS > 600
