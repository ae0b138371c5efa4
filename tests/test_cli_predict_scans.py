"""`pvl-adapter predict` on NIfTI and DICOM: masks lie on the input's own voxels, and what it lacks is reported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from example_model import noise, pixels, write_image
from pydicom.data import get_testdata_file

from pvl_adapter.data import read_image

highdicom = pytest.importorskip("highdicom")  # of which not every Python has a build
ROTATION = nib.eulerangles.euler2mat(0.2, -0.1, 0.15)
OBLIQUE = nib.affines.from_matvec(ROTATION @ np.diag([0.9, 1.1, 2.0]), [-10.0, 20.0, 5.0])


def write_scan(path: Path, *, axes: str = "RAS") -> Path:
    """A scan whose voxels are the same anatomy whatever the order of its axes."""
    image = nib.Nifti1Image(noise(24, 28, 6, most=900, dtype=np.int16), OBLIQUE)
    turn = nib.orientations.ornt_transform(nib.io_orientation(OBLIQUE), nib.orientations.axcodes2ornt(axes))
    image = image.as_reoriented(turn)
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=2)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


@pytest.mark.parametrize(("axes", "axis"), [("RAS", "z"), ("RAS", "x"), ("SRP", "y"), ("AIL", "z"), ("AIL", "x")])
def test_maps_of_a_scan_lie_on_its_voxels(axes, axis, predict, tmp_path):
    path = write_scan(tmp_path / "scan.nii.gz", axes=axes)
    (row,) = predict(path, f"--axis={axis}", "--slices=1:3", "--abstain=0.5", "--batch-size=3")
    scan, maps = nib.load(path), {}
    for name in ("mask", "probability", "uncertainty", "abstain"):
        written = nib.load(predict.out / f"scan_{name}.nii.gz")
        np.testing.assert_array_equal(written.affine, scan.affine)
        assert (written.header["qform_code"], written.header["sform_code"]) == (1, 2)
        np.testing.assert_allclose(written.header.get_zooms(), scan.header.get_zooms())
        assert written.get_data_dtype() == (np.uint8 if name in ("mask", "abstain") else np.float32)
        assert written.shape == scan.shape
        maps[name] = np.moveaxis(np.asarray(nib.as_closest_canonical(written).dataobj), "xyz".index(axis), 0)
    assert not maps["mask"][[0, *range(3, len(maps["mask"]))]].any()
    assert np.isnan(maps["uncertainty"][[0, *range(3, len(maps["mask"]))]]).all()  # 0 nats would say that it is sure
    for number in (1, 2):
        wanted = predict.expected(read_image(f"{path}#{axis}={number}"))
        # As a radiologist sees it: the first row is the most superior or anterior, the first column right or anterior.
        np.testing.assert_allclose(maps["probability"][number], wanted["probability"][::-1, ::-1].T, atol=1e-5)
        np.testing.assert_array_equal(maps["mask"][number], wanted["mask"][::-1, ::-1].T)
        np.testing.assert_array_equal(maps["abstain"][number], wanted["uncertainty"][::-1, ::-1].T > 0.5)
    found, voxel_ml = maps["mask"].sum(), abs(np.linalg.det(scan.affine[:3, :3])) / 1000
    assert (int(row["found_pixels"]), row["found_mm2"]) == (found, "")
    assert float(row["found_ml"]) == pytest.approx(found * voxel_ml, abs=1e-4)
    assert pixels(predict.out / "scan_overlay.jpg").ndim == 3


def test_one_slice_of_a_scan_has_an_area_and_a_window(predict, tmp_path):
    path = f"{write_scan(tmp_path / 'scan.nii.gz', axes='LAS')}#z=2"
    for window in ((), (300.0, 500.0)):
        (row,) = predict(path, *(("--window", *window) if window else ()))
        mask = np.asarray(nib.load(predict.out / "scan_z2_mask.nii.gz").dataobj)
        assert mask[..., 2].sum() == mask.sum() > 0
        assert float(row["found_mm2"]) == pytest.approx(mask.sum() * 0.9 * 1.1, abs=1e-2)
        wanted = predict.predicted(read_image(path, window=window or None))
        assert float(row["review_score"]) == pytest.approx(wanted.review_score.item(), abs=1e-5)


@pytest.mark.parametrize("wrong", ["#z=6", "#frame=1", "--slices=10:"])
def test_slices_that_are_not_there_are_reported(wrong, predict, tmp_path):
    path = write_scan(tmp_path / "scan.nii.gz")
    (row,) = predict(f"{path}{wrong}", code=1) if "#" in wrong else predict(path, wrong, code=1)
    assert wrong.strip("#").split("=")[0] in row["error"]


def test_maps_have_the_shape_of_the_scan(predict, tmp_path):
    for shape in ((24, 28), (24, 28, 6, 1)):
        nib.save(nib.Nifti2Image(noise(*shape, dtype=np.float32), OBLIQUE), tmp_path / "scan.nii")
        predict(tmp_path / "scan.nii")
        written = nib.load(predict.out / "scan_uncertainty.nii.gz")
        assert (type(written), written.shape) == (nib.Nifti2Image, shape)
        assert np.isfinite(written.get_fdata()).all()


ENHANCED_CT, RADIOGRAPH = "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.1"
TILTED = [1.0, 0.0, 0.0, 0.0, 0.8, 0.6]  # rows and columns of a coronal-oblique plane, growing to left and back
NORMAL = np.cross(TILTED[:3], TILTED[3:])


def filled(header: pydicom.Dataset, **attributes: Any) -> pydicom.Dataset:
    """With attributes; those that are None are taken out."""
    for name, value in attributes.items():
        if value is None:
            header.pop(name, None)
        else:
            setattr(header, name, value)
    return header


def save(path: Path, *size: int, seed: int = 0, **attributes: Any) -> Path:
    """A CT slice of pydicom's test data with other pixels and attributes."""
    header = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    header.remove_private_tags()
    frames = {"NumberOfFrames": size[0]} if len(size) > 2 else {}
    plain = {"Rows": size[-2], "Columns": size[-1], "PixelRepresentation": 0, "SliceThickness": 2.0, **frames}
    geometry = {"ImageOrientationPatient": TILTED, "PixelSpacing": [0.8, 0.5], "ImagePositionPatient": None}
    names = {"SOPInstanceUID": pydicom.uid.generate_uid(), "PatientName": "Müller^Ärzte", "PixelPaddingValue": None}
    header.PixelData = noise(*size, seed=seed, most=2000, dtype=np.uint16).tobytes()
    filled(header, **{**plain, **geometry, **names, **attributes})
    header.file_meta.MediaStorageSOPClassUID = header.get("SOPClassUID", ENHANCED_CT)
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)
    return path


def write_series(folder: Path, *, count: int = 5, change: Callable[[int], dict[str, Any]] = lambda _: {}) -> list[Path]:
    """Files in the order of their positions, whose names and instance numbers are in another order."""
    paths = []
    for number in range(count):
        position = {"ImagePositionPatient": list(np.round(2.5 * number * NORMAL + [3.0, 1.0, -7.0], 6))}
        attributes = {"InstanceNumber": 7 * number % 5 + 1, **position, **change(number)}
        paths.append(save(folder / f"{(2 * number + 1) % count}.dcm", 30, 44, seed=number, **attributes))
    return paths


def write_multi_frame(path: Path) -> Path:
    """An enhanced CT: what it says of single frames is in sequences."""
    spacing = filled(pydicom.Dataset(), PixelSpacing=[0.8, 0.5], SliceThickness=2.0)
    turn = filled(pydicom.Dataset(), ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    shared = filled(pydicom.Dataset(), PixelMeasuresSequence=[spacing], PlaneOrientationSequence=[turn])
    positions = [filled(pydicom.Dataset(), ImagePositionPatient=[0.0, 0.0, 3.0 * frame]) for frame in range(4)]
    frames = [filled(pydicom.Dataset(), PlanePositionSequence=[each]) for each in positions]
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": frames}
    in_sequences = dict.fromkeys(("PixelSpacing", "ImageOrientationPatient", "SliceThickness"))
    return save(path, 4, 30, 44, SOPClassUID=ENHANCED_CT, **in_sequences, **groups)


def masks_of(seg: Path, sources: list[Path]) -> np.ndarray:
    """Read by highdicom: [sources, h, w, segments]."""
    instances = [pydicom.dcmread(path).SOPInstanceUID for path in sources]
    return highdicom.seg.segread(seg).get_pixels_by_source_instance(instances, ignore_spatial_locations=True) > 0


def test_a_dicom_file_gets_a_seg_that_refers_to_it(predict, tmp_path):
    """And so does a radiograph, which has a spacing of pixels, but neither a position in space nor a thickness."""
    lacking = dict.fromkeys(("FrameOfReferenceUID", "ImageOrientationPatient", "SliceThickness"))
    ct = save(tmp_path / "ct.dcm", 30, 44, ImagePositionPatient=[0.0, 0.0, 0.0])
    chest = save(tmp_path / "chest.dcm", 30, 44, seed=1, SOPClassUID=RADIOGRAPH, Modality="CR", **lacking)
    sentence = "Ménière: " + "a tumor at the left " * 5
    for row in predict(ct, chest, "--abstain=0.4", texts=(sentence,)):
        path, file = Path(row["input"]), predict.out / f"{row['name']}.seg.dcm"
        maps, planes = predict.expected(read_image(path), text=sentence), masks_of(file, [path])
        np.testing.assert_array_equal(planes[0, :, :, 0], maps["mask"])
        np.testing.assert_array_equal(planes[0, :, :, 1], maps["uncertainty"] > 0.4)
        np.testing.assert_array_equal(pixels(predict.out / f"{row['name']}_mask.png") > 0, maps["mask"])
        assert float(row["found_mm2"]) == pytest.approx(maps["mask"].sum() * 0.4, abs=1e-2)
        assert row["note"] == ""
        seg, source = highdicom.seg.segread(file), pydicom.dcmread(path)
        for name in {"StudyInstanceUID", "FrameOfReferenceUID", "PatientName"} & set(source.dir()):
            assert seg[name].value == source[name].value
        assert seg.SeriesInstanceUID != source.SeriesInstanceUID
        assert (seg.SegmentSequence[0].SegmentLabel, seg.SegmentationType) == (sentence[:64].strip(), "BINARY")


def test_a_series_is_put_in_order(predict, tmp_path):
    paths = write_series(tmp_path / "in" / "series")
    write_image(tmp_path / "in" / "series" / "beside.png")
    rows = {row["name"]: row for row in predict(tmp_path / "in", "--slices=1:4", "--batch-size=2")}
    assert set(rows) == {"series", "series/beside"}
    with np.load(predict.out / "series.npz") as saved:
        maps = dict(saved)
    assert maps["instances"].tolist() == [pydicom.dcmread(path).SOPInstanceUID for path in paths]
    assert maps["slices"].tolist() == [0, 1, 2, 3, 4]
    assert np.isnan(maps["uncertainty"][[0, 4]]).all()  # those that were not asked for
    planes = masks_of(predict.out / "series.seg.dcm", paths[1:4])
    for index, path in enumerate(paths[1:4]):
        wanted = predict.expected(read_image(path))
        np.testing.assert_array_equal(planes[index, :, :, 0], wanted["mask"])
        for name in ("mask", "probability", "uncertainty"):
            np.testing.assert_allclose(maps[name][index + 1], wanted[name], atol=1e-5)
    row = rows["series"]
    assert float(row["found_ml"]) == pytest.approx(maps["mask"].sum() * 0.4 * 2.5 / 1000, abs=1e-3)
    assert (row["found_mm2"], row["note"]) == ("", "")
    assert row["input"].startswith(str(tmp_path / "in" / "series"))


def test_series_are_not_mixed_and_what_lies_beside_them_is_named(predict, tmp_path, capsys):
    """Reports, and the segmentation of an earlier call."""
    for number in (4, 5):
        change = {"SeriesInstanceUID": pydicom.uid.generate_uid(), "SeriesNumber": number}
        for path in write_series(tmp_path / "in", count=3, change=lambda _, change=change: change):
            path.rename(path.with_name(f"{number}-{path.stem}"))  # without a suffix
    write_series(tmp_path / "in" / "alone", count=1)
    names = {"in/series4", "in/series5", "alone/0"}
    assert {row["name"] for row in predict(tmp_path / "in")} == names
    (predict.out / "in" / "series4.seg.dcm").rename(tmp_path / "in" / "found.dcm")
    shutil.copy(get_testdata_file("reportsi.dcm"), tmp_path / "in" / "report.dcm")
    assert {row["name"] for row in predict(tmp_path / "in")} == names
    said = capsys.readouterr().err
    assert all(name in said for name in ("found.dcm", "report.dcm"))
    assert highdicom.seg.segread(predict.out / "in" / "series5.seg.dcm").SeriesNumber == 1005


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("ImagePositionPatient", [3.0, 1.0, -7.0]),  # of slice 0
        ("ImageOrientationPatient", [1, 0, 0, 0, 1, 0]),
        ("PixelSpacing", [0.8, 0.6]),
    ],
)
def test_slices_that_are_not_a_stack_are_reported(name, changed, predict, tmp_path):
    write_series(tmp_path / "in", change=lambda number: {name: changed} if number == 2 else {})
    (row,) = predict(tmp_path / "in", code=1)
    assert ("the same position" if "Position" in name else name) in row["error"]


def test_uneven_gaps_are_noted_and_a_tilted_gantry_does_no_harm(predict, tmp_path):
    at = lambda position: {"ImagePositionPatient": list(np.round(position, 6))}  # noqa: E731
    write_series(tmp_path / "in" / "tilted", change=lambda number: at(number * (NORMAL + np.array([0.0, 0.3, 0.0]))))
    write_series(tmp_path / "in" / "uneven", change=lambda number: at(number**2 * NORMAL))
    tilted, uneven = sorted(predict(tmp_path / "in"), key=lambda row: row["name"])
    assert (float(tilted["found_ml"]) > 0, tilted["note"], uneven["found_ml"]) == (True, "", "")
    assert "1 to 7 mm apart" in uneven["note"]
    assert all(highdicom.seg.segread(predict.out / f"{name}.seg.dcm") for name in ("tilted", "uneven"))


def test_frames_are_slices(predict, tmp_path):
    path = write_multi_frame(tmp_path / "enhanced.dcm")
    (row,) = predict(path, "--slices=1:")
    seg, frames = highdicom.seg.segread(predict.out / "enhanced.seg.dcm"), [2, 3, 4]  # counted from 1
    options = {"ignore_spatial_locations": True, "assert_missing_frames_are_empty": True}
    planes = seg.get_pixels_by_source_frame(pydicom.dcmread(path).SOPInstanceUID, frames, **options)[..., 0]
    wanted = [predict.expected(read_image(f"{path}#frame={frame - 1}"))["mask"] for frame in frames]
    np.testing.assert_array_equal(planes, wanted)
    assert float(row["found_ml"]) == pytest.approx(np.sum(wanted) * 0.4 * 3 / 1000, abs=1e-3)


def test_what_an_input_lacks_for_a_seg_is_noted(predict, tmp_path):
    cine = get_testdata_file("SC_rgb_rle_2frame.dcm")
    odd = save(tmp_path / "odd.dcm", 2, 30, 44, ImagePositionPatient=[0.0, 0.0, 0.0])
    torn = save(tmp_path / "torn.dcm", 30, 44, StudyInstanceUID=None)
    rows = {row["name"]: row for row in predict(cine, odd, torn)}
    for row in rows.values():
        assert "no DICOM SEG" in row["note"]
        assert not {"attribute", "apart"} & set(row["note"].split())  # not what Python says, no gaps of 0 mm
        assert ".seg.dcm" not in row["files"]
    assert "StudyInstanceUID" in rows["torn"]["note"]
    with np.load(predict.out / "SC_rgb_rle_2frame.npz") as saved:
        for frame, found in enumerate(saved["uncertainty"]):
            np.testing.assert_allclose(
                found, predict.expected(read_image(f"{cine}#frame={frame}"))["uncertainty"], atol=1e-5
            )
    assert (predict.out / "torn_mask.png").is_file()


@pytest.mark.filterwarnings("ignore:Invalid value for VR IS")
def test_dicom_that_cannot_be_predicted_is_reported(predict, tmp_path):
    cine = save(tmp_path / "cine.dcm", 2, 30, 44)
    paths = get_testdata_file("badVR.dcm"), get_testdata_file("reportsi.dcm"), cine
    errors = {Path(row["input"]).stem: row["error"] for row in predict(*paths, "--axis=x", code=1)}
    for name, named in {"badVR": "badVR.dcm", "reportsi": "SR", "cine": "--axis"}.items():
        assert named in errors[name]
