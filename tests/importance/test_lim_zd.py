"""LIM, ZD, the order they give, and the paper's split (arXiv 2406.17415)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from edgewright.errors import UserError
from edgewright.importance import lim_zd
from edgewright.importance.lim_zd import LimAccumulator, importance_weights, lim, order_by_importance, paper_split, zd


def test_lim_of_known_vectors() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert lim(x, x * 3) == pytest.approx(-1.0)  # a layer that only scales its input does nothing
    assert lim(x, -x) == pytest.approx(1.0)
    assert lim(x, torch.tensor([[0.0, 5.0], [0.0, 1.0]])) == pytest.approx(
        -0.5
    )  # tokens count alike, whatever their norm


def test_lim_accumulates_over_uneven_batches() -> None:
    x, y = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0)).unbind()
    accumulator = LimAccumulator()
    accumulator.update(x[:7], y[:7])
    accumulator.update(x[7:].view(1, 43, 16), y[7:].view(1, 43, 16))
    assert accumulator.value() == pytest.approx(lim(x, y), abs=1e-12)
    cosines = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    assert lim(x, y) == pytest.approx(-float(cosines.mean()), abs=1e-6)


def test_lim_refusals() -> None:
    with pytest.raises(UserError, match="longer text"):
        LimAccumulator().value()
    with pytest.raises(UserError, match="not finite"):
        lim(torch.full((1, 2), float("nan")), torch.ones(1, 2))
    with pytest.raises(ValueError, match="differ in shape"):
        lim(torch.ones(1, 2), torch.ones(2, 2))


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_zd_is_the_fraction_beyond_one_deviation(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(lim_zd, "CHUNK_WEIGHTS", chunk)
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(11, 13, generator=generator) * 2 + 1, torch.randn(5, 40, generator=generator).exp()]
    together = torch.cat([m.reshape(-1) for m in matrices]).double()
    z = (together - together.mean()) / together.std(correction=0)
    before = [m.clone() for m in matrices]

    def stream() -> Iterator[torch.Tensor]:
        yield from matrices

    assert zd(stream()) == pytest.approx(float((z > 1).double().mean()), abs=1e-12)
    assert zd(matrices, two_sided=True) == pytest.approx(float((z.abs() > 1).double().mean()), abs=1e-12)
    assert zd([m.double() for m in matrices]) == zd(matrices)
    assert all(torch.equal(a, b) for a, b in zip(matrices, before, strict=True))


def test_zd_is_over_all_matrices_of_the_layer_together() -> None:
    small, large = torch.tensor([[-1.0, 1.0]]), torch.tensor([[-100.0, 100.0]])
    assert zd([small, large]) == 0.25
    assert zd([torch.full((3, 3), 0.5)]) == 0.0
    assert zd([torch.tensor([[1.0, -1.0, 3.0, -3.0]]).to(torch.bfloat16)], two_sided=True) == 0.5
    with pytest.raises(ValueError, match="without weights"):
        zd([])


def test_order() -> None:
    scores = {0: -0.5, 1: -0.9, 2: -0.1, 3: -0.5}
    assert order_by_importance(scores, "lim") == [2, 0, 3, 1]  # high LIM first
    assert order_by_importance(scores, "zd") == [1, 0, 3, 2]  # low ZD first
    with pytest.raises(UserError, match="'magic'"):
        order_by_importance(scores, "magic")
    with pytest.raises(UserError, match="layer 1"):
        order_by_importance({1: float("nan")}, "zd")


def test_weights_are_log_linear_in_rank() -> None:
    weights = importance_weights({4: -0.9, 5: -0.5, 6: -0.1}, "lim")
    assert weights == pytest.approx({6: 16.0, 5: 4.0, 4: 1.0})
    assert importance_weights({3: 0.2}, "zd") == {3: 4.0}


def test_paper_split() -> None:
    assert paper_split(40, 4, 2, 3.5) == 30  # the paper's own example
    assert paper_split(20, 4, 2, 2.1) == 1  # in floating point 2.1 - 2 is not 0.1
    assert paper_split(32, 8, 4, 4.99) == 7
    assert paper_split(10, 4, 2, 2) == 0
    assert paper_split(10, 4, 2, 4) == 10
    for bad in ((4, 2, 4.1), (4, 2, 1.9), (2, 4, 3)):
        with pytest.raises(UserError, match="not between"):
            paper_split(10, *bad)
