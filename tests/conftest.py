"""Shared by all tests: one torch thread (the suite runs two workers on two cores), and calibration on little data."""

import pytest
import torch

from edgewright import planning, sensitivity

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _little_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few hundred tokens where a user's run takes 32,768: the same path in seconds."""
    monkeypatch.setattr(planning, "MOST_TOKENS", 600)
    monkeypatch.setattr(sensitivity, "WINDOWS", 6)
