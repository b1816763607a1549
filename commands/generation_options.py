"""The options of commands that generate text: how a token is drawn, what ends an answer, how a prompt is put."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import UserError
from ..system.reading import MEBIBYTE, one_line, read_text, shown
from .options import MOST_SEED, MOST_TOKENS, path

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
SAMPLING = (*_SAMPLING, "no_repeat_ngram")
"""Parameters of `Sampling`, each an option of the same name."""


def generation(command: Any) -> Any:
    """The options that `run` and `chat` share."""
    options = [
        click.option("-n", "--max-new-tokens", type=click.IntRange(1, MOST_TOKENS), help="Default: the model's."),
        click.option("--temperature", type=float, help="0 takes the best token. Default: the model's, else 0."),
        click.option("--top-k", type=int, help="Draw of the best K tokens."),
        click.option("--top-p", type=float, help="Draw of the smallest set of tokens with this probability."),
        click.option("--min-p", type=float, help="Draw of tokens at least so probable, relative to the best one."),
        click.option("--repetition-penalty", type=float, help="For tokens read or written before (arXiv 1909.05858)."),
        click.option("--presence-penalty", type=float, help="Taken from the logits of tokens written before."),
        click.option("--frequency-penalty", type=float, help="The same, for each time."),
        click.option("--no-repeat-ngram", type=int, help="No sequence of so many tokens comes twice."),
        click.option("--seed", type=click.IntRange(0, MOST_SEED), help="Of the draws. Default: random, and printed."),
        click.option("--stop", "stops", multiple=True, metavar="TEXT", help="Ends the answer; repeatable."),
        click.option("--stop-token", "stop_tokens", multiple=True, metavar="TOKEN", help="The same, one token."),
    ]
    command = templates(command)
    for option in reversed(options):
        command = option(command)
    return command


def templates(command: Any) -> Any:
    """The options that say how a prompt is put."""
    options = [
        click.option(
            "--template", metavar="NAME|FILE", help="Another chat template: the model's own, or a jinja file."
        ),
        click.option(
            "--template-arg",
            "template_args",
            multiple=True,
            metavar="KEY=VALUE",
            help="A variable of the template, such as enable_thinking=false; repeatable.",
        ),
        click.option("--system", metavar="TEXT", help="A system message before the prompt."),
        click.option("--tools", type=path, metavar="FILE", help="JSON schemas of functions for the template."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def sampling_given(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of `Sampling` out of `options`: those that were given."""
    given = {name: options.pop(name) for name in SAMPLING}
    return {name: value for name, value in given.items() if value is not None}


def speech_given(options: dict[str, Any], audio: bool) -> Any:
    """Take the options of `SpeechOptions` out of `options`. Raises UserError where they are given without a sound."""
    from ..runtimes.transcribe import SpeechOptions

    given = {name: options.pop(name) for name in ("language", "translate", "timestamps")}
    if not audio and any(given.values()):
        raise UserError(f"--{next(name for name, value in given.items() if value)} goes with --audio FILE")
    return SpeechOptions(given["language"], "translate" if given["translate"] else None, given["timestamps"])


def chat_given(options: dict[str, Any], use: bool | None) -> Any:
    """Take the options of `ChatOptions` out of `options`. Raises UserError for files and values that cannot be read."""
    from ..checkpoints.chat_template import ChatTemplate
    from ..checkpoints.prompt import ChatOptions

    named: str | None = options.pop("template")
    from_file = named is not None and Path(named).is_file()
    template = ChatTemplate(read_text(Path(str(named)), MEBIBYTE)) if from_file else named
    tools = options.pop("tools")
    return ChatOptions(
        use=use,
        template=template,
        system=options.pop("system"),
        tools=None if tools is None else _tools(tools),
        arguments=dict(_argument(text) for text in options.pop("template_args")),
    )


def _argument(text: str) -> tuple[str, Any]:
    """`key=value`; the value as JSON where it is that, else as text."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier() or key in ("messages", "tools", "documents", "add_generation_prompt"):
        raise UserError(
            f"--template-arg {shown(text, 60)}: write a variable of the template, such as enable_thinking=false"
        )
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def _tools(file: Path) -> list[dict[str, Any]]:
    """The functions in a JSON file: a list of objects, or one."""
    try:
        value = json.loads(read_text(file, 4 * MEBIBYTE))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{one_line(file)}: not valid JSON ({one_line(error, 80)})") from None
    tools = value if isinstance(value, list) else [value]
    if not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{one_line(file)}: a list of JSON schemas is needed, one for each function")
    return tools
