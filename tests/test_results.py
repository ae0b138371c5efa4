"""Results of volumes: masks lie where the picture is bright, along every axis, and files have the input's geometry."""

from __future__ import annotations

import json
from datetime import datetime
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from example_model import contents, noise
from fake_predictions import bright, found_in, prediction, source_of
from PIL import Image
from test_cli_predict_scans import NORMAL, OBLIQUE, write_multi_frame, write_series

from pvl_adapter.data.label_files import read_nifti_labels
from pvl_adapter.data.presets import Code, Label
from pvl_adapter.data.results import Result, ResultOptions
from pvl_adapter.data.scans import InputOptions, open_input

AXES = [("x",), ("y",), ("z",), ("x", "y", "z")]
SHAPE = (9, 7, 5)


def blobs(*shape: int, seed: int = 0) -> np.ndarray:
    """Black and white."""
    return (noise(*shape, seed=seed) > 128).astype(np.uint8)


def write_nifti(path, voxels, *, axes="RAS", unit="mm", affine=OBLIQUE):
    """Stored along other axes, with a qform that differs from the sform."""
    image = nib.Nifti1Image(voxels, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    image = image.as_reoriented(turn)
    image.set_qform(np.diag([*image.header.get_zooms()[:3], 1.0]), code=1)
    image.set_sform(image.affine, code=2)
    image.header.set_xyzt_units(unit, "sec")
    nib.save(image, path)
    return path


def voxels_of(path):
    return np.asarray(nib.load(path).dataobj)


# ---- geometry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", AXES, ids="".join)
@pytest.mark.parametrize("stored", ["RAS", "PIL", "SAR"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_nifti_mask_is_the_bright_voxels_along_every_axis(axes, stored, times, tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", blobs(*SHAPE, *[times][: times - 1]), axes=stored)
    result = found_in(path, options=InputOptions(axes=axes), maps=True)
    result.write(tmp_path, "found")
    scan = nib.load(path)
    for name in ("mask", "probability", "uncertainty", "epistemic"):
        written = nib.load(tmp_path / f"found_{name}.nii.gz")
        assert written.shape == scan.shape
        np.testing.assert_array_equal(written.affine, scan.affine)
        for form in ("get_qform", "get_sform"):
            np.testing.assert_array_equal(getattr(written, form)(), getattr(scan, form)())
        assert written.header.get_zooms() == scan.header.get_zooms()
        assert written.header.get_xyzt_units() == ("mm", "sec")
        expected = voxels_of(path) if name in ("mask", "probability") else np.zeros(scan.shape)
        np.testing.assert_allclose(written.dataobj, expected, atol=1e-6)
    found, voxel = voxels_of(path).sum() / times, abs(np.linalg.det(scan.affine[:3, :3]))
    assert result.measures(0)["found_ml"] == pytest.approx(found * voxel / 1000)
    assert result.measures(0)["found_pixels"] == found


def test_axes_that_disagree_are_averaged_and_leave_doubt(tmp_path):
    """Slices along z find everything, those along x and y nothing."""
    path, axis = write_nifti(tmp_path / "a.nii", blobs(4, 6, 8)), {(8, 6): 0.2, (8, 4): 0.5, (6, 4): 0.95}
    seen = lambda image, _: np.full(image.shape, axis[image.shape], np.float32)  # noqa: E731
    result = found_in(path, seen=seen, options=InputOptions(axes=("x", "y", "z")), maps=True, threshold=0.5)
    result.write(tmp_path, "found")
    entropy = lambda p: -(p * np.log(p) + (1 - p) * np.log(1 - p))  # noqa: E731
    p, mean = 0.55, np.mean([entropy(each) for each in axis.values()])
    assert voxels_of(tmp_path / "found_mask.nii.gz").all()
    for name, value in {"probability": p, "uncertainty": entropy(p), "epistemic": entropy(p) - mean}.items():
        np.testing.assert_allclose(voxels_of(tmp_path / f"found_{name}.nii.gz"), value, rtol=1e-5)
    measures = result.measures(0)
    assert measures["mean_uncertainty"] == pytest.approx(entropy(p), rel=1e-5)
    assert measures["review_score"] == pytest.approx(1 - (2 * p + 1e-3) / (p + 1 + 1e-3), rel=1e-5)


@pytest.mark.parametrize(("unit", "millimetre"), [("meter", 1000.0), ("mm", 1.0), ("micron", 0.001), ("unknown", 1.0)])
def test_units_of_the_header_count(unit, millimetre, tmp_path):
    path = write_nifti(tmp_path / "a.nii", np.ones((4, 5, 6), np.uint8) * 9, unit=unit)
    result = found_in(path, options=InputOptions(window=(0, 2)))
    assert result.measures(0)["found_ml"] == pytest.approx(120 * 0.9 * 1.1 * 2.0 * millimetre**3 / 1000)


@pytest.mark.parametrize("axes", [(), *AXES], ids="".join)
@pytest.mark.parametrize("kind", ["series", "frames"])
def test_a_dicom_mask_is_the_bright_voxels_along_every_axis(axes, kind, tmp_path):
    """Of a shuffled oblique series, and of a file of frames."""
    highdicom = pytest.importorskip("highdicom")
    window = (-24, 2000)  # stored values of 0 to 2000, rescaled to HU
    paths = write_series(tmp_path / "in") if kind == "series" else [write_multi_frame(tmp_path / "in.dcm")]
    result = found_in(paths[0].parent if kind == "series" else paths[0], options=InputOptions(window, axes))
    result.write(tmp_path, "found")
    assert result.volume.notes == []
    stored = [pydicom.dcmread(path) for path in paths]
    # in the order of their places: `write_series` returns them so
    expected = np.concatenate([header.pixel_array.reshape(-1, 30, 44) for header in stored])
    expected = np.rint(expected / 2000 * 255) / 255 > 0.5
    with np.load(tmp_path / "found.npz") as saved:
        np.testing.assert_array_equal(saved["mask"], expected)
    segments = highdicom.seg.segread(tmp_path / "found.seg.dcm")
    if kind == "series":
        instances = [header.SOPInstanceUID for header in stored]
        planes = segments.get_pixels_by_source_instance(instances, ignore_spatial_locations=True)
    else:
        planes = segments.get_pixels_by_source_frame(
            stored[0].SOPInstanceUID, [1, 2, 3, 4], ignore_spatial_locations=True
        )
    np.testing.assert_array_equal(planes[..., 0], expected)
    if kind == "series":  # it lies where highdicom sees the series
        np.testing.assert_allclose(segments.get_volume().affine, highdicom.get_volume_from_series(stored).affine)
    assert result.measures(0)["found_ml"] == pytest.approx(expected.sum() * 0.4 * (2.5, 3)[kind == "frames"] / 1000)


def test_frames_of_a_file_may_lie_in_any_order(tmp_path):
    path, places = write_multi_frame(tmp_path / "in.dcm"), [2, 0, 3, 1]
    header = pydicom.dcmread(path)
    for group, place in zip(header.PerFrameFunctionalGroupsSequence, places, strict=True):
        group.PlanePositionSequence[0].ImagePositionPatient = [0.0, 0.0, 3.0 * place]
    header.save_as(path)
    expected = np.rint(header.pixel_array / 2000 * 255) / 255 > 0.5
    for axes in ((), ("x",)):
        result = found_in(path, options=InputOptions((-24, 2000), axes))
        assert (result.volume.slice_mm > 0.4, result.volume.notes) == (True, [])
        result.write(tmp_path, "found")
        with np.load(tmp_path / "found.npz") as saved:
            assert saved["slices"].tolist() == [1, 3, 0, 2]
            np.testing.assert_array_equal(saved["mask"], expected[saved["slices"]])


@pytest.mark.parametrize("lacking", ["tilted", "uneven", "colours", "without a position"])
def test_dicom_that_cannot_be_cut_along_another_axis_is_one_error(lacking, tmp_path):
    step = NORMAL + np.array([0.0, 0.3, 0.0]) if lacking == "tilted" else NORMAL
    place = lambda number: number**2 if lacking == "uneven" else number  # noqa: E731
    path = tmp_path / "in"
    write_series(path, change=lambda at: {"ImagePositionPatient": list(np.round(place(at) * step, 6))})
    if lacking == "without a position":
        path = write_multi_frame(tmp_path / "in.dcm")
        header = pydicom.dcmread(path)
        del header.PerFrameFunctionalGroupsSequence
        header.save_as(path)
    if lacking == "colours":
        for file in path.iterdir():
            header = pydicom.dcmread(file)
            header.SamplesPerPixel, header.PhotometricInterpretation, header.PlanarConfiguration = 3, "RGB", 0
            header.PixelData *= 3
            header.save_as(file)
    with pytest.raises(ValueError, match=r"dcm: got"):
        found_in(path, options=InputOptions(axes=("x",)))


# ---- frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["tif", "gif"])
def test_all_frames_of_a_sequence_are_predicted_unless_one_is_named(suffix, tmp_path):
    frames = np.stack([blobs(20, 24, seed=seed) for seed in range(4)]) * np.uint8(255)
    first, *others = map(Image.fromarray, frames)
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others)
    result = found_in(tmp_path / f"a.{suffix}")
    result.write(tmp_path, "found")
    for name, expected in (("mask", frames), ("probability", frames.astype(np.uint16) * 257)):
        with Image.open(tmp_path / f"found_{name}.tif") as pages:
            assert pages.n_frames == 4
            for number in range(4):
                pages.seek(number)
                np.testing.assert_array_equal(np.array(pages), expected[number])
    assert (result.measures(0)["found_pixels"], np.isnan(result.measures(0)["found_ml"])) == (frames.sum() // 255, True)
    one = source_of(tmp_path / f"a.{suffix}#frame=2")
    assert open_input(one, InputOptions()).keys == [("frame", 2)]


# ---- cleaning, labels, promises -------------------------------------------------------------------------------------


def test_holes_are_filled_and_the_largest_region_is_kept_in_space(tmp_path):
    voxels = np.zeros((12, 12, 12), np.uint8)
    voxels[1:6, 1:6, 1:6] = 1
    voxels[3, 3, 3] = 0  # enclosed
    voxels[1:3, 3, 4] = 0  # a tunnel to the outside, though each slice along z encloses one
    voxels[8:, 8:11, 2:4] = 1
    path = write_nifti(tmp_path / "a.nii", voxels)
    wanted = voxels.copy()
    wanted[3, 3, 3] = 1
    for axes in (("z",), ("x", "y", "z")):
        result = found_in(path, options=InputOptions(axes=axes), fill_holes=True)
        result.write(tmp_path, "filled")
        np.testing.assert_array_equal(voxels_of(tmp_path / "filled_mask.nii.gz"), wanted)
        result = found_in(path, options=InputOptions(axes=axes), fill_holes=True, largest_component=True)
        result.write(tmp_path, "cleaned")
        mask = voxels_of(tmp_path / "cleaned_mask.nii.gz")
        np.testing.assert_array_equal(mask, wanted * (np.arange(12) < 8)[:, None, None])
        assert result.measures(0)["found_pixels"] == mask.sum()
    Image.fromarray(voxels[:, :, 3] * np.uint8(255)).save(tmp_path / "b.png")
    found_in(tmp_path / "b.png", fill_holes=True, largest_component=True).write(tmp_path, "b")
    with Image.open(tmp_path / "b_mask.png") as mask:
        assert np.array(mask).astype(bool).sum() == 25
    with pytest.raises(ValueError, match="leave out the step"):
        found_in(path, options=InputOptions(slices=slice(None, None, 2)), fill_holes=True)


CODES = {"category": Code("123037004", "SCT", "Anatomical Structure"), "kind": Code("10200004", "SCT", "Liver")}
LABELS = [Label(300, "b", "the b", (255, 0, 0), **CODES), Label(7, "a", "the a", (0, 255, 0))]


def two(image: np.ndarray, k: int) -> np.ndarray:
    """The first finds the left two thirds, the second the right two thirds with more certainty."""
    third = image.shape[1] // 3
    found = np.full(image.shape, 0.1, np.float32)
    found[:, slice(None, 2 * third) if k == 0 else slice(third, None)] = 0.7 + 0.2 * k
    return found


@pytest.mark.parametrize("axes", [("z",), ("x", "y", "z")], ids="".join)
@pytest.mark.parametrize("clean", [False, True])
def test_several_sentences_give_one_label_map(axes, clean, tmp_path):
    path = write_nifti(tmp_path / "a.nii", np.ones((6, 6, 6), np.int16))
    seen = lambda image, k: two(image, k) if axes == ("z",) else np.full(image.shape, 0.7 + 0.2 * k, "f4")  # noqa: E731
    result = found_in(path, seen=seen, labels=LABELS, options=InputOptions(axes=axes), fill_holes=clean)
    result.write(tmp_path, "found")
    masks = {label.value: voxels_of(tmp_path / f"found_{label.name}_mask.nii.gz") for label in LABELS}
    labels = nib.load(tmp_path / "found_labels.nii.gz")
    np.testing.assert_array_equal(labels.dataobj, np.where(masks[7], 7, np.where(masks[300], 300, 0)))
    assert labels.get_data_dtype() == np.uint16
    assert {(each.value, each.name, each.color) for each in read_nifti_labels(labels)} == {
        (each.value, each.name, each.color) for each in LABELS
    }
    said = json.loads((tmp_path / "found_labels.json").read_text())
    shared = int((masks[7] & masks[300]).sum())
    assert said["overlaps"] == [{"first": "a", "second": "b", "pixels": shared}]
    assert shared > 0
    assert '"b"' in (tmp_path / "found_labels.txt").read_text()
    entropy = voxels_of(tmp_path / "found_entropy.nii.gz")
    assert ((entropy > 0.1) & (entropy < np.log(3))).all()
    again = tmp_path / "again"
    again.mkdir()
    swapped = lambda image, k: seen(image, 1 - k)  # noqa: E731
    how = {"options": InputOptions(axes=axes), "fill_holes": clean}
    other = found_in(path, seen=swapped, labels=LABELS[::-1], **how)
    other.write(again, "found")
    assert {name: content[1] for name, content in contents(again).items()} == {
        name: content[1] for name, content in contents(tmp_path).items() if name.startswith("found")
    }


def test_a_label_map_of_dicom_is_one_seg(tmp_path):
    highdicom = pytest.importorskip("highdicom")
    paths = write_series(tmp_path / "in")
    found_in(tmp_path / "in", seen=two, labels=LABELS).write(tmp_path, "found")
    made = highdicom.seg.segread(tmp_path / "found.seg.dcm")
    assert [(each.SegmentNumber, each.SegmentLabel) for each in made.SegmentSequence] == [(1, "a"), (2, "b")]
    assert made.SegmentSequence[1].SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    instances = [pydicom.dcmread(path).SOPInstanceUID for path in paths]
    planes = made.get_pixels_by_source_instance(instances, combine_segments=True, ignore_spatial_locations=True)
    with np.load(tmp_path / "found_labels.npz") as saved:
        np.testing.assert_array_equal(planes, np.searchsorted([7, 300], saved["labels"], side="right"))
    assert sorted(path.name for path in tmp_path.glob("*.dcm")) == ["found.seg.dcm"]


def test_a_label_map_of_an_image_has_a_palette(tmp_path):
    Image.fromarray(noise(9, 12)).save(tmp_path / "a.png")
    found_in(tmp_path / "a.png", seen=two, sentences=("left", "right")).write(tmp_path, "found")
    with Image.open(tmp_path / "found_labels.png") as image:
        assert (image.mode, np.array(image)[0].tolist()) == ("P", [1] * 4 + [2] * 8)
    assert (tmp_path / "found_left_mask.png").is_file()


def calibration(prediction_=None):
    """Promises everything."""
    pairs = lambda found: len(found.probability)  # noqa: E731
    return SimpleNamespace(
        outer_mask=lambda found: found.probability > 0.25,
        inner_mask=lambda found: found.probability > 0.75,
        area_moments=lambda found: (found.probability.mean(dim=(1, 2)), torch.full((pairs(found),), 0.1)),
        interval_of_sums=lambda area, error, volume: torch.stack([area - error, area + error]) * (2 if volume else 1),
        presence=lambda found: SimpleNamespace(verdict=["present"] * pairs(found)),
        flagged=lambda found: torch.ones(pairs(found), dtype=bool),
        abstained=lambda found: None,
        scorer=SimpleNamespace(calibrated=lambda probability: probability),
    )


def promised(path, *, axes=("z",), slices=None):
    volume = open_input(source_of(path), InputOptions((127.5, 255), axes, slices))
    result = Result(volume, LABELS[:1], ResultOptions())
    for key in volume.keys:
        result.add([key], prediction(bright(volume.read(key), 0)[None], calibration=calibration()))
    return result


def test_promises_are_written_where_the_model_is_calibrated(tmp_path):
    path = write_nifti(tmp_path / "a.nii", noise(9, 7, 5).astype(np.int16))
    result = promised(path)
    result.write(tmp_path, "found")
    mean = voxels_of(path).astype(float) / 255
    np.testing.assert_array_equal(voxels_of(tmp_path / "found_outer.nii.gz"), mean > 0.25)
    np.testing.assert_array_equal(voxels_of(tmp_path / "found_inner.nii.gz"), mean > 0.75)
    measures, voxel = result.measures(0), 0.9 * 1.1 * 2.0 / 1000
    areas, pixels = mean.mean(axis=(0, 1)).sum(), 9 * 7
    assert measures["least_ml"] == pytest.approx(2 * (areas - 0.5) * pixels * voxel, rel=1e-4)
    assert measures["most_ml"] == pytest.approx(2 * (areas + 0.5) * pixels * voxel, rel=1e-4)
    assert (measures["presence"], measures["flagged"], np.isnan(measures["least_mm2"])) == ("", True, True)
    for axes, slices in ((("x", "y", "z"), None), (("z",), slice(1, 3))):
        assert np.isnan(promised(path, axes=axes, slices=slices).measures(0)["least_ml"])

    Image.fromarray(noise(9, 12)).save(tmp_path / "a.png")
    result = promised(tmp_path / "a.png")
    measures = result.measures(0)
    assert any("not within its interval" in note for note in result.notes) == (
        not measures["least_pixels"] <= measures["found_pixels"] <= measures["most_pixels"]
    )
    area = noise(9, 12).mean() / 255 * 108
    assert (measures["least_pixels"], measures["most_pixels"]) == pytest.approx((area - 10.8, area + 10.8), rel=1e-5)
    assert (measures["presence"], measures["flagged"], measures["abstained"]) == ("present", True, "")


# ---- the same bytes, and errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nifti", "dicom", "image", "frames"])
def test_a_result_has_the_same_bytes_every_time(kind, tmp_path):
    path = tmp_path / "in"
    if kind == "nifti":
        path = write_nifti(tmp_path / "a.nii.gz", noise(*SHAPE))
    elif kind == "dicom":
        pytest.importorskip("highdicom")
        write_series(path)
    else:
        pages = [Image.fromarray(page) for page in noise(1 + (kind == "frames"), 20, 24)]
        pages[0].save(path := tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    written = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        how = {"maps": True, "abstain": 0.5, "created": datetime(2026, 1, 2, 3, 4, 5)}
        found_in(path, seen=two, labels=LABELS, **how).write(folder, "found")
        written.append({name: content[1] for name, content in contents(folder).items()})
    assert written[0] == written[1]
    assert len(written[0]) > 8 or kind == "dicom"


def broken(path, kind):
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "no gzip":
        path.write_bytes(b"nothing" * 99)
    elif kind == "NaN":
        nib.save(nib.Nifti1Image(np.where(blobs(*SHAPE), np.nan, 1.0).astype("f4"), OBLIQUE), path)
    elif kind == "RGB":
        colours = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
        nib.save(nib.Nifti1Image(colours, OBLIQUE), path)
    elif kind == "one voxel wide":
        nib.save(nib.Nifti1Image(blobs(9, 1, 5), OBLIQUE), path)
    elif kind == "five dimensions":
        nib.save(nib.Nifti1Image(blobs(4, 4, 4, 1, 3), OBLIQUE), path)
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cut off", "damaged"),
        ("no gzip", "damaged"),
        ("NaN", "voxels that are NaN"),
        ("RGB", "expected a 3-D volume of plain numbers"),
        ("one voxel wide", "cut along y"),
        ("five dimensions", "expected a 3-D volume"),
    ],
)
def test_a_volume_that_cannot_be_read_is_one_error(kind, said, tmp_path):
    path = broken(write_nifti(tmp_path / "a.nii.gz", noise(*SHAPE)), kind)
    with pytest.raises(ValueError, match=said) as error:
        found_in(path)
    assert "\n" not in str(error.value)
    assert "a.nii.gz" in str(error.value)


def test_axes_and_slices_that_make_no_sense_are_refused():
    for given in ({"axes": ("w",)}, {"axes": ("x", "x")}, {"axes": ("x", "y"), "slices": slice(3)}):
        with pytest.raises(ValueError, match="expected"):
            InputOptions(**given)


def test_black_and_white_of_a_large_volume_are_its_exact_percentiles(tmp_path):
    voxels = np.random.default_rng(0).normal(size=(90, 80, 70))
    for values in (voxels.astype(np.float32), (1000 * voxels).astype(np.int16)):
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii.gz")
        volume = open_input(source_of(tmp_path / "a.nii.gz"), InputOptions()).volume
        assert volume.limits == tuple(float(level) for level in np.percentile(values, (0.5, 99.5)))
