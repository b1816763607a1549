"""`python -m fuzz`: N mutants of parsers and of commands from number K on, shared out among targets."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

from fuzz.runner import HANG_SECONDS, fuzz
from fuzz.seeds import write_seeds
from fuzz.targets import COMMANDS, PARSERS


@click.command()
@click.option("--parsers", default=100_000, show_default=True, help="Mutants of the parsers.")
@click.option("--commands", default=2_000, show_default=True, help="Mutants of whole commands.")
@click.option("--first", default=0, show_default=True, help="Number of the first mutant.")
@click.option("--patience", default=HANG_SECONDS, show_default=True, help="Seconds until a mutant counts as a hang.")
@click.option("--only", multiple=True, help="Only this target; repeatable.")
def main(parsers: int, commands: int, first: int, patience: float, only: tuple[str, ...]) -> None:
    """Fuzz; exit code 1 when a mutant broke a rule."""
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder)
        write_seeds(seeds)
        for targets, total in ((PARSERS, parsers), (COMMANDS, commands)):
            for name, fuzzed in targets.items():
                if only and name not in only:
                    continue
                count = -(-total // (len(only) if only else len(targets)))
                began, broken = time.monotonic(), 0
                for failure in fuzz(name, fuzzed, seeds, range(first, first + count), patience):
                    broken += 1
                    print(json.dumps(vars(failure)), flush=True)
                failures += broken
                print(f"{name}: {count} mutants, {broken} broke a rule, {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
