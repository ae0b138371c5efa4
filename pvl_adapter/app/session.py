"""What one visitor of the page has dropped, asked and found; all of it lives in memory and in one temporary folder.

Shape alphabet: K sentences, H W pixels of the network, h w pixels of a slice.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import pvl_adapter as pvl
from pvl_adapter.data.inputs import Source, find_sources
from pvl_adapter.data.issues import listed
from pvl_adapter.data.presets import Label, labels_of
from pvl_adapter.data.results import Result, ResultOptions, slug
from pvl_adapter.data.scans import InputOptions, InputVolume, Key, open_input

MAPS = ("probability", "aleatoric", "epistemic")
_PROMISED = ("outer_mask", "inner_mask", "calibrated_probability")
_MOST_FILES, _MOST_BYTES = 20_000, 8 << 30  # of a zip, unpacked
_SAID = ("area_interval", "abstained", "flagged")
_EXPECTED = "an image (PNG, JPEG, TIFF, ...), a NIfTI volume, DICOM files, or a zip of those"
_BATCH = 8  # image and sentence pairs


@dataclass(frozen=True)
class Found:
    """What K sentences find in one slice, from which everything is drawn without a new pass.

    Attributes:
        maps: Of MAPS, and of what is promised, each [K, H, W].
        promises: Of each sentence, what is promised: presence, area_interval (in pixels of the slice), ...
        no_promise: Why nothing is promised; empty if something is.
        alpha: Of the promises.
        prediction: To be saved; None of many slices, whose maps are written by `Result`.
    """

    maps: dict[str, np.ndarray]
    promises: list[dict[str, Any]]
    no_promise: str
    alpha: float
    prediction: pvl.Prediction | None

    @classmethod
    def of(cls, prediction: pvl.Prediction, pairs: slice, *, keep: bool) -> Found:
        """Some pairs of a prediction."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is not promised is None
            promised = {name: getattr(prediction, name) for name in (*MAPS, *_PROMISED)}
            said: dict[str, Any] = {
                name: getattr(prediction, name) for name in ("area_interval", "abstained", "flagged")
            }
            presence = prediction.presence
        said = {name: values.tolist() for name, values in said.items() if values is not None}
        said |= {"presence": presence.verdict} if presence else {}
        said = {name: values[pairs] for name, values in said.items()}
        count = len(prediction.mask[pairs])
        return cls(
            maps={name: values[pairs].cpu().numpy() for name, values in promised.items() if values is not None},
            promises=[{name: values[k] for name, values in said.items()} for k in range(count)],
            no_promise="" if prediction.calibration else prediction.no_promise,
            alpha=prediction.calibration.alpha if prediction.calibration else 0.0,
            prediction=prediction if keep else None,
        )

    def doubtful(self, abstain: float) -> np.ndarray:
        """Pixels with more uncertainty than so many nats, bool [K, H, W]."""
        return self.maps["aleatoric"] + self.maps["epistemic"] > abstain


class Session:
    """A visitor's input, sentences and results; empty until something is dropped."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.sources: list[Source] = []
        self.volume: InputVolume | None = None
        self.result: Result | None = None  # of all slices, if they were predicted
        self.labels: tuple[Label, ...] = ()
        self.found: dict[Key, Found] = {}
        self.job: object = None  # what is predicting the whole volume; another one, or None, ends it

    @property
    def keys(self) -> list[Key]:
        return self.volume.keys if self.volume else []

    def relative(self, message: str) -> str:
        """A message without the folder, which a visitor does not know."""
        return message.replace(f"{self.folder}/input/", "")

    def close(self) -> None:
        """Forget everything, files too."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        vars(self).update(vars(Session()))

    def take(self, files: Sequence[str | os.PathLike[str]]) -> None:
        """Take in dropped files; those of a zip, and slices of a series, belong together.

        Raises:
            ValueError: If there is nothing to predict in them.
        """
        self.close()
        self.folder = Path(tempfile.mkdtemp(prefix="pvl-adapter-"))
        inputs = self.folder / "input"
        inputs.mkdir()
        for number, file in enumerate(map(Path, files)):
            if zipfile.is_zipfile(file):
                _unpack(file, inputs / file.stem)
            else:
                shutil.copy(file, inputs / (f"{number}-{file.name}" if (inputs / file.name).exists() else file.name))
        self.sources, skipped = find_sources([str(inputs)], output=self.folder / "output")
        if not self.sources:
            names = listed([path.relative_to(inputs) for path in skipped])
            raise ValueError(f"got {names or 'no file'}, expected {_EXPECTED}")

    def open(self, number: int = 0, *, axis: str = "z") -> None:
        """Open one of the sources, cut along an axis; forgets what was found."""
        self.volume, self.found, self.result, self.job = None, {}, None, None
        source = self.sources[number]
        volume = open_input(source, InputOptions(axes=(axis,) if source.kind == "nifti" else (), scratch=self.folder))
        volume.read(volume.keys[len(volume.keys) // 2])  # refuses a damaged image
        self.volume = volume

    def ask(self, sentences: str) -> None:
        """Take in sentences, one in each line; what others have found is forgotten."""
        if self.volume is None:
            raise ValueError("there is no image yet; drop one, or click an example")
        if not (labels := labels_of(line.strip() for line in sentences.splitlines() if line.strip())):
            raise ValueError("there is no sentence yet; say what is to be found, one sentence in each line")
        if labels != self.labels:
            self.labels, self.found, self.result, self.job = labels, {}, None, None

    def predict(self, model: pvl.MedCLIPSeg, keys: Sequence[Key], **sampling: Any) -> pvl.Prediction:
        """Find all sentences in some slices: len(keys) * K pairs, key by key."""
        assert self.volume is not None
        found, count, sentences = self.found, len(self.labels), [label.sentence for label in self.labels]
        images = [self.volume.read(key) for key in keys]
        if len(keys) == 1:  # its image part is shared by all sentences
            prediction = model.predict(images[0], sentences, **sampling)
        else:
            pairs = [image for image in images for _ in sentences]
            prediction = model.predict(pairs, sentences * len(keys), **sampling)
        for at, key in enumerate(keys):
            found[key] = Found.of(prediction, slice(at * count, (at + 1) * count), keep=len(keys) == 1)
        return prediction

    def predict_all(self, model: pvl.MedCLIPSeg, **sampling: Any) -> Iterator[int]:
        """Find all sentences in all slices; yields how many are done, and ends early if `job` changes."""
        assert self.volume is not None
        job = self.job = object()
        result, keys = Result(self.volume, self.labels, ResultOptions()), list(self.keys)
        step = max(1, _BATCH // len(self.labels))
        yield 0
        for start in range(0, len(keys), step):
            some = keys[start : start + step]
            result.add(some, self.predict(model, some, **sampling))
            yield start + len(some)
            if self.job is not job:
                return
        self.result = result

    def measures(self, key: Key, *, threshold: float, abstain: float) -> list[dict[str, Any]]:
        """What each sentence finds in a slice, and in the whole volume if that was predicted; JSON-ready."""
        assert self.volume is not None
        found, pixel, slice_mm = self.found[key], self.volume.pixel_mm2, self.volume.slice_mm
        rows = []
        for k, label in enumerate(self.labels):
            pixels, promises = self._pixels(key, k, threshold), dict(found.promises[k])
            row = {"sentence": label.sentence, "pixels": pixels, "pixels_interval": promises.pop("area_interval", None)}
            row |= {"left_to_a_human": float(found.doubtful(abstain)[k].mean()), **promises}
            if np.isfinite(pixel):
                interval = row["pixels_interval"] and [bound * pixel for bound in row["pixels_interval"]]
                row |= {"mm2": pixels * pixel, "mm2_interval": interval}
            if self.result is not None and np.isfinite(pixel * slice_mm):
                total = sum(self._pixels(each, k, threshold) for each in self.keys)
                row["ml"] = total * pixel * slice_mm / 1000.0
            rows.append(row)
        return rows

    def _pixels(self, key: Key, k: int, threshold: float) -> int:
        """Of a mask at the slice's own size, resized as by `Prediction.at_original_size`."""
        assert self.volume is not None
        mask = self.found[key].maps["probability"][k] > threshold  # [H, W]
        sizes = zip(self.volume.size(key), mask.shape, strict=True)
        taken = (np.floor(np.arange(new, dtype=np.float32) * np.float32(old / new)).astype(int) for new, old in sizes)
        rows, columns = (np.bincount(each, minlength=old) for each, old in zip(taken, mask.shape, strict=True))
        return int(rows @ mask @ columns)

    def save(self, key: Key, *, threshold: float, abstain: float) -> Path:
        """Everything that was found in a slice, or in all if all were predicted, as a zip file."""
        assert self.volume is not None
        assert self.folder is not None
        if key not in self.found:
            raise ValueError("nothing was found in this slice yet; press Find")
        out = self.folder / "output"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        name = Path(self.volume.source.name).name
        if self.result is not None:
            self.result.options = ResultOptions(threshold, abstain)
            self.result.maps["mask"][:] = self.result.maps["probability"] > threshold
            self.result.write(out, name)
        elif (prediction := self.found[key].prediction) is not None:
            prediction = replace(prediction, mask=prediction.probability > threshold)
            stems = [name] if len(self.labels) == 1 else [f"{name}_{slug(label.name)}" for label in self.labels]
            prediction.save(out, names=stems)
        facts = {"slice": list(key), "threshold": threshold, "abstain_nats": abstain}
        said = {**facts, "found": self.measures(key, threshold=threshold, abstain=abstain)}
        (out / "measures.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        return Path(shutil.make_archive(str(self.folder / f"{name}_found"), "zip", out))


def _unpack(file: Path, folder: Path) -> None:
    with zipfile.ZipFile(file) as packed:
        size = sum(entry.file_size for entry in packed.infolist())
        if len(packed.infolist()) > _MOST_FILES or size > _MOST_BYTES:
            got = f"got {len(packed.infolist())} files of {size / 2**30:.1f} GiB"
            raise ValueError(f"{file.name}: {got}, expected {_MOST_FILES} of {_MOST_BYTES >> 30} at most; send fewer")
        packed.extractall(folder)
