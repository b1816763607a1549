"""The bar of a step that counts, and the lines above it."""

from __future__ import annotations

import io

from rich.console import Console

from edgewright.commands.progress import Bar


def test_a_counted_step_is_a_bar_and_goes_when_another_line_comes() -> None:
    out = io.StringIO()
    bar = Bar(Console(file=out, force_terminal=True, width=80))
    assert bar.show("quantizing: 10% (model.layers.0.mlp.up_proj.weight)")
    assert bar.show("quantizing: 50% (model.layers.1.mlp.up_proj.weight)")
    assert "quantizing" in out.getvalue()
    assert not bar.show("onnx: decoder")
    drawn = out.getvalue()
    assert "50%" in drawn
    assert "\x1b[?25h" in drawn  # the cursor is back
    assert bar.show("gptq: 0% (x)")
    bar.close()
    bar.close()


def test_lines_that_count_nothing() -> None:
    bar = Bar(Console(file=io.StringIO(), force_terminal=True))
    for line in ("top-1 agreement: 99.5% of tokens", "wrote plan.json", "a: 101% (b)", "x" * 100 + ": 5%", "a: 5%\nb"):
        assert not bar.show(line)
