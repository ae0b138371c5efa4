"""The page in a real browser: what visitors do, and every request that it makes."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from example_model import TEXT, noise, save_model, write_image
from PIL import Image

import pvl_adapter as pvl

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

from pvl_adapter.app import build  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


class Visitor:
    """A browser's window on the page, with nothing shared."""

    def __init__(self, browser: Any, url: str, *, width: int = 1280) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        self.page.goto(url)
        self.page.get_by_role("button", name="Find", exact=True).wait_for()

    def drop(self, *files: Path) -> None:
        self.page.locator("#pvl-ask input[type=file]").set_input_files(list(files))

    def find(self, sentences: str) -> None:
        self.page.get_by_label("What to find").fill(sentences)
        self.page.get_by_role("button", name="Find", exact=True).click()
        self.page.locator(".pvl-card dl").first.wait_for()

    def picture(self, number: int = 0) -> np.ndarray:
        source = self.page.locator(".pvl-panels img").nth(number).get_attribute("src")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))

    def wait_for_change(self, before: np.ndarray) -> np.ndarray:
        for _ in range(100):
            if (now := self.picture()).shape != before.shape or (now != before).any():
                return now
            self.page.wait_for_timeout(50)
        raise AssertionError("the picture did not change")


@pytest.fixture(scope="module")
def model(open_clip_models, tmp_path_factory) -> Any:
    """Counts its passes."""
    model = pvl.from_pretrained(save_model(open_clip_models["bert"], tmp_path_factory.mktemp("trained")))
    predict, model.passes = model.predict, []
    model.predict = lambda *args, **how: (model.passes.append(args[1]), predict(*args, **how))[1]
    return model


@pytest.fixture(scope="module")
def site(model) -> Iterator[str]:
    page = build(model, num_samples=2)
    page.launch(prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visitor(browser, site) -> Iterator[Visitor]:
    """Nothing it did left this machine, and no script failed."""
    made = Visitor(browser, site)
    yield made
    outside = [url for url in made.requests if urlsplit(url).hostname not in ("127.0.0.1", "localhost", None)]
    made.context.close()
    assert len(made.requests) > 10
    assert outside == []
    assert made.errors == []


def test_a_sentence_changes_the_mask_and_sliders_need_no_pass(visitor, model, tmp_path):
    visitor.drop(write_image(tmp_path / "one.png"))
    visitor.page.locator(".pvl-panels img").wait_for()
    plain = visitor.picture()
    visitor.find(TEXT)
    found = visitor.wait_for_change(plain)
    visitor.find("one polyp")
    other = visitor.wait_for_change(found)
    passes = len(model.passes)
    for label in ("A pixel is found", "Leave a pixel"):
        visitor.page.get_by_label(f"range slider for {label}").first.fill("0.3")
        other = visitor.wait_for_change(other)
    assert len(model.passes) == passes


def test_a_broken_file_is_told_and_the_page_goes_on(visitor, tmp_path):
    broken = write_image(tmp_path / "broken.png")
    broken.write_bytes(broken.read_bytes()[:60])
    visitor.drop(broken)
    said = visitor.page.locator(".pvl-error")
    said.wait_for()
    assert "broken.png is damaged" in said.inner_text()
    visitor.page.get_by_role("button", name="Find", exact=True).click()  # nothing of it is left
    visitor.page.get_by_text("there is no image yet").wait_for()
    visitor.page.locator("#pvl-ask").get_by_label("Clear").click()
    visitor.drop(write_image(tmp_path / "one.png"))
    visitor.find(TEXT)


def test_a_volume_is_gone_through_predicted_and_downloaded(visitor, model, tmp_path):
    nib = pytest.importorskip("nibabel")
    nib.save(nib.Nifti1Image(noise(24, 28, 12), np.diag([2.0, 1.5, 4.0, 1.0])), tmp_path / "scan.nii.gz")
    visitor.drop(tmp_path / "scan.nii.gz")
    slider = visitor.page.get_by_label("range slider for Slice").first
    slider.wait_for()
    before, passes = visitor.picture(), len(model.passes)
    slider.fill("2")
    visitor.wait_for_change(before)
    assert len(model.passes) == passes
    visitor.page.get_by_label("What to find").fill(f"{TEXT}\none polyp")
    visitor.page.get_by_role("button", name="Find in all slices").click()
    visitor.page.get_by_text("Predicted 12 of 12 slices").wait_for()
    visitor.page.get_by_text(" ml").first.wait_for()
    visitor.page.get_by_label("one polyp").click()
    visitor.page.get_by_text("Epistemic", exact=True).wait_for()
    with visitor.page.expect_download() as download:
        visitor.page.get_by_role("button", name="Download everything").click()
    assert download.value.suggested_filename == "scan_found.zip"


def test_two_visitors_see_their_own(visitor, browser, site, tmp_path):
    other = Visitor(browser, site, width=390)
    for each, seed, size in ((visitor, 0, (40, 60)), (other, 1, (60, 40))):
        each.drop(write_image(tmp_path / f"picture{seed}.png", seed=seed, size=size))
        each.page.get_by_label("What to find").fill(f"sentence {seed}")
    for each in (visitor, other):  # both at once
        each.page.get_by_role("button", name="Find", exact=True).click()
    for each, seed in ((visitor, 0), (other, 1)):
        each.page.locator(".pvl-card dl").first.wait_for()
        assert each.page.locator(".pvl-card b").first.inner_text() == f"sentence {seed}"
        assert each.page.locator(".pvl-panels figcaption").first.inner_text() == f"picture{seed}"
        height, width = each.picture().shape[:2]
        assert (height > width) == (seed == 1)
    assert other.page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out on a phone
    other.context.close()


def test_examples_are_found_by_a_click(visitor):
    visitor.page.locator("tr.tr-body").first.click()
    visitor.page.locator(".pvl-card dl").first.wait_for()
    assert visitor.page.get_by_label("What to find").input_value() == "the brain"
