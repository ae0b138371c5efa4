"""Fixtures shared by the suite. Nothing may be fetched while testing."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported

import pytest
import torch
from hosts import HOSTS, Host

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


@pytest.fixture(params=HOSTS, ids=str)
def host(request: pytest.FixtureRequest) -> Host:
    """Every supported family in turn."""
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run only when asked for by `-m slow`."""
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with -m slow"))
