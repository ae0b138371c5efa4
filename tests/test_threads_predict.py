"""A web server's threads: every way of predicting beside all others gives to the last bit what it gives alone."""

from __future__ import annotations

import asyncio
import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from example_model import noise
from PIL import Image
from saved_models import official
from support import images, maps, randomise, segmenter
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter import kernels
from pvl_adapter.distilled_head import weights_hash
from pvl_adapter.images import to_pil
from pvl_adapter.trust import calibrate
from pvl_adapter.trust.scorer import Perceptron

IMAGES = images()
LEFT, POLYP = "a tumor at the left", "one polyp"
THREADS, ROUNDS = 6, 5
Ways = dict[str, Callable[[], list[Tensor]]]


@pytest.fixture(scope="module")
def model(words) -> pvl.MedCLIPSeg:
    """Of the published shape, so that padding is read; with a distilled head, and calibrated for four samples."""
    model, learn = official(words), Perceptron.learn
    images = [noise(20, 30, 3, seed=number) for number in range(48)]
    found = model.predict(images, [LEFT] * 48, num_samples=2, seed=7).probability
    masks = [each > each.quantile(0.6) for each in found]
    samples = [
        {"image": image, "text": LEFT, "mask": mask.numpy(), "subject": f"s{number // 2}"}
        for number, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Perceptron, "learn", lambda *given, **how: learn(*given, **{**how, "steps": 5}))
        calibrate(model, samples, alpha=0.2, loss_limit=0.95, pixel_limit=0.9, num_samples=4)
    model.distilled = pvl.DistilledHead(model.head.dim).eval().requires_grad_(False)
    model.distilled.facts |= {"weights": weights_hash(model), "held_out": 9}
    return model


@pytest.fixture
def ways(model) -> Ways:
    """Of predicting with one model, and with another beside it."""
    second, other = copy.deepcopy(model), segmenter()
    randomise(second.clip.pvl_adapters, seed=5)
    ensemble = pvl.Ensemble([model, second])
    one, three = model.image_part(IMAGES[0]), model.image_part(IMAGES)

    def of(image: Any, text: Any, **settings: Any) -> Callable[[], list[Tensor]]:
        return lambda: maps(model.predict(image, text, **settings))

    def promises() -> list[Tensor]:
        found = model.predict(IMAGES[0], LEFT, num_samples=4)
        return [found.outer_mask, found.area_interval, found.flagged]  # None, were other weights seen

    def rounded() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return maps(model.predict(one, LEFT, num_samples=2))

    return {
        "mean": of(IMAGES, [LEFT, POLYP, "tumor"], num_samples=0),
        "samples": of(IMAGES[0], POLYP, num_samples=3, seed=3, memory_budget=1),
        "auto": of(IMAGES[1], [LEFT, POLYP], num_samples=pvl.Auto(tolerance=0.05, max_samples=6)),
        "distilled": of(IMAGES[0], LEFT, num_samples="distilled"),
        "part": of(one, LEFT, num_samples=2),
        "parts": of(three, [POLYP, LEFT, POLYP], num_samples=2),
        "rounded": rounded,
        "promises": promises,
        "label_map": lambda: [model.predict(one, [LEFT, POLYP], num_samples=2).label_map().entropy],
        "ensemble": lambda: maps(ensemble.predict(one, LEFT, num_samples=2)),
        "beside": lambda: maps(other.predict(IMAGES, torch.tensor([[97, 5, 6, 99] + [0] * 8] * 3), num_samples=2)),
    }


@pytest.fixture(autouse=True)
def _switching_often(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "has_native_bfloat16", lambda: True)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(got, expected, strict=True))


def test_threads_with_a_part_a_calibration_and_an_ensemble_of_one_model(model, ways):
    expected, names = {name: way() for name, way in ways.items()}, list(ways)

    def work(thread: int) -> list[str]:
        order = [names[(thread * 5 + turn * (thread + 1)) % len(names)] for turn in range(ROUNDS)]
        return [name for name in order if not same(ways[name](), expected[name])]

    with ThreadPoolExecutor(THREADS) as threads:
        wrong = [name for found in threads.map(work, range(THREADS)) for name in found]
    assert not wrong


def test_an_event_loop_that_gives_its_calls_to_threads(ways):
    expected = {name: way() for name, way in ways.items()}

    async def serve() -> dict[str, list[Tensor]]:
        return dict(zip(ways, await asyncio.gather(*map(asyncio.to_thread, ways.values())), strict=True))

    found = asyncio.run(serve())
    assert [name for name in ways if not same(found[name], expected[name])] == []


@pytest.mark.filterwarnings("ignore:a sentence has")
def test_sentences_of_any_length_are_padded_alike_in_all_threads(model):
    sentences = [" ".join(["tumor"] * length) for length in range(1, 14)]
    expected, wrong = [model.tokenize(sentence)["input_ids"] for sentence in sentences], []

    def work() -> None:
        for _ in range(20):
            for sentence, ids in zip(sentences, expected, strict=True):
                try:
                    got = model.tokenize(sentence)["input_ids"]
                    wrong.extend([] if torch.equal(got, ids) else [got.shape])
                except Exception as error:
                    wrong.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_one_opened_file_given_by_all_threads(kind, tmp_path):
    Image.fromarray(noise(600, 600, 3)).save(tmp_path / "image", format=kind)
    expected = to_pil(tmp_path / "image")[0]

    for _ in range(4):
        with ThreadPoolExecutor(THREADS) as threads, Image.open(tmp_path / "image") as opened:
            found = list(threads.map(to_pil, [opened] * THREADS))
        assert all(one == expected for (one,) in found)
