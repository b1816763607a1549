"""What is fuzzed: a reader or a command, the honest files, and how they are changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from edgewright.bundle import CHECKPOINT, Bundle
from edgewright.calibration.prompts import read_task
from edgewright.checkpoints.gguf_file import read_gguf
from edgewright.checkpoints.opening import open_checkpoint
from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.cli import main
from edgewright.device_profiles.profile import load
from edgewright.models.registry import build
from edgewright.quant.overrides import Override
from edgewright.quant.plan import BitPlan
from edgewright.quant.units import quantizable_units
from edgewright.runtimes.context_memory import load_memory
from edgewright.system.reading import read_json_object
from fuzz.mutate import Mutator, json_or_bytes, of_binary, of_bytes, of_json, of_safetensors, of_text


@dataclass(frozen=True)
class Fuzzed:
    """run: what reads it, given the folder of a copy. files: those of the copy, one of which is changed each time. needs: what
    the copy holds besides.
    """

    run: Callable[[Path], object]
    files: dict[str, Mutator]
    needs: tuple[str, ...] = ()


def _model(folder: Path) -> None:
    opened = open_checkpoint(str(folder / "model"))
    for name in opened.names():
        opened.info(name)
    model = build(opened.config)
    quantizable_units(model)
    tokenizer = opened.tokenizer
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("a b"))


def _config(folder: Path) -> None:
    build(read_json_object(folder / "model" / "config.json"))


def _tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_dir(folder / "model")
    ids = tokenizer.encode("k n i g h t é \U0001f600")
    tokenizer.decode(ids)
    stream = tokenizer.stream()
    for token in [*ids, 0, 5, 1000]:
        stream.put(token)
    stream.end()


def _gguf(folder: Path) -> None:
    opened = open_checkpoint(str(folder / "model.gguf"))
    build(opened.config)
    for name in opened.names():
        opened.rows(name, 0, 1)


def _vocabulary(folder: Path) -> None:
    tokenizer = Tokenizer.from_gguf(read_gguf(folder / "vocabulary.gguf").metadata)
    tokenizer.decode(tokenizer.encode("abc"))


def _memory(folder: Path) -> None:
    bundle = Bundle.open(folder / "bundle")
    load_memory(folder / "memory", bundle, _Spec())  # type: ignore[arg-type]


class _Spec:
    hidden = 64


def _manifest(folder: Path) -> None:
    Bundle.open(folder / "bundle").check_files()


def _overrides(folder: Path) -> None:
    for line in (folder / "overrides").read_text("utf-8", "replace").splitlines():
        Override.parse(line)


def _command(*words: str) -> Callable[[Path], Any]:
    """A command line; `@` in a word is the folder."""

    def run(folder: Path) -> None:
        result = CliRunner().invoke(main, [word.replace("@", str(folder)) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        last = (result.stderr.splitlines() or [""])[-1]
        if result.exit_code not in (0, 1, 2) or "error: unforeseen" in result.stderr or "Traceback" in result.stderr:
            raise AssertionError(f"exit code {result.exit_code}: {last[:300]}")
        if result.exit_code == 2 and not last.startswith("error: "):
            raise AssertionError(f"exit code 2 without its line: {last[:300]}")

    return run


_CHECKPOINT_FILES: dict[str, Mutator] = {
    "model/config.json": json_or_bytes,
    "model/model.safetensors": of_safetensors,
    "model/tokenizer.json": json_or_bytes,
    "model/tokenizer_config.json": json_or_bytes,
    "model/generation_config.json": json_or_bytes,
}
PARSERS: dict[str, Fuzzed] = {
    "config": Fuzzed(_config, {"model/config.json": of_json}),
    "checkpoint": Fuzzed(_model, _CHECKPOINT_FILES, ("model",)),
    "tokenizer": Fuzzed(
        _tokenizer,
        {"model/tokenizer.json": json_or_bytes, "model/tokenizer_config.json": json_or_bytes},
        ("model",),
    ),
    "gguf": Fuzzed(_gguf, {"model.gguf": of_binary}),
    "gguf vocabulary": Fuzzed(_vocabulary, {"vocabulary.gguf": of_binary}),
    "manifest": Fuzzed(_manifest, {"bundle/manifest.json": json_or_bytes}, ("bundle",)),
    "plan": Fuzzed(lambda folder: BitPlan.read(folder / "plan.json"), {"plan.json": json_or_bytes}),
    "task": Fuzzed(lambda folder: read_task(folder / "task.tsv"), {"task.tsv": of_text}),
    "memory": Fuzzed(_memory, {"memory": of_safetensors}, ("bundle/manifest.json",)),
    "device": Fuzzed(lambda folder: load(folder / "device.toml"), {"device.toml": of_text}),
}

_BUNDLE = f"bundle/{CHECKPOINT}"
COMMANDS: dict[str, Fuzzed] = {
    "inspect": Fuzzed(_command("inspect", "@/model"), _CHECKPOINT_FILES, ("model",)),
    "inspect gguf": Fuzzed(_command("inspect", "@/model.gguf"), {"model.gguf": of_binary}),
    "plan": Fuzzed(_command("plan", "-m", "@/model", "--bits", "5"), _CHECKPOINT_FILES, ("model",)),
    "plan --plan": Fuzzed(
        _command("plan", "-m", "@/model", "--plan", "@/plan.json"), {"plan.json": json_or_bytes}, ("model",)
    ),
    "plan --task": Fuzzed(
        _command(
            "plan",
            "-m",
            "@/model",
            "--bits",
            "5",
            "--importance",
            "fisher",
            "--fisher-windows",
            "2",
            "--task",
            "@/task.tsv",
        ),
        {"task.tsv": of_text, "model/tokenizer.json": json_or_bytes},
        ("model", "task.tsv"),
    ),
    "export": Fuzzed(
        _command("export", "-m", "@/model", "--bits", "5", "--format", "onnx", "-o", "@/out"),
        _CHECKPOINT_FILES,
        ("model",),
    ),
    "verify": Fuzzed(
        _command("verify", "@/bundle"),
        {
            "bundle/manifest.json": json_or_bytes,
            f"{_BUNDLE}/config.json": json_or_bytes,
            f"{_BUNDLE}/model.safetensors": of_safetensors,
            "bundle/onnx/decoder.onnx": of_bytes,
        },
        ("bundle",),
    ),
    "run": Fuzzed(
        _command("run", "@/bundle", "--prompt", "k n", "-n", "3"),
        {
            "bundle/manifest.json": json_or_bytes,
            f"{_BUNDLE}/tokenizer.json": json_or_bytes,
            f"{_BUNDLE}/tokenizer_config.json": json_or_bytes,
            "bundle/onnx/decoder.onnx": of_bytes,
        },
        ("bundle",),
    ),
}
