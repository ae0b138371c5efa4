"""DICOM files and series: slices in their order in space, and masks as DICOM SEG."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.sr.codedict import codes

import pvl_adapter as pvl
from pvl_adapter.data.inputs import Source, read_header
from pvl_adapter.data.reading import read_image
from pvl_adapter.data.results import Result
from pvl_adapter.data.scans import InputOptions, InputVolume, Key
from pvl_adapter.image_files import reason

try:
    import highdicom
except ImportError:  # has no build for every Python; only a DICOM SEG needs it
    highdicom = None  # type: ignore[assignment]


class DicomVolume(InputVolume):
    """One DICOM file, of one or several frames, or the slices of a series, sorted along their normal."""

    def __init__(self, source: Source, options: InputOptions) -> None:
        super().__init__(source, options)
        self.files = list(source.files)
        self.headers = [read_header(file) for file in self.files]
        first = self.headers[0]
        self.frames = int(first.get("NumberOfFrames") or 1)
        size = self.read(("frame", 0)).shape[:2]  # refuses what holds no image
        if len(self.files) > 1:
            self._sort()
        self.shape = (max(self.frames, len(self.files)), *size)
        if self.shape[0] > 1 and set(options.axes) - {"z"}:
            raise ValueError(f"--axis {options.axes[0]} is for NIfTI; DICOM is predicted as it was acquired")
        self.keys = self.choose("frame", self.shape[0])
        if spacing := value(first, 0, "PixelMeasuresSequence", "PixelSpacing"):
            self.pixel_mm2 = float(spacing[0]) * float(spacing[1])
        self.positions = self._positions()
        gaps = np.abs(np.diff(self.positions))
        if len(gaps) and 0.0 < gaps.max() <= gaps.min() + 0.01 * gaps.max():
            self.slice_mm = float(gaps.mean())
        elif len(gaps):
            self.notes.append(f"slices lie {gaps.min():.3g} to {gaps.max():.3g} mm apart, so ml are unknown")

    def _sort(self) -> None:
        """By position along the normal; refuses slices that do not form a stack."""
        split = "move those that belong together to a folder of their own, or give the files one by one"
        for name in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
            values = [np.atleast_1d(np.array(header.get(name) or 0, dtype=float)) for header in self.headers]
            same = [other.shape == values[0].shape and np.abs(other - values[0]).max() < 1e-3 for other in values]
            if not all(same):
                one, other = (f"{self.files[at].name} has {values[at].tolist()}" for at in (0, same.index(False)))
                raise ValueError(f"slices of this series differ in {name}: {one}, {other}; {split}")
        for header in self.headers:  # the last digits may differ, which highdicom would not take
            header.ImageOrientationPatient = self.headers[0].ImageOrientationPatient
        order = np.argsort(self._positions())
        self.headers, self.files = [self.headers[each] for each in order], [self.files[each] for each in order]
        if same := np.flatnonzero(np.diff(self._positions()) < 1e-3).tolist():
            raise ValueError(
                f"{self.files[same[0]].name} and {self.files[same[0] + 1].name} of this series have the same position, "
                f"and {len(same) - 1} more pairs have (points in time, or echoes?); {split}"
            )

    def _positions(self) -> np.ndarray:
        """Of each slice along the normal, in mm: [slices]. Empty if unknown, or if slices are not parallel."""
        frames = [(header, frame) for header in self.headers for frame in range(self.frames)]
        positions = [value(*frame, "PlanePositionSequence", "ImagePositionPatient") for frame in frames]
        turns = [value(*frame, "PlaneOrientationSequence", "ImageOrientationPatient") for frame in frames]
        if not all(positions) or not all(turns) or np.ptp(np.array(turns, dtype=float), axis=0).max() > 1e-3:
            return np.empty(0)
        along, down = np.array(turns[0], dtype=float).reshape(2, 3)
        found = np.array(positions, dtype=float) @ np.cross(along, down)
        return np.empty(0) if self.frames > 1 and not np.ptp(found) else found  # one position for all frames

    def read(self, key: Key) -> np.ndarray:
        file = f"{self.files[0]}#frame={key[1]}" if self.frames > 1 else self.files[key[1]]
        return read_image(file, window=self.options.window)

    def write(self, folder: Path, stems: Sequence[str], result: Result) -> None:
        for k, stem in enumerate(stems):
            self._write_segmentation(folder / f"{stem}.seg.dcm", result, k)
            if self.shape[0] > 1:
                result.save_overlay(folder / f"{stem}_overlay.png", k)
                headers = [self.headers[0 if self.frames > 1 else number] for _, number in self.keys]
                arrays = {of: np.stack([result.map(of, k, key) for key in self.keys]) for of in result.names}
                arrays["slices"] = np.array([number for _, number in self.keys])
                arrays["instances"] = np.array([str(each.get("SOPInstanceUID", "")) for each in headers])
                np.savez_compressed(folder / f"{stem}.npz", allow_pickle=False, **arrays)
        if self.shape[0] == 1:
            super().write(folder, stems, result)

    def _write_segmentation(self, file: Path, result: Result, k: int) -> None:
        try:
            if highdicom is None:
                raise ImportError('highdicom is not installed; pip install "pvl-adapter[dicom]"')
            self._segmentation(result, k).save_as(file)
        except OSError:  # a full disk, not the input
            raise
        except Exception as error:  # highdicom and pydicom raise almost anything for what an input lacks
            missing = isinstance(error, AttributeError) and error.name
            cause = f"it has no {missing}" if missing else reason(error)
            lacking = "" if isinstance(error, ImportError) else "the input lacks what one needs: "
            self.notes.append(f"no DICOM SEG: {lacking}{cause}")

    def _segmentation(self, result: Result, k: int) -> highdicom.seg.Segmentation:
        """A binary SEG of the mask and, if asked for, of what to leave to a human."""
        if self.shape[0] > 1 and not len(self.positions):
            raise ValueError("its frames have no position in space")
        text = result.labels[k].sentence
        labels = {"mask": text, "abstain": f"left to a human: {text}"}
        labels = {name: label for name, label in labels.items() if name in result.names}
        blank = np.zeros(self.shape[1:], np.uint8)
        keys: list[Key] = (
            [("frame", n) for n in range(self.shape[0])] if self.frames > 1 else self.keys
        )  # of a file all
        segments = [[result.map(of, k, key) if key in result.index else blank for key in keys] for of in labels]
        sources = self.headers if self.frames > 1 else [self.headers[number] for _, number in keys]
        if "ImagePositionPatient" not in sources[0] and "SliceThickness" not in sources[0]:
            sources = [copy.copy(header) for header in sources]
            sources[0].pop("PixelSpacing", None)  # highdicom writes but does not read it without the other
        made = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=np.stack([np.stack(slices) for slices in segments], axis=-1),  # [n, h, w, segments]
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[description(number, label) for number, label in enumerate(labels.values(), start=1)],
            series_instance_uid=highdicom.UID(),
            series_number=1000 + int(self.headers[0].get("SeriesNumber") or 0),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="pvl-adapter",
            manufacturer_model_name="MedCLIPSeg",
            software_versions=pvl.__version__,
            device_serial_number=result.options.model_hash,
            series_description=long_string(text),
            content_description=long_string(text),
            specific_character_set="ISO_IR 192",  # UTF-8: a sentence may hold any letter
        )
        highdicom.seg.Segmentation.from_dataset(made)  # of some inputs highdicom makes what it cannot read
        return made


def value(header: pydicom.Dataset, frame: int, sequence: str, name: str) -> Any:
    """What a file says of a frame: of it alone, of all frames, or as if there were but one; None if it does not."""
    per_frame, shared = (header.get(f"{which}FunctionalGroupsSequence") or [] for which in ("PerFrame", "Shared"))
    for groups in (per_frame[frame : frame + 1], shared):
        if groups and groups[0].get(sequence):
            return groups[0][sequence][0].get(name)
    return header.get(name)


def description(number: int, label: str) -> highdicom.seg.SegmentDescription:
    """Of a segment; its codes say "tissue", for what is meant is in the sentence, which has no code."""
    described = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=long_string(label),
        segmented_property_category=codes.SCT.Tissue,
        segmented_property_type=codes.SCT.Tissue,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="pvl-adapter", family=codes.cid7162.ArtificialIntelligence, version=pvl.__version__
        ),
    )
    described.SegmentDescription = label[:1024]
    return described


def long_string(text: str) -> str:
    """As DICOM's LO takes it."""
    return text.replace("\\", "/")[:64].strip()
