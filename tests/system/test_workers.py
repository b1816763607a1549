"""The same codes whatever the number of workers: one process, two, or a Ray cluster."""

from __future__ import annotations

import operator
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import joblib  # type: ignore[import-untyped]
import pytest
import torch
from helpers.requests import asking

from edgewright.checkpoints.opening import open_checkpoint
from edgewright.errors import UserError
from edgewright.importance.kl import kl_of_each
from edgewright.pipeline.gptq import quantize_rows
from edgewright.pipeline.plan import plan
from edgewright.quant.hessian import factor
from edgewright.quant.plan import Entry
from edgewright.system.workers import Workers

pytestmark = pytest.mark.exports


EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "t5gemma-g2p"


def test_results_come_in_order() -> None:
    for workers in (Workers(), Workers(2)):
        with workers.running():
            assert workers.over(operator.mul, [(2, i) for i in range(5)]) == [0, 2, 4, 6, 8]


def test_any_thread_may_ask_for_the_workers() -> None:
    workers = Workers(2)
    with workers.running(), ThreadPoolExecutor(1) as pool:
        found = pool.submit(workers.over, os.getpid, [()] * 4).result()
    assert os.getpid() not in found


def test_work_done_here_leaves_the_threads_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """One job is done by joblib in this very process, whatever the backend."""
    workers = Workers(2)
    monkeypatch.setattr(Workers, "_backend", lambda _: joblib.parallel_config(n_jobs=1))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert workers.over(torch.get_num_threads, [()] * 2) == [1, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def codes(workers: Workers) -> list[torch.Tensor]:
    checkpoint = open_checkpoint(str(EXAMPLE))
    name = max(
        (n for n in checkpoint.names() if len(checkpoint.info(n).shape) == 2), key=lambda n: checkpoint.info(n).shape
    )
    rows, columns = checkpoint.info(name).shape
    assert rows > 512
    x = torch.randn(300, columns, generator=torch.Generator().manual_seed(0))
    made = factor(x.T @ x / 300)
    with workers.running():
        found = quantize_rows(checkpoint, name, made, Entry(3, 32, 1.0, "", "gptq"), workers)
    return [found.codes, found.scales]


def divergences(workers: Workers) -> list[float]:
    """Of three weights rounded each alone: what a sweep of plans and `--importance kl` are made of."""
    checkpoint = open_checkpoint(str(EXAMPLE))
    planned = plan(asking(str(EXAMPLE), task=EXAMPLE / "task.tsv", importance="zd", max_context=64))
    parts = [{unit.weights[0].name: (3, 32, False)} for unit in planned.units[:3]]
    with workers.running():
        return kl_of_each(replace(planned.source, checkpoint=checkpoint).over(planned.samples[:4]), parts, workers)


def test_two_processes_give_the_codes_of_one() -> None:
    for one, two in zip(codes(Workers()), codes(Workers(2)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow
def test_a_ray_cluster_of_two_workers_gives_the_codes_and_losses_of_one() -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        found = codes(Workers(2, cluster.address))
        assert not ray.is_initialized()  # given back
        for one, two in zip(codes(Workers()), found, strict=True):
            assert torch.equal(one, two)
        measured = divergences(Workers(2, cluster.address))
        assert measured == divergences(Workers())
        assert min(measured) > 0.0
    finally:
        cluster.shutdown()


def test_a_cluster_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewright.system import workers as room

    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(
            UserError, match=r"--cluster needs ray, which is not installed: pip install 'edgewright\[cluster\]'"
        ),
        Workers(2, "ray://nowhere:10001").running(),
    ):
        pass
