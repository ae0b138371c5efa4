"""Names, colours and codes of labels in the forms that other programs read: NIfTI, ITK-SNAP, DICOM SEG, PNG, JSON."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pvl_adapter import __version__
from pvl_adapter.atomic import write_atomically
from pvl_adapter.data.presets import MOST, Label, labels_of

if TYPE_CHECKING:
    import highdicom


def nifti_extensions(labels: Sequence[Label]) -> list[Any]:
    """Labels as header extensions, for `image.header.extensions.extend` of nibabel.

    The same XML twice: Connectome Workbench looks for an extension of its own code, 30; readers of TotalSegmentator's
    label maps take the first one there is, which nibabel gives them only of a code that it has a class for, as 0.
    """
    import nibabel as nib

    root = ET.Element("CaretExtension")
    volume = ET.SubElement(root, "VolumeInformation", Index="0")
    table = ET.SubElement(volume, "LabelTable")
    for label in labels:
        red, green, blue = (f"{part / 255:.6g}" for part in label.color)
        entry = ET.SubElement(table, "Label", Key=str(label.value), Red=red, Green=green, Blue=blue, Alpha="1")
        entry.text = label.name
    ET.SubElement(volume, "StudyMetaDataLinkSet")
    ET.SubElement(volume, "VolumeType").text = "Label"
    text = ET.tostring(root, encoding="UTF-8", xml_declaration=True)
    return [nib.nifti1.Nifti1Extension(code, text) for code in (0, 30)]


def read_nifti_labels(image: Any) -> tuple[Label, ...]:
    """Labels in the header of a nibabel image, with the name as sentence; empty if there are none."""
    for extension in image.header.extensions:
        packed = io.BytesIO()
        extension.write_to(packed, False)  # `content` is there in nibabel 5.3 and later alone
        if b"<CaretExtension" not in (text := packed.getvalue()[8:].rstrip(b"\0 ")):
            continue
        found = []
        for entry in ET.fromstring(text).iter("Label"):
            red, green, blue = (round(255 * float(entry.get(name, "0"))) for name in ("Red", "Green", "Blue"))
            name = (entry.text or "").strip()
            found.append(Label(int(entry.get("Key", "0")), name, name, (red, green, blue)))
        return tuple(label for label in found if label.value)  # 0 is background
    return ()


def itk_snap(labels: Sequence[Label]) -> str:
    """Labels as an ITK-SNAP label description file."""
    lines = ["# ITK-SNAP label description file", "# IDX -R- -G- -B- -A- VIS MSH LABEL"]
    lines += ['    0    0    0    0    0   0   0 "Clear Label"']
    for label in labels:
        name = " ".join(label.name.replace('"', "'").split())
        lines.append(f'{label.value:5d} {" ".join(f"{part:4d}" for part in label.color)}    1   1   1 "{name}"')
    return "\n".join(lines) + "\n"


def segment_description(label: Label, *, number: int) -> highdicom.seg.SegmentDescription:
    """A label as a segment of a DICOM SEG, counted from 1.

    Without codes it is a tissue: what is meant is in the sentence, which has no code.
    """
    import highdicom
    from pydicom.sr.codedict import codes

    tissue = (codes.SCT.Tissue.value, codes.SCT.Tissue.scheme_designator, codes.SCT.Tissue.meaning)
    described = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=long_string(label.name),
        segmented_property_category=highdicom.sr.CodedConcept(*(label.category or tissue)),
        segmented_property_type=highdicom.sr.CodedConcept(*(label.kind or tissue)),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="pvl-adapter", family=codes.cid7162.ArtificialIntelligence, version=__version__
        ),
        display_color=highdicom.color.CIELabColor.from_rgb(*label.color),
    )
    described.SegmentDescription = label.sentence[:1024]
    return described


def long_string(text: str) -> str:
    """As DICOM's LO takes it."""
    return text.replace("\\", "/")[:64].strip()


def legend(labels: Sequence[Label]) -> list[dict[str, Any]]:
    """Labels as JSON, in the columns of a preset."""
    rows = []
    for label in labels:
        row: dict[str, Any] = {"value": label.value, "name": label.name, "sentence": label.sentence}
        row["color"] = f"#{bytes(label.color).hex()}"
        for of, code in (("category", label.category), ("type", label.kind)):
            row |= {f"{of} {part}": text for part, text in (code._asdict() if code else {}).items()}
        rows.append(row)
    return rows


def write_label_image(
    path: Path, numbers: np.ndarray, names: Sequence[str], *, labels: Sequence[Label] | None, facts: dict[str, Any]
) -> Path:
    """Write a label map as PNG, and beside it a JSON of its legend and other facts; see `LabelMap.save`.

    Args:
        path: Of the PNG.
        numbers: k + 1 of `names[k]`, 0 of background, [h, w].
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"path is {path}, expected one that ends in .png, as {path.stem}.png")
    known = {key: label for label in labels or labels_of(names) for key in (label.sentence, label.name)}
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"there is no label for {missing[0]!r}, expected one of each name; add it to the labels")
    used = [known[name] for name in names]
    image = label_image(np.array([0, *(label.value for label in used)])[numbers], used)
    text = json.dumps({"labels": legend(used), **facts}, indent=2) + "\n"
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", compress_level=1))
    write_atomically(path.with_suffix(".json"), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def label_image(values: np.ndarray, labels: Sequence[Label]) -> Image.Image:
    """Label values [h, w] as an image with the colours as palette; of values above 255 one of 16 bits without."""
    if max(label.value for label in labels) > 255:
        return Image.fromarray(values.astype(np.uint16))
    image = Image.fromarray(values.astype(np.uint8)).convert("P")
    image.putpalette(_colors(labels)[:256].tobytes())
    return image


def label_overlay(image: Image.Image, values: np.ndarray, labels: Sequence[Label]) -> Image.Image:
    """The image with label values [h, w] over it in their colours, half transparent."""
    opacity = Image.fromarray(np.where(values > 0, np.uint8(128), np.uint8(0)))
    return Image.composite(Image.fromarray(_colors(labels)[values]), image.convert("RGB"), opacity)


def _colors(labels: Sequence[Label]) -> np.ndarray:
    """Of each label value, uint8 [65536, 3]."""
    colors = np.zeros((MOST + 1, 3), np.uint8)
    for label in labels:
        colors[label.value] = label.color
    return colors
