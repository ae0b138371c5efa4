"""examples/predict.py on NIfTI and DICOM: masks lie on the input's own voxels, and what it lacks is reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_model import (
    SAMPLES,
    TEXT,
    Predict,
    expected,
    noise,
    pixels,
    predict_into,
    small_segmenter,
    write_image,
)

import pvl_adapter as pvl
from pvl_adapter.data import read_image

highdicom, nib, pydicom = map(pytest.importorskip, ("highdicom", "nibabel", "pydicom"))  # of pvl-adapter[examples]
from pydicom.data import get_testdata_file  # noqa: E402

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.1, 0.15) @ np.diag([0.9, 1.1, 2.0]), [-10.0, 20.0, 5.0]
)


@pytest.fixture(scope="module")
def model(open_clip_models) -> pvl.MedCLIPSeg:
    return small_segmenter(open_clip_models["bert"])


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory) -> Path:
    return model.save_pretrained(tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture
def predict(trained, tmp_path) -> Predict:
    return predict_into(tmp_path / "out", trained)


# --- NIfTI -----------------------------------------------------------------------------------------------------------


def write_scan(path: Path, *, axes: str = "RAS", shape: tuple[int, ...] = (24, 28, 6), seed: int = 0) -> Path:
    """A scan whose voxels are the same anatomy whatever the order of its axes."""
    image = nib.Nifti1Image(noise(*shape, seed=seed, most=900, dtype=np.int16), OBLIQUE)
    turn = nib.orientations.ornt_transform(nib.io_orientation(OBLIQUE), nib.orientations.axcodes2ornt(axes))
    image = image.as_reoriented(turn)
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=2)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


@pytest.mark.parametrize("axis", "xyz")
@pytest.mark.parametrize("axes", ["RAS", "SRP", "AIL"])
def test_maps_of_a_scan_lie_on_its_voxels(axes, axis, predict, model, tmp_path):
    path = write_scan(tmp_path / "scan.nii.gz", axes=axes)
    (row,) = predict(path, f"--axis={axis}", "--slices=1:3", "--abstain=0.5", "--batch-size=3")
    scan = nib.load(path)
    out = {name: nib.load(tmp_path / "out" / f"scan_{name}.nii.gz") for name in ("mask", "probability", "uncertainty")}
    for name, written in out.items():
        assert written.shape == scan.shape
        np.testing.assert_array_equal(written.affine, scan.affine)
        assert written.header["qform_code"] == 1
        assert written.header["sform_code"] == 2
        np.testing.assert_allclose(written.header.get_zooms(), scan.header.get_zooms())
        assert written.get_data_dtype() == (np.uint8 if name == "mask" else np.float32)

    canonical = {name: np.asarray(nib.as_closest_canonical(image).dataobj) for name, image in out.items()}
    assert {name: maps.shape for name, maps in canonical.items()} == dict.fromkeys(canonical, (24, 28, 6))
    found = 0
    for number in range(canonical["mask"].shape["xyz".index(axis)]):
        here = {name: maps.take(number, axis="xyz".index(axis)) for name, maps in canonical.items()}
        if number not in (1, 2):
            assert not here["mask"].any()
            assert not here["probability"].any()
            assert np.isnan(here["uncertainty"]).all()
            continue
        maps = expected(model, read_image(f"{path}#{axis}={number}"))
        # As a radiologist sees it: the first row is the most superior or anterior, the first column right or anterior.
        assert np.abs(here["probability"] - maps["probability"][::-1, ::-1].T).max() < 1e-5
        np.testing.assert_array_equal(here["mask"], maps["mask"][::-1, ::-1].T)
        found += maps["mask"].sum()
    assert int(row["found_pixels"]) == found
    voxel_ml = abs(np.linalg.det(scan.affine[:3, :3])) / 1000
    assert float(row["found_ml"]) == pytest.approx(found * voxel_ml, abs=1e-4)
    assert pixels(tmp_path / "out" / "scan_overlay.png").ndim == 3
    assert (tmp_path / "out" / "scan_abstain.nii.gz").is_file()


def test_one_slice_of_a_scan_has_an_area(predict, tmp_path):
    (row,) = predict(f"{write_scan(tmp_path / 'scan.nii.gz', axes='LAS')}#z=2")
    mask = np.asarray(nib.load(tmp_path / "out" / "scan_z2_mask.nii.gz").dataobj)
    assert mask[..., 2].sum() == mask.sum() > 0
    assert float(row["found_mm2"]) == pytest.approx(mask.sum() * 0.9 * 1.1, abs=1e-2)


@pytest.mark.parametrize(
    ("voxels", "part", "options", "named"),
    [
        (np.zeros((8, 8, 3, 2), np.uint8), "", [], "3-D"),
        (np.full((8, 8, 3), np.nan, np.float32), "", [], "NaN"),
        (np.zeros((8, 8, 6), np.uint8), "#z=6", [], "z=6"),
        (np.zeros((8, 8, 6), np.uint8), "#frame=1", [], "frame"),
        (np.zeros((8, 8, 6), np.uint8), "", ["--slices=10:"], "--slices"),
        (None, "", [], "damaged"),
    ],
)
def test_scans_that_cannot_be_predicted_are_reported(voxels, part, options, named, predict, tmp_path):
    path = tmp_path / "scan.nii.gz"
    if voxels is None:
        path.write_bytes(write_scan(path).read_bytes()[:-100])
    else:
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    (row,) = predict(f"{path}{part}", *options, code=1)
    assert named in row["error"]


@pytest.mark.parametrize("shape", [(24, 28), (24, 28, 1), (24, 28, 6, 1)])
def test_maps_have_the_shape_of_the_scan(shape, predict, tmp_path):
    nib.save(nib.Nifti2Image(noise(*shape, dtype=np.float32), OBLIQUE), tmp_path / "scan.nii")
    predict(tmp_path / "scan.nii")
    written = nib.load(tmp_path / "out" / "scan_uncertainty.nii.gz")
    assert isinstance(written, nib.Nifti2Image)
    assert written.shape == shape
    assert np.isfinite(written.get_fdata()).all()


def test_a_window_says_what_is_black_and_white(predict, model, tmp_path):
    path = f"{write_scan(tmp_path / 'one.nii')}#z=3"
    scores = [float(predict(path, *window)[0]["review_score"]) for window in ((), ("--window", "300", "500"))]
    for score, window in zip(scores, (None, (300.0, 500.0)), strict=True):
        wanted = model.predict(read_image(path, window=window), TEXT, num_samples=SAMPLES)
        assert score == pytest.approx(wanted.review_score.item(), abs=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-4


# --- DICOM -----------------------------------------------------------------------------------------------------------

ENHANCED_CT, ULTRASOUND, RADIOGRAPH = (f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("2.1", "3.1", "1"))
TILTED = [1.0, 0.0, 0.0, 0.0, 0.8, 0.6]  # rows and columns of a coronal-oblique plane, growing to left and back


def dicom(stored: np.ndarray, **attributes: Any) -> pydicom.Dataset:
    """A CT slice of pydicom's test data with other pixels and attributes; one that is None is left out."""
    header = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    header.remove_private_tags()
    size = {"Rows": stored.shape[-2], "Columns": stored.shape[-1], "PixelRepresentation": 0, "SliceThickness": 2.0}
    geometry = {"ImageOrientationPatient": TILTED, "PixelSpacing": [0.8, 0.5], "ImagePositionPatient": None}
    names = {"SOPInstanceUID": pydicom.uid.generate_uid(), "PatientName": "Müller^Ärzte", "PixelPaddingValue": None}
    for name, value in {**size, **geometry, **names, **attributes}.items():
        if value is None:
            header.pop(name, None)
        else:
            setattr(header, name, value)
    header.file_meta.MediaStorageSOPClassUID = header.get("SOPClassUID", ENHANCED_CT)
    header.PixelData = stored.astype(np.uint16).tobytes()
    return header


def stored(*shape: int, seed: int = 0) -> np.ndarray:
    return noise(*shape, seed=seed, most=2000, dtype=np.uint16)


def save(header: pydicom.Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)
    return path


def write_series(folder: Path, *, count: int = 5, change: Callable[[int], dict[str, Any]] = lambda _: {}) -> list[Path]:
    """Files in the order of their positions, whose names and instance numbers are in another order."""
    normal = np.cross(TILTED[:3], TILTED[3:])
    paths = []
    for number in range(count):
        position = {"ImagePositionPatient": list(np.round(2.5 * number * normal + [3.0, 1.0, -7.0], 6))}
        header = dicom(stored(30, 44, seed=number), InstanceNumber=7 * number % 5 + 1, **(position | change(number)))
        paths.append(save(header, folder / f"{(2 * number + 1) % count}.dcm"))
    return paths


def test_a_dicom_file_gets_a_seg_that_refers_to_it(predict, model, tmp_path):
    path = save(dicom(stored(30, 44), ImagePositionPatient=[0.0, 0.0, 0.0]), tmp_path / "ct.dcm")
    sentence = "Ménière: " + "a tumor at the left " * 5
    (row,) = predict(path, "--abstain=0.4", texts=(sentence,))
    maps = expected(model, read_image(path), text=sentence)
    seg = highdicom.seg.segread(tmp_path / "out" / "ct.seg.dcm")
    source = pydicom.dcmread(path)

    planes = seg.get_pixels_by_source_instance([source.SOPInstanceUID], ignore_spatial_locations=True)
    np.testing.assert_array_equal(planes[0, :, :, 0] > 0, maps["mask"])
    np.testing.assert_array_equal(planes[0, :, :, 1] > 0, maps["uncertainty"] > 0.4)
    assert (seg.StudyInstanceUID, seg.FrameOfReferenceUID) == (source.StudyInstanceUID, source.FrameOfReferenceUID)
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID
    assert str(seg.PatientName) == "Müller^Ärzte"
    first = seg.SegmentSequence[0]
    assert (first.SegmentLabel, first.SegmentDescription) == (sentence[:64].strip(), sentence.strip())
    assert (first.SegmentAlgorithmType, seg.SegmentationType) == ("AUTOMATIC", "BINARY")
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "ct_mask.png") > 0, maps["mask"])
    assert float(row["found_mm2"]) == pytest.approx(maps["mask"].sum() * 0.4, abs=1e-2)
    assert row["note"] == ""


def test_a_radiograph_gets_a_seg(predict, model, tmp_path):
    """It has a spacing of pixels, but neither a position in space nor a thickness."""
    lacking = dict.fromkeys(("FrameOfReferenceUID", "ImageOrientationPatient", "SliceThickness"))
    header = dicom(stored(30, 44), SOPClassUID=RADIOGRAPH, Modality="CR", **lacking)
    path = save(header, tmp_path / "chest.dcm")
    (row,) = predict(path)
    seg = highdicom.seg.segread(tmp_path / "out" / "chest.seg.dcm")
    planes = seg.get_pixels_by_source_instance([header.SOPInstanceUID], ignore_spatial_locations=True)
    np.testing.assert_array_equal(planes[0, :, :, 0] > 0, expected(model, read_image(path))["mask"])
    assert float(row["found_mm2"]) == pytest.approx(int(row["found_pixels"]) * 0.4, abs=1e-2)


def test_a_series_is_put_in_order(predict, model, tmp_path):
    paths = write_series(tmp_path / "in" / "series")
    write_image(tmp_path / "in" / "series" / "beside.png")
    rows = {row["name"]: row for row in predict(tmp_path / "in", "--slices=1:4", "--batch-size=2")}
    assert set(rows) == {"series", "series/beside"}
    out = tmp_path / "out"
    seg = highdicom.seg.segread(out / "series.seg.dcm")
    instances = [pydicom.dcmread(path).SOPInstanceUID for path in paths]
    with np.load(out / "series.npz") as saved:
        maps = dict(saved)
    assert maps["instances"].tolist() == instances[1:4]
    assert maps["slices"].tolist() == [1, 2, 3]
    planes = seg.get_pixels_by_source_instance(instances[1:4], ignore_spatial_locations=True)
    found = 0
    for index, path in enumerate(paths[1:4]):
        wanted = expected(model, read_image(path))
        np.testing.assert_array_equal(planes[index, :, :, 0] > 0, wanted["mask"])
        np.testing.assert_array_equal(maps["mask"][index] > 0, wanted["mask"])
        np.testing.assert_allclose(maps["probability"][index], wanted["probability"], atol=1e-5)
        np.testing.assert_allclose(maps["uncertainty"][index], wanted["uncertainty"], atol=1e-5)
        found += wanted["mask"].sum()
    row = rows["series"]
    assert float(row["found_ml"]) == pytest.approx(found * 0.4 * 2.5 / 1000, abs=1e-3)
    assert row["found_mm2"] == row["note"] == ""
    assert row["input"].startswith(str(tmp_path / "in" / "series"))


def test_series_are_not_mixed(predict, tmp_path):
    for number, uid in enumerate((pydicom.uid.generate_uid(), pydicom.uid.generate_uid())):
        change = {"SeriesInstanceUID": uid, "SeriesNumber": number + 4}
        paths = write_series(tmp_path / "in", count=3, change=lambda _, change=change: change)
        for path in paths:
            path.rename(path.with_name(f"{number}-{path.stem}"))  # without a suffix
    write_series(tmp_path / "in" / "alone", count=1)
    rows = predict(tmp_path / "in")
    assert {row["name"] for row in rows} == {"in/series4", "in/series5", "alone/0"}
    for name in ("in/series4", "in/series5"):
        assert highdicom.seg.segread(tmp_path / "out" / f"{name}.seg.dcm").SeriesNumber == 1000 + int(name[-1])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda number: {"ImagePositionPatient": [0.0, 0.0, number // 2]}, "the same position"),
        (lambda number: {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]} if number == 2 else {}, "ImageOrientation"),
        (lambda number: {"PixelSpacing": [0.8, 0.6]} if number == 2 else {}, "PixelSpacing"),
    ],
)
def test_slices_that_are_no_stack_are_reported(change, named, predict, tmp_path):
    write_series(tmp_path / "in", change=change)
    (row,) = predict(tmp_path / "in", code=1)
    assert named in row["error"]


def test_uneven_gaps_are_noted_and_a_tilted_gantry_does_no_harm(predict, tmp_path):
    normal, down = np.cross(TILTED[:3], TILTED[3:]), np.array([0.0, 0.3, 0.0])
    positions = {"tilted": lambda number: normal * number + down * number, "uneven": lambda number: normal * number**2}
    for name, at in positions.items():
        change = lambda number, at=at: {"ImagePositionPatient": list(np.round(at(number), 6))}  # noqa: E731
        write_series(tmp_path / "in" / name, change=change)
    tilted, uneven = sorted(predict(tmp_path / "in"), key=lambda row: row["name"])
    assert (float(tilted["found_ml"]) > 0, tilted["note"]) == (True, "")
    assert uneven["found_ml"] == ""
    assert "1 to 7 mm apart" in uneven["note"]
    for name in positions:
        highdicom.seg.segread(tmp_path / "out" / f"{name}.seg.dcm")


def item(**values: Any) -> pydicom.Dataset:
    made = pydicom.Dataset()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def multi_frame(count: int = 4) -> pydicom.Dataset:
    """An enhanced CT: what it says of single frames is in sequences."""
    in_sequences = dict.fromkeys(("PixelSpacing", "ImageOrientationPatient", "SliceThickness"))
    header = dicom(stored(count, 30, 44), SOPClassUID=ENHANCED_CT, NumberOfFrames=count, **in_sequences)
    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=[0.8, 0.5], SliceThickness=2.0)],
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
    )
    positions = [item(ImagePositionPatient=[0.0, 0.0, 3.0 * frame]) for frame in range(count)]
    header.SharedFunctionalGroupsSequence = [shared]
    header.PerFrameFunctionalGroupsSequence = [item(PlanePositionSequence=[each]) for each in positions]
    return header


def test_frames_are_slices(predict, model, tmp_path):
    path = save(multi_frame(), tmp_path / "enhanced.dcm")
    (row,) = predict(path, "--slices=1:")
    seg = highdicom.seg.segread(tmp_path / "out" / "enhanced.seg.dcm")
    instance = pydicom.dcmread(path).SOPInstanceUID
    frames = [2, 3, 4]  # counted from 1
    planes = seg.get_pixels_by_source_frame(
        instance, frames, ignore_spatial_locations=True, assert_missing_frames_are_empty=True
    )
    found = 0
    for index, frame in enumerate(frames):
        wanted = expected(model, read_image(f"{path}#frame={frame - 1}"))["mask"]
        np.testing.assert_array_equal(planes[index, :, :, 0] > 0, wanted)
        found += wanted.sum()
    assert float(row["found_ml"]) == pytest.approx(found * 0.4 * 3 / 1000, abs=1e-3)


def test_what_an_input_lacks_for_a_seg_is_noted(predict, model, tmp_path):
    lacking = dict.fromkeys(("FrameOfReferenceUID", "ImageOrientationPatient"))
    cine = dicom(stored(3, 30, 44), SOPClassUID=ULTRASOUND, NumberOfFrames=3, Modality="US", **lacking)
    bare = dicom(stored(3, 30, 44), NumberOfFrames=3, SOPInstanceUID=None, SOPClassUID=None, StudyInstanceUID=None)
    odd = dicom(stored(2, 30, 44), NumberOfFrames=2, ImagePositionPatient=[0.0, 0.0, 0.0])
    torn = dicom(stored(30, 44), StudyInstanceUID=None)
    paths = {name: tmp_path / f"{name}.dcm" for name in ("cine", "bare", "odd", "torn")}
    for path, header in zip(paths.values(), (cine, bare, odd, torn), strict=True):
        save(header, path)
    rows = {row["name"]: row for row in predict(*paths.values())}
    for row in rows.values():
        assert "no DICOM SEG" in row["note"]
        assert not {"attribute", "apart"} & set(row["note"].split())  # not what Python says, no gaps of 0 mm
        assert ".seg.dcm" not in row["files"]
    assert "StudyInstanceUID" in rows["torn"]["note"]
    for name in ("cine", "bare"):
        with np.load(tmp_path / "out" / f"{name}.npz") as saved:
            for frame in range(3):
                wanted = expected(model, read_image(f"{paths[name]}#frame={frame}"))
                np.testing.assert_array_equal(saved["mask"][frame] > 0, wanted["mask"])
                np.testing.assert_allclose(saved["uncertainty"][frame], wanted["uncertainty"], atol=1e-5)
    assert (tmp_path / "out" / "torn_mask.png").is_file()


def report() -> pydicom.Dataset:
    made = dicom(stored(2, 2), Modality="SR", Rows=None, Columns=None)
    del made.PixelData
    return made


def test_what_lies_beside_a_series_is_left_out_and_named(predict, tmp_path, capsys):
    """Reports, and the segmentation of an earlier call."""
    write_series(tmp_path / "in")
    predict(tmp_path / "in")
    (tmp_path / "out" / "in.seg.dcm").rename(tmp_path / "in" / "found.dcm")
    save(report(), tmp_path / "in" / "report.dcm")
    (row,), said = predict(tmp_path / "in"), capsys.readouterr().err
    assert "#series=" in row["input"]
    assert all(name in said for name in ("found.dcm", "report.dcm"))


@pytest.mark.filterwarnings("ignore:Invalid value for VR IS")
def test_dicom_that_cannot_be_predicted_is_reported(predict, tmp_path):
    damaged = save(dicom(stored(30, 44), NumberOfFrames=3), tmp_path / "damaged.dcm")
    content = damaged.read_bytes()
    place = content.index(b"IS", content.index(b"\x28\x00\x08\x00")) + 4
    damaged.write_bytes(content[:place] + b"x " + content[place + 2 :])
    enhanced = save(multi_frame(), tmp_path / "enhanced.dcm")
    rows = predict(damaged, enhanced, save(report(), tmp_path / "report.dcm"), "--axis=x", code=1)
    errors = {Path(row["input"]).name: row["error"] for row in rows}
    for name, named in {"damaged.dcm": "damaged.dcm", "enhanced.dcm": "--axis", "report.dcm": "SR"}.items():
        assert named in errors[name]
