"""Names, colours and codes of labels, read back by the programs' own libraries."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from pvl_adapter.data.label_files import (
    itk_snap,
    label_image,
    label_overlay,
    nifti_extensions,
    read_nifti_labels,
    segment_description,
)
from pvl_adapter.data.presets import Code, Label, labels_of, palette_color

LABELS = (
    Label(1, 'foie <droit> & "gauche" é', "the liver", (221, 130, 101)),
    Label(
        7,
        "spleen",
        "s" * 2000,
        (0, 255, 7),
        Code("91723000", "SCT", "Anatomical Structure"),
        Code("78961009", "SCT", "Spleen"),
    ),
    Label(65535, "n" * 100 + "\\", "one nodule", (1, 2, 254)),
)


# ---- NIfTI -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def volume(tmp_path):
    nib = pytest.importorskip("nibabel")
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint16), np.eye(4))
    image.header.extensions.extend(nifti_extensions(LABELS))
    image.to_filename(tmp_path / "labels.nii.gz")
    return nib.load(tmp_path / "labels.nii.gz")


def test_a_nifti_file_gives_its_labels_back(volume):
    assert [(label.value, label.name, label.color) for label in read_nifti_labels(volume)] == [
        (label.value, label.name, label.color) for label in LABELS
    ]
    assert volume.get_fdata().shape == (3, 4, 5)


def test_a_nifti_file_is_read_as_other_programs_do(volume):
    first = volume.header.extensions[0]  # TotalSegmentator's label maps are read so
    root = ET.fromstring(first.get_content())
    table = root.find("VolumeInformation/LabelTable")
    assert root.tag == "CaretExtension"
    assert {int(each.get("Key")): each.text for each in table} == {label.value: label.name for label in LABELS}
    assert [float(table[0].get(name)) for name in ("Red", "Green", "Blue", "Alpha")] == pytest.approx(
        [221 / 255, 130 / 255, 101 / 255, 1.0], abs=1e-5
    )
    assert volume.header.extensions.get_codes() == [0, 30]  # Connectome Workbench looks for 30


def test_a_nifti_file_without_labels_has_none(volume):
    nib = pytest.importorskip("nibabel")
    volume.header.extensions.clear()
    volume.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"made by hand"))
    assert read_nifti_labels(volume) == ()


def test_the_same_labels_give_the_same_bytes():
    pytest.importorskip("nibabel")
    assert nifti_extensions(LABELS) == nifti_extensions(list(LABELS))


# ---- ITK-SNAP --------------------------------------------------------------------------------------------------------


def test_itk_snap_finds_eight_fields_in_a_line():
    rows = [line for line in itk_snap(LABELS).splitlines() if not line.startswith("#")]
    fields = [
        re.fullmatch(r"\s*(\d+)" + r"\s+(\d+)" * 3 + r'\s+([01])\s+([01])\s+([01])\s+"([^"]*)"', row) for row in rows
    ]
    found = [(int(each[1]), each[8], tuple(map(int, each.groups()[1:4]))) for each in fields]
    assert found[0] == (0, "Clear Label", (0, 0, 0))
    assert [field.groups()[4:7] for field in fields] == [("0", "0", "0"), *[("1", "1", "1")] * 3]
    assert found[1:] == [(label.value, label.name.replace('"', "'"), label.color) for label in LABELS]


# ---- DICOM -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segments(tmp_path_factory):
    """The segments of a file with one for each label, and what is in the file besides."""
    highdicom = pytest.importorskip("highdicom")
    pydicom = pytest.importorskip("pydicom")
    source = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    masks = np.zeros((1, source.Rows, source.Columns, len(LABELS)), np.uint8)
    masks[0, :5, :5] = 1  # segments of a binary file may overlap
    made = highdicom.seg.Segmentation(
        source_images=[source],
        pixel_array=masks,
        segmentation_type="BINARY",
        segment_descriptions=[segment_description(label, number=at) for at, label in enumerate(LABELS, start=1)],
        series_instance_uid=highdicom.UID(),
        series_number=1,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="pvl-adapter",
        manufacturer_model_name="test",
        software_versions="0",
        device_serial_number="0",
        specific_character_set="ISO_IR 192",
    )
    path = tmp_path_factory.mktemp("dicom") / "labels.dcm"
    made.save_as(path)
    read = highdicom.seg.segread(path)
    return [read.get_segment_description(number) for number in range(1, len(LABELS) + 1)]


def test_dicom_segments_have_names_and_sentences(segments):
    assert [each.segment_label for each in segments] == ['foie <droit> & "gauche" é', "spleen", "n" * 64]
    assert [each.SegmentDescription for each in segments] == ["the liver", "s" * 1024, "one nodule"]


def test_dicom_segments_have_the_codes_of_the_preset_or_are_tissue(segments):
    def coded(concept):
        return concept.value, concept.scheme_designator, concept.meaning

    tissue = ("85756007", "SCT", "Tissue")
    assert [coded(each.segmented_property_type) for each in segments] == [tissue, LABELS[1].kind, tissue]
    assert [coded(each.segmented_property_category) for each in segments] == [tissue, LABELS[1].category, tissue]


def test_dicom_segments_have_the_colours(segments):
    highdicom = pytest.importorskip("highdicom")
    for segment, label in zip(segments, LABELS, strict=True):
        color = highdicom.color.CIELabColor.from_dicom_value(segment.RecommendedDisplayCIELabValue).to_rgb()
        assert np.abs(np.subtract(color, label.color)).max() <= 2


# ---- images ----------------------------------------------------------------------------------------------------------


def test_an_image_of_labels_has_their_colours():
    labels = labels_of(["a", "b"])
    values = np.array([[0, 1], [2, 1]])
    image = label_image(values, labels)
    assert np.array_equal(np.array(image), values)
    assert [image.convert("RGB").getpixel(at) for at in ((0, 0), (1, 0), (0, 1))] == [
        (0, 0, 0),
        palette_color(0),
        palette_color(1),
    ]
    assert np.array(label_image(np.array([[0, 65535]]), LABELS)).tolist() == [[0, 65535]]


def test_an_overlay_tints_labels_and_leaves_the_rest():
    image = Image.fromarray(np.full((2, 2), 100, np.uint8))
    tinted = np.array(label_overlay(image, np.array([[0, 1], [65535, 0]]), LABELS))
    assert tinted[0, 0].tolist() == tinted[1, 1].tolist() == [100, 100, 100]
    for at, color in (((0, 1), LABELS[0].color), ((1, 0), LABELS[2].color)):
        assert np.abs(tinted[at] - (np.array(color) + 100) / 2).max() <= 1
