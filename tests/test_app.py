"""The page without a browser: its API, files good and bad, visitors side by side, and no request to outside."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from example_model import TEXT, noise, pixels, refuse, run, save_model, write_image

import pvl_adapter as pvl

gradio = pytest.importorskip("gradio")
nib = pytest.importorskip("nibabel")
import gradio_client  # noqa: E402
import httpx  # noqa: E402

from pvl_adapter.app import build  # noqa: E402
from pvl_adapter.app.session import Session  # noqa: E402

SEVERAL = f"{TEXT}\none polyp"
PAGE = Path(__file__).parents[1] / "docs" / "app.md"


@pytest.fixture(scope="module")
def site(open_clip_models, tmp_path_factory) -> Iterator[Any]:
    """A running page with a small model; at the end, no address but this machine's was asked for."""
    folder = save_model(open_clip_models["bert"], tmp_path_factory.mktemp("trained"))
    outside, connect = [], socket.socket.connect

    def recorded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            outside.append(address)
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", recorded)
        model = pvl.from_pretrained(folder)
        page = build(model, name="small", num_samples=2)
        page.launch(prevent_thread_lock=True, quiet=True)
        client = gradio_client.Client(page.local_url, verbose=False, analytics_enabled=False)
        yield SimpleNamespace(model=model, url=page.local_url, client=client, folder=folder)
        page.close(verbose=False)
    assert outside == []


def segment(site: Any, *files: Path, sentences: str = TEXT, **how: Any) -> tuple[list[dict[str, Any]], Path]:
    given = [gradio_client.handle_file(file) for file in files]
    found, packed = site.client.predict(given, sentences, api_name="/segment", **how)
    return found["found"], Path(packed)


def write_scan(path: Path) -> Path:
    nib.save(nib.Nifti1Image(noise(24, 28, 6), np.diag([2.0, 1.5, 4.0, 1.0])), path)
    return path


def test_the_api_finds_what_the_model_finds(site, tmp_path):
    image = write_image(tmp_path / "one.png")
    for threshold in (0.5, 0.4):
        ((found,), packed) = segment(site, image, threshold=threshold)
        expected = site.model.predict(image, TEXT, num_samples=2, threshold=threshold).at_original_size(0)
        assert (found["sentence"], found["pixels"]) == (TEXT, expected["mask"].sum())
        with zipfile.ZipFile(packed) as files:
            files.extractall(tmp_path / "found")
        np.testing.assert_array_equal(pixels(tmp_path / "found" / "one_mask.png") > 0, expected["mask"])


def test_a_volume_is_found_in_one_slice_or_in_all(site, tmp_path):
    scan = write_scan(tmp_path / "scan.nii.gz")
    for axis, pixel_mm2, slice_mm, count in (("axial", 3.0, 4.0, 6), ("sagittal", 6.0, 2.0, 24)):
        rows, packed = segment(site, scan, sentences=SEVERAL, axis=axis)
        found = np.zeros(2)
        for number in range(count):
            image = pvl.data.read_image(f"{scan}#{'z' if axis == 'axial' else 'x'}={number}")
            prediction = site.model.predict(image, sorted(SEVERAL.splitlines()), num_samples=2)
            found += [prediction.at_original_size(k)["mask"].sum() for k in range(2)]
        np.testing.assert_allclose([row["ml"] for row in rows], found * pixel_mm2 * slice_mm / 1000.0, rtol=1e-6)
        with zipfile.ZipFile(packed) as files:
            masks = sorted(name for name in files.namelist() if name.endswith("_mask.nii.gz"))
            files.extractall(tmp_path / axis)
            assert "scan_labels.nii.gz" in files.namelist()
        counted = [np.asarray(nib.load(tmp_path / axis / name).dataobj).sum() for name in masks]
        np.testing.assert_array_equal(counted, found)
    (row,), _ = segment(site, scan, slice_number=3)
    assert "ml" not in row
    assert row["mm2"] == row["pixels"] * 3.0


def test_a_dicom_series_in_a_zip_is_one_volume(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    header = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    for number in range(3):
        header.ImagePositionPatient = [0.0, 0.0, 5.0 * number]
        header.SOPInstanceUID = pydicom.uid.generate_uid()
        header.save_as(tmp_path / f"{number}")
    packed = Path(shutil.make_archive(str(tmp_path / "series"), "zip", tmp_path, "."))
    session = Session()
    session.take([packed])
    session.open()
    assert (len(session.sources), len(session.keys)) == (1, 3)
    assert session.volume is not None
    assert session.volume.slice_mm == pytest.approx(5.0)
    folder = session.folder
    session.close()
    assert folder is not None
    assert not folder.exists()


def test_bad_files_are_one_line_and_the_page_goes_on(site, tmp_path):
    broken = write_image(tmp_path / "broken.png")
    broken.write_bytes(broken.read_bytes()[:60])
    (tmp_path / "notes.txt").write_text("no image")
    hostile = tmp_path / "hostile.zip"
    with zipfile.ZipFile(hostile, "w") as files:
        files.writestr("../../escaped.txt", "nothing")
    for name, named in (("broken.png", "broken.png"), ("notes.txt", "notes.txt"), ("hostile.zip", "escaped.txt")):
        with pytest.raises(gradio_client.exceptions.AppError) as told:
            segment(site, tmp_path / name)
        assert named in str(told.value)
        assert "\n" not in str(told.value)
        assert "/tmp" not in str(told.value)
    with pytest.raises(gradio_client.exceptions.AppError, match="sentence"):
        segment(site, write_image(tmp_path / "one.png"), sentences=" \n")
    assert segment(site, tmp_path / "one.png")[0]


def test_thresholds_and_sentences_shown_need_no_pass(site, tmp_path, monkeypatch):
    from pvl_adapter.app.events import Events

    events, session = Events(site.model, {"num_samples": 2}, []), Session()
    events.receive(session, [str(write_image(tmp_path / "one.png"))], "axial", 0.5, 0.69)
    events.find(session, SEVERAL, 0, "", 0.5, 0.69)
    monkeypatch.setattr(site.model, "predict", None)
    views = {
        tuple(events.draw(session, 0, shown, threshold, abstain))
        for shown in ("all", *SEVERAL.splitlines())
        for threshold, abstain in ((0.5, 0.69), (0.4, 0.69), (0.5, 0.3))
    }
    assert len(views) == 9
    session.close()


def test_a_run_over_all_slices_ends_when_it_is_told_to(site, tmp_path):
    session = Session()
    session.take([write_scan(tmp_path / "scan.nii.gz")])
    session.open(axis="x")
    session.ask(TEXT)
    for done in session.predict_all(site.model, num_samples=0):
        if done:
            session.job = None
    assert (done, len(session.found), len(session.keys)) == (8, 8, 24)
    assert session.result is None
    session.close()


def test_visitors_at_once_get_their_own_answers(site, tmp_path):
    images = [write_image(tmp_path / f"{seed}.png", seed=seed, size=(40, 40 + seed)) for seed in range(4)]
    clients = [gradio_client.Client(site.url, verbose=False, analytics_enabled=False) for _ in images]

    def ask(number: int) -> int:
        own = SimpleNamespace(client=clients[number])
        return segment(own, images[number])[0][0]["pixels"]

    with ThreadPoolExecutor(4) as pool:
        counted = list(pool.map(ask, range(4)))
    expected = [site.model.predict(image, TEXT, num_samples=2).at_original_size(0)["mask"].sum() for image in images]
    assert counted == expected


def test_hostile_names_are_shown_as_text(site, tmp_path):
    from pvl_adapter.app.events import Events

    events, session = Events(site.model, {"num_samples": 0}, []), Session()
    events.receive(session, [str(write_image(tmp_path / "<img src=x>{{x}}.png"))], "axial", 0.5, 0.69)
    *_, view, table = events.find(session, "<script>alert(1)</script> ${x}", 0, "", 0.5, 0.69)
    assert "<img src=x>" not in view
    assert "<script>" not in table
    assert not {"{{", "${"} & {view[at : at + 2] for at in range(len(view))}
    session.close()


def test_what_the_documentation_calls_works(site, tmp_path, monkeypatch):
    write_image(tmp_path / "scan.png")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(from gradio_client.*?)```", PAGE.read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(block.replace("http://127.0.0.1:7860", site.url), scope)
    assert scope["found"]["found"][0]["pixels"] >= 0
    assert (
        scope["client"].predict(api_name="/model")["trained on"] == "not recorded: take adapters and head for untrained"
    )
    named = set(scope["client"].view_api(return_format="dict")["named_endpoints"])
    assert named == {"/segment", "/model"}


def test_nothing_is_asked_of_the_network(site):
    """`site` looks at sockets; the page's own policy forbids browsers the rest."""
    answer = httpx.get(site.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=[\"'](?:https?:)?//[^\"']+", answer.text)
    assert loaded == []


def test_the_command_says_where_it_is_and_ends_cleanly(site, tmp_path, monkeypatch, capsys):
    write_image(tmp_path / "in" / "one.png")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # restored afterwards
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert str(port) in refuse(capsys, "app", site.folder, f"--port={port}", "--device=cpu")

    def end() -> int:
        while True:
            with suppress(httpx.HTTPError):
                code = httpx.get(f"http://127.0.0.1:{port}", timeout=30).status_code
                time.sleep(0.2)  # the line is printed
                os.kill(os.getpid(), signal.SIGTERM)
                return code
            time.sleep(0.1)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor() as pool:
            ended = pool.submit(end)
            assert run("app", site.folder, f"--port={port}", f"--examples={tmp_path / 'in'}", "--device=cpu") == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended.result() == 200
    assert capsys.readouterr().out == f"{site.folder} is at http://127.0.0.1:{port}/; Ctrl-C ends it\nended\n"
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("wrong", ["--num-samples=some", "--port=99999999"])
def test_wrong_options_are_named_before_the_model_is_loaded(wrong, capsys):
    assert wrong.split("=")[0] in refuse(capsys, "app", "no-model", wrong).splitlines()[-1]
