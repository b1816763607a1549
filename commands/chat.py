"""`chat`: turns typed on a terminal or piped in, a line each, over one loaded bundle. No torch is imported."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from ..runtimes.answer import Answer, Stops
from ..runtimes.conversation import Conversation
from ..runtimes.sampling import Sampling
from ..system.reading import one_line, shown
from ..system.writing import write_file
from .run import REASONS

Note = Callable[[str], None]
Write = Callable[[str], None]

HELP = """\
/system TEXT   begin anew under a system message
/reset         forget what was said, but for the system message
/save FILE     keep the conversation as JSON
/help          this
/exit          leave; so does Ctrl-D. Ctrl-C ends an answer"""


@dataclass(frozen=True)
class Turns:
    """A chat under way.

    Attributes:
        conversation: what was said.
        sampling: how tokens are drawn; each answer takes the next seed.
        stops: what ends an answer.
        write: prints a piece of an answer. note: prints a line beside it.
    """

    conversation: Conversation
    sampling: Sampling
    stops: Stops
    write: Write
    note: Note

    def run(self, lines: Iterator[str]) -> None:
        """Answer each line, until there are none or one says /exit."""
        for number, line in enumerate(lines):
            text = line.strip()
            if text.startswith("/"):
                if text in ("/exit", "/quit"):
                    return
                self._command(text)
            elif text:
                self._answer(text, number)

    def _answer(self, text: str, number: int) -> None:
        sampling = replace(self.sampling, seed=(self.sampling.seed + number) % (1 << 63))
        try:
            answer = self.conversation.say(text, sampling, self.stops)
            for line in self.conversation.notes:
                self.note(line)
            pieces = self._written(answer)
        except UserError as error:
            self.note(f"error: {error}")
            return
        self.conversation.heard(answer, "".join(pieces))
        cache, rate = self.conversation.cache, f", {answer.rate:.1f} tokens/s" if answer.rate else ""
        self.note(
            f"[{len(answer.ids)} tokens{rate}; {cache.fed} of prompt read, {cache.reused} kept; "
            f"stopped by {REASONS[answer.reason]}]"
        )

    def _written(self, answer: Answer) -> list[str]:
        """The pieces of an answer, printed as they come. Ctrl-C ends them."""
        pieces = []
        try:
            for piece in answer:
                pieces.append(piece)
                self.write(piece)
        except KeyboardInterrupt:
            answer.close()
        self.write("\n")
        return pieces

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            self.conversation.reset()
            self.note("what was said is forgotten")
        elif name == "/system":
            self.conversation.system(rest)
            self.note("a new conversation under this system message")
        elif name == "/save" and rest:
            try:
                write_file(Path(rest), json.dumps(self.conversation.messages, indent=1, ensure_ascii=False) + "\n")
                self.note(f"wrote {one_line(rest, 200)}")
            except (OSError, UserError) as error:
                self.note(f"error: {one_line(error, 200)}")
        else:
            if name != "/help":
                self.note(f"{shown(text, 40)} is no command here:")
            self.note(HELP)


def seed_of(seed: int | None) -> int:
    """A seed that was given, or a random one."""
    return secrets.randbits(31) if seed is None else seed


def typed_lines() -> Iterator[str]:
    """Lines as they are typed, with editing and a history of this session; a plain loop where standard input is no terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory

    session: PromptSession[str] = PromptSession(history=InMemoryHistory())
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:  # at the prompt it clears the line
            continue
        except EOFError:
            return
