"""One plan in every format: the same bits in the files of all targets, the same phonemes out of them, true sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from helpers.requests import asking
from helpers.tiny import EXAMPLE

from edgewright import compiler
from edgewright.bundle import CHECKPOINT, Bundle
from edgewright.calibration.prompts import read_task
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.cli import main
from edgewright.errors import VerificationFailure
from edgewright.exporters.registry import exporter
from edgewright.models.loading import CODES, load_dequantized, quantized_parts
from edgewright.models.registry import build
from edgewright.ops.quantized import dequantize
from edgewright.quant.overrides import Override
from edgewright.runtimes.eager import EagerSession
from edgewright.runtimes.generate import generate_batch
from edgewright.runtimes.registry import open_exact, open_session
from edgewright.targets.registry import TARGETS
from edgewright.verification.lowering import check_weights

FORMATS = ("onnx", "executorch", "coreml", "tensorrt", "qnn")
CONTEXT = 32
WORDS = 200
MIXED = {r"encoder\.layers\.0\.": 2, r"encoder\.layers\.1\.": 3, r"decoder\.layers\.0\.": 6, r"decoder\.layers\.1\.": 8}

pytestmark = pytest.mark.skipif(
    not all(TARGETS[name].installed for name in FORMATS), reason="not every target's library is installed"
)


def made(folder: Path, **options: Any) -> Path:
    request = asking(str(EXAMPLE), FORMATS, max_context=CONTEXT, verify=False, **options)
    compiler.export(request, folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's command makes: 4.5 bits, the widths that all targets store whole."""
    return made(tmp_path_factory.mktemp("usual"), bits=4.5)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one layer in each stack: what needs no right answers."""
    return made(tmp_path_factory.mktemp("short"), bits=4.5, num_layers=1)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2, 3, 4, 6 and 8 bits in one model."""
    overrides = tuple(Override(regex, bits) for regex, bits in MIXED.items())
    return made(tmp_path_factory.mktemp("mixed"), bits=5.0, widths=(2, 3, 4, 6, 8), overrides=overrides, num_layers=3)


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.slow) for n in ("short", "usual", "mixed")])
def bundle(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def stored(bundle: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and float32 value of every quantized weight of the checkpoint."""
    checkpoint = open_checkpoint(str(bundle / CHECKPOINT))
    shapes = {name: tuple(p.shape) for name, p in build(checkpoint.config).named_parameters(remove_duplicate=False)}
    for name in [n.removesuffix(CODES) for n in checkpoint.names() if n.endswith(CODES)]:
        yield name, dequantize(*quantized_parts(checkpoint, name, shapes[name]))


def test_every_artefact_holds_the_same_bits(bundle: Path) -> None:
    wanted = dict(stored(bundle))
    assert len(wanted) > (15 if bundle.parent.name.startswith("short") else 50)
    tied = build(open_checkpoint(str(bundle / CHECKPOINT)).config).tied
    for name in FORMATS:
        found = {}
        for key, values in exporter(name).read_weights(bundle / name):
            key = tied.get(key, key)
            assert key not in found or torch.equal(found[key], values), (name, key)
            found[key] = values
        assert wanted.keys() <= found.keys(), name
        for key, values in wanted.items():
            assert found[key].dtype == torch.float32
            assert torch.equal(found[key], values), (name, key)
        assert check_weights(Bundle.open(bundle), name, open_checkpoint(str(bundle / CHECKPOINT))) == len(wanted)


@pytest.mark.slow
def test_a_weight_that_is_another_fails_the_check(short: Path) -> None:
    """The other bundle's plan gives other values under the same names."""
    checkpoint = open_checkpoint(str(short / CHECKPOINT))
    shapes = {name: tuple(p.shape) for name, p in build(checkpoint.config).named_parameters(remove_duplicate=False)}
    name = "model.encoder.layers.0.self_attn.q_proj.weight"
    codes, _, _, _ = quantized_parts(checkpoint, name, shapes[name])

    class Flipped:
        """The checkpoint with one code of one weight changed by one."""

        config = checkpoint.config
        source = checkpoint.source
        has, names = checkpoint.has, checkpoint.names

        def tensor(self, asked: str) -> torch.Tensor:
            value = checkpoint.tensor(asked)
            if asked == name + CODES:
                value = value.clone()
                value[0, 0] ^= 1
            return value

    assert codes.numel() > 0
    for form in FORMATS:
        with pytest.raises(
            VerificationFailure, match=f"{form}: {name} in the artefact's files is not the checkpoint's"
        ):
            check_weights(Bundle.open(short), form, Flipped())  # type: ignore[arg-type]


@pytest.mark.slow
def test_all_five_widths_are_there_and_sizes_are_told_truly(mixed: Path) -> None:
    manifest = Bundle.open(mixed).manifest
    plan = json.loads((mixed / CHECKPOINT / "plan.json").read_text())
    assert {entry["bits"] for entry in plan["entries"].values()} == {2, 3, 4, 6, 8}
    sizes = {entry.format: entry for entry in manifest.targets}
    assert len({entry.ideal_bytes for entry in sizes.values()}) == 1
    ideal = sizes["onnx"].ideal_bytes
    # Only Core ML stores 3 and 6 bits whole; 2 bits ride in 4 on ExecuTorch and TensorRT.
    assert ideal <= sizes["coreml"].stored_bytes < sizes["onnx"].stored_bytes
    assert sizes["coreml"].stored_bytes < sizes["executorch"].stored_bytes
    for entry in sizes.values():
        files = sum((mixed / name).stat().st_size for name in entry.files)
        assert files >= entry.stored_bytes, entry.format
    weights = mixed / "coreml" / "model.mlpackage" / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    kept = open_checkpoint(str(mixed / CHECKPOINT))
    others = sum(2 * kept.tensor(n).numel() for n in kept.names() if not n.endswith((CODES, ".scales")))
    assert weights.stat().st_size <= 1.03 * (ideal + others)


# ---- phonemes


@cache
def words() -> list[list[int]]:
    tokenizer = open_checkpoint(str(EXAMPLE)).tokenizer
    assert tokenizer is not None
    return [tokenizer.encode(p) for p in read_task(EXAMPLE / "task.tsv", WORDS).prompts]


def phonemes(session: Any, bundle: Path, count: int = WORDS) -> list[list[int]]:
    spec = Bundle.open(bundle).manifest.generation
    prompts, found = words()[:count], []
    for start in range(0, count, 50):
        found += generate_batch(session, spec, prompts[start : start + 50], spec.max_new_tokens)
    return found


@pytest.fixture(scope="module")
def reference(usual: Path) -> list[list[int]]:
    checkpoint = open_checkpoint(str(usual / CHECKPOINT))
    model = build(checkpoint.config)
    load_dequantized(model, checkpoint)
    return phonemes(EagerSession(model.graphs()), usual)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "count"), [(form, WORDS) for form in ("onnx", "tensorrt", "coreml")])
def test_words_give_the_same_phonemes_with_float32_activations(
    form: str, count: int, usual: Path, reference: list[list[int]]
) -> None:
    session = open_exact(Bundle.open(usual), form)
    assert session is not None
    assert session.activations == "float32"
    assert len(reference) == WORDS
    assert phonemes(session, usual, count) == reference[:count]


def agreement(found: list[list[int]], wanted: list[list[int]]) -> float:
    """Share of phonemes that stand where they should; a word of another length counts by the longer one."""
    same = sum(sum(a == b for a, b in zip(f, w, strict=False)) for f, w in zip(found, wanted, strict=True))
    return same / sum(max(len(f), len(w)) for f, w in zip(found, wanted, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "count"),
    [
        *((form, WORDS) for form in ("onnx", "executorch", "tensorrt", "coreml", "qnn")),
    ],
)
def test_reduced_activations_agree_on_99_percent_of_the_phonemes(
    form: str, count: int, usual: Path, reference: list[list[int]]
) -> None:
    session = open_session(Bundle.open(usual), form)
    assert session.activations in ("int8", "float16")
    assert agreement(phonemes(session, usual, count), reference[:count]) >= 0.99


# ---- the commands


def edgewright(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_every_target_answers(form: str, usual: Path) -> None:
    result = edgewright("run", usual, "--format", form, "--prompt", "k n i g h t", "-t", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout == "N AY T\n"
    assert bool(result.stderr) is (form in ("coreml", "tensorrt", "qnn")), "what stands in for a device says so"


@pytest.mark.slow
def test_profile_measures_what_runs_here_and_says_why_not_the_rest(short: Path) -> None:
    options = ("-p", 8, "-n", 4, "-r", 1, "-t", 1)
    result = edgewright("profile", short, *options, "-o", "json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found["targets"]) == {"onnx", "executorch"}
    assert all(m["kind"] == "measured" and len(m["rows"]) == 2 for m in found["targets"].values())
    assert set(found["not_measured"]) == {"coreml", "tensorrt", "qnn"}
    (estimate,) = found["simulated"]["qnn"].values()
    assert "SoC model" in estimate["simulator"]
    assert all(p["microseconds"] > 0 and p["ddr_fill_bytes"] > 0 for p in estimate["programs"].values())
    text = edgewright("profile", short, *options, "--format", "qnn").stdout
    assert "vendor-simulated by Qualcomm's simulator of SoC model" in text
    assert "decoder_step" in text
    assert "t/s" not in text


@pytest.mark.slow
def test_strict_placement_fails_where_the_placement_is_not_known(short: Path) -> None:
    passes = edgewright("verify", short, "--format", "onnx", "--format", "tensorrt", "--strict-placement")
    assert passes.exit_code == 0, passes.output
    unknown = edgewright("verify", short, "--format", "coreml", "--strict-placement")
    assert unknown.exit_code == 1
    assert "coreml: the placement is not known here" in unknown.stderr.splitlines()[-1]
