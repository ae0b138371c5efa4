"""What a calibrated model promises: the same after saving, None where nothing was calibrated, and errors that help."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from example_model import noise
from saved_models import config_file, of_open_clip, rewrite, weights_file
from support import assert_same_bits, edit_json, maps, truncate

import pvl_adapter as pvl
from pvl_adapter.trust import Calibration, calibrate
from pvl_adapter.trust.scorer import Perceptron

PROMISES = ("outer_mask", "inner_mask", "presence", "area_interval", "abstained", "calibrated_probability", "flagged")
TEXTS = ("a tumor at the left", "a tumor at the left", "one polyp")  # two slices, and something that is not there
HOW: dict[str, Any] = {"num_samples": 4}
LIMITS: dict[str, Any] = {"alpha": 0.2, "loss_limit": 0.95, "pixel_limit": 0.9, **HOW}


def subjects(model: pvl.MedCLIPSeg, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Three pairs of each; the truth is where other samples of the model find most, moved a little."""
    number = range(3 * count)
    images, texts = [noise(20, 30, 3, seed=1000 * seed + each) for each in number], [TEXTS[each % 3] for each in number]
    found = model.predict(images, texts, seed=7, num_samples=2).probability
    masks = [(found[each] > found[each].quantile(0.6)).roll(each % 4, dims=1) & (each % 3 < 2) for each in number]
    return [
        {"image": images[each], "text": texts[each], "mask": masks[each].numpy(), "subject": f"s{each // 3}"}
        for each in number
    ]


def images_texts(samples: list[dict[str, Any]]) -> tuple[list[np.ndarray], list[str]]:
    return [sample["image"] for sample in samples], [sample["text"] for sample in samples]


def promises(prediction: pvl.Prediction) -> dict[str, Any]:
    found = {name: getattr(prediction, name) for name in PROMISES}
    return {**found, "volume": prediction.volume_interval(2.0), "pixels": prediction.abstain()}


@dataclass
class World:
    """A calibrated model, the subjects, and others like them."""

    model: pvl.MedCLIPSeg
    bare: pvl.MedCLIPSeg  # not calibrated
    samples: list[dict[str, Any]]
    others: list[dict[str, Any]]

    def predict(self, *, of: pvl.MedCLIPSeg | None = None, **settings: Any) -> pvl.Prediction:
        return (of or self.model).predict(*images_texts(self.others[:6]), **{**HOW, **settings})


@pytest.fixture(scope="module")
def world(open_clip_models) -> Iterator[World]:
    learn = Perceptron.learn
    with pytest.MonkeyPatch.context() as patch:  # quickly: promises hold whatever the scores are worth
        patch.setattr(Perceptron, "learn", lambda *given, **how: learn(*given, **{**how, "steps": 40}))
        model = of_open_clip(open_clip_models["native"])
        bare, samples, others = copy.deepcopy(model), subjects(model, 24), subjects(model, 24, seed=1)
        calibrate(model, samples, **LIMITS)
        yield World(model, bare, samples, others)


def test_a_calibration_says_what_it_rests_on(world):
    made, facts = world.model.calibration, {"dataset": "list", "subjects": 17, "present": 34, "learned_on": 7}

    assert (made.alpha, made.confidence, made.loss_limit, made.pixel_limit) == (0.2, 0.9, 0.95, 0.9)
    assert made.sampling == {"num_samples": "4", "antithetic": True, "threshold": 0.5}
    assert {**made.facts, **facts} == made.facts
    made.check(world.model)
    made.check_prompts(world.model, [TEXTS[0], "one green hippopotamus", TEXTS[2]])
    with pytest.raises(ValueError, match=r"2 of 3 sentences.*green hippopotamus.*calibrate on sentences"):
        made.check_prompts(world.model, [TEXTS[0], "one green hippopotamus", "two whales"])


def test_calibrating_is_repeatable_and_leaves_the_model_as_it_was(world):
    model = copy.deepcopy(world.bare)
    model.clip.train()
    before, random = copy.deepcopy(model), torch.get_rng_state()

    again = calibrate(model, world.samples, by=[each["subject"] for each in world.samples], batch_size=16, **LIMITS)

    assert again.to_dict() == world.model.calibration.to_dict()
    assert torch.equal(torch.get_rng_state(), random)
    assert_same_bits(model.state_dict(), before.state_dict())
    assert [each.training for each in model.modules()] == [each.training for each in before.modules()]
    assert [each.requires_grad for each in model.parameters()] == [each.requires_grad for each in before.parameters()]
    got, expected = world.predict(of=model), world.predict(of=world.bare)
    assert_same_bits([got.mask, *maps(got)], [expected.mask, *maps(expected)])


def test_promises_hold_for_other_subjects(world):
    found = world.model.predict(*images_texts(world.others), **HOW)
    truth = torch.from_numpy(np.stack([each["mask"] for each in world.others]))
    size, inner, area = (each.sum(dim=(1, 2)) for each in (truth, found.inner_mask, found.mask))
    missed = (truth & ~found.outer_mask).sum(dim=(1, 2)) / size.clamp_min(1)
    wrong = (found.inner_mask & ~truth).sum(dim=(1, 2)) / inner.clamp_min(1)
    low, high = (found.area_interval * truth[0].numel() / (20 * 30)).T
    loss = 1.0 - 2.0 * (truth & found.mask).sum(dim=(1, 2)) / (size + area)

    for losses, limit in (
        (missed[size > 0], 0.2),
        (wrong, 0.2),
        ((size < low - 1e-2) | (size > high + 1e-2), 0.2),
        (found.presence.p_absent[size == 0] <= 0.2, 0.2),
        (found.presence.p_present[size > 0] <= 0.2, 0.2),
        (loss[~found.abstained], 0.95),
        ((found.mask != truth)[~found.abstain()], 0.9),
    ):
        assert losses.float().mean() <= limit + 3.0 * losses.float().std() / min(24, len(losses)) ** 0.5


def test_every_promise_has_the_shape_that_it_says(world):
    found = world.predict()
    sized = found.at_original_size(1, names=["outer_mask", "inner_mask"])

    assert found.outer_mask.shape == found.inner_mask.shape == found.abstain().shape == found.mask.shape
    assert {each.dtype for each in (found.outer_mask, found.inner_mask, found.abstained, found.flagged)} == {torch.bool}
    assert found.abstained.shape == found.flagged.shape == found.familiarity.shape == (6,)
    assert ((found.calibrated_probability >= 0.0) & (found.calibrated_probability <= 1.0)).all()
    for absent, present, verdict in zip(*found.presence, strict=True):
        expected = {(True, False): "present", (False, True): "absent"}
        assert verdict == expected.get((bool(absent <= 0.2), bool(present <= 0.2)), "unsure")
    assert torch.equal(found.abstain(0.3), found.uncertainty > 0.3)
    assert {each.shape for each in sized.values()} == {(20, 30)}
    assert sized["outer_mask"].mean() == pytest.approx(found.outer_mask[1].float().mean().item(), abs=0.1)


def test_areas_are_in_pixels_of_the_image_as_given_and_volumes_of_all_slices(world):
    image, text = images_texts(world.others[:1])
    larger = np.kron(image[0], np.ones((2, 3, 1), np.uint8))
    prepared = world.model.predict(world.model.prepare(image), text, prepared=True, **HOW).area_interval
    several = world.model.predict([image[0], larger], text * 2, **HOW)

    low, high = several.area_interval[0]
    assert 0.0 <= low < high <= 20 * 30
    torch.testing.assert_close(prepared[0] / (32 * 48), several.area_interval[0] / (20 * 30))
    assert 3.0 * high < several.area_interval[1, 1] <= 40 * 90
    low, high = several.volume_interval(1.0)
    assert 0.0 <= low < high
    parts = [world.model.predict([each], text, **HOW) for each in (image[0], larger)]  # slices need not come at once
    areas, errors = (sum(each) for each in zip(*map(world.model.calibration.area_moments, parts), strict=True))
    torch.testing.assert_close(
        world.model.calibration.interval_of_sums(areas[0], errors[0], volume=True), torch.stack([low, high])
    )
    torch.testing.assert_close(several.volume_interval(2.5), torch.stack([2.5 * low, 2.5 * high]))


def test_words_and_images_unlike_the_calibration_are_flagged(world):
    image = world.others[0]["image"]
    usual = world.model.predict([each["image"] for each in world.samples], [TEXTS[0]] * 72, **HOW)
    words = world.model.predict(image, [TEXTS[0], "a purple hippopotamus"], **HOW)
    unlike = world.model.predict(np.zeros_like(image), TEXTS[0], **HOW)

    assert usual.flagged.float().mean() < 0.2
    assert words.flagged.tolist() == [bool(words.familiarity[0] <= 1 / 18), True]
    assert unlike.familiarity.item() == pytest.approx(1 / 18)  # farther than all 17 subjects
    assert unlike.flagged.all()
    made, ids = replace(world.model.calibration, tokens=frozenset({5, 6})), torch.tensor([[5, 6], [5, 0], [8, 0]])
    assert made.unseen(ids).tolist() == [False, True, True]
    padded = {"input_ids": ids, "attention_mask": (ids != 0).long()}  # so a word does not depend on those beside
    assert made.unseen(padded).tolist() == [False, False, True]


def test_promises_depend_neither_on_the_images_beside_nor_on_other_threads(world):
    together = world.predict()
    for row, (image, text) in enumerate(zip(*images_texts(world.others[:6]), strict=True)):
        alone = world.model.predict(image, text, **HOW)
        for name in ("area_interval", "abstained", "flagged"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[row], rtol=1e-4, atol=1e-3)
        for name in ("outer_mask", "inner_mask"):  # but for rounding
            assert (getattr(alone, name)[0] != getattr(together, name)[row]).float().mean() < 2e-3
        assert alone.presence.verdict == [together.presence.verdict[row]]
    with ThreadPoolExecutor(3) as pool:
        for got in pool.map(lambda _: promises(world.predict()), range(3)):
            assert_same_bits(got, promises(together))


def test_masks_of_absent_targets_are_emptied_only_if_asked(world):
    found = world.model.predict(*images_texts(world.others), **HOW)
    absent = torch.tensor([verdict == "absent" for verdict in found.presence.verdict])
    emptied = found.empty_absent()

    assert absent.any()
    assert found.mask[absent].any()
    assert not emptied.mask[absent].any()
    assert torch.equal(emptied.mask[~absent], found.mask[~absent])
    with pytest.warns(UserWarning, match=r"masks were emptied.*empty_absent\(\)"):  # the promises were of other masks
        assert emptied.abstained is None


def test_without_a_calibration_there_are_no_promises_but_a_word_on_how_to_get_them(world):
    trained = copy.deepcopy(world.model)
    with torch.no_grad():
        next(trained.head.parameters()).add_(1e-2)
    for found, why in (
        (world.predict(of=world.bare), r"pvl_adapter\.trust\.calibrate"),
        (world.predict(num_samples=6), r"calibrated for predict\(num_samples=4"),
        (world.predict(threshold=0.4), r"calibrated for predict\(threshold=0\.5"),
        (world.predict(antithetic=False), r"calibrated for predict\(antithetic=True"),
        (world.predict(of=trained), r"trained since.*pvl_adapter\.trust\.calibrate"),
    ):
        for name in (*PROMISES, "familiarity"):
            with pytest.warns(UserWarning, match=f"no {name} is promised.*{why}"):
                assert getattr(found, name) is None
        with pytest.warns(UserWarning, match=why):
            assert (found.volume_interval(1.0), found.abstain()) == (None, None)
        with pytest.warns(UserWarning, match=why):
            assert found.empty_absent() is found
        with pytest.warns(UserWarning, match=why), pytest.raises(ValueError, match=f"no outer_mask.*{why}"):
            found.at_original_size(0, names=["outer_mask"])


def test_distilled_predictions_are_calibrated_with_their_head(world):
    model = copy.deepcopy(world.bare)
    pairs, teach = images_texts(world.samples[:24]), {"samples": 4, "steps": 5, "shuffled": 0.0}
    pvl.distill(model, *pairs, **teach)
    rows = [SimpleNamespace(image="", text=each["text"], subject=each["subject"]) for each in world.samples]
    data = type("Dataset", (list,), {"rows": rows, "location": "brains/val"})(world.samples)
    made = calibrate(model, data, **{**LIMITS, "num_samples": "distilled"})

    assert (made.sampling["num_samples"], made.facts["dataset"]) == ("distilled", "brains/val")
    assert world.predict(of=model, num_samples="distilled").outer_mask is not None
    with pytest.warns(UserWarning, match=r"calibrated for predict\(num_samples=distilled"):
        assert world.predict(of=model).outer_mask is None
    pvl.distill(model, *pairs, **{**teach, "seed": 1})  # the same network, another head
    with pytest.raises(ValueError, match="other weights"):
        made.check(model)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "adapters"])
def test_promises_are_exactly_the_same_after_saving(world, tmp_path, whole):
    folder = world.model.save_pretrained(tmp_path, whole=whole)
    clip = None if whole else pvl.remove_adapters(copy.deepcopy(world.model).clip)
    loaded = pvl.from_pretrained(folder, clip=clip)

    assert_same_bits(promises(world.predict(of=loaded)), promises(world.predict()))
    assert loaded.calibration.to_dict() == world.model.calibration.to_dict()
    card = (folder / "README.md").read_text()
    assert "51 image and sentence pairs of 17 subjects" in card
    assert "misses at most 20% of the structure" in card
    assert "predict(num_samples=4, antithetic=True, threshold=0.5)" in card


def test_the_card_never_rounds_a_promise(world, tmp_path):
    model = copy.deepcopy(world.model)
    model.calibration = replace(model.calibration, alpha=0.025, loss_limit=0.125)
    card = (model.save_pretrained(tmp_path) / "README.md").read_text()

    for words in ("misses at most 2.5% of", "the area in 97.5% of", "Dice of at least 0.875,"):
        assert words in card


def test_a_calibration_is_kept_in_a_file_of_its_own(world, tmp_path):
    path, model = world.model.calibration.save(tmp_path / "c.json"), copy.deepcopy(world.bare)
    loaded = Calibration.load(path, model)

    assert model.calibration is loaded
    assert_same_bits(promises(world.predict(of=model)), promises(world.predict()))
    model.calibration, next(model.head.parameters()).data[0] = None, 1.0
    with pytest.raises(ValueError, match=r"other weights.*calibrate"):
        Calibration.load(path, model)
    assert model.calibration is None
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "none.json", model)


@pytest.mark.parametrize("by_data", [False, True], ids=["in place", "by .data"])
def test_a_model_that_was_trained_since_is_saved_without(world, tmp_path, caplog, by_data):
    model = copy.deepcopy(world.model)
    world.predict(of=model)  # so that it has been checked
    weight = next(model.head.parameters())
    (weight.data if by_data else weight.detach()).add_(1e-2)
    folder = model.save_pretrained(tmp_path)

    assert "saved without the calibration" in caplog.text
    assert pvl.from_pretrained(folder).calibration is None
    assert "Promises" not in (folder / "README.md").read_text()


def change(name: str, value: Any) -> Any:
    return edit_json(lambda path: path, lambda state: state.update({name: value}))


@pytest.mark.parametrize(
    "damage",
    [
        change("alpha", 0.01), change("version", 2), change("familiar", None), change("area_factor", float("nan")),
        edit_json(lambda path: path, lambda state: state.pop("present")),
        edit_json(lambda path: path, lambda state: state["familiar"]["scores"].update(values="nan " * 51)),
        truncate(lambda path: path, 0.9), lambda path: path.write_text("[1]"), lambda path: path.write_bytes(b"\xff"),
    ],
)  # fmt: skip
def test_a_damaged_or_edited_calibration_is_refused(world, tmp_path, damage):
    path, model = world.model.calibration.save(tmp_path / "c.json"), copy.deepcopy(world.bare)
    damage(path)
    with pytest.raises(ValueError, match="calibrate again"):
        Calibration.load(path, model)
    assert model.calibration is None


def test_a_folder_with_a_damaged_calibration_is_refused_and_leaves_the_clip(world, tmp_path):
    folder = world.model.save_pretrained(tmp_path, whole=False)
    clip = pvl.remove_adapters(copy.deepcopy(world.model).clip)
    edit = {"description": lambda known: known["calibration"].update(alpha=0.01)}
    rewrite(weights_file, config_file, "pvl_adapter.MedCLIPSeg", **edit)(folder)

    with pytest.raises(ValueError, match="calibration is damaged"):
        pvl.from_pretrained(folder, clip=clip)
    assert not hasattr(clip, "pvl_adapters")


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (lambda some: some[:36], {"alpha": 0.1}, "got 12 subjects.*9 more for alpha=0.1.*larger alpha"),
        (lambda some: [{**each, "mask": 0 * each["mask"]} for each in some], {}, "all 21 rows.*empty"),
        (lambda _: SimpleNamespace(rows=[SimpleNamespace(subject="")] * 9), {}, "9 of 9 rows.*column Subject.*by="),
        (lambda some: [{**each, "subject": ""} for each in some], {}, "whose 72 of 72"),
        (list, {"by": ["a"]}, "1, expected one for each of 72 rows"), (list, {"by": "site"}, "'site'.*subject"),
        (list, {"alpha": 0.0}, "alpha is 0.0"), (list, {"alpha": float("nan")}, "alpha is nan"),
        (list, {"confidence": 1.0}, "confidence"), (list, {"learn_share": 1.0}, "learn_share"),
        (list, {"learn_share": 0.05}, "1 to learn from, expected at least 3"),
        (list, {"loss_limit": -1.0}, "loss_limit"), (list, {"batch_size": 0}, "batch_size"),
        (list, {"sample_count": 3}, "sample_count.*expected num_samples"), (list, {"num_samples": -1}, "num_samples"),
    ],
)  # fmt: skip
def test_what_cannot_calibrate_is_refused_and_changes_nothing(world, data, settings, message):
    model = copy.deepcopy(world.bare)
    with pytest.raises(ValueError, match=message):
        calibrate(model, data(world.samples), **{**LIMITS, **settings})
    assert model.calibration is None


def test_nan_in_the_network_or_the_scores_is_refused(world):
    model = copy.deepcopy(world.model)
    next(model.head.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        calibrate(model, world.samples, **LIMITS)
    assert model.calibration is not None
    scorer = copy.deepcopy(world.model.calibration.scorer)
    scorer.pixels.linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN.*calibrate again"):
        replace(world.model.calibration, scorer=scorer)
