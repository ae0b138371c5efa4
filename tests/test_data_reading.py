"""Images and masks of every format: exact grey levels, windows, orientation, and what is foreground."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from pvl_adapter.data import read_image, read_mask, read_table
from pvl_adapter.image_files import SliceRef

GREY = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
COLOURS = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=2)
DEEP = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1800
SHAPE = np.zeros((5, 7), dtype=bool)
SHAPE[1:3, 2:6] = True
WORKBOOKS = Path(__file__).parent / "goldens" / "prompts"


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def save_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


def save_dicom(path: Path, stored: np.ndarray, **elements: object) -> Path:
    """Stored values [H, W], frames [N, H, W] or colours [H, W, 3] as a secondary capture."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    colour = stored.ndim == 3 and stored.shape[-1] == 3
    if stored.ndim == 3 and not colour:
        data.NumberOfFrames = len(stored)
    data.Rows, data.Columns = stored.shape[:2] if colour else stored.shape[-2:]
    data.SamplesPerPixel = 3 if colour else 1
    if colour:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = stored.dtype.itemsize * 8
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    data.PixelData = stored.tobytes() + b"\0" * (stored.nbytes % 2)
    for name, value in elements.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def shown(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


# ---- images ---------------------------------------------------------------------------------------------------------

FAINT = np.concatenate([COLOURS, np.full((5, 7, 1), 3, np.uint8)], axis=2)
EIGHT_BIT = {  # file, what is saved, what is read
    "grey.png": (GREY, GREY),
    "grey.tif": (GREY, GREY),
    "colours.png": (COLOURS, COLOURS),
    "rgba.png": (FAINT, COLOURS),
    "la.png": (FAINT[:, :, ::3], GREY),
    "bit.png": (SHAPE, SHAPE * np.uint8(255)),
}


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bits_stay_as_they_are(tmp_path, name):
    given, expected = EIGHT_BIT[name]
    path = save(tmp_path / name, given)
    for got in (read_image(path), read_image(path, window=(40, 10))):
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, expected)


def test_windows_of_sixteen_bits_and_floats_are_exact(tmp_path):
    pages = [Image.fromarray(values) for values in (DEEP[::-1].copy(), DEEP)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    floats = save(tmp_path / "a.tif", DEEP.astype(np.float32))
    for path in (save(tmp_path / "a.png", DEEP), floats, f"{tmp_path}/pages.tif#frame=1"):
        np.testing.assert_array_equal(read_image(path, window=(20000, 30000)), shown(DEEP.astype(float), 5000, 35000))
        np.testing.assert_array_equal(read_image(path), shown(DEEP, *np.percentile(DEEP, (0.5, 99.5))))


def test_one_value_everywhere_is_black(tmp_path):
    assert not read_image(save(tmp_path / "a.png", np.full((4, 4), 5000, np.uint16))).any()
    assert not read_image(save_nifti(tmp_path / "a.nii", np.full((4, 4, 1), 7.0, np.float32))).any()


@pytest.mark.parametrize("window", [(1, 0), (float("nan"), 1), (1, float("inf")), (1, 2, 3)])
def test_no_window(tmp_path, window):
    with pytest.raises(ValueError, match="expected center and a positive width"):
        read_image(save(tmp_path / "a.png", DEEP), window=window)


@pytest.mark.parametrize("name", ["a.png", "a.nii.gz#z=3", "a.dcm"])
def test_files_that_are_not_there(tmp_path, name):
    for read in (read_image, read_mask):
        with pytest.raises(FileNotFoundError, match=name.partition("#")[0]):
            read(tmp_path / name)


# ---- NIfTI ----------------------------------------------------------------------------------------------------------


def marked(orientation: str) -> tuple[np.ndarray, np.ndarray]:
    """A volume stored along other axes, voxels and affine; its marker lies to the patient's left, front and head."""
    canonical = np.zeros((8, 9, 10), np.int16)
    canonical[1, 7, 8] = 100
    stored = nibabel.orientations.axcodes2ornt(orientation)
    turn = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), stored)
    image = nibabel.Nifti1Image(canonical, np.diag([2.0, 3.0, 4.0, 1.0])).as_reoriented(turn)
    assert nibabel.aff2axcodes(image.affine) == tuple(orientation)
    return np.asarray(image.dataobj), image.affine


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SAL"])
def test_slices_are_shown_as_radiologists_see_them(tmp_path, orientation):
    """The patient's left is on the right of the image, the front at the top or on the left, the head at the top."""
    path = save_nifti(tmp_path / "a.nii.gz", *marked(orientation))
    expected = {"z=8": ((9, 8), [1, 6]), "y=7": ((10, 8), [1, 6]), "x=1": ((10, 9), [1, 1])}
    for part, (shape, marker) in expected.items():
        got = read_image(f"{path}#{part}", window=(50, 100))
        assert got.shape == shape
        assert np.argwhere(got).tolist() == [marker]
        np.testing.assert_array_equal(read_mask(f"{path}#{part}&label=100"), got > 0)
    assert not read_image(f"{path}#z=7", window=(50, 100)).any()


def test_a_volume_has_one_window_for_all_slices(tmp_path):
    voxels = np.random.default_rng(0).normal(100, 30, (6, 7, 8)).astype(np.float32)
    voxels[:, :, 3] *= 0.1
    path = save_nifti(tmp_path / "a.nii.gz", voxels)
    expected = shown(voxels[::-1, ::-1, 3].T.astype(float), *np.percentile(voxels, (0.5, 99.5)))
    np.testing.assert_array_equal(read_image(f"{path}#z=3"), expected)


def test_single_slices_need_no_number(tmp_path):
    voxels = np.arange(42, dtype=np.uint8).reshape(6, 1, 7)
    expected = read_image(f"{save_nifti(tmp_path / 'a.nii', voxels)}#y=0")
    for form in (voxels, voxels[..., None]):
        np.testing.assert_array_equal(read_image(save_nifti(tmp_path / "b.nii", form)), expected)
    assert read_image(save_nifti(tmp_path / "c.nii", voxels[:, 0])).shape == (7, 6)  # a header of two dimensions


def test_a_volume_that_changes_is_read_again(tmp_path):
    path = save_nifti(tmp_path / "a.nii", np.zeros((3, 3, 3), np.uint8))
    assert not read_mask(f"{path}#z=1").any()
    save_nifti(path, np.ones((3, 3, 4), np.uint8))
    assert read_mask(f"{path}#z=3").all()


@pytest.mark.parametrize("levels", [(1, 2), (255, 200)])
def test_foreground_of_a_slice_is_told_by_the_volume(tmp_path, levels):
    """That slice alone would pass for a mask."""
    voxels = np.zeros((4, 4, 4), np.int16 if 1 in levels else np.uint8)
    voxels[0, 0, 0], voxels[1, 1, 1] = levels
    path = save_nifti(tmp_path / "a.nii.gz", voxels)
    with pytest.raises(ValueError, match=rf"not binary.*0, {min(levels)}, {max(levels)}"):
        read_mask(f"{path}#z=0")
    assert read_mask(f"{path}#z=0", label=levels[0]).sum() == 1
    assert read_mask(f"{path}#z=0&label={levels[1]}").sum() == 0  # absent from this slice


def test_masks_of_floats_and_scaled_masks(tmp_path):
    path = save_nifti(tmp_path / "a.nii", SHAPE[..., None].astype(np.float64))
    np.testing.assert_array_equal(read_mask(path), SHAPE[::-1, ::-1].T)
    image = nibabel.Nifti1Image(SHAPE[..., None].astype(np.float32), np.eye(4))
    image.header.set_data_dtype(np.uint8)
    nibabel.save(image, tmp_path / "b.nii")  # nibabel stores 0 and 255 and a scale
    np.testing.assert_array_equal(read_mask(tmp_path / "b.nii"), SHAPE[::-1, ::-1].T)


# ---- DICOM ----------------------------------------------------------------------------------------------------------

STORED = np.arange(35, dtype=np.int16).reshape(5, 7) * 60
HU = STORED * 2.0 - 1024
RESCALE = {"RescaleSlope": 2, "RescaleIntercept": -1024}
WINDOW = {"WindowCenter": [300, 40], "WindowWidth": [1501, 400]}
DICOM_IMAGES = {  # elements, window given, what is shown
    "hounsfield": ({}, (40, 400), shown(HU, -160, 240)),
    "percentiles": ({}, None, shown(HU, *np.percentile(HU, (0.5, 99.5)))),
    "own window": (WINDOW, None, shown(HU, 299.5 - 750, 299.5 + 750)),
    "the caller's window counts": (WINDOW, (40, 400), shown(HU, -160, 240)),
    "exact": ({**WINDOW, "VOILUTFunction": "LINEAR_EXACT"}, None, shown(HU, 300 - 750.5, 300 + 750.5)),
    "sigmoid": ({**WINDOW, "VOILUTFunction": "SIGMOID"}, None, shown(1 / (1 + np.exp(-4 * (HU - 300) / 1501)), 0, 1)),
    "no width": ({**WINDOW, "WindowWidth": 0}, None, shown(HU, *np.percentile(HU, (0.5, 99.5)))),
    "inverted": ({"PhotometricInterpretation": "MONOCHROME1"}, (40, 400), 255 - shown(HU, -160, 240)),
}


@pytest.mark.parametrize("kind", DICOM_IMAGES)
def test_dicom_windows_are_exact(tmp_path, kind):
    elements, window, expected = DICOM_IMAGES[kind]
    path = save_dicom(tmp_path / "a.dcm", STORED, **RESCALE, **elements)
    np.testing.assert_array_equal(read_image(path, window=window), expected)


def test_tables_of_grey_levels(tmp_path):
    table = Dataset()
    table.LUTDescriptor = [35, 0, 16]
    table.LUTData = (np.arange(35, dtype=np.uint16) * 1500).tobytes()
    stored = np.arange(35, dtype=np.uint16).reshape(5, 7)
    path = save_dicom(tmp_path / "a.dcm", stored, VOILUTSequence=[table])
    np.testing.assert_array_equal(read_image(path), shown(stored * 1500.0, 0, 65535))


def test_eight_bit_dicom_colours_and_files_without_extension(tmp_path):
    np.testing.assert_array_equal(read_image(save_dicom(tmp_path / "IM0001", GREY)), GREY)
    np.testing.assert_array_equal(read_image(save_dicom(tmp_path / "a.DCM", COLOURS)), COLOURS)
    path = save_dicom(tmp_path / "b.dcm", GREY, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_image(path), 255 - GREY)


def test_frames_have_their_own_windows(tmp_path):
    groups = []
    for center in (100, 1000):
        groups.append(Dataset())
        groups[-1].FrameVOILUTSequence = [Dataset()]
        groups[-1].FrameVOILUTSequence[0].WindowCenter, groups[-1].FrameVOILUTSequence[0].WindowWidth = center, 201
    shared = Dataset()
    shared.PixelValueTransformationSequence = [Dataset()]
    shared.PixelValueTransformationSequence[0].RescaleSlope = 2
    shared.PixelValueTransformationSequence[0].RescaleIntercept = -1024
    elements = {"PerFrameFunctionalGroupsSequence": groups, "SharedFunctionalGroupsSequence": [shared]}
    path = save_dicom(tmp_path / "b.dcm", np.stack([STORED] * 2), **elements)
    for number, center in enumerate((100, 1000)):
        got = read_image(f"{path}#frame={number}")
        np.testing.assert_array_equal(got, shown(HU, center - 0.5 - 100, center - 0.5 + 100))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.nii", "a.nii.gz", "a.dcm", "a.xlsx"])
def test_a_fuzzed_file_is_read_or_refused(tmp_path, name):
    """Whatever a file holds, nothing but ValueError reaches the user."""
    path, random = tmp_path / name, np.random.default_rng(0)
    if ".nii" in name:
        save_nifti(path, np.repeat(GREY[:, :, None], 3, axis=2))
    elif name == "a.xlsx":
        path.write_bytes((WORKBOOKS / "CVC300/Prompts_Folder/Train_text.xlsx").read_bytes())
    else:
        save_dicom(path, GREY) if name == "a.dcm" else save(path, GREY)
    sound = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(30):
        broken = sound.copy()
        broken[random.integers(0, min(len(broken), 2000), 4)] = random.integers(0, 256, 4)
        path.write_bytes(broken[: random.integers(len(broken) // 2, len(broken) + 1)].tobytes())
        for read in (read_table,) if name == "a.xlsx" else (read_image, read_mask):
            with suppress(ValueError):
                read(f"{path}#z=1" if ".nii" in name else path)


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 255, 65535])
def test_masks_of_two_levels(tmp_path, level):
    """Level 1 as well, which the official code takes for empty."""
    for mask in (SHAPE, ~SHAPE, np.zeros_like(SHAPE), np.ones_like(SHAPE)):
        levels = mask * (np.uint16(level) if level > 255 else np.uint8(level))
        for path in (save(tmp_path / "a.png", levels), save(tmp_path / "a.tif", levels)):
            got = read_mask(path)
            assert got.dtype == bool
            np.testing.assert_array_equal(got, mask)
        np.testing.assert_array_equal(read_mask(save_dicom(tmp_path / "a.dcm", levels)), mask)


def test_masks_of_single_bits_colours_and_palettes(tmp_path):
    white = SHAPE * np.uint8(255)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "bit.png", SHAPE)), SHAPE)
    faint = np.stack([white, white, white, np.full(SHAPE.shape, 9, np.uint8)], 2)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "rgba.png", faint)), SHAPE)
    coloured, swapped = Image.fromarray(SHAPE * np.uint8(2)), Image.fromarray((~SHAPE).astype(np.uint8))
    coloured.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    coloured.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_mask(f"{tmp_path / 'palette.png'}#label=2"), SHAPE)
    swapped.putpalette([255, 255, 255, 0, 0, 0])  # index 0 is white
    swapped.save(tmp_path / "swapped.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "swapped.png"), SHAPE)


def test_lossy_masks_follow_the_official_rule(tmp_path):
    mask = np.zeros((64, 64), bool)
    mask[10:40, 20:50] = True
    path = save(tmp_path / "a.jpg", mask * np.uint8(255), quality=60)
    assert len(np.unique(np.asarray(Image.open(path)))) > 2
    np.testing.assert_array_equal(read_mask(path), mask)
    Image.open(path).save(tmp_path / "saved_again.png")  # as the masks of Kvasir
    np.testing.assert_array_equal(read_mask(tmp_path / "saved_again.png"), mask)
    smooth = Image.fromarray(mask * np.uint8(255)).resize((301, 301), Image.Resampling.BILINEAR)
    smooth.save(tmp_path / "resampled.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "resampled.png"), np.asarray(smooth) >= 127)


LABELS = [(0, 2), (0, 1, 255), (0, 1, 2, 15, 255), (0, 128, 255), (5,), tuple(range(0, 250, 3))]


@pytest.mark.parametrize("levels", LABELS, ids=str)
def test_label_maps_need_a_label(tmp_path, levels):
    array = np.resize(np.array(levels, np.uint8), (30, 40))
    path = save(tmp_path / "a.png", array)
    with pytest.raises(ValueError, match=rf"a\.png.*not binary.*{', '.join(map(str, levels[:8]))}.*label=2"):
        read_mask(path)
    for level in levels[:4]:
        np.testing.assert_array_equal(read_mask(path, label=level), array == level)
        np.testing.assert_array_equal(read_mask(f"{path}#label={level}"), array == level)
    with pytest.raises(ValueError, match="label 1 in the name and 2"):
        read_mask(f"{path}#label=1", label=2)


def test_slice_references(tmp_path):
    for text, ref in {
        "a/b.nii.gz#z=40": SliceRef(Path("a/b.nii.gz"), ("z", 40)),
        "b.nii#x=0&label=7": SliceRef(Path("b.nii"), ("x", 0), 7),
        "b.png#label=0": SliceRef(Path("b.png"), None, 0),
        "case #3.png": SliceRef(Path("case #3.png")),
    }.items():
        assert SliceRef.parse(text) == ref
        assert str(ref) == text
    np.testing.assert_array_equal(read_image(save(tmp_path / "a#z=1.png", GREY)), GREY)  # a real name may contain '#'
    for wrong in ("a.nii#z=", "a.nii#z=-1", "a.nii#w=1", "a.nii#z=1&x=2", "a.nii#z=1.5", "a.nii#z=1&"):
        with pytest.raises(ValueError, match="expected one of #z=40"):
            SliceRef.parse(wrong)
