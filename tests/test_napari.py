"""The napari plugin, offscreen: where layers lie, what the model is shown, and what a second sentence costs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_model import noise
from saved_models import official

import pvl_adapter as pvl
from pvl_adapter.data import read_image

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
pytest.importorskip("napari")
pytest.importorskip("qtpy.QtWidgets", exc_type=ImportError)
nib = pytest.importorskip("nibabel")

from napari.components import ViewerModel  # noqa: E402
from qtpy.QtWidgets import QApplication  # noqa: E402

from pvl_adapter import napari as plugin  # noqa: E402

LEFT, POLYP = "a tumor at the left", "one polyp"
OBLIQUE = np.array([[0.1, -1.9, 0.2, 9.0], [2.1, 0.1, 0.1, -30.0], [0.1, 0.2, -3.0, 40.0], [0, 0, 0, 1.0]])
AFFINES = {"radiological": np.diag([-1.0, 1.5, 2.0, 1.0]), "permuted_and_oblique": OBLIQUE}


@pytest.fixture(scope="module")
def model(words) -> pvl.MedCLIPSeg:
    return official(words)


@pytest.fixture(params=AFFINES)
def volume(request, tmp_path) -> Path:
    nib.save(
        nib.Nifti1Image(noise(16, 20, 12, most=900, dtype=np.int16), AFFINES[request.param]), tmp_path / "v.nii.gz"
    )
    return tmp_path / "v.nii.gz"


def opened(path: Path) -> tuple[ViewerModel, Any]:
    viewer = ViewerModel()
    ((data, how, kind),) = plugin.get_reader(str(path))(str(path))
    assert kind == "image"
    return viewer, viewer.add_image(data, **how)


def test_the_manifest_is_valid_and_importing_loads_neither_qt_nor_torch():
    npe2 = pytest.importorskip("npe2")
    manifest = npe2.PluginManifest.from_file(Path(plugin.__file__).with_suffix(".yaml"))
    manifest.validate_imports()
    code = "import sys, pvl_adapter.napari; print([m for m in sys.modules if m in ('torch', 'qtpy', 'napari')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_every_voxel_of_a_nifti_lies_where_its_affine_says(volume):
    _, layer = opened(volume)
    image = nib.load(volume)
    at = [layer.world_to_data(-world[::-1]) for world in positions(image)]
    assert np.allclose(at, np.rint(at), atol=1e-3)
    found = [layer.data[tuple(np.rint(each).astype(int))] for each in at]
    assert np.array_equal(found, [image.get_fdata()[tuple(at)] for at in corners(image)])
    assert plugin.get_reader("scan.png") is None


def result_of(generator: Any) -> Any:
    while True:
        try:
            next(generator)
        except StopIteration as ended:
            return ended.value


def corners(image: Any) -> list[np.ndarray]:
    return [np.array(at) for at in ((0, 0, 0), (15, 0, 0), (3, 19, 1), (2, 5, 11), (15, 19, 11))]


def positions(image: Any) -> list[np.ndarray]:
    """In mm to the right, front and head."""
    return [(image.affine @ [*at, 1.0])[:3] for at in corners(image)]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_model_is_shown_what_the_command_line_shows_it(volume, axis):
    _, layer = opened(volume)
    for number in (0, 3):
        point = layer.data_to_world([number if each == axis else 0 for each in range(3)])
        picture = plugin.Picture.of(layer, point=point, axis=axis)
        of_file = layer.data.shape[axis] - 1 - number
        assert np.array_equal(picture.levels(picture.places[0]), read_image(f"{volume}#{'zyx'[axis]}={of_file}"))


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_results_lie_on_the_picture_and_are_those_of_each_slice(model, volume, axis, every):
    _, layer = opened(volume)
    layer.scale, layer.translate = (2.0, 1.0, 0.5), (3.0, 4.0, 5.0)
    at = np.array([3, 4, 5])
    picture = plugin.Picture.of(layer, point=layer.data_to_world(at), axis=axis, every=every)
    asking = plugin.find(model, picture, [LEFT], num_samples=2, parts={})
    found = result_of(asking)
    maps = picture.joined([each[0] for each in found.probability], mode="bilinear")
    viewer = ViewerModel()
    result = viewer.add_image(maps, **picture.look)

    first = np.where((np.arange(3) == axis) & (not every), at, 0)
    assert np.allclose(result.data_to_world(at - first), layer.data_to_world(at))
    levels = np.take(layer.data, at[axis], axis=axis)
    low, high = layer.contrast_limits
    levels = np.rint(np.clip((levels - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    expected = model.predict(levels, LEFT, num_samples=2).at_original_size(0)
    assert np.allclose(np.take(maps, at[axis] if every else 0, axis=axis), expected["probability"], atol=1e-5)
    labels = found.labels(threshold=0.5, abstain=9.0, uncertainty=maps)
    assert np.array_equal(np.take(labels, at[axis] if every else 0, axis=axis), expected["mask"])


def test_colours_in_two_dimensions_and_a_time_axis_with_a_volume(model):
    viewer = ViewerModel()
    colours = viewer.add_image(noise(20, 30, 3), rgb=True, scale=(2, 3))
    picture = plugin.Picture.of(colours, point=(0, 0))
    assert picture.shape == (20, 30)
    assert np.array_equal(picture.levels(picture.places[0]), colours.data)

    series = viewer.add_image(noise(4, 6, 20, 30), translate=(0, 5, 0, 0))
    for axis in range(4):
        picture = plugin.Picture.of(series, point=(2, 8, 7, 6), axis=axis, every=True)
        assert picture.shape[axis] == series.data.shape[axis]
        place = picture.places[1]
        assert picture.levels(place).shape == np.asarray(series.data[place]).shape
        joined = picture.joined([torch.full((8, 8), float(n)) for n in range(len(picture.places))], mode="nearest")
        assert joined.shape == picture.shape
        assert np.array_equal(np.unique(np.take(joined, 1, axis=axis)), [1.0])


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    return model.save_pretrained(tmp_path_factory.mktemp("model") / "saved")


def ask(panel: plugin.Panel, sentences: str) -> None:
    panel.sentences.value = sentences
    panel.start_or_stop()
    ends = time.monotonic() + 60
    while panel.worker is not None and time.monotonic() < ends:
        QApplication.instance().processEvents()
        time.sleep(0.005)


def test_the_panel_asks_in_a_thread_and_its_sliders_need_no_pass(saved, monkeypatch):
    app = QApplication.instance() or QApplication([])
    viewer = ViewerModel()
    image = viewer.add_image(noise(4, 20, 30), scale=(3, 1, 1))
    panel = plugin.make_widget(viewer)._panel
    with pytest.raises(ValueError, match="fill in the fields"):
        panel.start_or_stop()
    panel.folder.line_edit.value, panel.samples.value = str(saved), 2

    ask(panel, LEFT)
    assert [layer.name for layer in viewer.layers[1:]] == [f"{LEFT}: probability", f"{LEFT}: uncertainty", LEFT]
    assert all(np.allclose(layer.scale, 1) and layer.data.shape == (1, 20, 30) for layer in viewer.layers[1:])
    parts = dict(panel.parts)
    ask(panel, f"{POLYP}\n{LEFT}\n{POLYP}")
    assert panel.parts == parts  # the same object: the image was not prepared again
    assert panel.labels.features["name"].tolist() == [LEFT, POLYP, "unsure"]
    assert set(panel.history.choices) == {None, LEFT, f"{POLYP}\n{LEFT}"}

    monkeypatch.setattr(pvl.MedCLIPSeg, "predict", None)
    expected = panel.found.probability[0]
    panel.threshold.value = 0.9
    assert panel.labels.data.max() <= 2
    assert (panel.labels.data > 0).mean() <= (expected > 0.9).any(dim=0).float().mean() + 0.2
    panel.abstain.value = 0.0
    assert (panel.labels.data == 3).all()
    panel.abstain.value, panel.threshold.value = 1.0, 1.0
    assert not panel.labels.data.any()
    assert image in viewer.layers
    assert app is not None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_that_is_not_there_is_said_in_one_line(tmp_path):
    app = QApplication.instance() or QApplication([])
    viewer = ViewerModel()
    viewer.add_image(noise(20, 30))
    panel = plugin.make_widget(viewer)._panel
    panel.folder.line_edit.value = str(tmp_path / "nothing")
    hook, sys.excepthook, told = sys.excepthook, lambda *_: None, None
    try:
        ask(panel, LEFT)
        told = panel.status.value
    finally:
        sys.excepthook = hook
    assert "nothing" in told
    assert "\n" not in told
    assert panel.run.text == "Find"
    assert app is not None


def test_a_damaged_file_is_said_in_one_line(tmp_path):
    (tmp_path / "bad.nii.gz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.nii\.gz is damaged or not NIfTI"):
        plugin.get_reader(str(tmp_path / "bad.nii.gz"))("")
