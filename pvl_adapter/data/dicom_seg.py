"""Masks and label maps of DICOM as DICOM SEG, of the same bytes every time."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from pydicom.uid import generate_uid

from pvl_adapter import __version__
from pvl_adapter.data.label_files import long_string, segment_description

if TYPE_CHECKING:
    from pvl_adapter.data.dicom_scans import DicomVolume
    from pvl_adapter.data.results import LabelVoxels, Result


def segmentation(volume: DicomVolume, result: Result, found: LabelVoxels | None) -> Any:
    """A binary SEG that refers to the input. Its masks are held in memory, a byte a voxel and segment at most.

    Args:
        volume: The input.
        result: Whose mask it holds and, if asked for, what to leave to a human.
        found: The label map, whose labels are the segments instead; None of one sentence.
    """
    try:
        import highdicom  # has no build for every Python
    except ImportError as error:
        raise ImportError('highdicom is not installed; pip install "pvl-adapter[dicom]"') from error
    if volume.count > 1 and not len(volume.corners):
        raise ValueError("its frames have no position in space")
    if found is None:
        mine, names = result.labels[0], [name for name in result.names if name in ("mask", "abstain")]
        left = f"left to a human: {mine.name}", f"left to a human: {mine.sentence}"
        labels = [mine, dataclasses.replace(mine, name=left[0], sentence=left[1])][: len(names)]
        masks = np.stack([result.voxels(name, 0) for name in names], axis=-1)  # [slices, h, w, segments]
    else:
        labels = found.labels
        masks = np.searchsorted([label.value for label in labels], found.values, side="right").astype(np.uint16)
    if volume.frames > 1:
        sources, masks = volume.headers, masks[volume.place]  # a SEG has all frames of a file, as they come
    else:
        numbers = [key[1] for key in result.keys] if volume.axes == ("frame",) else list(range(volume.count))
        sources, masks = [volume.headers[number] for number in numbers], masks[numbers]
    if "ImagePositionPatient" not in sources[0] and "SliceThickness" not in sources[0]:
        sources = [copy.copy(header) for header in sources]
        sources[0].pop("PixelSpacing", None)  # highdicom writes but does not read it without the other
    text = long_string(", ".join(label.name for label in labels[: None if found else 1]))
    created = result.options.created or datetime.now()
    content = [str(header.SOPInstanceUID) for header in sources]
    content += [repr((labels, result.options, created)), hashlib.sha256(np.ascontiguousarray(masks).data).hexdigest()]
    series, instance, dimensions = (generate_uid(entropy_srcs=[*content, of]) for of in ("series", "SEG", "dimensions"))
    made: Any = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=masks,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment_description(label, number=at) for at, label in enumerate(labels, start=1)],
        series_instance_uid=series,
        series_number=1000 + int(volume.headers[0].get("SeriesNumber") or 0),
        sop_instance_uid=instance,
        instance_number=1,
        manufacturer="pvl-adapter",
        manufacturer_model_name="MedCLIPSeg",
        software_versions=__version__,
        device_serial_number=result.options.model_hash or "unknown",
        series_description=text,
        content_description=text,
        specific_character_set="ISO_IR 192",  # UTF-8: a sentence may hold any letter
        **{f"{of}_{part}": getattr(created, part)() for of in ("series", "content") for part in ("date", "time")},
    )
    made.InstanceCreationDate, made.InstanceCreationTime = made.ContentDate, made.ContentTime
    for each in (*made.get("DimensionOrganizationSequence", []), *made.get("DimensionIndexSequence", [])):
        each.DimensionOrganizationUID = dimensions
    for each in made.get("ContributingEquipmentSequence", []):
        each.ContributionDateTime = created
    highdicom.seg.Segmentation.from_dataset(made)  # of some inputs highdicom makes what it cannot read
    return made
