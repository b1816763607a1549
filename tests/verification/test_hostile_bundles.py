"""`verify` on bundles whose hashes are right and whose artefacts are a stranger's: one line that names the target."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import hostile_graphs as hostile
from helpers.requests import asking
from helpers.tiny import write_tiny_llama

from edgewright import compiler
from edgewright.cli import main
from edgewright.errors import UserError, VerificationFailure
from edgewright.runtimes.session import Placement
from edgewright.system.subprocesses import Limits
from edgewright.verification.checking import verify_here
from edgewright.verification.options import VerifyOptions
from edgewright.verification.report import Agreement, Report, TargetReport, TextScore
from edgewright.verification.verify import verify

ONE = VerifyOptions(threads=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Must not be written to."""
    folder = tmp_path_factory.mktemp("llama")
    model = write_tiny_llama(folder / "model", num_hidden_layers=1)
    compiler.export(asking(str(model), bits=6.0, verify=False, prompts=2), folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def line(error: BaseException) -> str:
    text = str(error)
    assert text.isprintable()
    assert len(text) < 600
    return text


def test_in_a_process_of_its_own_the_report_is_the_same(bundle: Path) -> None:
    notes: list[str] = []
    apart = verify(bundle, ONE, notes.append)
    assert notes[0] == "checking file hashes"
    assert notes[-1].startswith("onnx: reloading")
    here = verify_here(bundle, ONE)
    assert apart.passed
    assert apart == dataclasses.replace(here, targets=list(here.targets), notes=list(here.notes))


def test_a_report_survives_the_way_through_json() -> None:
    agreement = Agreement(1e-5, 0.1, 0.99, 4, 3, 40, 0.5)
    target = TargetReport(
        "qnn",
        "float16",
        agreement,
        agreement,
        Placement("NPU", {"step": {"MatMul": 3}}, {}, {"step": {"Scan": 2}}, "the runtime", False),
        1,
        1,
        wrong="a weight",
        arithmetic=agreement,
        text=TextScore(3.0, 0.1, 0.9),
        on_device=True,
    )
    report = Report(
        [target],
        agreement,
        original_task_accuracy=0.5,
        task_size=3,
        original_text=TextScore(2.0, 0.0, 1.0),
        text_against="original",
        text_windows=2,
        text_positions=30,
        notes=["left out"],
    )
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert Report.from_json(Report([]).to_json()) == Report([])


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell what a process takes")
def test_a_graph_that_fills_the_memory_is_ended(copy: Path) -> None:
    hostile.edit_graph(copy, hostile.filled_memory(8))
    with pytest.raises(VerificationFailure, match=r"^onnx: (loading|running decoder): the process took more memory"):
        verify(copy, ONE, limits=Limits(3 << 29, 600.0))


def test_an_artefact_that_does_not_come_to_an_end_is_ended(bundle: Path) -> None:
    with pytest.raises(VerificationFailure, match=r"^onnx: .*: the process did not come to an end in 0 s") as caught:
        verify(bundle, ONE, limits=Limits(8 << 30, 1e-4))
    line(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (hostile.endless_loop, "a graph inside 'Loop'"),
        (hostile.weights_in("../../../secret"), "outside its folder"),
        (hostile.foreign_op, "of stranger is in no export"),
    ],
)
def test_a_graph_that_no_exporter_writes_is_not_loaded(copy: Path, change: hostile.Edit, words: str) -> None:
    hostile.edit_graph(copy, change)
    with pytest.raises(UserError, match=words) as caught:
        verify_here(copy, ONE)
    line(caught.value)


def test_outputs_of_another_form_fail_the_target(copy: Path) -> None:
    hostile.edit_graph(copy, hostile.other_logits)
    with pytest.raises(VerificationFailure, match=r"^onnx: decoder does not run .logits comes as float32") as caught:
        verify_here(copy, ONE)
    line(caught.value)


def test_the_manifest_cannot_describe_other_graphs_than_the_checkpoints(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["graphs"][0]["states"][0]["shape"][1] = 1 << 24
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="the graphs in its manifest are not its checkpoint's"):
        verify_here(copy, ONE)


def test_a_config_of_huge_sizes_does_not_fit_its_small_file(copy: Path) -> None:
    config = json.loads((copy / "checkpoint" / "config.json").read_text())
    config |= {"vocab_size": 1 << 24, "hidden_size": 1 << 24}
    (copy / "checkpoint" / "config.json").write_text(json.dumps(config))
    hostile.mend(copy, "checkpoint/config.json")
    with pytest.raises(UserError) as caught:
        verify_here(copy, ONE)
    line(caught.value)


def test_weights_that_no_memory_holds_are_refused_by_the_figure(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["weights"] = 1 << 47
    manifest["targets"][0]["stored_bytes"] = 1 << 47
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"takes memory: about [0-9.]+ GiB, of which [0-9.]+ GiB are available"):
        verify_here(copy, ONE)


def test_an_unknown_target_is_a_note(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    entry: dict[str, Any] = dict(manifest["targets"][0]) | {"format": "abacus", "files": []}
    manifest["targets"].append(entry)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    report = verify_here(copy, ONE)
    assert report.notes == ["abacus was not checked here: this edgewright does not know it"]


def test_on_the_command_line_it_is_one_line(copy: Path) -> None:
    hostile.edit_graph(copy, hostile.other_logits)
    failed = CliRunner().invoke(main, ["verify", str(copy), "-t", "1"])
    assert failed.exit_code == 1
    assert failed.stdout == ""
    assert "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("verification failed: onnx: decoder does not run")
