"""Fixtures shared by the suite. Nothing may be fetched while testing but from a hub on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hub_server import HUB, HubServer

# Read when the libraries are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_ENDPOINT"] = HUB.address
os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["NO_PROXY"] = "127.0.0.1,localhost"

import huggingface_hub
import pytest
import torch
from example_model import Predict, save_model
from fakes import forget_open_clip, register_open_clip, write_words
from hosts import HOSTS, Host

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


@pytest.fixture(params=HOSTS, ids=str)
def host(request: pytest.FixtureRequest) -> Host:
    """Every supported family in turn."""
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _started_hub() -> Iterator[HubServer]:
    HUB.start()
    yield HUB
    HUB.shutdown()


@pytest.fixture
def hub(_started_hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """An empty hub that can be reached; everywhere else there is none."""
    _started_hub.reset()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return _started_hub


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run only when asked for by `-m slow`."""
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with -m slow"))


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> Path:
    """A folder with a small BERT's configuration and tokenizer."""
    return write_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def open_clip_models(tmp_path_factory, words) -> Iterator[dict[str, str]]:
    """Names under which open_clip knows three small models."""
    with forget_open_clip():
        yield register_open_clip(tmp_path_factory.mktemp("open_clip"), words)


@pytest.fixture(scope="module")
def trained(open_clip_models, tmp_path_factory) -> Path:
    """A folder with a segmenter of a small CLIP."""
    return save_model(open_clip_models["bert"], tmp_path_factory.mktemp("trained"))


@pytest.fixture
def predict(trained, tmp_path, capsys) -> Predict:
    """Runs `pvl-adapter predict` with it."""
    return Predict(trained, tmp_path / "out", capsys)
