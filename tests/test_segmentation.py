"""`MedCLIPSeg`: logits, prompts, pictures, and predictions whose statistics are those of their samples."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from hosts import BY_NAME, PATCH, VOCABULARY, Host
from PIL import Image
from support import CONFIG, assert_same_bits, gradients, injected, normal, randomise
from torch import Tensor, nn

import pvl_adapter as pvl

HOST = BY_NAME["open_clip-inlined_text"]
MAPS = ("probability", "uncertainty", "aleatoric", "epistemic", "standard_error")
SENTENCES = ["one small round tumor", "a polyp at the left", "no finding"]


def segmenter(host: Host = HOST, **settings: object) -> pvl.MedCLIPSeg:
    """In eval mode, with logits spread over both sides of zero."""
    model = pvl.MedCLIPSeg(injected(host), **settings).eval()
    randomise(model.head, seed=1)
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- logits ----------------------------------------------------------------------------------------------------------


def test_there_is_a_logit_for_every_pixel(host):
    output = segmenter(host)(host.image, host.text)

    joint_width = output.text_embeds.shape[-1]
    assert output.logits.shape == (3, *host.image_size)
    assert output.patch_tokens.shape == (3, host.grid[0] * host.grid[1], joint_width)
    assert output.text_embeds.shape == (3, joint_width)


def test_logits_are_those_of_the_equations():
    """Scale blocks and dot product written out with other operations, and bilinear resizing."""
    model = segmenter()
    joint = pvl.encode(model.clip, HOST.image, HOST.text)

    query = joint.text_embeds / joint.text_embeds.norm(dim=-1, keepdim=True)
    for index in (0, 2, 4):
        query = query @ model.head.mask_head[index].weight.T + model.head.mask_head[index].bias
        query = query if index == 4 else F.gelu(query)
    patches = joint.patch_tokens / joint.patch_tokens.norm(dim=-1, keepdim=True)
    features = patches.unflatten(1, joint.grid)  # [B, h, w, D]
    for block in model.head.upscale:
        quads = torch.einsum("bhwd,dexy->bhxwye", features, block.conv1.weight) + block.conv1.bias
        features = F.gelu(quads.flatten(3, 4).flatten(1, 2))  # [B, 2h, 2w, D]
        padded = F.pad(features, (0, 0, 1, 1, 1, 1))
        height, width = features.shape[1:3]
        features = sum(
            padded[:, y : y + height, x : x + width] * block.conv2.weight[:, 0, y, x]
            for y in range(3)
            for x in range(3)
        )
        mean, variance = features.mean(-1, keepdim=True), features.var(-1, keepdim=True, unbiased=False)
        features = (features - mean) / (variance + 1e-6).sqrt() * block.norm.weight + block.norm.bias
    logits = torch.einsum("bhwd,bd->bhw", features, query)
    expected = F.interpolate(logits[:, None], HOST.image_size, mode="bilinear", align_corners=False)[:, 0]

    torch.testing.assert_close(model(HOST.image, HOST.text).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_upscale", [0, 1, 3])
def test_the_number_of_scale_blocks_is_a_setting(num_upscale):
    model = segmenter(config=pvl.MedCLIPSegConfig(num_upscale=num_upscale))

    assert len(model.head.upscale) == num_upscale
    assert model(HOST.image, HOST.text).logits.shape == (3, *HOST.image_size)


def test_text_decides_the_mask():
    model = segmenter()

    logits = model(HOST.image[:1].expand(3, -1, -1, -1), HOST.text).logits

    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_logits_are_deterministic_in_eval_mode_and_drawn_in_train_mode():
    model = segmenter()

    def logits(**settings: object) -> Tensor:
        return model(HOST.image, HOST.text, **settings).logits

    assert torch.equal(logits(), logits())
    assert torch.equal(logits(), logits(sample=False))
    assert not torch.equal(logits(sample=True), logits(sample=True))
    assert torch.equal(logits(sample=True, generator=generator()), logits(sample=True, generator=generator()))
    model.train()
    assert not torch.equal(logits(), logits())


def test_a_training_step_reaches_head_and_adapters_and_nothing_else(host):
    model = segmenter(host).train()
    output = model(host.image, host.text)
    target = normal(3, *host.image_size) > 0

    terms = pvl.SegmentationLoss()(
        output.logits, target, patch_tokens=output.patch_tokens, text_embeds=output.text_embeds
    )
    terms.total.backward()

    for name, gradient in gradients(model).items():
        trained = name.startswith(("head.", "clip.pvl_adapters."))
        assert (gradient is not None) == trained, name
        assert gradient is None or torch.isfinite(gradient).all(), name


def test_a_few_steps_learn_one_picture():
    model, target = segmenter().train(), torch.zeros(3, *HOST.image_size)
    target[:, :16] = 1
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    def step() -> float:
        output = model(HOST.image, HOST.text)
        loss = pvl.dice_loss(output.logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    losses = [step() for _ in range(30)]

    assert losses[-1] < 0.5 * losses[0]


def test_a_model_can_be_copied_saved_and_moved():
    model = segmenter()
    expected = model(HOST.image, HOST.text).logits

    twin = copy.deepcopy(model)
    other = pvl.MedCLIPSeg(pvl.inject_adapters(HOST.build(seed=1), CONFIG)).eval()
    other.load_state_dict(model.state_dict())
    moved = copy.deepcopy(model).double()(HOST.image.double(), HOST.text).logits

    assert torch.equal(twin(HOST.image, HOST.text).logits, expected)
    assert torch.equal(other(HOST.image, HOST.text).logits, expected)
    torch.testing.assert_close(moved.float(), expected, atol=1e-3, rtol=1e-3)


def test_a_head_of_float32_serves_a_host_of_bfloat16():
    model = pvl.MedCLIPSeg(pvl.inject_adapters(HOST.build().bfloat16(), CONFIG))

    assert model(HOST.image.bfloat16(), HOST.text).logits.dtype == torch.float32


# --- prompts ---------------------------------------------------------------------------------------------------------


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A Hugging Face tokenizer built here: one id per word."""
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, **{word: 4 + k for k, word in enumerate(words)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="module")
def speaking() -> pvl.MedCLIPSeg:
    """On a host with the vocabulary of OpenAI's CLIP, whose tokenizer open_clip carries."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.CLIP(
            16,
            {"layers": 3, "width": 32, "head_width": 8, "patch_size": PATCH, "image_size": HOST.image_size},
            {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 3},
        )
        model = pvl.MedCLIPSeg(pvl.inject_adapters(clip, CONFIG)).eval()
    randomise(model.head)
    return model


def test_sentences_are_turned_into_ids_by_the_tokenizer_of_the_host(speaking):
    ids = open_clip.SimpleTokenizer(context_length=16)(SENTENCES)

    assert torch.equal(speaking.tokenize(SENTENCES), ids)
    assert torch.equal(speaking.tokenize(SENTENCES[0]), ids[:1])
    assert torch.equal(speaking(HOST.image, SENTENCES).logits, speaking(HOST.image, ids).logits)


def test_a_sentence_longer_than_the_context_is_cut(speaking):
    ids = speaking.tokenize("tumor " * 100)

    assert ids.shape == (1, 16)
    assert speaking(HOST.image[:1], ids).logits.isfinite().all()


@pytest.mark.parametrize("name", ["open_clip-bert", "transformers-clip"])
def test_a_hugging_face_tokenizer_may_be_given(name):
    host = BY_NAME[name]
    clip = host.build()
    if name == "transformers-clip":
        clip.config.text_config.eos_token_id = clip.text_model.eos_token_id = 3
    pvl.inject_adapters(clip, CONFIG)
    model = pvl.MedCLIPSeg(clip, tokenizer=word_tokenizer()).eval()

    encoded = model.tokenize(SENTENCES)

    assert encoded["input_ids"].shape[0] == 3
    assert encoded["attention_mask"].sum(dim=1).tolist() == [6, 7, 4]
    assert model(host.image, SENTENCES).logits.shape == (3, *host.image_size)
    one_by_one = [model(host.image[b : b + 1], SENTENCES[b]).logits for b in range(3)]
    torch.testing.assert_close(model(host.image, SENTENCES).logits, torch.cat(one_by_one), atol=1e-4, rtol=1e-4)


def test_a_hugging_face_tokenizer_cuts_at_the_context_of_the_host():
    host = BY_NAME["open_clip-bert"]
    model = segmenter(host, tokenizer=word_tokenizer())

    assert model.tokenize("tumor " * 100)["input_ids"].shape == (1, host.positions)


def test_any_function_of_sentences_may_serve_as_tokenizer():
    model = segmenter(tokenizer=lambda sentences: HOST.ids[: len(sentences)])

    assert torch.equal(model(HOST.image, SENTENCES).logits, model(HOST.image, HOST.ids).logits)


@pytest.mark.parametrize("name", ["open_clip-inlined_text", "open_clip-bert", "transformers-clip"])
def test_a_host_that_does_not_tell_its_tokenizer_asks_for_one(name):
    with pytest.raises(ValueError, match=rf"{VOCABULARY} entries.*MedCLIPSeg\(clip, tokenizer="):
        segmenter(BY_NAME[name]).tokenize("a tumor")


@pytest.mark.parametrize("text", [[], ["a tumor", 3], [None], [["a tumor"]]], ids=repr)
def test_prompts_that_are_no_sentences_are_refused(speaking, text):
    with pytest.raises(ValueError, match=r"expected one sentence \(a string\) for each image"):
        speaking.tokenize(text)


def test_one_sentence_for_several_pictures_is_refused_rather_than_guessed(speaking):
    with pytest.raises(ValueError, match=r"3 images and 1 sentences"):
        speaking.predict(HOST.image, "a tumor", num_samples=1)


# --- predictions -----------------------------------------------------------------------------------------------------


def test_a_prediction_has_maps_of_the_size_the_network_sees(host):
    prediction = segmenter(host).predict(host.image, host.text, num_samples=4)

    assert prediction.mask.dtype == torch.bool
    assert prediction.num_samples.tolist() == [4, 4, 4]
    for name in ("mask", *MAPS):
        value = getattr(prediction, name)
        assert value.shape == (3, *host.image_size)
        assert not value.requires_grad
        assert torch.isfinite(value).all()


def test_uncertainties_are_in_their_ranges_and_add_up():
    prediction = segmenter().predict(HOST.image, HOST.text, num_samples=8)

    assert prediction.probability.min() >= 0
    assert prediction.probability.max() <= 1
    assert prediction.uncertainty.max() <= math.log(2) + 1e-6
    for name in ("uncertainty", "aleatoric", "epistemic", "standard_error"):
        assert getattr(prediction, name).min() >= 0, name
    assert prediction.epistemic.max() > 0
    torch.testing.assert_close(prediction.aleatoric + prediction.epistemic, prediction.uncertainty, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("antithetic", [True, False], ids=["antithetic", "independent"])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 8, 9])
def test_statistics_are_those_of_the_stacked_samples(num_samples, antithetic):
    prediction = segmenter().predict(
        HOST.image, HOST.text, num_samples=num_samples, antithetic=antithetic, threshold=0.4, return_samples=True
    )
    samples = prediction.samples.double().numpy()  # [S, B, H, W]

    def entropy(p: np.ndarray) -> np.ndarray:
        return -p * np.log(p) - (1 - p) * np.log1p(-p)

    mean = samples.mean(axis=0)
    expected = {
        "probability": mean,
        "uncertainty": entropy(mean),
        "aleatoric": entropy(samples).mean(axis=0),
        "epistemic": entropy(mean) - entropy(samples).mean(axis=0),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(prediction, name).numpy(), value, atol=2e-6)
    pairs = num_samples // 2 if antithetic else 0
    if num_samples == 1 or pairs == 1:
        assert prediction.standard_error.isnan().all()
        assert prediction.variance.isnan().all()
    else:
        spread = ((samples - mean) ** 2).sum(axis=0)
        of_pairs = np.zeros_like(mean)
        if pairs:
            pair_means = samples[: 2 * pairs].reshape(pairs, 2, *mean.shape).mean(axis=1)
            of_pairs = 4 * pairs * pair_means.var(axis=0, ddof=1)
        unpaired = num_samples - 2 * pairs
        # The spread about the mean falls short of S variances by S times the variance of the mean.
        variance = (spread + of_pairs / num_samples) / (num_samples - unpaired / num_samples)
        error = np.sqrt((of_pairs + unpaired * variance) / num_samples**2)
        np.testing.assert_allclose(prediction.variance.numpy(), variance, atol=1e-6)
        np.testing.assert_allclose(prediction.standard_error.numpy(), error, atol=1e-6)
    sure = np.abs(mean - 0.4) > 1e-5
    assert np.array_equal(prediction.mask.numpy()[sure], (mean > 0.4)[sure])


def test_a_generator_reproduces_a_prediction_and_spares_the_global_state():
    model, before = segmenter(), torch.random.get_rng_state()

    one, same, other = (
        model.predict(HOST.image, HOST.text, num_samples=2, generator=generator(seed)) for seed in (1, 1, 2)
    )

    assert torch.equal(one.probability, same.probability)
    assert not torch.equal(one.probability, other.probability)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_more_samples_give_a_smaller_standard_error():
    model = segmenter()

    few, many = (
        model.predict(HOST.image, HOST.text, num_samples=n, antithetic=False).standard_error.mean() for n in (4, 64)
    )

    assert few / many == pytest.approx(4.0, rel=0.5)


def test_the_threshold_decides_the_mask_and_nothing_else():
    model = segmenter()

    low, high = (
        model.predict(HOST.image, HOST.text, num_samples=2, threshold=threshold, generator=generator())
        for threshold in (0.0, 1.0)
    )

    assert low.mask.all()
    assert not high.mask.any()
    assert torch.equal(low.probability, high.probability)


def test_a_prediction_cannot_be_changed_by_accident():
    prediction = segmenter().predict(HOST.image, HOST.text, num_samples=1)

    with pytest.raises(dataclasses.FrozenInstanceError):
        prediction.mask = None


def mixed_modes(model: nn.Module) -> dict[str, bool]:
    """Put the model in train mode but for a part, and say what is where."""
    model.train()
    model.head.mask_head.eval()
    return {name: module.training for name, module in model.named_modules()}


def test_predicting_runs_in_eval_mode_and_leaves_every_mode_as_it_was():
    host = BY_NAME["open_clip-bert"]
    model = pvl.MedCLIPSeg(injected(host, dropout=0.9, config=pvl.PVLConfig(layers=[1], dim=8, tower_dropout=True)))
    modes = mixed_modes(model)

    one, same = (model.predict(host.image, host.text, num_samples=2, generator=generator()) for _ in range(2))

    assert torch.equal(one.probability, same.probability)  # a dropout awake would differ
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 2.5}, "num_samples is 2.5.*expected a number of samples"),
        ({"num_samples": -2}, "num_samples is -2.*expected a number of samples"),
        ({"threshold": 1.5}, r"threshold is 1\.5.*between 0 and 1"),
        ({"threshold": -0.1}, r"threshold is -0\.1.*between 0 and 1"),
        ({"threshold": math.nan}, "threshold is nan.*between 0 and 1"),
        ({"text": HOST.ids[:2]}, "3 images and 2 sentences"),
        ({"text": HOST.ids + VOCABULARY}, f"vocabulary has {VOCABULARY}"),
        ({"image": HOST.image[:, :, :-1]}, "pixels, this model takes 32 x 48"),
        ({"image": HOST.image * math.nan}, "NaN or infinite"),
        ({"image": HOST.image / 0}, "NaN or infinite"),
        ({"image": (HOST.image * 9).to(torch.int16)}, "int16.*expected uint8, or float"),
        ({"image": []}, "no picture"),
    ],
    ids=[
        "no_number",
        "negative_samples",
        "threshold_above",
        "threshold_below",
        "threshold_nan",
        "batch",
        "vocabulary",
        "size",
        "nan",
        "infinite",
        "integer_tensor",
        "nothing",
    ],
)
def test_wrong_arguments_of_predict_are_refused_and_leave_every_mode_as_it_was(arguments, message):
    model = segmenter()
    expected = model(HOST.image, HOST.text)
    modes = mixed_modes(model)

    with pytest.raises(ValueError, match=message):
        model.predict(**{"image": HOST.image, "text": HOST.text, "num_samples": 2, **arguments})

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert_same_bits(model.eval()(HOST.image, HOST.text).logits, expected.logits)


def test_an_error_in_the_middle_of_predicting_leaves_every_mode_as_it_was():
    model = segmenter()
    modes = mixed_modes(model)
    calls: list[int] = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("second sample")

    handle = model.head.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="second sample"):
        model.predict(HOST.image, HOST.text, num_samples=3, memory_budget=1)
    handle.remove()

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.predict(HOST.image, HOST.text, num_samples=1).probability.isfinite().all()


# --- pictures --------------------------------------------------------------------------------------------------------

SIZE = (20, 30)  # height and width of the pictures, other than those of the network


def color_array() -> np.ndarray:
    """[20, 30, 3], channels that cannot be mixed up."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.stack([rows * 12, columns * 8, 255 - rows * 5], axis=-1).astype(np.uint8)


@pytest.fixture
def picture_file(tmp_path) -> Iterator[Path]:
    path = tmp_path / "picture.png"
    Image.fromarray(color_array()).save(path)
    return path


def test_a_picture_may_come_in_many_forms(picture_file):
    model, array = segmenter(), color_array()
    expected = model.prepare(array)

    forms = [picture_file, str(picture_file), Image.fromarray(array), array / 255.0, (array / 255.0).astype(np.float32)]
    for form in forms:
        assert torch.equal(model.prepare(form), expected)
    assert torch.equal(model.prepare([array, picture_file]), expected.expand(2, -1, -1, -1))
    assert expected.shape == (1, 3, *HOST.image_size)
    assert expected.dtype == torch.float32


def test_a_grey_picture_fills_all_channels():
    model, grey = segmenter(), color_array()[..., 0]
    expected = model.prepare(np.repeat(grey[..., None], 3, axis=-1))

    for form in (grey, Image.fromarray(grey), grey / 255.0):
        assert torch.equal(model.prepare(form), expected)


def test_transparency_and_palettes_are_read_as_colors():
    model, picture = segmenter(), Image.fromarray(color_array())

    assert torch.equal(model.prepare(picture.convert("RGBA")), model.prepare(picture))
    palette = picture.convert("P")
    assert torch.equal(model.prepare(palette), model.prepare(palette.convert("RGB")))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32], ids=["16_bit", "32_bit", "float"])
def test_deep_pictures_keep_their_shades_or_are_refused(dtype, tmp_path):
    """Scans often come in 16 bits; cut off at 255 they would be all white, silently."""
    deep = np.linspace(0, 40000, SIZE[0] * SIZE[1]).reshape(SIZE).astype(dtype)
    path = tmp_path / ("deep.png" if dtype == np.uint16 else "deep.tiff")
    Image.fromarray(deep).save(path)

    for form in (path, Image.fromarray(deep)):
        try:
            prepared = segmenter().prepare(form)[0, 0]
        except ValueError as error:
            assert "expected" in str(error)  # noqa: PT017
        else:
            assert prepared.mean(dim=1).diff().min() > 0


def test_pictures_are_normalised_with_the_statistics_of_the_host_unless_others_are_set():
    flat = np.full((*SIZE, 3), (255, 0, 51), dtype=np.uint8)
    clip = injected(HOST)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    ours = pvl.MedCLIPSegConfig(image_mean=mean, image_std=std)

    default = pvl.MedCLIPSeg(clip).prepare(flat)
    set_here = pvl.MedCLIPSeg(clip, config=ours).prepare(flat)
    clip.visual.image_mean, clip.visual.image_std = mean, std  # as open_clip's factory does
    of_the_host = pvl.MedCLIPSeg(clip).prepare(flat)

    color = torch.tensor([1.0, 0.0, 0.2])
    openai_mean, openai_std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    torch.testing.assert_close(default[0, :, 5, 5], (color - torch.tensor(openai_mean)) / torch.tensor(openai_std))
    torch.testing.assert_close(set_here[0, :, 5, 5], (color - torch.tensor(mean)) / torch.tensor(std))
    torch.testing.assert_close(of_the_host, set_here)


def test_resizing_keeps_rows_and_columns_apart():
    """A picture bright in its upper half stays bright in the upper half."""
    array = np.zeros((40, 40, 3), dtype=np.uint8)
    array[:20] = 255

    prepared = segmenter().prepare(array)[0, 0]

    assert prepared[:12].min() > prepared[-12:].max()


def test_prepared_tensors_pass_through_untouched():
    assert torch.equal(segmenter().prepare(HOST.image), HOST.image)


def test_predicting_from_a_file_equals_predicting_from_the_prepared_tensor(picture_file):
    model = segmenter()
    text = HOST.ids[:1]

    from_file = model.predict(picture_file, text, num_samples=2, generator=generator())
    from_tensor = model.predict(model.prepare(picture_file), text, num_samples=2, generator=generator())

    assert torch.equal(from_file.probability, from_tensor.probability)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((20, 30, 4), np.uint8), r"\(20, 30, 4\).*expected \[height, width\]"),
        (np.zeros((3, 20, 30), np.uint8), r"\(3, 20, 30\).*expected \[height, width\]"),
        (np.zeros((1, 20, 30, 3), np.uint8), r"\(1, 20, 30, 3\).*expected \[height, width\]"),
        (np.zeros(20, np.uint8), r"\(20,\).*expected \[height, width\]"),
        (np.zeros((20, 30), np.int64), "int64.*expected uint8, or float"),
        (np.zeros((20, 30), bool), "bool.*expected uint8, or float"),
        (np.full((20, 30), 200.0), "200.*expected 0 to 1"),
        (np.full((20, 30), -0.5), r"-0\.5.*expected 0 to 1"),
        (np.full((20, 30), np.nan), "NaN or infinite"),
        (np.full((20, 30), np.inf), "NaN or infinite"),
        (np.zeros((0, 30), np.uint8), r"\(0, 30\)"),
        (3, "int.*expected a picture"),
        (None, "NoneType.*expected a picture"),
        ([color_array(), None], "NoneType.*expected a picture"),
        ([], "no picture"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(getattr(value, "shape", type(value).__name__)),
)
def test_what_is_no_picture_is_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        segmenter().prepare(picture)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        segmenter().prepare(tmp_path / "missing.png")


def test_a_file_that_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "notes.png").write_text("no picture")

    with pytest.raises((ValueError, OSError), match=r"notes\.png"):
        segmenter().prepare(tmp_path / "notes.png")
