"""DICOM files and series: slices in their order in space, cut along any axis where they lie evenly."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import pydicom

from pvl_adapter.data.dicom import read_dicom
from pvl_adapter.data.inputs import Source, read_header
from pvl_adapter.data.reading import read_image
from pvl_adapter.data.scans import InputOptions, InputVolume
from pvl_adapter.data.volumes import AXES, Key, slice_of, spacing, zeros
from pvl_adapter.image_files import SliceRef, reason

if TYPE_CHECKING:
    from pvl_adapter.data.results import LabelVoxels, Result


class DicomVolume(InputVolume):
    """One DICOM file, of one or several frames, or the slices of a series, sorted along their normal.

    Its maps have the shape [slices, h, w], in the order in space; a frame is called by its number in the file, a slice
    of a series by its place.
    """

    def __init__(self, source: Source, options: InputOptions) -> None:
        super().__init__(source, options)
        self.files = list(source.files)
        self.headers = [read_header(file) for file in self.files]
        self.frames = int(self.headers[0].get("NumberOfFrames") or 1)
        self.count = max(self.frames, len(self.files))
        size = self._read_stored(0).shape[:2]  # refuses what holds no image
        if len(self.files) > 1:
            self._check_alike()
        self.shape = (self.count, *size)
        corners, self.turns = self._geometry()  # [slices, 3], [6]; empty if unknown
        along = corners @ np.cross(self.turns[:3], self.turns[3:]) if len(corners) else np.arange(self.count)
        self.sequence = np.argsort(along, kind="stable")  # numbers of frames or files, by their place
        self.corners, gaps = corners[self.sequence] if len(corners) else corners, np.diff(along[self.sequence])
        if len(self.files) > 1:
            self._sort(gaps)
        self.place = np.argsort(self.sequence)
        if spacing := value(self.headers[0], 0, "PixelMeasuresSequence", "PixelSpacing"):
            self.pixel_mm2 = float(spacing[0]) * float(spacing[1])
        if len(corners) > 1 and 0.0 < gaps.max() <= gaps.min() + 0.01 * gaps.max():
            self.solid, self.slice_mm = True, float(gaps.mean())
        elif len(corners) > 1:
            self.notes.append(f"slices lie {gaps.min():.3g} to {gaps.max():.3g} mm apart, so ml are unknown")
        self.axes = (source.part[0],) if source.part else options.axes
        if self.count == 1 or not set(self.axes) & set(AXES):
            self.axes = ("frame",)
            self.choose({"frame": self.count})
        else:
            self._turn()

    def _check_alike(self) -> None:
        split = "move those that belong together to a folder of their own, or give the files one by one"
        if self.frames > 1:
            raise ValueError(f"{self.files[0].name} of this series has {self.frames} frames, expected one; {split}")
        for name in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
            values = [np.atleast_1d(np.array(header.get(name) or 0, dtype=float)) for header in self.headers]
            same = [other.shape == values[0].shape and np.abs(other - values[0]).max() < 1e-3 for other in values]
            if not all(same):
                one, other = (f"{self.files[at].name} has {values[at].tolist()}" for at in (0, same.index(False)))
                raise ValueError(f"slices of this series differ in {name}: {one}, {other}; {split}")

    def _sort(self, gaps: np.ndarray) -> None:
        """Files by their place; refuses two of the same."""
        for header in self.headers:  # what highdicom would not take
            header.ImageOrientationPatient = self.headers[0].ImageOrientationPatient  # the last digits may differ
            header.pop("SpacingBetweenSlices", None)  # often wrong; positions tell
        self.headers, self.files = ([each[at] for at in self.sequence] for each in (self.headers, self.files))
        self.sequence = np.arange(self.count)
        if same := np.flatnonzero(gaps < 1e-3).tolist():
            split = "move those that belong together to a folder of their own, or give the files one by one"
            raise ValueError(
                f"{self.files[same[0]].name} and {self.files[same[0] + 1].name} of this series have the same position, "
                f"and {len(same) - 1} more pairs have (points in time, or echoes?); {split}"
            )

    def _geometry(self) -> tuple[np.ndarray, np.ndarray]:
        """Where slices begin, [slices, 3] in mm, and the directions of their rows and columns, [6].

        Empty if unknown, or if slices are not parallel.
        """
        frames = [(header, frame) for header in self.headers for frame in range(self.frames)]
        corners = [value(*frame, "PlanePositionSequence", "ImagePositionPatient") for frame in frames]
        turns = [value(*frame, "PlaneOrientationSequence", "ImageOrientationPatient") for frame in frames]
        if not all(corners) or not all(turns) or np.ptp(np.array(turns, dtype=float), axis=0).max() > 1e-3:
            return np.empty((0, 3)), np.empty(0)
        found, turn = np.array(corners, dtype=float), np.array(turns[0], dtype=float)
        same = self.frames > 1 and not np.ptp(found @ np.cross(turn[:3], turn[3:]))  # one position for all frames
        return (np.empty((0, 3)), np.empty(0)) if same else (found, turn)

    def _turn(self) -> None:
        """Cut along axes of the patient."""
        name = self.files[0].name if self.frames > 1 else f"the series of {self.files[0].name}"
        wanted = f"expected what can be cut along {', '.join(self.axes)}; leave out --axis to take slices as acquired"
        if not self.solid:
            raise ValueError(f"{name}: got slices without even distances in space, {wanted}")
        step = (self.corners[-1] - self.corners[0]) / (self.count - 1)
        if np.linalg.norm(step) > 1.0005 * self.slice_mm:  # 1.8 degrees
            raise ValueError(f"{name}: got slices of a tilted gantry, {wanted}")
        height, width = map(float, value(self.headers[0], 0, "PixelMeasuresSequence", "PixelSpacing") or (np.nan,) * 2)
        steps = np.stack([step, self.turns[3:] * height, self.turns[:3] * width], axis=1) * [[-1], [-1], [1]]  # to RAS
        self.turned = np.asarray(nib.io_orientation(nib.affines.from_matvec(steps)))  # type: ignore[no-untyped-call]
        self.choose({axis: self.shape[at] for axis, at in zip(AXES, np.argsort(self.turned[:, 0]), strict=True)})
        self.pixel_mm2, self.slice_mm = spacing(steps, self.turned, self.axes[0])

    @property
    def _shown(self) -> tuple[float, float] | None:
        """The window of all slices that are cut across: the file's if it is the same for all, else the middle one's."""
        groups = [(header, frame) for header in self.headers for frame in range(self.frames)]
        tags = ("WindowCenter", "WindowWidth", "VOILUTSequence", "RescaleSlope")
        said = {str([value(*group, "FrameVOILUTSequence", tag) for tag in tags[:3]]) for group in groups}
        if self.options.window or (len(said) == 1 and said != {str([None] * 3)}):
            return self.options.window
        middle = self.sequence[self.count // 2]
        ref = SliceRef(self.files[0], ("frame", middle)) if self.frames > 1 else SliceRef(self.files[middle])
        limits = read_dicom(ref, limits=None)[1]
        return (sum(limits) / 2, limits[1] - limits[0]) if limits and limits[1] > limits[0] else None

    @cached_property
    def _stack(self) -> np.ndarray:
        """All slices as they are shown, [slices, h, w], by their place."""
        stack, window = zeros(self.shape, np.uint8, folder=self.options.scratch), self._shown
        for place, number in enumerate(self.sequence):
            if (shown := self._read_stored(number, window=window)).shape != self.shape[1:]:
                raise ValueError(f"{self.files[0].name}: got colours, expected grey levels to cut along {self.axes[0]}")
            stack[place] = shown
        return stack

    def _read_stored(self, number: int, *, window: tuple[float, float] | None = None) -> np.ndarray:
        file = f"{self.files[0]}#frame={number}" if self.frames > 1 else self.files[number]
        return read_image(file, window=window or self.options.window)

    def read(self, key: Key) -> np.ndarray:
        return self._read_stored(key[1]) if key[0] == "frame" else self.view(self._stack, key)

    def view(self, voxels: np.ndarray, key: Key) -> np.ndarray:
        return voxels[self.place[key[1]]] if key[0] == "frame" else slice_of(voxels, self.turned, key)

    def write(self, folder: Path, name: str, result: Result, found: LabelVoxels | None) -> None:
        """Single frames also get the files of an image, others a .npz of each sentence, for a SEG holds masks alone."""
        from pvl_adapter.data.dicom_seg import segmentation

        try:
            segmentation(self, result, found).save_as(folder / f"{name}.seg.dcm")
        except OSError:  # a full disk, not the input
            raise
        except Exception as error:  # highdicom and pydicom raise almost anything for what an input lacks
            missing = isinstance(error, AttributeError) and error.name
            cause = f"it has no {missing}" if missing else reason(error)
            lacking = "" if isinstance(error, ImportError) else "the input lacks what one needs: "
            self.notes.append(f"no DICOM SEG: {lacking}{cause}")
        if self.count == 1:
            super().write(folder, name, result, found)
            return
        frames = self.sequence.tolist()
        headers = [self.headers[0 if self.frames > 1 else number] for number in frames]
        named = {"slices": frames, "instances": [str(header.get("SOPInstanceUID", "")) for header in headers]}
        for k, stem in enumerate(result.stems(name)):
            maps = {of: result.voxels(of, k) for of in dict.fromkeys((*result.names, *result.kept))}
            np.savez_compressed(folder / f"{stem}.npz", allow_pickle=False, **maps, **named)
        if found is not None:
            maps = {"labels": found.values, "entropy": found.entropy}
            np.savez_compressed(folder / f"{name}_labels.npz", allow_pickle=False, **maps, **named)


def value(header: pydicom.Dataset, frame: int, sequence: str, name: str) -> Any:
    """What a file says of a frame: of it alone, of all frames, or as if there were but one; None if it does not."""
    per_frame, shared = (header.get(f"{which}FunctionalGroupsSequence") or [] for which in ("PerFrame", "Shared"))
    for groups in (per_frame[frame : frame + 1], shared):
        if groups and groups[0].get(sequence):
            return groups[0][sequence][0].get(name)
    return header.get(name)
