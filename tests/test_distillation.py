"""Uncertainty in one pass: what the head learns, what it promises, and that it knows which model it belongs to."""

from __future__ import annotations

import copy

import pytest
import torch
from example_model import save_model, script, write_image
from saved_models import assert_equal_models, config_file, of_open_clip, rewrite, weights_file
from support import HOST, assert_same_maps, maps, segmenter, unchanged

import pvl_adapter as pvl
from pvl_adapter.distilled_head import mean_passes, moments, predict_in_one_pass
from pvl_adapter.image_part import ImagePart
from pvl_adapter.monte_carlo import NUM_SAMPLES
from pvl_adapter.sample_statistics import binary_entropy

COUNT = 40
IMAGES = torch.rand(COUNT, 3, 20, 30, generator=torch.Generator().manual_seed(0))
PROMPTS = HOST.ids.repeat(COUNT, 1)[:COUNT]


@pytest.fixture(scope="module")
def taught() -> tuple[pvl.MedCLIPSeg, pvl.DistillReport]:
    model = segmenter()
    return model, pvl.distill(model, IMAGES, PROMPTS, samples=8, steps=150)


@pytest.fixture(scope="module")
def with_tokenizer(open_clip_models) -> pvl.MedCLIPSeg:
    """Taught for a moment; not to be changed."""
    model = of_open_clip(open_clip_models["native"])
    pvl.distill(model, IMAGES[:20], ["a tumor at the left", "one polyp"] * 10, samples=4, steps=5)
    return model


def predict(model: pvl.MedCLIPSeg, rows: slice = slice(0, 5), **settings: object) -> pvl.Prediction:
    settings = {"threshold": 0.5, "rows": 2, **settings}
    return predict_in_one_pass(model, model.image_part(IMAGES[rows]), PROMPTS[rows], **settings)


def test_every_map_is_of_one_distribution():
    mean, deviation = torch.linspace(-8, 8, 33)[:, None], torch.logspace(-3, 0.3, 20)
    got = moments(mean.expand(33, 20), deviation.expand(33, 20))

    quantiles = torch.special.ndtri((torch.arange(2000) + 0.5) / 2000)
    p = (mean[..., None] + deviation[:, None] * quantiles).sigmoid()
    expected = (p.mean(dim=-1), binary_entropy(p).mean(dim=-1), p.var(dim=-1), (p - p.square()).mean(dim=-1))
    torch.testing.assert_close(got, expected, atol=1e-2, rtol=0.0)
    assert (binary_entropy(got[0]) - got[1]).min() > -1e-6


def test_the_head_is_nearer_to_the_samples_than_the_mean_pass_it_reads(taught):
    report = taught[1]

    assert report.probability_error < 0.8 * report.mean_pass_error
    assert report.held_out == 4
    assert report.pairs == 4 * 36


def test_teaching_leaves_the_model_as_it_was_and_is_repeatable():
    model, other = segmenter(), segmenter()
    before = copy.deepcopy(model)

    report, again = (pvl.distill(each, IMAGES[:20], PROMPTS[:20], samples=4, steps=5) for each in (model, other))

    assert_same_maps(maps(predict(model)), maps(predict(other)), atol=1e-5)
    assert again.worth_samples == pytest.approx(report.worth_samples, rel=0.01)
    assert not any(each.requires_grad for each in model.distilled.parameters())
    model.distilled = None
    assert_equal_models(model, before, HOST)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "adapters"])
def test_it_is_saved_with_the_model_and_in_its_card(with_tokenizer, tmp_path, whole):
    model = with_tokenizer
    with unchanged(model):
        folder = model.save_pretrained(tmp_path, whole=whole)

    clip = None if whole else pvl.remove_adapters(copy.deepcopy(model.clip))
    loaded = pvl.from_pretrained(folder, clip=clip)

    assert_equal_models(loaded, model)
    assert loaded.distilled.facts == model.distilled.facts
    loaded.distilled.check(loaded)
    assert "Uncertainty in one pass" in (folder / "README.md").read_text()


def test_a_head_of_other_weights_is_refused_and_not_saved(with_tokenizer, tmp_path, caplog):
    model = copy.deepcopy(with_tokenizer)
    model.distilled.check(model)
    model.distilled.check(copy.deepcopy(model).bfloat16())  # the same weights, rounded
    with torch.no_grad():
        model.head.mask_head[0].weight[0, 0] += 1.0

    with pytest.raises(ValueError, match="changed since"):
        model.distilled.check(model)
    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path))

    assert loaded.distilled is None
    assert "without the distilled head" in caplog.text
    assert "one pass" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [(5, {}, "at least 20"), (40, {"samples": 3}, "samples is 3"), (40, {"held_out": 1.0}, "held_out"),
     (40, {"held_out": 0.001}, "too few")],
)  # fmt: skip
def test_what_cannot_teach_is_refused(count, settings, message):
    with pytest.raises(ValueError, match=message):
        pvl.distill(segmenter(), IMAGES[:count], PROMPTS[:count], **settings)


def test_the_maps_are_a_predictions(taught):
    model = taught[0]
    got, sampled = predict(model), model.predict(IMAGES[:5], PROMPTS[:5], num_samples=200)

    assert_same_maps(maps(got, slice(1, 3)), maps(predict(model, slice(1, 3))))  # whatever is beside them
    torch.testing.assert_close(got.uncertainty, got.aleatoric + got.epistemic)
    assert got.epistemic.min() >= 0.0
    assert got.num_samples.tolist() == [1] * 5
    assert predict(model, threshold=0.3).threshold == 0.3
    for name in ("variance", "epistemic"):
        pair = torch.stack([getattr(got, name).flatten(), getattr(sampled, name).flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.5
    low, high = got.interval(0.95)
    assert ((low <= sampled.probability) & (sampled.probability <= high)).float().mean() > 0.8
    one_image = predict_in_one_pass(model, model.image_part(IMAGES[:1]), PROMPTS[:3], threshold=0.5, rows=2)
    assert_same_maps(maps(one_image, 0), maps(got, 0))


def test_pairs_that_the_head_doubts_are_sampled(taught):
    model = copy.deepcopy(taught[0])
    images, asked = model.prepare(IMAGES[:5]), []

    def sample(rows: list[int]) -> pvl.Prediction:
        asked.append(rows)
        return model.predict(images[rows], PROMPTS[rows], num_samples=6, prepared=True)

    (joint,) = mean_passes(model, ImagePart(images), PROMPTS[:5], rows=5)
    doubt = model.distilled(joint, model.head, size=model.image_size).doubt
    worst = int(doubt.argmax())
    model.distilled.limit *= doubt.topk(2).values.mean()  # above that of all others
    got = predict_in_one_pass(model, ImagePart(images), PROMPTS[:5], threshold=0.5, rows=2, sample=sample)

    assert asked == [[worst]]
    assert got.num_samples.tolist() == [6 if row == worst else 1 for row in range(5)]
    expected = model.predict(images[[worst]], PROMPTS[[worst]], num_samples=6, prepared=True)
    assert_same_maps(maps(got, worst), maps(expected, 0))
    assert_same_maps([bound[worst] for bound in got.interval()], [bound[0] for bound in expected.interval()])


def test_predict_takes_the_head_and_samples_what_it_doubts(taught):
    model = copy.deepcopy(taught[0])
    settings = {"num_samples": "distilled", "prepared": True}
    images = model.prepare(IMAGES[:5])
    (joint,) = mean_passes(model, ImagePart(images), PROMPTS[:5], rows=5)
    model.distilled.limit *= model.distilled(joint, model.head, size=model.image_size).doubt.topk(2).values.mean()
    got = model.predict(images, PROMPTS[:5], **settings)
    (sampled,) = (got.num_samples > 1).nonzero().flatten().tolist()

    for row in range(5):
        count = NUM_SAMPLES if row == sampled else "distilled"
        alone = model.predict(images[row : row + 1], PROMPTS[row : row + 1], num_samples=count, prepared=True)
        assert_same_maps(maps(got, row), maps(alone, 0), atol=1e-5)
    with pytest.raises(ValueError, match="no samples to return"):
        model.predict(images, PROMPTS[:5], return_samples=True, **settings)


def test_a_model_without_a_head_says_what_to_do():
    with pytest.raises(ValueError, match=r"pvl_adapter\.distill"):
        predict(segmenter())


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda d: d.pop("distilled"), "unexpected: distilled"), (lambda d: d.update(distilled=[]), "described by"),
     (lambda d: d["distilled"].update(width=None), "described by"),
     (lambda d: d["distilled"].update(width=8), "shape")],
)  # fmt: skip
def test_a_damaged_description_of_a_head_is_refused(with_tokenizer, tmp_path, change, message):
    folder = with_tokenizer.save_pretrained(tmp_path)
    assert pvl.from_pretrained(folder).distilled is not None
    rewrite(weights_file, config_file, "pvl_adapter.MedCLIPSeg", description=change)(folder)

    with pytest.raises(ValueError, match=message):
        pvl.from_pretrained(folder)


def test_the_example_teaches_a_head_from_a_folder_of_images(open_clip_models, tmp_path, capsys):
    model = save_model(open_clip_models["native"], tmp_path / "model")
    for number in range(12):
        write_image(tmp_path / "images" / f"{number}.png", seed=number)
    given = [str(model), f"--images={tmp_path / 'images'}", "--samples=4", "--steps=2", f"--output={tmp_path / 'out'}"]

    script("distill").main([*given, "--text", "a tumor at the left", "one polyp"])

    facts = pvl.from_pretrained(tmp_path / "out").distilled.facts
    assert (facts["pairs"], facts["held_out"]) == (4 * 22, 2)
    assert "saved in" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script("distill").main(given)
    assert "belong together" in capsys.readouterr().err
