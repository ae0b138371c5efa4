"""Label maps: the odds of exclusive labels, one label for every pixel, and no matter in which order sentences come."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import full_disk, images, speaking_segmenter
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.data.presets import Label, read_preset
from pvl_adapter.label_map import Overlap, combine, overlaps

SENTENCES = ["a red fox", "the left lung", "one oval nodule", "bone", "an island", "the heart"]
PROBABILITIES = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.floats(0.0, 1.0, width=32))  # with ties
ROWS = (
    st.integers(1, 6)
    .flatmap(lambda count: st.lists(st.lists(PROBABILITIES, min_size=count, max_size=count), min_size=1, max_size=5))
    .map(lambda pixels: torch.tensor(pixels).T)
)  # [K, pixels]
THRESHOLDS = st.sampled_from([0.5, 0.1, 0.9]) | st.floats(0.01, 0.99)


def shares_by_hand(pixel: list[float], threshold: float) -> list[float]:
    """Of background and each label: sum over all outcomes of independent opinions in which at most one is right."""
    found = [0.0] * (len(pixel) + 1)
    for outcome in product((False, True), repeat=len(pixel)):
        if sum(outcome) > 1:
            continue
        chance = math.prod(one if right else 1.0 - one for one, right in zip(pixel, outcome, strict=True))
        price = 1.0 if any(outcome) else threshold / (1.0 - threshold)
        found[outcome.index(True) + 1 if any(outcome) else 0] += price * chance
    return [share / sum(found) for share in found]


# ---- one label for every pixel ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=7), st.floats(0.05, 0.95))
def test_labels_and_entropy_are_those_of_all_outcomes_with_at_most_one_true(pixel, threshold):
    shares = shares_by_hand(pixel, threshold)
    found = combine(torch.tensor(pixel, dtype=torch.float64)[:, None], threshold=threshold)

    assert found.entropy.item() == pytest.approx(-sum(one * math.log(one) for one in shares), abs=2e-5)
    assert shares[found.labels.item()] == pytest.approx(max(shares), rel=1e-9)


@given(ROWS, THRESHOLDS)
def test_what_is_in_a_single_mask_is_never_background_and_nothing_else_has_a_label(rows, threshold):
    labels, entropy, _ = combine(rows, threshold=threshold)
    masks = rows > threshold

    assert torch.equal(labels > 0, masks.any(dim=0))
    for pixel, label in enumerate(labels.tolist()):
        assert label == 0 or rows[label - 1, pixel] == rows[:, pixel].max()
    assert (entropy >= 0.0).all()
    assert (entropy <= math.log(len(rows) + 1) + 1e-5).all()


@given(ROWS, THRESHOLDS, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(rows, threshold, random):
    names, order = SENTENCES[: len(rows)], list(range(len(rows)))
    random.shuffle(order)
    first = combine(rows, threshold=threshold, names=names)
    other = combine(rows[order], threshold=threshold, names=[names[row] for row in order])
    back = torch.tensor([0, *(row + 1 for row in order)])

    assert torch.equal(back[other.labels], first.labels)
    assert torch.equal(other.entropy, first.entropy)
    assert overlaps(other.shared, [names[row] for row in order]) == overlaps(first.shared, names)


def test_of_equal_probabilities_the_first_name_wins():
    rows = torch.tensor([[0.8, 0.8], [0.8, 0.9]])
    assert combine(rows, names=["lung", "bone"]).labels.tolist() == [2, 2]
    assert combine(rows, names=["bone", "lung"]).labels.tolist() == [1, 2]
    assert combine(rows).labels.tolist() == [1, 2]


def test_masks_that_were_cleaned_up_decide_and_the_entropy_stays():
    rows = torch.tensor([[0.9, 0.9, 0.2], [0.6, 0.1, 0.1]])
    masks = torch.tensor([[False, False, True], [True, False, False]])
    found = combine(rows, masks=masks)
    assert found.labels.tolist() == [2, 0, 1]
    assert torch.equal(found.entropy, combine(rows).entropy)


def test_a_calibrated_probability_changes_the_entropy_alone():
    rows = torch.rand(4, 50)
    plain, calibrated = combine(rows), combine(rows, calibrated=(0.5 * rows.logit() - 1.0).sigmoid())
    assert torch.equal(plain.labels, calibrated.labels)
    assert torch.equal(calibrated.entropy, combine((0.5 * rows.logit() - 1.0).sigmoid()).entropy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_certainty_is_no_trouble(dtype):
    rows = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1e-7]], dtype=dtype)
    found = combine(rows)
    assert found.labels.tolist() == [0, 1, 1, 0]
    assert found.entropy.dtype == torch.float32
    assert found.entropy.tolist() == pytest.approx([0.0, 0.0, math.log(2.0), 0.0], abs=1e-5)


@pytest.mark.parametrize("wrong", [math.nan, -0.1, 1.5])
def test_what_is_no_probability_is_refused(wrong):
    with pytest.raises(ValueError, match="expected probabilities from 0 to 1"):
        combine(torch.tensor([[0.5, wrong]]))


def test_parts_of_a_volume_add_up_to_the_whole(tmp_path):
    rows = np.random.default_rng(0).random((3, 4, 5, 6), dtype=np.float32)
    np.save(tmp_path / "rows.npy", rows)
    mapped, whole = np.load(tmp_path / "rows.npy", mmap_mode="r+"), combine(rows)
    parts = [combine(mapped[:, number]) for number in range(4)]

    assert whole.labels.shape == whole.entropy.shape == (4, 5, 6)
    assert torch.equal(torch.stack([part.labels for part in parts]), whole.labels)
    assert torch.equal(sum(part.shared for part in parts), whole.shared)


def test_overlaps_name_pairs_and_count_their_pixels():
    masks = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1, 1]])
    found = overlaps(combine(masks.float()).shared, ["lung", "heart", "bone"])
    assert found == (Overlap("heart", "lung", 2), Overlap("bone", "heart", 1), Overlap("bone", "lung", 1))


# ---- of a prediction -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> pvl.MedCLIPSeg:
    return speaking_segmenter()


@pytest.fixture(scope="module")
def predicted(model) -> pvl.Prediction:
    found = model.predict(images(1), SENTENCES, num_samples=2)
    return with_probability(found, torch.rand(found.mask.shape, generator=torch.Generator().manual_seed(0)) ** 2)


def with_probability(prediction: pvl.Prediction, probability: Tensor) -> pvl.Prediction:
    return replace(prediction, probability=probability, mask=probability > prediction.threshold)


def test_any_order_of_the_sentences_gives_the_same_label_map(model):
    middle = float(model.predict(images(1), SENTENCES, num_samples=2).probability.median())
    maps = []
    for seed in range(6):
        order = torch.randperm(len(SENTENCES), generator=torch.Generator().manual_seed(seed)).tolist()
        sentences = [SENTENCES[row] for row in order]
        maps.append(model.predict(images(1), sentences, num_samples=2, threshold=middle).label_map())

    assert len(maps[0].labels.unique()) > 2
    for other in maps[1:]:
        assert torch.equal(other.labels, maps[0].labels)
        assert other.names == tuple(sorted(SENTENCES))
        assert other.overlaps == maps[0].overlaps
        torch.testing.assert_close(other.entropy, maps[0].entropy, rtol=0.0, atol=1e-6)


def test_a_label_map_agrees_with_the_single_masks_at_both_sizes(predicted):
    found = predicted.label_map()
    masks = np.stack([predicted.at_original_size(index, names=["mask"])["mask"] for index in range(len(SENTENCES))])
    sized = found.at_original_size()

    assert torch.equal(found.labels > 0, predicted.mask.any(dim=0))
    assert sized["labels"].shape == sized["entropy"].shape == (20, 30)
    assert np.array_equal(sized["labels"] > 0, masks.any(axis=0))
    for number, name in enumerate(found.names, start=1):
        assert not (sized["labels"] == number)[~masks[SENTENCES.index(name)]].any()


def test_the_threshold_is_that_of_the_prediction_unless_given(predicted):
    lower = replace(predicted, threshold=0.2, mask=predicted.probability > 0.2)
    assert torch.equal(lower.label_map().labels, predicted.label_map(threshold=0.2).labels)
    assert torch.equal(lower.label_map().entropy, predicted.label_map(threshold=0.2).entropy)
    assert not torch.equal(lower.label_map().labels, predicted.label_map().labels)


def test_every_way_to_predict_keeps_its_threshold(model):
    ensemble = model.predict(images(1), SENTENCES[:2], num_samples=2, threshold=0.3, members=({}, {}))
    assert ensemble.threshold == model.predict(images(1), SENTENCES[:2], num_samples=0, threshold=0.3).threshold == 0.3


def test_a_mask_that_was_emptied_has_no_label(predicted):
    emptied = predicted.mask.clone()
    emptied[SENTENCES.index("bone")] = False
    found = replace(predicted, mask=emptied).label_map()
    assert found.names.index("bone") + 1 not in found.labels
    assert torch.equal(found.labels > 0, emptied.any(dim=0))


def test_a_single_sentence_gives_its_mask_and_uncertainty(model):
    found = model.predict(images(1), "the left lung", num_samples=4)
    assert torch.equal(found.label_map().labels, found.mask[0].int())
    torch.testing.assert_close(found.label_map().entropy, found.uncertainty[0], rtol=0.0, atol=1e-5)


def test_a_calibrated_model_says_that_the_entropy_is_calibrated(predicted):
    scaled = SimpleNamespace(calibrated_probability=lambda of: (0.3 * of.probability.logit() - 1.0).sigmoid())
    found, plain = replace(predicted, calibration=scaled).label_map(), predicted.label_map()
    assert (found.calibrated, plain.calibrated) == (True, False)
    assert torch.equal(found.labels, plain.labels)
    assert not torch.equal(found.entropy, plain.entropy)


def test_several_images_repeated_sentences_and_missing_names_are_refused(model):
    with pytest.raises(ValueError, match="several images, expected one"):
        model.predict(images(2), SENTENCES[:2], num_samples=0).label_map()
    prepared = model.prepare(images(2))
    with pytest.raises(ValueError, match="several images, expected one"):
        model.predict(prepared, SENTENCES[:2], num_samples=0, prepared=True).label_map()
    with pytest.raises(ValueError, match=r"got 1 different names of 2 labels.*say each sentence once"):
        model.predict(images(1), ["bone", "bone"], num_samples=0).label_map()
    of_ids = model.predict(images(1), model.tokenize(["bone", "a red fox"]), num_samples=0)
    with pytest.raises(ValueError, match=r"got 0 different names of 2 labels.*give names="):
        of_ids.label_map()
    assert of_ids.label_map(names=["B", "A"]).names == ("A", "B")


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_saved_label_map_has_values_colours_and_a_legend(predicted, tmp_path):
    found = predicted.label_map()
    path = found.save(tmp_path / "map.png")
    image, facts = Image.open(path), json.loads((tmp_path / "map.json").read_text(encoding="utf-8"))

    assert np.array_equal(np.array(image), found.at_original_size()["labels"])
    legend = read_preset(tmp_path / "map.json")
    assert tuple(label.name for label in legend) == found.names
    colors = {label.value: label.color for label in legend} | {0: (0, 0, 0)}
    for value, color in zip(np.array(image).ravel(), np.array(image.convert("RGB")).reshape(-1, 3), strict=True):
        assert tuple(color) == colors[value]
    assert [Overlap(**pair) for pair in facts["overlaps"]] == list(found.overlaps)
    assert facts["entropy_is_calibrated"] is False


def test_a_preset_numbers_and_colours_the_labels(predicted, tmp_path):
    labels = [Label(300 - at, f"name {at}", sentence, (at, 2, 3)) for at, sentence in enumerate(SENTENCES)]
    found = predicted.label_map()
    values = np.array(Image.open(found.save(tmp_path / "map.png", labels=labels)))

    assert values.dtype == np.uint16  # no palette beyond 255
    numbers = found.at_original_size()["labels"]
    for number, name in enumerate(found.names, start=1):
        assert set(values[numbers == number].tolist()) <= {300 - SENTENCES.index(name)}
    with pytest.raises(ValueError, match="there is no label for 'the left lung'"):
        found.save(tmp_path / "map.png", labels=labels[:1] + labels[2:])
    with pytest.raises(ValueError, match=r"expected one that ends in \.png, as map\.png"):
        found.save(tmp_path / "map.jpg")


def test_a_full_disk_leaves_the_old_files(predicted, tmp_path):
    path = predicted.label_map().save(tmp_path / "map.png")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        predicted.label_map(threshold=0.1).save(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
