"""`python -m fuzz.guided TARGET [libFuzzer options]`: mutants of a reader guided by coverage; needs atheris."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["edgewright"]):
    from edgewright.errors import UserError, VerificationFailure
    from fuzz.seeds import write_seeds
    from fuzz.targets import PARSERS


def main() -> None:
    """Fuzz one reader until an exception that is not foreseen, or a libFuzzer limit such as -max_total_time=60."""
    name, *options = sys.argv[1:]
    fuzzed = PARSERS[name]
    with tempfile.TemporaryDirectory() as place:
        folder, corpus = Path(place, "seeds"), Path(place, "corpus")
        folder.mkdir()
        corpus.mkdir()
        write_seeds(folder)
        file = sorted(fuzzed.files)[0]
        shutil.copyfile(folder / file, corpus / "honest")

        def one(data: bytes) -> None:
            (folder / file).write_bytes(data)
            try:
                fuzzed.run(folder)
            except (UserError, VerificationFailure):
                return

        atheris.Setup(["fuzz", str(corpus), "-timeout=20", "-rss_limit_mb=4096", *options], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
