"""`--max-context` beyond what longrope was trained for: the long factors, and a line that says so."""

from __future__ import annotations

import pytest
from helpers import tiny
from helpers.requests import asking
from helpers.tiny_families import FAMILIES

from edgewright import compiler

TRAINED = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("phi3") / "model"
    return str(tiny.write(folder, FAMILIES["phi3"], max_position_embeddings=256))


@pytest.mark.parametrize("context", [None, 32, TRAINED])
def test_within_the_training_nothing_changes(context: int | None, model: str) -> None:
    lines: list[str] = []
    planned = compiler.plan(asking(model, max_context=context), lines.append)
    assert planned.generation.max_context == (context or TRAINED)
    assert "edgewright" not in planned.config
    assert not any("longrope" in line for line in lines)


@pytest.mark.parametrize(("context", "given"), [(128, 128), (1000, 256)])
def test_beyond_it_the_long_factors_are_used(context: int, given: int, model: str) -> None:
    lines: list[str] = []
    planned = compiler.plan(asking(model, max_context=context), lines.append)
    assert planned.generation.max_context == given
    assert planned.config["edgewright"] == {"long_factors": True}
    assert [line for line in lines if "longrope" in line] == [
        f"longrope: a context of {context} tokens is more than the {TRAINED} of the training, so the factors for long texts "
        "are used, for short ones too"
    ]
    assert planned.model.spec.attention[0].rope.factors == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)  # type: ignore[union-attr]


def test_a_rehearsal_has_them_too(model: str) -> None:
    planned = compiler.plan(asking(model, max_context=128, num_layers=1))
    assert planned.config["edgewright"] == {"long_factors": True}
    assert planned.config["num_hidden_layers"] == 1
