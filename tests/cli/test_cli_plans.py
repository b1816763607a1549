"""`plan` as a user meets it: budgets, overrides, plans edited by hand, rehearsals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.cli_runner import edgewright, passed, refused
from safetensors import safe_open
from safetensors.torch import load_file

EMBED = "model.decoder.embed_tokens.weight"


def planned(model: Path, *options: object) -> dict[str, Any]:
    result = edgewright("plan", "-m", model, "--json", *options)
    found: dict[str, Any] = json.loads(passed(result))
    return found


@pytest.mark.parametrize(
    ("budget", "word"),
    [
        (("--bits", 1), "below the floor"),
        (("--bits", 17), "above the ceiling"),
        (("--size", "1k"), "below the floor"),
        (("--size", "1g"), "above the ceiling"),
    ],
)
def test_an_impossible_budget_names_floor_and_ceiling(
    budget: tuple[str, object], word: str, plan_file: tuple[Path, Path], tmp_path: Path
) -> None:
    model, _ = plan_file
    line = refused(edgewright("export", "-m", model, *budget, "-o", tmp_path / "bundle"))
    assert word in line
    found = re.search(r"from ([0-9.]+) bits a weight \(([0-9]+) bytes .*\) to ([0-9.]+) \(([0-9]+) bytes\)", line)
    assert found is not None
    assert list(tmp_path.iterdir()) == []
    for option, end in (("--bits", found[1]), ("--bits", found[3]), ("--size", found[2]), ("--size", found[4])):
        planned(model, option, end)  # what is named can be typed


@pytest.mark.slow
def test_a_size_is_respected(plan_file: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = plan_file
    size = 150_000
    made = planned(model, "--size", size)
    assert made["total_bytes"] <= size
    passed(edgewright("export", "-m", model, "--size", size, "--no-verify", "-o", tmp_path / "bundle"))
    with safe_open(tmp_path / "bundle" / "checkpoint" / "model.safetensors", "pt") as file:
        everything = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert everything <= size
    assert everything > 0.9 * size


def test_overrides_widths_and_groups(plan_file: tuple[Path, Path]) -> None:
    model, _ = plan_file
    entries = planned(model, "--bits", 6, "--override", "embed_tokens=8", "--override", "mlp=4:32")["entries"]
    assert {e["bits"] for n, e in entries.items() if "embed_tokens" in n} == {8}
    assert {(e["bits"], e["group_size"]) for n, e in entries.items() if ".mlp." in n} == {(4, 32)}
    wide = planned(model, "--bits", 5, "--widths", "3,8")["entries"]
    assert {e["bits"] for e in wide.values()} == {3, 8}
    grouped = planned(model, "--bits", 4.5, "--widths", "4", "--group-size", "32")["entries"]
    assert {e["group_size"] for e in grouped.values()} == {32}
    channel = planned(model, "--bits", 5, "--widths", "4,8", "--group-size", "channel")["entries"]
    shapes = {n: load_file(model / "model.safetensors")[n].shape for n in channel}
    assert all(e["group_size"] == shapes[n][1] for n, e in channel.items())
    assert "matches no weight" in refused(edgewright("plan", "-m", model, "--override", "nothing_like_it=4"))
    assert "regex" in refused(edgewright("plan", "-m", model, "--override", "embed"))
    assert "7 bits" in refused(edgewright("plan", "-m", model, "--override", "embed=7"))
    assert "7 bits" in refused(edgewright("plan", "-m", model, "--widths", "7"))


def test_options_that_exclude_each_other(plan_file: tuple[Path, Path]) -> None:
    model, plan = plan_file
    assert "--bits and --size" in refused(edgewright("plan", "-m", model, "--bits", 4, "--size", "1m"))
    assert "--plan already" in refused(edgewright("plan", "-m", model, "--bits", 4, "--plan", plan))
    assert "choose from onnx" in refused(edgewright("export", "-m", model, "--format", "tflite", "-o", "x"))
    unreadable = edgewright("plan", "-m", model, "--size", "many")
    assert unreadable.exit_code == 2
    assert "is not a size" in unreadable.stderr


def test_a_plan_edited_by_hand_is_accepted_back(plan_file: tuple[Path, Path], tmp_path: Path) -> None:
    model, plan = plan_file
    values = json.loads(plan.read_text())
    before = planned(model, "--plan", plan)
    assert before["average_bits"] == values["average_bits"]
    shape = load_file(model / "model.safetensors")[EMBED].shape
    values["entries"][EMBED] |= {"bits": 3, "group_size": shape[1], "why": "by hand"}
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(values))
    after = planned(model, "--plan", edited, "-o", tmp_path / "back.json")
    assert after["entries"][EMBED] == {"bits": 3, "group_size": shape[1]}
    assert after["average_bits"] != before["average_bits"]
    assert after["total_bytes"] * 8 / after["weights"] == pytest.approx(after["average_bits"])
    assert json.loads((tmp_path / "back.json").read_text())["total_bytes"] == after["total_bytes"]


def test_a_broken_plan_is_one_line(plan_file: tuple[Path, Path], tmp_path: Path) -> None:
    model, plan = plan_file
    text = plan.read_text()
    values = json.loads(text)

    def entry(**changes: object) -> str:
        return json.dumps(values | {"entries": values["entries"] | {EMBED: values["entries"][EMBED] | changes}})

    less = {n: e for n, e in values["entries"].items() if n != EMBED}
    more = values["entries"] | {"model.unknown.weight": values["entries"][EMBED]}
    broken = {
        "half": text[: len(text) // 2],
        "list": "[]",
        "bits": entry(bits=7),
        "group": entry(group_size=48),
        "text": entry(bits="4"),
        "lacks": json.dumps(values | {"entries": less}),
        "unknown": json.dumps(values | {"entries": more}),
        "deep": "[" * 100_000,
        "version": json.dumps(values | {"version": 2}),
    }
    for name, bad in broken.items():
        file = tmp_path / f"{name}.json"
        file.write_text(bad)
        assert "plan" in refused(edgewright("plan", "-m", model, "--plan", file)), name
    assert "cannot be read" in refused(edgewright("plan", "-m", model, "--plan", tmp_path / "absent.json"))


def test_a_dry_run_writes_nothing(plan_file: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = plan_file
    result = edgewright("export", "-m", model, "-o", tmp_path / "bundle", "--dry-run", "--json")
    assert json.loads(passed(result))["average_bits"] <= 4.5
    assert list(tmp_path.iterdir()) == []
    assert sorted(p.name for p in model.iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]


@pytest.mark.slow
def test_one_layer_of_each_stack(plan_file: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = plan_file
    out = tmp_path / "bundle"
    made = json.loads(passed(edgewright("export", "-m", model, "--num-layers", 1, "-o", out, "--json")))
    assert {n.split(".")[3] for n in made["plan"]["entries"] if ".layers." in n} == {"0"}
    assert made["verification"]["passed"] is True
    config = json.loads((out / "checkpoint" / "config.json").read_text())
    assert config["encoder"]["num_hidden_layers"] == config["decoder"]["num_hidden_layers"] == 1
    passed(edgewright("verify", out))
    for count in (0, -1):
        assert "num-layers" in refused(edgewright("plan", "-m", model, "--num-layers", count))
