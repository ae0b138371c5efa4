"""napari plugin: sentences become a labels layer, with probability and uncertainty, that lies on the picture.

napari draws rows downwards and columns to the right. So voxels of a NIfTI file are turned to the nearest inferior,
posterior, left axes, and the world counts mm in these directions: minus z, y and x of the file's own space. All three
views then show what a radiologist's display does, and 3-D is no mirror image.

Shape alphabet: K sentences, H W pixels of the network, h w pixels of a slice.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pvl_adapter.image_files import VOLUME_SUFFIXES, SliceRef, reading

if TYPE_CHECKING:
    from torch import Tensor

    from pvl_adapter.image_part import ImagePart
    from pvl_adapter.segmentation import MedCLIPSeg

LayerData = tuple[np.ndarray, dict[str, Any], str]
MADE = "pvl_adapter"  # in the metadata of layers that are results
_PARTS = 64  # slices whose image part is kept: about 1 MB each
_LIMITS = (0.5, 99.5)  # percentiles that are black and white at first, as for `read_image`


def get_reader(path: str | Sequence[str]) -> Callable[[str | Sequence[str]], list[LayerData]] | None:
    """What napari asks for: how NIfTI files are read, None for others."""
    paths = [path] if isinstance(path, (str, os.PathLike)) else path
    is_nifti = all(str(each).lower().endswith(VOLUME_SUFFIXES) for each in paths)
    return (lambda _: [read_nifti(SliceRef(Path(each))) for each in paths]) if is_nifti else None


def read_nifti(ref: SliceRef) -> LayerData:
    """An image layer [I, P, L] or [time, I, P, L], placed by its affine; ValueError for a damaged file."""
    with reading(ref, "NIfTI with an affine that tells the orientation"):
        import nibabel

        turns: Any = nibabel.orientations
        image: Any = nibabel.load(ref.file)
        voxels = np.asanyarray(image.dataobj)
        while voxels.ndim < 3 or (voxels.ndim > 3 and voxels.shape[-1] == 1):
            voxels = voxels[..., None] if voxels.ndim < 3 else voxels[..., 0]
        turn = turns.ornt_transform(turns.io_orientation(image.affine), turns.axcodes2ornt("LPI"))
        to_ras = image.affine @ turns.inv_ornt_aff(turn, voxels.shape[:3])
        voxels = turns.apply_orientation(voxels, turn).T  # [.., I, P, L]
        unit = str(image.header.get_xyzt_units()[0]).replace("unknown", "mm")
    if voxels.dtype.kind not in "buif" or not voxels.size:
        raise ValueError(f"{ref}: got {voxels.dtype} voxels of shape {voxels.shape}, expected plain numbers")
    more, affine = voxels.ndim - 3, np.eye(voxels.ndim + 1)
    affine[more:-1, more:-1], affine[more:-1, -1] = -to_ras[2::-1, 2::-1], -to_ras[2::-1, 3]
    low, high = np.percentile(np.nan_to_num(voxels), _LIMITS)
    how = {"name": ref.file.name, "affine": affine, "contrast_limits": (low, high if high > low else low + 1.0)}
    names = {"axis_labels": (*"tuvw"[:more], *"zyx"), "units": (*("pixel",) * more, *(unit,) * 3)}
    return voxels.astype(np.float32) if voxels.dtype.kind == "f" else voxels, {**how, **names}, "image"


@dataclass(frozen=True, eq=False)
class Picture:
    """Slices of an image layer, as the model is shown them.

    Attributes:
        data: Of the layer.
        limits: What is black and what is white; None of colours.
        places: Of each slice in the layer: numbers, and all of the two axes of its plane.
        shape: Of all slices together, with as many axes as the layer.
        order: How many axes of the plane come before the one that counts the slices.
        look: Where and how they lie: affine, units and names of the axes.
    """

    data: Any
    limits: tuple[float, ...] | None
    places: list[tuple[Any, ...]]
    shape: tuple[int, ...]
    order: int
    look: dict[str, Any]

    @classmethod
    def of(cls, layer: Any, *, point: Sequence[float], axis: int = 0, every: bool = False) -> Picture:
        """The slice at a point of the world, or every one along an axis; of further axes the place of that point."""
        data, ndim = layer.data[0] if layer.multiscale else layer.data, layer.ndim
        axes, across = list(range(ndim)), axis if ndim > 2 else None
        plane = [each for each in axes if each != across][-2:]
        here = np.clip(np.rint(layer.world_to_data(point)), 0, np.array(data.shape[:ndim]) - 1).astype(int)
        here[[*plane, across] if every and across is not None else plane] = 0
        shape = [data.shape[each] if each in plane or (every and each == across) else 1 for each in axes]
        places = []
        for number in range(1 if across is None else shape[across]):
            at = [here[each] + number * (each == across) for each in axes]
            places.append(tuple(slice(None) if each in plane else int(at[each]) for each in axes))
        affine, steps = np.eye(ndim + 1), np.eye(ndim)
        affine[:-1, -1] = layer.data_to_world(here)
        affine[:-1, :-1] = np.transpose([layer.data_to_world(here + step) for step in steps]) - affine[:-1, -1:]
        look = {"affine": affine, "units": layer.units, "axis_labels": layer.axis_labels}
        order = 0 if across is None else sum(each < across for each in plane)
        limits = None if layer.rgb else tuple(map(float, layer.contrast_limits))
        return cls(data, limits, places, tuple(shape), order, look)

    def levels(self, place: tuple[Any, ...]) -> np.ndarray:
        """A slice as the model is shown it: uint8 [h, w] within the layer's contrast limits, or colours [h, w, 3]."""
        values = np.asarray(self.data[place])
        if self.limits is None:
            return values[..., :3]
        low, high = self.limits
        values = np.nan_to_num(values.astype(np.float64), nan=low)
        return np.rint(np.clip((values - low) / (high - low), 0.0, 1.0) * 255.0).astype(np.uint8)

    def joined(self, slices: Sequence[Tensor], *, mode: str) -> np.ndarray:
        """Maps [H, W] of all slices at their own size, as one array of `shape`."""
        from torch.nn.functional import interpolate

        size = [length for length, all_of in zip(self.shape, self.places[0], strict=True) if all_of == slice(None)]
        resized = [interpolate(each[None, None].float(), size=size, mode=mode)[0, 0].numpy() for each in slices]
        return np.moveaxis(np.stack(resized), 0, self.order).reshape(self.shape)


@dataclass
class Found:
    """What sentences find in a picture: maps of each slice at the network's size, and what the model promises."""

    picture: Picture
    sentences: list[str]
    probability: list[Tensor] = field(default_factory=list)  # [K, H, W]
    uncertainty: list[Tensor] = field(default_factory=list)  # [H, W]; of several sentences the label map's entropy
    note: str = ""

    def labels(self, *, threshold: float, abstain: float, uncertainty: np.ndarray) -> np.ndarray:
        """Which sentence, counted from 1; one more where the uncertainty (of the picture's size) is above `abstain`."""
        from pvl_adapter.label_map import combine

        slices = [combine(each, threshold=threshold, names=self.sentences).labels for each in self.probability]
        labels = self.picture.joined(slices, mode="nearest").astype(np.min_scalar_type(len(self.sentences) + 1))
        labels[uncertainty > abstain] = len(self.sentences) + 1
        return labels


def find(
    model: MedCLIPSeg, picture: Picture, sentences: Sequence[str], *, num_samples: int, parts: dict[Any, ImagePart]
) -> Generator[None, None, Found]:
    """Ask distinct sentences of every slice; yields after each. `parts` are of earlier calls for the same data."""
    found = Found(picture, sorted(sentences))
    for place in picture.places:
        key = f"{picture.limits} {place}"
        parts[key] = part = parts.pop(key, None) or model.image_part(picture.levels(place))
        if len(parts) > _PARTS:
            del parts[next(iter(parts))]  # the one not used for longest
        told = model.predict(part, found.sentences, num_samples=num_samples)
        found.probability.append(told.probability.cpu())
        found.uncertainty.append((told.label_map().entropy if len(sentences) > 1 else told.uncertainty[0]).cpu())
        presence = told.presence if told.calibration and len(picture.places) == 1 else None
        found.note = ", ".join(presence.verdict) if presence else told.no_promise.partition(";")[0]
        yield
    return found


class Panel:
    """The dock widget of a viewer: its fields, the model, and what was found last."""

    def __init__(self, viewer: Any) -> None:
        from magicgui import widgets

        self.viewer = viewer
        self.worker: Any = None
        self.found: Found | None = None
        self.model: tuple[str, MedCLIPSeg] | None = None
        self.parts: dict[Any, ImagePart] = {}
        self.asked: tuple[str, Any] = ("", None)  # of which model and data `parts` are
        make: Any = widgets
        self.folder = make.FileEdit(mode="d", label="model", tooltip="a folder, or owner/name on the Hugging Face hub")
        self.image = make.ComboBox(label="image", choices=self._images)
        self.axis = make.ComboBox(label="slices across", choices=self._axes)
        self.every = make.CheckBox(label="", text="all slices, not the current one alone")
        self.sentences = make.TextEdit(label="sentences", tooltip="one or more, one per line")
        self.history = make.ComboBox(label="asked before", choices=[], nullable=True)
        self.samples = make.SpinBox(label="samples", value=30, max=1000, tooltip="0 is one pass with mean values")
        self.run = make.PushButton(text="Find")
        self.threshold = make.FloatSlider(label="threshold", value=0.5, min=0.0, max=1.0, tracking=False)
        self.abstain = make.FloatSlider(label="unsure above", value=1.0, min=0.0, max=1.0, tracking=False)
        self.abstain.tooltip = "share of the highest uncertainty that there can be; 1 is off"
        self.status = make.Label(value="For research: this is no medical device.")
        fields = [self.folder, self.image, self.axis, self.every, self.sentences, self.history, self.samples, self.run]
        self.root = make.Container(widgets=[*fields, self.threshold, self.abstain, self.status])
        self.root._panel = self  # signals hold their receivers weakly
        self.image.changed.connect(self.axis.reset_choices)
        self.history.changed.connect(self._ask_again)
        self.run.changed.connect(self.start_or_stop)
        for slider in (self.threshold, self.abstain):
            slider.changed.connect(self.relabel)

    def _images(self, _: object) -> list[Any]:
        return [each for each in self.viewer.layers if hasattr(each, "rgb") and MADE not in each.metadata]

    def _axes(self, _: object) -> list[tuple[str, int]]:
        layer = self.image.value
        return [] if layer is None or layer.ndim < 3 else [(name, at) for at, name in enumerate(layer.axis_labels)]

    def _ask_again(self, sentences: str | None) -> None:
        self.sentences.value = sentences or self.sentences.value

    def start_or_stop(self) -> None:
        """Ask in a thread, or stop after the current slice."""
        from napari.qt.threading import create_worker

        if self.worker is not None:
            self.worker.quit()
            return
        sentences = list(dict.fromkeys(line.strip() for line in self.sentences.value.splitlines() if line.strip()))
        name, layer = self.folder.line_edit.value.strip(), self.image.value
        if not (name and layer and sentences):
            raise ValueError("got no model, image or sentence, expected all three: fill in the fields above")
        where = {"axis": self.axis.value or 0, "every": self.every.value}
        picture = Picture.of(layer, point=self.viewer.dims.point, **where)
        if self.asked[0] != name or self.asked[1] is not picture.data:
            self.parts, self.asked = {}, (name, picture.data)
        text = "\n".join(sentences)
        self.history.choices = [text, *(each for each in self.history.choices if each not in (text, None))]
        self.run.text, self.status.value = "Stop", "asking ..."
        self.worker = create_worker(
            self._ask,
            *(name, picture, sentences, self.samples.value),
            _progress={"total": len(picture.places), "desc": sentences[0]},
            _connect={"returned": self.show, "errored": self._failed, "finished": self._ended},
        )

    def _ask(self, name: str, picture: Picture, sentences: list[str], num_samples: int) -> Any:
        """In the thread: a generator that returns a `Found`."""
        if self.model is None or self.model[0] != name:
            import torch

            from pvl_adapter.hub import from_pretrained

            self.model = name, from_pretrained(name, device="cuda" if torch.cuda.is_available() else None)
        return (yield from find(self.model[1], picture, sentences, num_samples=num_samples, parts=self.parts))

    def _failed(self, error: Exception) -> None:
        self.status.value = (str(error).splitlines() or [type(error).__name__])[0]  # napari itself shows more

    def _ended(self) -> None:
        self.worker, self.run.text = None, "Find"

    def show(self, found: Found) -> None:
        """Add the layers of a result, in place of earlier ones of the same names."""
        from pvl_adapter.data.presets import labels_of

        name = found.sentences[0] + f" and {len(found.sentences) - 1} more" * (len(found.sentences) > 1)
        titles = [f"{name}: probability", f"{name}: uncertainty", name]
        for old in [each for each in self.viewer.layers if each.name in titles and MADE in each.metadata]:
            self.viewer.layers.remove(old)
        most, unsure = math.log(len(found.sentences) + 1), len(found.sentences) + 1
        self.found = None
        how: dict[str, Any] = {**found.picture.look, "metadata": {MADE: found.sentences}}
        highest = [each.max(dim=0).values for each in found.probability]
        made = [(highest, "viridis", 1.0), (found.uncertainty, "magma", most)]
        for title, (slices, colormap, limit) in zip(titles, made, strict=False):
            more = {"colormap": colormap, "contrast_limits": (0.0, limit), "blending": "additive", "visible": False}
            self.uncertainty = self.viewer.add_image(
                found.picture.joined(slices, mode="bilinear"), name=title, **more, **how
            )
        colors = {label.value: [*(part / 255 for part in label.color), 1.0] for label in labels_of(found.sentences)}
        how["colormap"] = {None: "transparent", **colors, unsure: "white"}
        how["features"] = {"index": [*colors, unsure], "name": [*found.sentences, "unsure"]}
        empty = np.zeros(found.picture.shape, np.uint8)
        self.labels, self.found = self.viewer.add_labels(empty, name=name, opacity=0.5, **how), found
        self.relabel()
        self.status.value = found.note

    def relabel(self) -> None:
        """The labels of what was found last, as the sliders say: no pass of the network."""
        if self.found is not None:
            share, most = self.abstain.value, math.log(len(self.found.sentences) + 1)
            how = {"threshold": self.threshold.value, "abstain": share * most if share < 1.0 else math.inf}
            self.labels.data = self.found.labels(**how, uncertainty=self.uncertainty.data)


def make_widget(viewer: Any = None) -> Any:
    """What napari docks."""
    import napari

    return Panel(viewer or napari.current_viewer()).root
