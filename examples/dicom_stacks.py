"""DICOM files and series for examples/predict.py: slices in their order in space, and what is found as DICOM SEG."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
from pydicom.sr.codedict import codes
from sources import Source, read_header
from stacks import Answer, Stack, write_png

import pvl_adapter as pvl
from pvl_adapter.atomic import write_atomically
from pvl_adapter.data import read_picture
from pvl_adapter.data.issues import reason


class DicomStack(Stack):
    """One DICOM file, of one or several frames, or the slices of a series, sorted along their normal."""

    def __init__(self, source: Source, args: argparse.Namespace) -> None:
        super().__init__(source, args)
        self.files = list(source.files)
        self.headers = [read_header(file) for file in self.files]
        first = self.headers[0]
        self.frames = int(first.get("NumberOfFrames") or 1)
        size = self.read(0).shape[:2]  # refuses what holds no picture
        if len(self.files) > 1:
            self._sort()
        self.shape = (max(self.frames, len(self.files)), *size)
        if self.shape[0] > 1 and args.axis != "z":
            raise ValueError(f"--axis {args.axis} is for NIfTI; slices of DICOM are predicted as they were acquired")
        self.numbers = self.choose()
        if spacing := value(first, 0, "PixelMeasuresSequence", "PixelSpacing"):
            self.pixel_mm2 = float(spacing[0]) * float(spacing[1])
        self.places = self._places()
        gaps = np.abs(np.diff(self.places))
        if len(gaps) and 0.0 < gaps.max() <= gaps.min() + 0.01 * gaps.max():
            self.slice_mm = float(gaps.mean())
        elif len(gaps):
            self.notes.append(f"slices lie {gaps.min():.3g} to {gaps.max():.3g} mm apart, so ml are not told")

    def _sort(self) -> None:
        """By place along the normal; refuses what is no stack."""
        split = "move those that belong together to a folder of their own, or give the files one by one"
        for name in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
            values = [np.atleast_1d(np.array(header.get(name) or 0, dtype=float)) for header in self.headers]
            same = [other.shape == values[0].shape and np.abs(other - values[0]).max() < 1e-3 for other in values]
            if not all(same):
                one, other = (f"{self.files[at].name} has {values[at].tolist()}" for at in (0, same.index(False)))
                raise ValueError(f"slices of this series differ in {name}: {one}, {other}; {split}")
        for header in self.headers:  # the last digits may differ, which highdicom would not take
            header.ImageOrientationPatient = self.headers[0].ImageOrientationPatient
        order = np.argsort(self._places())
        self.headers, self.files = [self.headers[each] for each in order], [self.files[each] for each in order]
        if same := np.flatnonzero(np.diff(self._places()) < 1e-3).tolist():
            raise ValueError(
                f"{self.files[same[0]].name} and {self.files[same[0] + 1].name} of this series lie at the same place, "
                f"and {len(same) - 1} more pairs do (points in time, or echoes?); {split}"
            )

    def _places(self) -> np.ndarray:
        """Of each slice along the normal, in mm; [slices]. Empty if unknown, or not all slices are parallel."""
        frames = [(header, frame) for header in self.headers for frame in range(self.frames)]
        positions = [value(*frame, "PlanePositionSequence", "ImagePositionPatient") for frame in frames]
        turns = [value(*frame, "PlaneOrientationSequence", "ImageOrientationPatient") for frame in frames]
        if not all(positions) or not all(turns) or np.ptp(np.array(turns, dtype=float), axis=0).max() > 1e-3:
            return np.empty(0)
        along, down = np.array(turns[0], dtype=float).reshape(2, 3)
        return np.array(positions, dtype=float) @ np.cross(along, down)

    def read(self, number: int) -> np.ndarray:
        file = f"{self.files[0]}#frame={number}" if self.frames > 1 else self.files[number]
        return read_picture(file, window=self.args.window)

    def write(self, path: Path, answer: Answer) -> list[Path]:
        files = []
        try:
            seg = self._segmentation(answer)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # for whatever is missing
            self.notes.append(f"no DICOM SEG, since the input lacks what one needs: {reason(error)}")
        else:
            files.append(path.with_name(f"{path.name}.seg.dcm"))
            write_atomically(files[0], seg.save_as)
        if self.shape[0] == 1:
            return files + super().write(path, answer)
        chosen = list(self.numbers)
        headers = [self.headers[0 if self.frames > 1 else number] for number in chosen]
        arrays = {name: slices[chosen] for name, slices in answer.maps.items()}
        arrays |= {"slices": np.array(chosen), "instances": np.array([str(each.SOPInstanceUID) for each in headers])}

        def write_npz(temporary: Path) -> None:
            with temporary.open("wb") as file:  # given a name, numpy would add to it
                np.savez_compressed(file, allow_pickle=False, **arrays)

        files.append(path.with_name(f"{path.name}.npz"))
        write_atomically(files[-1], write_npz)
        return [*files, write_png(path.with_name(f"{path.name}_overlay.png"), answer.overlay())]

    def _segmentation(self, answer: Answer) -> highdicom.seg.Segmentation:
        """A binary SEG of mask and, if there is one, what to leave to a human; highdicom raises what it likes."""
        if self.shape[0] > 1 and not len(self.places):
            raise ValueError("its frames have no place in space")
        labels = {"mask": answer.text, "abstain": f"left to a human: {answer.text}"}
        labels = {name: label for name, label in labels.items() if name in answer.maps}
        numbers = list(range(self.shape[0]) if self.frames > 1 else self.numbers)
        sources = self.headers if self.frames > 1 else [self.headers[number] for number in numbers]
        if "ImagePositionPatient" not in sources[0] and "SliceThickness" not in sources[0]:
            sources = [copy.copy(header) for header in sources]
            sources[0].pop("PixelSpacing", None)  # highdicom writes but does not read it without the other
        made = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=np.stack([answer.maps[name][numbers] for name in labels], axis=-1),  # [n, h, w, segments]
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[description(number, label) for number, label in enumerate(labels.values(), start=1)],
            series_instance_uid=highdicom.UID(),
            series_number=1000 + int(self.headers[0].get("SeriesNumber") or 0),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="pvl-adapter",
            manufacturer_model_name="MedCLIPSeg",
            software_versions=pvl.__version__,
            device_serial_number=self.args.model_hash,
            series_description=long_string(answer.text),
            content_description=long_string(answer.text),
            specific_character_set="ISO_IR 192",  # UTF-8: a sentence may hold any letter
        )
        highdicom.seg.Segmentation.from_dataset(made)  # of some inputs it makes what it cannot read
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
