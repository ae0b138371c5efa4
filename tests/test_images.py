"""Pictures and masks: whatever form they come in, the network gets what the released pipeline would feed it."""

from __future__ import annotations

import dataclasses
import io
import math
import os
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
from pvl_adapter.images import prepare_images, prepare_masks

GOLDEN = load_file(Path(__file__).parent / "goldens" / "preprocess.safetensors")
SIZE = (56, 56)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AS_RELEASED: dict[str, Any] = {"mean": MEAN, "std": STD, "channel_order": "BGR", "resize": "opencv_bilinear"}
PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

PICTURE: np.ndarray = GOLDEN["image_rgb"].numpy()  # [61, 83, 3]
TENSOR: Tensor = GOLDEN["image_rgb"].permute(2, 0, 1).contiguous()
GREY: np.ndarray = PICTURE[:, :, 1].copy()


def tiny_segmenter() -> pvl.MedCLIPSeg:
    """A small network of the released code with random weights, at the size of the recorded picture."""
    network = dataclasses.replace(TINY_RELEASED, image_size=SIZE[0], patch_size=14)
    return network.build().to_empty(device="cpu")


def by_prepare_images(pictures: Any) -> Tensor:
    return prepare_images(pictures, size=SIZE, **AS_RELEASED)


def by_a_released_network(pictures: Any) -> Tensor:
    return tiny_segmenter().prepare(pictures)


both_ways = pytest.mark.parametrize(
    "prepare", [by_prepare_images, by_a_released_network], ids=["prepare_images", "released_network"]
)


def grey_levels(prepared: Tensor) -> Tensor:
    """[B, 3, H, W] in 0 to 255: the normalisation undone, whatever the order of channels."""
    return (prepared * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255.0


def saved(path: Path, picture: Image.Image, **settings: Any) -> Path:
    picture.save(path, **settings)
    return path


# --- as released -----------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Path], Any]] = {
    "array": lambda folder: PICTURE,
    "array_not_contiguous": lambda folder: PICTURE[:, :, ::-1].copy()[:, :, ::-1],
    "float_array": lambda folder: PICTURE / 255.0,
    "float32_array": lambda folder: (PICTURE / 255.0).astype(np.float32),
    "pil": lambda folder: Image.fromarray(PICTURE),
    "path": lambda folder: saved(folder / "picture.png", Image.fromarray(PICTURE)),
    "str": lambda folder: str(saved(folder / "picture.png", Image.fromarray(PICTURE))),
    "bmp": lambda folder: saved(folder / "picture.bmp", Image.fromarray(PICTURE)),
    "tensor": lambda folder: TENSOR,
    "tensor_not_contiguous": lambda folder: GOLDEN["image_rgb"].permute(2, 0, 1),
    "float_tensor": lambda folder: TENSOR / 255.0,
    "double_tensor": lambda folder: TENSOR.double() / 255.0,
    "tensor_with_gradients": lambda folder: (TENSOR / 255.0).requires_grad_(),
    "batch_tensor": lambda folder: TENSOR[None],
    "list": lambda folder: [PICTURE],
    "tuple": lambda folder: (Image.fromarray(PICTURE),),
    "rgba": lambda folder: Image.fromarray(np.dstack([PICTURE, GREY]), "RGBA"),
    "rgba_file": lambda folder: saved(folder / "picture.png", Image.fromarray(np.dstack([PICTURE, GREY]), "RGBA")),
}


@both_ways
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_a_picture_becomes_what_the_released_pipeline_feeds_the_network(form, prepare, tmp_path):
    got = prepare(form(tmp_path))

    assert got.shape == (1, 3, *SIZE)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    difference = (grey_levels(got) - grey_levels(GOLDEN["model_input"][None])).abs()
    assert difference.max() <= 1.001


def test_most_grey_levels_are_exactly_those_of_the_released_pipeline():
    """OpenCV computes in fixed point and cuts off, so that one in eight comes out a level darker."""
    difference = grey_levels(by_prepare_images(PICTURE)) - grey_levels(GOLDEN["model_input"][None])

    assert (difference.abs() < 0.01).float().mean() > 0.8
    assert difference.mean().abs() < 0.2


def test_masks_are_exactly_those_of_the_released_pipeline(tmp_path):
    mask = GOLDEN["mask_gray"]
    file = saved(tmp_path / "mask.png", Image.fromarray(mask.numpy()))
    expected = GOLDEN["model_mask"][None].bool()

    for form in (mask, mask.numpy(), Image.fromarray(mask.numpy()), file, str(file), [mask], mask >= 127):
        got = prepare_masks(form, size=SIZE)
        assert got.dtype == torch.bool
        assert torch.equal(got, expected)


@both_ways
def test_pictures_of_several_sizes_and_kinds_make_one_batch(prepare, tmp_path):
    small = PICTURE[:30, :41]
    pictures = [
        PICTURE,
        Image.fromarray(small),
        saved(tmp_path / "picture.png", Image.fromarray(PICTURE)),
        torch.from_numpy(small.copy()).permute(2, 0, 1) / 255.0,
        str(saved(tmp_path / "grey.png", Image.fromarray(GREY))),
        GREY,
    ]

    got = prepare(pictures)

    assert torch.equal(got, torch.cat([prepare(picture) for picture in pictures]))
    assert torch.equal(got[0], got[2])
    assert torch.equal(got[1], got[3])
    assert torch.equal(got[4], got[5])


@both_ways
def test_a_batch_tensor_is_its_pictures_one_by_one(prepare):
    pictures = torch.stack([TENSOR, TENSOR.flip(0), 255 - TENSOR])

    assert torch.equal(prepare(pictures), torch.cat([prepare(picture) for picture in pictures]))


GREY_FORMS: dict[str, Callable[[Path], Any]] = {
    "array": lambda folder: GREY,
    "array_with_a_channel": lambda folder: GREY[:, :, None],
    "float_array": lambda folder: GREY / 255.0,
    "tensor": lambda folder: torch.from_numpy(GREY),
    "tensor_with_a_channel": lambda folder: torch.from_numpy(GREY)[None],
    "pil": lambda folder: Image.fromarray(GREY, "L"),
    "pil_with_transparency": lambda folder: Image.fromarray(np.dstack([GREY, 255 - GREY]), "LA"),
    "file": lambda folder: saved(folder / "grey.png", Image.fromarray(GREY)),
}


@both_ways
@pytest.mark.parametrize("form", GREY_FORMS.values(), ids=GREY_FORMS)
def test_a_grey_picture_is_that_picture_in_colour(form, prepare, tmp_path):
    assert torch.equal(prepare(form(tmp_path)), prepare(np.repeat(GREY[:, :, None], 3, axis=2)))


def test_a_picture_with_a_palette_is_that_picture_in_colour(tmp_path):
    palette = Image.fromarray(PICTURE).quantize(16)
    assert palette.mode == "P"
    expected = by_prepare_images(palette.convert("RGB"))

    assert torch.equal(by_prepare_images(palette), expected)
    assert torch.equal(by_prepare_images(saved(tmp_path / "picture.png", palette)), expected)
    assert torch.equal(by_prepare_images(saved(tmp_path / "picture.gif", palette)), expected)


def test_a_black_and_white_picture_uses_the_whole_range():
    picture = Image.fromarray(GREY).convert("1")

    got = prepare_images(picture, size=(61, 83), resize="opencv_bilinear", **PLAIN)

    assert got.unique().tolist() == [0.0, 1.0]


ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # how the stored picture differs from the upright one
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: np.rot90,
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_photograph_is_turned_upright(orientation, tmp_path):
    stored = Image.fromarray(np.ascontiguousarray(ORIENTATIONS[orientation](PICTURE)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(tmp_path / "photograph.png", stored, exif=exif)  # without loss, so that it can be compared exactly

    assert torch.equal(by_prepare_images(file), by_prepare_images(PICTURE))
    with Image.open(file) as opened:
        assert torch.equal(by_prepare_images(opened), by_prepare_images(PICTURE))


def test_a_jpeg_is_turned_upright_and_so_is_a_mask(tmp_path):
    upright = np.zeros((40, 60, 3), dtype=np.uint8)
    upright[:, 30:] = 255  # the right half is bright
    exif = Image.Exif()
    exif[0x0112] = 6
    file = saved(tmp_path / "photograph.jpg", Image.fromarray(np.rot90(upright).copy()), exif=exif, quality=95)

    got = prepare_images(file, size=(40, 60), resize="opencv_bilinear", **PLAIN)[0]
    mask = prepare_masks(file, size=(40, 60))[0]

    assert got[:, :, :28].max() < 0.05
    assert got[:, :, 32:].min() > 0.95
    assert not mask[:, :28].any()
    assert mask[:, 32:].all()


def test_a_prepared_tensor_is_passed_through_untouched():
    prepared = torch.randn(2, 3, *SIZE)

    assert by_prepare_images(prepared) is prepared
    assert torch.equal(by_a_released_network(prepared), prepared)


def test_what_was_prepared_can_be_prepared_again():
    prepared = by_a_released_network([PICTURE, GREY])

    assert torch.equal(by_a_released_network(prepared), prepared)


def test_what_is_given_is_not_changed():
    array, tensor, image = PICTURE.copy(), TENSOR.clone(), Image.fromarray(PICTURE)

    by_prepare_images([array, tensor, image])

    assert np.array_equal(array, PICTURE)
    assert torch.equal(tensor, TENSOR)
    assert np.array_equal(np.asarray(image), PICTURE)


def test_channels_can_keep_their_order():
    settings = {"size": SIZE, "resize": "opencv_bilinear", **PLAIN}

    red_first = prepare_images(PICTURE, channel_order="RGB", **settings)

    assert torch.equal(red_first, prepare_images(PICTURE, **settings))
    assert torch.equal(red_first.flip(1), prepare_images(PICTURE, channel_order="BGR", **settings))


def test_resizing_is_bicubic_unless_told_otherwise():
    expected = np.asarray(Image.fromarray(PICTURE).resize((31, 47), Image.Resampling.BICUBIC)) / 255.0

    got = prepare_images(PICTURE, size=(47, 31), **PLAIN)

    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_a_network_in_half_precision_gets_its_own_type():
    model = tiny_segmenter()
    model.clip.to(torch.bfloat16)

    assert model.prepare(PICTURE).dtype == torch.bfloat16


# --- resizing against plain loops ------------------------------------------------------------------------------------

SIZES = [
    ((5, 7), (56, 31)),
    ((61, 83), (13, 17)),
    ((33, 9), (8, 40)),
    ((1, 1), (3, 2)),
    ((2, 3), (7, 11)),
    ((64, 48), (32, 24)),
    ((19, 23), (19, 23)),
    ((50, 1), (7, 9)),
]


def bilinear_by_hand(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """OpenCV's: pixels are centred at halves, nothing is averaged besides the four neighbours, edges repeat."""

    def neighbours(wanted: int, given: int) -> list[tuple[int, int, float]]:
        found = []
        for index in range(wanted):
            place = (index + 0.5) * given / wanted - 0.5
            low = math.floor(place)
            found.append((min(max(low, 0), given - 1), min(max(low + 1, 0), given - 1), place - low))
        return found

    result = np.zeros((*size, picture.shape[2]))
    for y, (top, bottom, down) in enumerate(neighbours(size[0], picture.shape[0])):
        for x, (left, right, along) in enumerate(neighbours(size[1], picture.shape[1])):
            above = (1 - along) * picture[top, left].astype(float) + along * picture[top, right]
            below = (1 - along) * picture[bottom, left].astype(float) + along * picture[bottom, right]
            result[y, x] = (1 - down) * above + down * below
    return result


@pytest.mark.parametrize(("given", "wanted"), SIZES, ids=str)
def test_bilinear_resizing_is_opencvs(given, wanted):
    picture = np.random.default_rng(0).integers(0, 256, (*given, 3)).astype(np.uint8)

    got = prepare_images(picture, size=wanted, resize="opencv_bilinear", **PLAIN)[0].permute(1, 2, 0).numpy() * 255.0

    assert np.abs(got - bilinear_by_hand(picture, wanted)).max() <= 0.51  # rounded to grey levels, nothing else
    np.testing.assert_allclose(got, got.round(), atol=1e-4)


def test_the_oracle_of_bilinear_resizing_is_right_itself():
    expected = GOLDEN["model_input"].flip(0) * torch.tensor(STD[::-1]).view(3, 1, 1)
    expected = (expected + torch.tensor(MEAN[::-1]).view(3, 1, 1)).permute(1, 2, 0).numpy() * 255.0

    assert np.abs(bilinear_by_hand(PICTURE, SIZE) - expected).max() <= 1.01


@pytest.mark.parametrize(("given", "wanted"), [*SIZES, ((36, 38), (56, 336)), ((58, 54), (56, 336))], ids=str)
def test_resizing_of_masks_is_opencvs(given, wanted):
    """At (36, 56) and its like, single precision would take a neighbour."""
    mask = np.random.default_rng(0).random(given) > 0.5
    expected = np.zeros(wanted, dtype=bool)
    steps = [1.0 / (wanted[axis] / given[axis]) for axis in range(2)]  # as OpenCV computes them
    for y in range(wanted[0]):
        for x in range(wanted[1]):
            row, column = math.floor(y * steps[0]), math.floor(x * steps[1])
            expected[y, x] = mask[min(row, given[0] - 1), min(column, given[1] - 1)]

    assert np.array_equal(prepare_masks(mask, size=wanted)[0].numpy(), expected)


def test_foreground_begins_at_grey_level_127():
    mask = np.array([[0, 1, 126, 127, 128, 255]], dtype=np.uint8)

    assert prepare_masks(mask, size=(1, 6)).tolist() == [[[False, False, False, True, True, True]]]


def test_masks_of_several_sizes_and_kinds_make_one_batch():
    mask = GOLDEN["mask_gray"].numpy()

    got = prepare_masks([mask, Image.fromarray(mask[:20]), torch.from_numpy(mask >= 127)], size=SIZE)

    assert got.shape == (3, *SIZE)
    assert torch.equal(got[0], got[2])


# --- what is no picture ----------------------------------------------------------------------------------------------


def sixteen_bit(folder: Path) -> Path:
    return saved(folder / "deep.png", Image.fromarray(GREY.astype(np.uint16) * 200))


def half_a_file(folder: Path, kind: str) -> Path:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, kind)
    file = folder / f"half.{kind}"
    file.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    return file


def text_file(folder: Path) -> Path:
    file = folder / "notes.txt"
    file.write_text("no picture")
    return file


def with_nan() -> np.ndarray:
    picture = PICTURE / 255.0
    picture[0, 0, 0] = np.nan
    return picture


BAD: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "nothing": (lambda folder: [], ValueError, "no picture was given"),
    "empty_batch": (lambda folder: TENSOR[None][:0], ValueError, "no picture was given"),
    "one_dimension": (lambda folder: PICTURE[0, :, 0], ValueError, r"shape \(83,\), expected \[height, width\]"),
    "two_channels": (lambda folder: PICTURE[:, :, :2], ValueError, r"shape \(61, 83, 2\), expected"),
    "channels_first_array": (lambda folder: TENSOR.numpy(), ValueError, r"shape \(3, 61, 83\), expected"),
    "channels_last_tensor": (lambda folder: GOLDEN["image_rgb"], ValueError, r"expected .*\[3, height, width\]"),
    "batch_array": (lambda folder: PICTURE[None], ValueError, r"shape \(1, 61, 83, 3\), expected"),
    "no_pixels": (lambda folder: PICTURE[:0], ValueError, r"empty picture of shape \(0, 83, 3\)"),
    "number": (lambda folder: np.array(3.0), ValueError, r"shape \(\), expected"),
    "int16": (lambda folder: PICTURE.astype(np.int16), ValueError, "int16, expected uint8, or float"),
    "int64_tensor": (lambda folder: TENSOR.long(), ValueError, "int64, expected uint8, or float"),
    "bool": (lambda folder: GREY > 3, ValueError, "bool, expected uint8, or float"),
    "nan": (lambda folder: with_nan(), ValueError, "NaN"),
    "infinite": (lambda folder: torch.full((3, 5, 5), math.inf), ValueError, "infinite"),
    "grey_levels_as_float": (lambda folder: PICTURE.astype(float), ValueError, "from 0 to 255, expected 0 to 1"),
    "below_zero": (lambda folder: PICTURE / 255.0 - 0.5, ValueError, r"from -0\.5 .*expected 0 to 1"),
    "sixteen_bit_file": (sixteen_bit, ValueError, "more than 8 bits"),
    "float_pil": (lambda folder: Image.fromarray(GREY.astype(np.float32)), ValueError, "more than 8 bits"),
    "int_pil": (lambda folder: Image.fromarray(GREY.astype(np.int32)), ValueError, "more than 8 bits"),
    "no_file": (lambda folder: str(folder / "absent.png"), FileNotFoundError, r"absent\.png"),
    "text_file": (text_file, ValueError, r"notes\.txt"),
    "half_a_png": (lambda folder: half_a_file(folder, "png"), ValueError, r"half\.png"),
    "half_a_jpeg": (lambda folder: half_a_file(folder, "jpeg"), ValueError, r"half\.jpeg"),
    "none": (lambda folder: None, ValueError, "got a NoneType, expected a picture"),
    "object": (lambda folder: object(), ValueError, "got a object, expected a picture"),
    "bytes": (lambda folder: b"\x89PNG", ValueError, "got a bytes, expected a picture"),
    "mapping": (lambda folder: {"image": PICTURE}, ValueError, "got a dict, expected a picture"),
    "list_of_lists": (lambda folder: [[PICTURE]], ValueError, "got a list, expected a picture"),
    "one_bad_among_good": (lambda folder: [PICTURE, PICTURE.astype(int)], ValueError, "int64, expected uint8"),
}


@both_ways
@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD)
def test_what_is_no_picture_is_refused(make, error, message, prepare, tmp_path):
    with pytest.raises(error, match=message):
        prepare(make(tmp_path))


BAD_MASKS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "nothing": (lambda folder: [], ValueError, "no mask was given"),
    "colour": (lambda folder: PICTURE, ValueError, r"shape \(61, 83, 3\), expected \[height, width\]"),
    "float": (lambda folder: GREY / 255.0, ValueError, "float64.*expected .*bool or uint8"),
    "labels": (lambda folder: GREY.astype(np.int64), ValueError, "int64.*expected .*bool or uint8"),
    "no_pixels": (lambda folder: GREY[:0], ValueError, r"shape \(0, 83\)"),
    "sixteen_bit_file": (sixteen_bit, ValueError, "more than 8 bits"),
    "no_file": (lambda folder: str(folder / "absent.png"), FileNotFoundError, r"absent\.png"),
    "text_file": (text_file, ValueError, r"notes\.txt"),
    "half_a_png": (lambda folder: half_a_file(folder, "png"), ValueError, r"half\.png"),
    "object": (lambda folder: object(), ValueError, "got a object, expected a mask"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_what_is_no_mask_is_refused(make, error, message, tmp_path):
    with pytest.raises(error, match=message):
        prepare_masks(make(tmp_path), size=SIZE)


def test_files_are_closed_again(tmp_path):
    file = saved(tmp_path / "picture.png", Image.fromarray(PICTURE))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0  # noqa: PTH208

    for _ in range(3):
        by_prepare_images([file, str(file)])
        prepare_masks(file, size=SIZE)

    assert not before or len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
