"""`python -m faults [--one N] [--calibrated N] [--all N]`: kill so many exports at random moments, count what is wrong."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

import click
from helpers.killed_export import EXAMPLES
from helpers.tiny import write_tiny_llama

from faults.kill import Export, killed_once, whole

CALIBRATED = (
    "--bits",
    "4.5",
    "--importance",
    "zd",
    "--calibration-tokens",
    "300",
    "--num-layers",
    "1",
    "--max-context",
    "64",
)


@click.command()
@click.option("--one", default=80, show_default=True, help="Exports to one target, without calibration.")
@click.option("--calibrated", default=80, show_default=True, help="Exports to one target, by GPTQ.")
@click.option("--all", "every", default=40, show_default=True, help="Exports to five targets.")
@click.option("--seed", default=0, show_default=True)
def main(one: int, calibrated: int, every: int, seed: int) -> None:
    """Kill exports; exit code 1 when something was wrong after one."""
    rng, wrong = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        model = write_tiny_llama(root / "model", num_hidden_layers=1)
        task = root / "task.tsv"
        task.write_text("".join((EXAMPLES / "t5gemma-g2p" / "task.tsv").read_text().splitlines(keepends=True)[:20]))
        targets = [word for name in ("onnx", "executorch", "coreml", "tensorrt", "qnn") for word in ("--format", name)]
        plain = ("--bits", "5", "--max-context", "64", "--no-verify")
        kinds = {
            "one target": (one, Export(model, (*plain, "--format", "onnx"))),
            "one target, calibrated": (
                calibrated,
                Export(EXAMPLES / "t5gemma-g2p", (*CALIBRATED, "--task", str(task), "--no-verify", "--format", "onnx")),
            ),
            "five targets": (every, Export(model, (*plain, *targets), deterministic=False)),
        }
        for name, (count, export) in kinds.items():
            if not count:
                continue
            reference, began, broken = whole(export, root / "whole"), time.monotonic(), 0
            for number in range(count):
                what = killed_once(export, reference, root / f"{name} {number}", rng)
                if what is not None:
                    broken += 1
                    print(f"{name} {number}: {what}", flush=True)
            wrong += broken
            seconds = time.monotonic() - began
            print(
                f"{name} ({reference.seconds:.1f} s unharmed): {count} killed, {broken} wrong, {seconds:.0f} s",
                flush=True,
            )
            (root / "whole").rename(root / f"whole {name}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
