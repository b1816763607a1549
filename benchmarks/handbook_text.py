"""The text that quality is measured on: the Debian Administrator's Handbook, in two disjoint parts.

    apt-get download debian-handbook && dpkg-deb -x debian-handbook_*.deb HANDBOOK
    python benchmarks/handbook_text.py HANDBOOK DIRECTORY

Writes `calibration.txt` and `heldout.txt`: the paragraphs of the English edition without markup, none twice, every other
page of the book to either part, so that no page is in both.
"""

from __future__ import annotations

import argparse
import re
from html.parser import HTMLParser
from pathlib import Path

PAGES = "usr/share/doc/debian-handbook/html/en-US"
SHORTEST = 40  # characters of a paragraph: shorter ones are headings and captions


class _Paragraphs(HTMLParser):
    """The text of `<div class="para">`, each with what is inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._open: list[bool] = []  # of the divs around us, which are paragraphs
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div":
            self._finish()
            self._open.append(dict(attrs).get("class") == "para")

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._open:
            self._finish()
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1]:
            self._text.append(data)

    def _finish(self) -> None:
        text = re.sub(r"\s+", " ", "".join(self._text)).strip()
        if len(text) >= SHORTEST:
            self.found.append(text)
        self._text.clear()


def paragraphs(page: Path) -> list[str]:
    parser = _Paragraphs()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser.found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("handbook", type=Path, help="where the package is unpacked")
    options.add_argument("output", type=Path)
    given = options.parse_args()
    seen: set[str] = set()
    parts: list[list[str]] = [[], []]
    for i, page in enumerate(sorted((given.handbook / PAGES).glob("*.html"))):
        for text in paragraphs(page):
            if text not in seen:
                seen.add(text)
                parts[i % 2].append(text)
    given.output.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("calibration.txt", "heldout.txt"), parts, strict=True):
        (given.output / name).write_text("\n\n".join(part) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
