"""The commands as a user meets them: results on standard output, notes on standard error, exit codes 0, 1 and 2.

One bundle of examples/t5gemma-g2p is exported by a real process and shared; everything else runs in this one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from helpers.cli_runner import edgewright, passed, process, refused
from helpers.hostile_graphs import mend
from helpers.pages import Page
from helpers.requests import asking
from helpers.tiny import EXAMPLE, write_tiny_llama, write_tiny_t5gemma
from safetensors import safe_open

from edgewright import compiler
from edgewright.pipeline import check

BITS = 4.5


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The example's bundle, and what `export --json` printed. Must not be written to but by `verify` and `profile`."""
    bundle = tmp_path_factory.mktemp("exported") / "bundle"
    options = ["--format", "onnx", "--bits", str(BITS), "-o", str(bundle), "--json"]
    done = process("-m", "edgewright.cli", "export", "-m", str(EXAMPLE), "--against", "none", *options)
    assert done.returncode == 0, done.stderr
    assert "quantizing: 100%" in done.stderr
    return bundle, json.loads(done.stdout)


@pytest.fixture(scope="session")
def bundle(exported: tuple[Path, dict[str, Any]]) -> Path:
    return exported[0]


# The main path


def test_export_then_verify_with_the_original(bundle: Path) -> None:
    result = edgewright("verify", bundle, "-m", EXAMPLE, "--json")
    report = json.loads(passed(result))
    assert report["passed"] is True
    (target,) = report["targets"]
    assert target["format"] == "onnx"
    assert target["activations"] == "float32"
    assert target["lowering"]["max_relative_error"] <= report["tolerance"]
    assert target["lowering"]["prompts_identical"] == target["lowering"]["prompts"] == 32
    assert target["shipped"]["top1"] > 0.9
    assert target["weights"] == len(json.loads((bundle / "checkpoint" / "plan.json").read_text())["entries"])
    assert target["placement"]["accelerated"].keys() == {"encoder", "cross_kv", "decoder"}
    assert target["placement"]["fallback"] == {}
    assert 0 < report["quantization"]["mean_kl"] < 1
    assert json.loads((bundle / "reports" / "verify.json").read_text()) == report
    assert "checking file hashes" in result.stderr


def test_average_bits_are_the_bytes_of_the_checkpoint(exported: tuple[Path, dict[str, Any]]) -> None:
    bundle, printed = exported
    plan = printed["plan"]
    stored = weights = 0
    with safe_open(bundle / "checkpoint" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        for name, entry in plan["entries"].items():
            assert entry["bits"] < 16
            codes, scales = file.get_tensor(f"{name}.codes"), file.get_tensor(f"{name}.scales")
            stored += codes.nbytes + scales.nbytes
            weights += codes.shape[0] * codes.shape[1] * 8 // entry["bits"]
            assert name not in names
    with safe_open(EXAMPLE / "model.safetensors", "pt") as file:
        original = sum(file.get_tensor(name).numel() for name in plan["entries"])
    assert weights == plan["weights"] == original
    assert stored == plan["total_bytes"]
    assert plan["average_bits"] == pytest.approx(stored * 8 / weights, rel=1e-9)
    assert BITS * 0.99 < plan["average_bits"] <= BITS


def test_stored_bytes_are_the_bytes_in_the_weight_file(exported: tuple[Path, dict[str, Any]]) -> None:
    bundle, printed = exported
    pieces = {}
    for graph in ("encoder", "cross_kv", "decoder"):
        model = onnx.load(bundle / "onnx" / f"{graph}.onnx", load_external_data=False)
        inputs = {"MatMulNBits": (1, 2), "GatherBlockQuantized": (0, 2)}  # codes, scales
        quantized = {n.input[i] for n in model.graph.node for i in inputs.get(n.op_type, ())}
        for tensor in model.graph.initializer:
            if tensor.name in quantized:
                where = {e.key: e.value for e in tensor.external_data}
                assert where["location"] == "weights.bin"
                pieces[int(where["offset"])] = int(where["length"])
    file = (bundle / "onnx" / "weights.bin").stat().st_size
    (target,) = printed["targets"]
    assert sum(pieces.values()) == target["stored_bytes"] == printed["plan"]["stored_bytes"]["onnx"] < file
    ends = sorted((start, start + length) for start, length in pieces.items())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


@pytest.mark.parametrize(
    "name", ["onnx/weights.bin", "checkpoint/model.safetensors", "onnx/decoder.onnx", "tokenizer.json"]
)
def test_verify_names_the_file_with_a_flipped_byte(bundle: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    result = edgewright("verify", copy, "-m", EXAMPLE)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"verification failed: {name}: ")
    assert "Traceback" not in result.stderr


def test_verify_names_a_missing_file_and_another_checkpoint(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    (copy / "onnx" / "encoder.onnx").unlink()
    result = edgewright("verify", copy)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "verification failed: onnx/encoder.onnx: missing from the bundle"
    other = write_tiny_t5gemma(tmp_path / "other")
    assert "is not the checkpoint this bundle was made from" in refused(edgewright("verify", bundle, "-m", other))


@pytest.mark.slow
def test_a_lowering_that_is_wrong_fails_verification(tmp_path: Path, bundle: Path) -> None:
    """Damage a file and mend its hash: weights are read back, and the comparison with the reference sees the rest."""

    def damaged(name: str, change: Callable[[bytes], bytes]) -> Path:
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(bundle, copy)
        data = change((copy / name).read_bytes())
        (copy / name).write_bytes(data)
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["files"][name] = hashlib.sha256(data).hexdigest()
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return copy

    def flip(data: bytes) -> bytes:
        return bytes(b ^ 0x11 for b in data[: len(data) // 2]) + data[len(data) // 2 :]

    def rescale(data: bytes) -> bytes:
        model = onnx.load_from_string(data)
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "GroupQueryAttention" and attribute.name == "scale":
                    attribute.f *= 2
        return model.SerializeToString()

    said = {
        damaged("onnx/weights.bin", flip): r"model\.\S+ in the artefact's files is not the checkpoint's to the bit",
        damaged("onnx/decoder.onnx", rescale): "logits differ from the reference",
    }
    for copy, wanted in said.items():
        result = edgewright("verify", copy, "--json")
        assert result.exit_code == 1
        assert re.match(f"verification failed: onnx: {wanted}", result.stderr.splitlines()[-1])
        assert json.loads(result.stdout)["passed"] is False


# Determinism


def files_of(root: Path) -> dict[str, bytes]:
    found = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("reports/")}


@pytest.mark.slow
def test_the_same_plan_and_checkpoint_give_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    """The second time from the plan, in another process than the first, and without verification."""
    options = ["--plan", bundle / "checkpoint" / "plan.json", "--no-verify"]
    again = tmp_path / "again"
    text = passed(edgewright("export", "-m", EXAMPLE, "-o", again, *options))
    assert "not verified" in text
    first, second = files_of(bundle), files_of(again)
    assert "manifest.json" in first
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


# Exports that break off


@pytest.mark.parametrize("error", [RuntimeError("the exporter broke"), KeyboardInterrupt()])
def test_an_export_that_breaks_off_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Breaks:
        @staticmethod
        def export(graphs: Any, directory: Path, options: Any, progress: Any) -> None:
            (directory / "half.onnx").write_bytes(b"half")
            seen.extend(p.name for p in directory.parent.parent.iterdir())
            raise error

    monkeypatch.setattr("edgewright.exporters.registry.exporter", lambda name: Breaks)
    model = write_tiny_t5gemma(tmp_path / "model")
    out = tmp_path / "deep" / "bundle"
    with pytest.raises(type(error)):
        compiler.export(asking(str(model)), out)
    assert [name.endswith(".partial") for name in seen] == [True]
    assert list(out.parent.iterdir()) == []


def test_an_artefact_that_fails_its_check_leaves_its_report_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgewright.errors import VerificationFailure

    def fail(report: object) -> None:
        raise VerificationFailure("onnx: not the same")

    monkeypatch.setattr(check, "require", fail)
    model = write_tiny_llama(tmp_path / "model", num_hidden_layers=1)
    result = edgewright("export", "-m", model, "-o", tmp_path / "bundle")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == "verification failed: onnx: not the same"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle.verification.json", "model"]
    assert "targets" in json.loads((tmp_path / "bundle.verification.json").read_text())


def test_an_output_that_exists_or_cannot_be_made_is_refused(tmp_path: Path, plan_file: tuple[Path, Path]) -> None:
    model, plan = plan_file
    (tmp_path / "file").write_text("kept")
    assert "exists already" in refused(edgewright("export", "-m", model, "-o", tmp_path / "file"))
    assert "cannot be" in refused(edgewright("export", "-m", model, "--plan", plan, "-o", tmp_path / "file" / "bundle"))
    assert "cannot be" in refused(edgewright("plan", "-m", model, "--plan", plan, "-o", tmp_path / "no" / "plan.json"))
    assert "-o BUNDLE" in refused(edgewright("export", "-m", model))
    assert (tmp_path / "file").read_text() == "kept"


# No torch where an app runs


@pytest.mark.parametrize(
    "code",
    [
        "import edgewright.cli",
        "from edgewright.cli import main; main(['--help'], standalone_mode=False)",
        "from edgewright.cli import main; main(['export', '--help'], standalone_mode=False)",
        "from edgewright.cli import main; main(['run', {bundle!r}, '--prompt', 'c a t'], standalone_mode=False)",
        "from edgewright.runtimes.benchmark import Lengths, measure; measure({bundle!r}, 'onnx', Lengths([4], 2, [0], 1), 1)",
    ],
)
def test_torch_is_not_imported(code: str, bundle: Path) -> None:
    check = "import sys; heavy = {'torch', 'transformers', 'onnx'} & set(sys.modules); assert not heavy, heavy"
    done = process("-c", f"{code.format(bundle=str(bundle))}\n{check}")
    assert done.returncode == 0, done.stderr


# run


def test_run_answers(bundle: Path) -> None:
    for arguments, stdin in ((("--prompt", "k n i g h t"), None), (("--prompt", "-"), "k n i g h t\n")):
        result = edgewright("run", bundle, *arguments, "-t", 1, stdin=stdin)
        assert passed(result).splitlines()[-1] == "N AY T"
        assert re.fullmatch(
            r"stopped by an end token: 3 tokens, [\d.]+ tokens/s, 7 of prompt in [\d.]+ s\n", result.stderr
        )
    short = passed(edgewright("run", bundle, "--prompt", "k n i g h t", "-n", 1))
    assert short.strip() == "N"
    sampled = [
        passed(edgewright("run", bundle, "--prompt", "t h r o u g h", "--temperature", 2, "--seed", s))
        for s in (1, 1, 2, 3, 4)
    ]
    assert sampled[0] == sampled[1]
    assert len(set(sampled)) > 1


def test_run_says_what_it_read_and_why_it_stopped(bundle: Path) -> None:
    shown = edgewright("run", bundle, "--prompt", "k n i g h t", "--show-prompt", "--stop", "Y T", "--top-k", 3)
    assert passed(shown) == "N A\n"
    assert "--top-k without effect" in shown.stderr
    assert "the prompt, 7 tokens [" in shown.stderr
    assert "stopped by a stop string or token" in shown.stderr
    told = json.loads(passed(edgewright("run", bundle, "--prompt", "k n i g h t", "--stop-token", "T", "--json")))
    (answer,) = told["answers"]
    assert (answer["text"], answer["stopped"], answer["new_tokens"]) == ("N AY", "stop", 2)
    several = edgewright(
        *("run", bundle, "--prompt", "k n i g h t", "--answers", 3, "--temperature", 1.5, "--seed", 5, "--json")
    )
    assert [a["seed"] for a in json.loads(passed(several))["answers"]] == [5, 6, 7]


def test_run_refuses_what_it_cannot_answer(bundle: Path, tmp_path: Path) -> None:
    assert "empty" in refused(edgewright("run", bundle, "--prompt", ""))
    assert "empty" in refused(edgewright("run", bundle, "--prompt", "-", stdin=""))
    assert "at most" in refused(edgewright("run", bundle, "--prompt", "a " * 500))
    assert "chat template" in refused(edgewright("run", bundle, "--prompt", "a", "--chat"))
    assert "holds no coreml" in refused(edgewright("run", bundle, "--prompt", "a", "--format", "coreml"))
    assert "not a bundle" in refused(edgewright("run", tmp_path, "--prompt", "a"))
    for flag, value, line in (
        ("--stop", "", "--stop '' would stop before the first letter"),
        ("--stop-token", "no such", "--stop-token 'no such' is no token"),
        ("--answers", 2, "--answers above 1"),
        ("--template", "x", "no chat template 'x'; it has: none"),
        ("--system", "x", "--system: the tokenizer has no chat template"),
    ):
        assert line in refused(edgewright("run", bundle, "--prompt", "a", flag, value))
    for options in (("--temperature", "nan"), ("--temperature", "1", "--top-p", "nan"), ("--temperature", "inf")):
        result = edgewright("run", bundle, "--prompt", "a", *options)
        assert result.exit_code == 2, options
        assert result.stdout == ""
        assert isinstance(result.exception, SystemExit)
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    (copy / "onnx" / "decoder.onnx").write_bytes(b"not a model")
    mend(copy, "onnx/decoder.onnx")
    assert "not a whole ONNX file" in refused(edgewright("run", copy, "--prompt", "a"))
    (copy / "checkpoint" / "tokenizer.json").unlink()
    mend(copy, "checkpoint/tokenizer.json")
    assert "no tokenizer" in refused(edgewright("run", copy, "--prompt", "a"))


# profile


@pytest.mark.parametrize("form", ["md", "json", "csv", "html"])
def test_profile_prints_each_form(bundle: Path, form: str) -> None:
    text = passed(edgewright("profile", bundle, "-p", 8, "-n", 4, "-r", 1, "-t", 1, "-o", form))
    if form == "json":
        whole = json.loads(text)
        assert (set(whole["targets"]), whole["simulated"], whole["not_measured"]) == ({"onnx"}, {}, {})
        assert json.loads((bundle / "reports" / "profile.json").read_text()) == whole
        result = whole["targets"]["onnx"]
        assert [r["test"] for r in result["rows"]] == ["pp8", "tg4"]
        assert all(r["tokens_per_s"] > 0 and r["repeats"] == 1 for r in result["rows"])
        assert result["kind"] == "measured"
        assert set(result["ops"]) == {"encoder", "cross_kv", "decoder"}
        assert all(sum(o["share"] for o in ops) <= 1.0001 for ops in result["ops"].values())
        assert 0 < result["memory"]["anonymous_after_load"] <= result["memory"]["peak_resident"]
    elif form == "csv":
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [r["test"] for r in rows] == ["pp8", "tg4"]
        assert all(float(r["tokens_per_s"]) > 0 for r in rows)
    elif form == "md":
        table = [line.split("|")[1:-1] for line in text.split("\n\n")[0].splitlines()]
        assert [c.strip() for c in table[0]] == ["target", "model", "bits", "threads", "test", "t/s"]
        assert [(row[0].strip(), row[4].strip()) for row in table[2:]] == [("onnx", "pp8"), ("onnx", "tg4")]
        assert {len(row) for row in table} == {6}
    else:
        page = Page(text)
        assert {"pp8", "tg4", "MatMulNBits"} <= set(page.cells)
        assert page.sections[0] == "about"


def test_profile_refuses_lengths_beyond_the_context(bundle: Path) -> None:
    context = json.loads((bundle / "manifest.json").read_text())["generation"]["max_context"]
    for options in (("-p", context + 1), ("-n", context), ("-p", 8, "-d", context), ("-p", "8,100000")):
        assert "context" in refused(edgewright("profile", bundle, "-r", 1, *options))
    assert "too few" in refused(edgewright("profile", bundle, "-p", 8, "-n", 4, "-r", 0))


# inspect, doctor, devices


def test_inspect_a_checkpoint_and_a_bundle(bundle: Path) -> None:
    checkpoint = edgewright("inspect", EXAMPLE, "--json")
    found = json.loads(passed(checkpoint))
    assert found["kind"] == "checkpoint"
    assert found["model_type"] == "t5gemma"
    assert found["stacks"] == {"encoder": 4, "decoder": 4}
    assert found["tokenizer"] is True
    shipped = json.loads(passed(edgewright("inspect", bundle, "--json")))
    assert shipped["kind"] == "bundle"
    assert shipped["weights"] == found["quantizable_weights"]
    assert set(shipped["graphs"]) == {"encoder", "cross_kv", "decoder"}
    files = [bundle / "onnx" / n for n in ("encoder.onnx", "cross_kv.onnx", "decoder.onnx", "weights.bin")]
    assert shipped["targets"]["onnx"]["file_bytes"] == sum(f.stat().st_size for f in files)
    for target in (EXAMPLE, bundle):
        assert "model_type: t5gemma" in passed(edgewright("inspect", target))
    assert "no model at" in refused(edgewright("inspect", bundle / "absent"))


def test_doctor_and_devices() -> None:
    found = json.loads(passed(edgewright("doctor", "--json")))
    assert found["targets"]["onnx"]["installed"] is True
    assert "verifies" in found["targets"]["onnx"]["here"]
    text = passed(edgewright("doctor"))
    assert all(any(line.startswith(name) for line in text.splitlines()) for name in found["targets"])
    names = [row["name"] for row in json.loads(passed(edgewright("devices", "list", "--json")))]
    assert "samsung-galaxy-s25" in names
    listed = [line.strip() for line in passed(edgewright("devices", "list")).splitlines()]
    assert [line.split()[0] for line in listed[2:]] == names
    assert any(re.match("dragonwing-q-8750 +board +another name of samsung-galaxy-s25", line) for line in listed)
    shown = json.loads(passed(edgewright("devices", "show", names[0], "--json")))
    assert shown["name"] == names[0]
    alias = passed(edgewright("devices", "show", "dragonwing-q-8750"))
    assert alias.startswith("# another name of samsung-galaxy-s25")
    assert json.loads(passed(edgewright("devices", "schema")))["title"] == "DeviceProfile"
    assert "absent-device" in refused(edgewright("devices", "show", "absent-device"))


@pytest.mark.slow
def test_the_text_forms_say_the_totals(plan_file: tuple[Path, Path], bundle: Path) -> None:
    model, _ = plan_file
    text = passed(edgewright("plan", "-m", model, "--bits", 5))
    assert re.search(r"quantizable weights at [45]\.\d{4} bits a weight, scales counted", text)
    verified = passed(edgewright("verify", bundle))
    assert "lowering error (float32 activations)" in verified
    assert "ok (<= 0.001)" in verified
