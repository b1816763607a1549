"""A request's sizes of calibration: what a user's run takes, and the options that make them small."""

from __future__ import annotations

from typing import Any

import click
import pytest
from helpers.requests import SMALL, asking

from edgewright.cli import main
from edgewright.commands import options as cli_options
from edgewright.pipeline.request import CalibrationOptions, Request


def asked(*arguments: str) -> Request:
    """What `plan` is asked for on the command line."""
    command = main.commands["plan"]
    with command.make_context("plan", ["-m", "model", *arguments]) as context:
        values: dict[str, Any] = dict(context.params)
        return cli_options.request(values.pop("model"), values, click.echo)


def test_a_users_run_calibrates_on_all_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked("--calibration", "none").calibration.shipped is False
    monkeypatch.setattr(next(p for p in main.commands["plan"].params if p.name == "calibration"), "default", None)
    plain = asked().calibration
    assert plain == CalibrationOptions()
    assert plain.shipped
    assert (plain.tokens, plain.part_tokens, plain.fisher_windows, plain.prompts) == (32768, 1024, 32, 32)


def test_hidden_options_make_a_calibration_small() -> None:
    small = asked("--calibration-tokens", "600", "--fisher-windows", "6").calibration
    assert small == SMALL == asking("model").calibration
    options = {option.name: option for option in main.commands["plan"].params}
    assert all(options[name].hidden for name in ("calibration_tokens", "fisher_windows"))
