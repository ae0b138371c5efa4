"""Images and masks: whatever form they come in, the network gets what the official pipeline would feed it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import TINY_RELEASED
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.image_files import write_image
from pvl_adapter.images import prepare_images, prepare_masks
from pvl_adapter.resizing import resize_image

GOLDEN = load_file(Path(__file__).parent / "goldens" / "preprocess.safetensors")
SIZE = (56, 56)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AS_RELEASED: dict[str, Any] = {"mean": MEAN, "std": STD, "channel_order": "BGR", "resize": "opencv_bilinear"}
PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

IMAGE: np.ndarray = GOLDEN["image_rgb"].numpy()  # [61, 83, 3]
TENSOR: Tensor = GOLDEN["image_rgb"].permute(2, 0, 1).contiguous()
GREY: np.ndarray = IMAGE[:, :, 1].copy()


def by_prepare_images(images: Any) -> Tensor:
    return prepare_images(images, size=SIZE, **AS_RELEASED)


def by_an_official_network(images: Any) -> Tensor:
    network = dataclasses.replace(TINY_RELEASED, image_size=SIZE[0], patch_size=14)
    return network.build().to_empty(device="cpu").prepare(images)


both_ways = pytest.mark.parametrize("prepare", [by_prepare_images, by_an_official_network])


def saved(path: Path, image: Image.Image, **settings: Any) -> Path:
    image.save(path, **settings)
    return path


# --- as the official code ---------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Path], Any]] = {
    "array": lambda folder: IMAGE,
    "float_array": lambda folder: IMAGE / 255.0,
    "pil": lambda folder: Image.fromarray(IMAGE),
    "path": lambda folder: saved(folder / "image.png", Image.fromarray(IMAGE)),
    "tensor_not_contiguous": lambda folder: GOLDEN["image_rgb"].permute(2, 0, 1),
    "tensor_with_gradients": lambda folder: (TENSOR / 255.0).requires_grad_(),
    "float_batch_tensor": lambda folder: TENSOR[None] / 255.0,
    "rounded_beyond_1": lambda folder: TENSOR[None] / 255.0 * (1 + 1e-7),
    "rgba_file": lambda folder: saved(folder / "image.png", Image.fromarray(np.dstack([IMAGE, GREY]), "RGBA")),
}


@both_ways
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_an_image_becomes_what_the_official_pipeline_feeds_the_network(form, prepare, tmp_path):
    """Every grey level is the recorded one; only the last digits of the normalisation differ."""
    got = prepare(form(tmp_path))

    assert got.shape == (1, 3, *SIZE)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got[0], GOLDEN["model_input"], atol=1e-6, rtol=0.0)


def test_masks_are_exactly_those_of_the_official_pipeline(tmp_path):
    mask = GOLDEN["mask_gray"]
    file = saved(tmp_path / "mask.png", Image.fromarray(mask.numpy()))
    expected = GOLDEN["model_mask"][None].bool()

    for form in (mask, mask.numpy(), Image.fromarray(mask.numpy()), file, str(file), [mask], mask >= 127, mask[None]):
        got = prepare_masks(form, size=SIZE)
        assert got.dtype == torch.bool
        assert torch.equal(got, expected)


def test_images_of_several_sizes_and_kinds_make_one_batch(tmp_path):
    small = IMAGE[:30, :41]
    images = [
        Image.fromarray(small),
        torch.from_numpy(small.copy()).permute(2, 0, 1) / 255.0,
        str(saved(tmp_path / "grey.png", Image.fromarray(GREY))),
        GREY,
        np.repeat(GREY[:, :, None], 3, axis=2),
        torch.from_numpy(GREY)[None],
        Image.fromarray(np.dstack([GREY, 255 - GREY]), "LA"),
    ]

    got = by_prepare_images(images)

    assert torch.equal(got, torch.cat([by_prepare_images(image) for image in images]))
    assert torch.equal(got[0], got[1])
    for grey in got[3:]:
        assert torch.equal(got[2], grey)


@pytest.mark.parametrize("scale", [1.0, 1 / 255.0])
@pytest.mark.parametrize("size", [SIZE, (61, 83)])
def test_a_batch_tensor_is_its_images_one_by_one(scale, size):
    """Raw images in [0, 1] are never taken for prepared ones; uint8 of the right size is not resized."""
    images = torch.stack([TENSOR, TENSOR.flip(1), 255 - TENSOR])
    images = images if scale == 1.0 else images * scale

    got = prepare_images(images, size=size, **AS_RELEASED)

    assert torch.equal(got, prepare_images(list(images), size=size, **AS_RELEASED))


def test_a_prepared_batch_is_refused_with_the_way_to_give_it():
    with pytest.raises(ValueError, match=r"expected 0 to 1.*prepared=True"):
        by_prepare_images(by_prepare_images(IMAGE))


def test_an_image_with_a_palette_is_that_image_in_colour(tmp_path):
    palette = Image.fromarray(IMAGE).quantize(16)
    expected = by_prepare_images(palette.convert("RGB"))

    for form in (palette, saved(tmp_path / "image.png", palette), saved(tmp_path / "image.gif", palette)):
        assert torch.equal(by_prepare_images(form), expected)


STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # by orientation: how the file differs from what is shown
    1: lambda shown: shown,
    2: np.fliplr,
    3: lambda shown: np.rot90(shown, 2),
    6: np.rot90,
    7: lambda shown: np.rot90(shown, 2).swapaxes(0, 1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_turned_upright_and_so_is_a_mask(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, mask = (np.ascontiguousarray(STORED[orientation](shown)) for shown in (IMAGE, GREY > 99))
    file = saved(tmp_path / "image.png", Image.fromarray(image), exif=exif)

    assert torch.equal(by_prepare_images(file), by_prepare_images(IMAGE))
    with Image.open(file) as opened:
        assert torch.equal(by_prepare_images(opened), by_prepare_images(IMAGE))
    file = saved(tmp_path / "mask.png", Image.fromarray(mask), exif=exif)
    assert torch.equal(prepare_masks(file, size=SIZE), prepare_masks(GREY > 99, size=SIZE))


def test_resizing_is_bicubic_unless_told_otherwise():
    expected = np.asarray(Image.fromarray(IMAGE).resize((31, 47), Image.Resampling.BICUBIC)) / 255.0

    got = prepare_images(IMAGE, size=(47, 31), **PLAIN)

    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_a_large_image_is_not_copied_to_be_resized(tmp_path):
    large = saved(tmp_path / "large.png", Image.new("RGB", (2000, 1500), (1, 2, 3)))  # 9 MB as uint8
    tracemalloc.start()

    got = prepare_images(large, size=(20, 30), resize="opencv_bilinear", **PLAIN)

    assert tracemalloc.get_traced_memory()[1] < 2e6  # besides Pillow's own copy
    tracemalloc.stop()
    assert torch.equal(got[0, :, 0, 0] * 255.0, torch.tensor([1.0, 2.0, 3.0]))


# --- resizing as OpenCV ----------------------------------------------------------------------------------------------

BY_OPENCV = [  # image, result, and SHA-256 of cv2.resize(image, INTER_LINEAR); OpenCV 4.11.0 and 5.0.0 agree
    ((5, 7), (56, 31), "687ff0dfa5e60711"),
    ((61, 83), (13, 17), "d202ce64344059fb"),
    ((33, 9), (8, 40), "87561bc4729cc87c"),
    ((1, 1), (3, 2), "1c7067077f7ae919"),
    ((2, 3), (7, 11), "2d4bbce20f962a9f"),
    ((64, 48), (32, 24), "d8827c0769110fc4"),
    ((19, 23), (19, 23), "9d0f41af056e162d"),
    ((50, 1), (7, 9), "965ec12d6c125456"),
    ((301, 199), (224, 224), "6437f9384bf76d52"),
    ((97, 640), (224, 224), "512f63dac0de06c8"),
    ((1200, 900), (40, 30), "d16bca0dd336193e"),
]
SIZES = [((5, 7), (56, 31)), ((33, 9), (8, 40)), ((2, 3), (7, 11)), ((36, 38), (56, 336)), ((58, 54), (56, 336))]


@pytest.mark.parametrize(("given", "wanted", "sha256"), BY_OPENCV)
def test_bilinear_resizing_is_opencvs_in_every_value(given, wanted, sha256):
    levels = np.frombuffer(random.Random(0).randbytes(3 * given[0] * given[1]), np.uint8).reshape(*given, 3)

    got = resize_image(Image.fromarray(levels), wanted, resize="opencv_bilinear")

    assert hashlib.sha256(got.permute(1, 2, 0).numpy().tobytes()).hexdigest().startswith(sha256)


@pytest.mark.parametrize(("given", "wanted"), SIZES, ids=str)
def test_resizing_of_masks_is_opencvs(given, wanted):
    """At (36, 56) and its like, single precision would take a neighbour."""
    mask = np.random.default_rng(0).random(given) > 0.5
    steps = [1.0 / (wanted[axis] / given[axis]) for axis in range(2)]  # as OpenCV computes them
    rows, columns = ([min(math.floor(k * steps[a]), given[a] - 1) for k in range(wanted[a])] for a in range(2))
    expected = [[mask[row, column] for column in columns] for row in rows]

    assert np.array_equal(prepare_masks(mask, size=wanted)[0].numpy(), expected)


# --- what is foreground ----------------------------------------------------------------------------------------------

SHAPE = np.zeros((20, 30), dtype=bool)
SHAPE[3:9, 4:20] = True


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("level", [1, 255])
def test_a_mask_of_two_levels_is_a_mask_in_every_type(kind, level, tmp_path):
    mask = (SHAPE * level).astype(kind)
    forms: list[Any] = [mask] if kind is np.uint16 else [mask, torch.from_numpy(mask)]
    if kind in (bool, np.uint8, np.uint16):
        forms += [Image.fromarray(mask), saved(tmp_path / "mask.png", Image.fromarray(mask))]
    for form in forms:
        assert np.array_equal(prepare_masks(form, size=SHAPE.shape)[0].numpy(), SHAPE)
    assert not prepare_masks(0 * mask.astype(np.uint8), size=SHAPE.shape).any()


def test_foreground_begins_at_grey_level_127():
    mask = SHAPE * np.uint8(255)
    mask[0, :6] = [0, 1, 126, 127, 128, 255]  # few pixels: the grey edges of a mask that was resized

    assert prepare_masks(mask, size=SHAPE.shape)[0, 0, :6].tolist() == [False, False, False, True, True, True]


# --- several images in one file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stack.tif", "moving.gif", "moving.png"])
def test_a_file_of_several_images_asks_which(name, tmp_path):
    frames = [Image.fromarray(np.full((8, 9), level, np.uint8)).convert("RGB") for level in (10, 200, 90)]
    file = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], lossless=True)

    with pytest.raises(ValueError, match=rf"{name}: .* 3 .*{name}#frame=0"):
        by_prepare_images(file)
    with Image.open(file) as opened, pytest.raises(ValueError, match="3 pages or frames"):
        by_prepare_images(opened)
    got = prepare_images([f"{file}#frame={number}" for number in range(3)], size=(8, 9), **PLAIN) * 255.0
    assert (got[:, 0, 0, 0] - torch.tensor([10.0, 200.0, 90.0])).abs().max() < 2  # GIF has a palette
    with pytest.raises(ValueError, match="frame=3 of 3"):
        by_prepare_images(f"{file}#frame=3")


def test_volumes_and_dicom_are_read_through_the_data_package(tmp_path):
    from test_data_reading import save_dicom, save_nifti

    dicom = save_dicom(tmp_path / "a.dcm", GREY)
    volume = save_nifti(tmp_path / "a.nii.gz", np.repeat((GREY > 99)[:, :, None], 5, axis=2).astype(np.uint8))

    assert torch.equal(by_prepare_images(dicom), by_prepare_images(GREY))
    shown = (GREY > 99).T[::-1, ::-1]
    assert torch.equal(by_prepare_images(f"{volume}#z=4"), by_prepare_images(shown * np.uint8(255)))
    assert torch.equal(prepare_masks(f"{volume}#z=4", size=SIZE), prepare_masks(shown.copy(), size=SIZE))
    with pytest.raises(ValueError, match=r"a\.nii\.gz#z=2"):
        by_prepare_images(volume)


# --- what is not an image --------------------------------------------------------------------------------------------


BAD: dict[str, tuple[Any, str]] = {  # what is given, and what the message must say
    "nothing": ([], "expected one or more"),
    "two channels": (IMAGE[:, :, :2], r"\(61, 83, 2\), expected"),
    "channels first in an array": (TENSOR.numpy(), r"\(3, 61, 83\), expected"),
    "channels last in a tensor": (GOLDEN["image_rgb"], r"expected .*\[3, height, width\]"),
    "no pixels": (IMAGE[:0], r"\(0, 83, 3\), expected"),
    "int16": (IMAGE.astype(np.int16), "int16, expected uint8"),
    "nan": (np.where(GREY > 99, np.nan, 0.5), "nan"),
    "grey levels as float": (IMAGE.astype(float), "0 to 255, expected 0 to 1"),
    "sixteen bits": (Image.fromarray(GREY.astype(np.uint16)), "more than 8 bits.*read_image"),
    "one bad among good": ([IMAGE, None], "NoneType, expected an image"),
}
BAD_MASKS: dict[str, tuple[Any, str]] = {
    "nothing": ([], "expected one or more"),
    "colours": (IMAGE, r"\(61, 83, 3\) of uint8, expected \[height, width\]"),
    "soft": (GREY / 255.0, "not binary"),
    "nan": (np.where(GREY > 99, np.nan, 1.0), "nan"),
    "labels": (GREY % 5, "levels are 0, 1, 2, 3, 4"),
    "object": (object(), "object, expected a mask"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_an_image_is_refused(kind):
    given, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        by_prepare_images(given)


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_what_is_not_a_mask_is_refused(kind):
    given, message = BAD_MASKS[kind]
    with pytest.raises(ValueError, match=message):
        prepare_masks(given, size=SIZE)


def test_an_image_of_too_many_pixels_names_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png .*MAX_IMAGE_PIXELS"):
        by_prepare_images(saved(tmp_path / "bomb.png", Image.new("RGB", (60, 60))))


def test_a_network_in_half_precision_gets_its_own_type():
    model = dataclasses.replace(TINY_RELEASED, image_size=SIZE[0], patch_size=14).build().to_empty(device="cpu")
    model.clip.to(torch.bfloat16)
    assert isinstance(model, pvl.MedCLIPSeg)
    assert model.prepare(IMAGE).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (64, 3)])
def test_images_are_written_without_loss_and_maps_in_16_bits(shape, tmp_path):
    random = np.random.default_rng(0)
    for levels in (
        random.integers(0, 65536, shape).astype(np.uint16),
        random.integers(0, 256, (*shape, 3)).astype(np.uint8),
    ):
        write_image(tmp_path / "image.png", Image.fromarray(levels))
        with Image.open(tmp_path / "image.png") as opened:
            opened.verify()  # checksums
        with Image.open(tmp_path / "image.png") as opened:
            np.testing.assert_array_equal(np.asarray(opened), levels)
