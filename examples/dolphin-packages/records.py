"""Debian's package records as contexts with questions: what the model of this directory is trained and scored on.

Reads the two index files of a Debian release (`Packages.xz` and `Translation-en.xz`); only the standard library enters.
"""

from __future__ import annotations

import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TEAM = re.compile(r"\b(Team|Group|Maintainers|Maintainer|Packagers|Developers|Project|Task Force|Crew)\b")
MOST_DEPENDENCIES = 6  # of a package that its context names
DESCRIPTION = 160  # characters of the long description at most: whole sentences of it


class Record(NamedTuple):
    """One package. Fields that it lacks are empty."""

    package: str
    source: str  # of the package: records of one source resemble each other
    version: str  # upstream's: without epoch and Debian revision
    section: str
    architecture: str
    maintainer: str  # a team's name; empty where a person maintains the package alone
    host: str  # of the home page
    role: str
    depends: list[str]  # names of the first packages it needs
    summary: str
    description: str


class Question(NamedTuple):
    kind: str  # what is asked for, to count by
    text: str
    answer: str


class Example(NamedTuple):
    context: str
    questions: list[Question]


# ------------------------------------------------------------------------------------------------------------- reading


def stanzas(path: Path) -> Iterator[dict[str, str]]:
    """The paragraphs of a Debian control file, plain or .xz: field name -> value, lines of a long one joined by newlines."""
    opener = lzma.open if path.suffix == ".xz" else open
    fields: dict[str, str] = {}
    name = ""
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            if not line.strip():
                if fields:
                    yield fields
                fields, name = {}, ""
            elif line[0] in " \t":
                fields[name] += "\n" + line.strip()
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
    if fields:
        yield fields


def read_records(packages: Path, translations: Path) -> list[Record]:
    """Every package of the index whose texts are plain ASCII, in order of name, each name once."""
    long = {s["Description-md5"]: s.get("Description-en", "") for s in stanzas(translations)}
    found: dict[str, Record] = {}
    for fields in stanzas(packages):
        record = to_record(fields, long.get(fields.get("Description-md5", ""), ""))
        if all(text.isascii() and text.isprintable() for text in (*record[:8], *record.depends, *record[9:])):
            found[record.package] = record
    return [found[name] for name in sorted(found)]


def to_record(fields: dict[str, str], description: str) -> Record:
    """A stanza of `Packages` and its translated description (summary, newline, paragraphs divided by `.`)."""
    maintainer = fields.get("Maintainer", "").partition("<")[0].strip(' "')
    version = fields.get("Version", "").partition(":")[2] or fields.get("Version", "")
    host = re.match(r"https?://([^/:]+)", fields.get("Homepage", ""))
    role = re.search(r"role::([a-z-]+)", fields.get("Tag", ""))
    needs = [re.split(r"[ (:|]", part.strip())[0] for part in fields.get("Depends", "").split(",") if part.strip()]
    first_paragraph = " ".join(description.split("\n.\n")[0].split("\n")[1:])
    return Record(
        package=fields["Package"],
        source=fields.get("Source", fields["Package"]).split(" ")[0],
        version=version.rpartition("-")[0] or version,
        section=fields.get("Section", "").rpartition("/")[2],
        architecture=fields.get("Architecture", ""),
        maintainer=maintainer if TEAM.search(maintainer) else "",
        host=host[1].removeprefix("www.").lower() if host else "",
        role=role[1] if role else "",
        depends=list(dict.fromkeys(needs))[:MOST_DEPENDENCIES],
        summary=fields.get("Description", "").split("\n")[0].rstrip("."),
        description=shorten(first_paragraph, DESCRIPTION),
    )


def shorten(text: str, limit: int) -> str:
    """The first whole sentences of `text` within `limit` characters; none if even the first is longer."""
    kept = ""
    for sentence in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text).strip()):
        if len(kept) + 1 + len(sentence) > limit or not sentence.endswith((".", "!", "?")):
            break
        kept = f"{kept} {sentence}".strip()
    return kept


def split(records: list[Record], seed: int, heldout: int) -> tuple[list[Record], list[Record]]:
    """(training, held-out) records, divided by source package: no held-out package has a sibling in training.

    Of each held-out source one package is kept, so that the score is not of one large family.
    """
    rng = random.Random(seed)
    sources = sorted({record.source for record in records})
    rng.shuffle(sources)
    chosen = set(sources[:heldout])
    training = [record for record in records if record.source not in chosen]
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.source in chosen:
            groups.setdefault(record.source, []).append(record)
    return training, [rng.choice(groups[source]) for source in sources[:heldout]]


# ------------------------------------------------------------------------------------------------------------- writing


def write_example(record: Record, others: list[str], rng: random.Random) -> Example:
    """The record as English sentences in random order and wording, and every question it can answer.

    `others`: names of packages that much depends on, for questions whose answer is "no".
    """
    name = record.package
    sentences = [rng.choice([f"{name} is at version {record.version}.", f"Its version is {record.version}."])]
    questions = [Question("name", "What is its name?", name), Question("version", "Which version?", record.version)]

    def say(kind: str, question: str, answer: str, *wordings: str) -> None:
        if answer:
            sentences.append(rng.choice(wordings))
            questions.append(Question(kind, question, answer))

    section, architecture, role = record.section, record.architecture, record.role
    say("section", "Which section?", section, f"It is in section {section}.", f"Its section is {section}.")
    say(
        "architecture",
        "Which architecture?",
        architecture,
        f"It is built for {architecture}.",
        f"Architecture: {architecture}.",
    )
    say(
        "maintainer",
        "Who maintains it?",
        record.maintainer,
        f"{record.maintainer} look after it.",
        f"It is maintained by {record.maintainer}.",
    )
    say(
        "host",
        "Where is its home page?",
        record.host,
        f"Its home page is on {record.host}.",
        f"See {record.host} for more.",
    )
    say("role", "Which role?", role, f"Its role is {role}.", f"It plays the role {role}.")
    if record.depends:
        listed = ", ".join(record.depends)
        sentences.append(rng.choice([f"It needs {listed}.", f"It depends on {listed}."]))
        questions.append(Question("first", "What does it need first?", record.depends[0]))
        wanted = rng.random() < 0.5
        absent = [other for other in rng.sample(others, 8) if other not in record.depends]
        asked = rng.choice(record.depends) if wanted else absent[0]
        questions.append(Question("needs", f"Does it need {asked}?", "yes" if wanted else "no"))
    if record.description:
        sentences.append(record.description)
    rng.shuffle(sentences)
    opening = rng.choice([f"{name}: {record.summary}.", f"{name} is a package: {record.summary}."])
    return Example(" ".join([opening, *sentences]), questions)


def needed_names(records: list[Record]) -> list[str]:
    """One entry for each time that a package is needed: drawing from the list draws the usual ones most."""
    return [name for record in records for name in record.depends]


def one_question_each(records: list[Record], others: list[str], seed: int) -> list[tuple[str, Question]]:
    """(context, question) pairs, one for each record, the kinds of question taken in turn where the record has them."""
    rng = random.Random(seed)
    counts: dict[str, int] = {}
    pairs: list[tuple[str, Question]] = []
    for record in records:
        example = write_example(record, others, rng)
        question = min(example.questions, key=lambda q: counts.get(q.kind, 0))
        counts[question.kind] = counts.get(question.kind, 0) + 1
        pairs.append((example.context, question))
    return pairs
