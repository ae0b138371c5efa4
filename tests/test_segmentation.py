"""`MedCLIPSeg`: logits, prompts, and images as the network takes them."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from hosts import BY_NAME
from support import CONFIG, HOST, gradients, injected, segmenter, speaking_segmenter
from tiny_models import IMAGE_SIZE, VOCABULARY
from torch import Tensor

import pvl_adapter as pvl

SENTENCES = ["one small round tumor", "a polyp at the left", "no finding"]

# --- logits ----------------------------------------------------------------------------------------------------------


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

    output = model(HOST.image, HOST.text)
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.patch_tokens, joint.patch_tokens)
    torch.testing.assert_close(output.text_embeds, joint.text_embeds)


@pytest.mark.parametrize("num_upscale", [0, 1, 3])
def test_the_number_of_scale_blocks_is_a_setting(num_upscale):
    model = pvl.MedCLIPSeg(injected(HOST), config=pvl.MedCLIPSegConfig(num_upscale=num_upscale))

    assert len(model.head.upscale) == num_upscale
    assert model(HOST.image, HOST.text).logits.shape == (3, *HOST.image_size)


def test_logits_are_drawn_in_train_mode_or_where_asked():
    model, noise = segmenter(), HOST.noise(CONFIG)

    def logits(**settings: object) -> Tensor:
        return model(HOST.image, HOST.text, **settings).logits

    def drawn(seed: int) -> Tensor:
        return logits(sample=True, generator=torch.Generator().manual_seed(seed))

    mean = logits()
    assert torch.equal(mean, logits(sample=False))
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert torch.equal(logits(noise=noise), logits(noise=noise))
    assert not torch.equal(logits(noise=noise), mean)
    model.train()
    assert not torch.equal(logits(), logits())
    torch.testing.assert_close(logits(sample=False), mean)


def test_weights_can_be_loaded_and_the_head_keeps_its_own_type():
    model = segmenter()
    other = pvl.MedCLIPSeg(pvl.inject_adapters(HOST.build(seed=1), CONFIG)).eval()
    half = pvl.MedCLIPSeg(pvl.inject_adapters(HOST.build().bfloat16(), CONFIG))

    other.load_state_dict(model.state_dict())

    assert torch.equal(other(HOST.image, HOST.text).logits, model(HOST.image, HOST.text).logits)
    assert half(HOST.image.bfloat16(), HOST.text).logits.dtype == torch.float32


def test_training_reaches_head_and_adapters_alone_and_learns_an_image():
    model, target = segmenter().train(), torch.zeros(3, *HOST.image_size)
    target[:, :16] = 1
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    def step() -> float:
        output = model(HOST.image, HOST.text)
        features = {"patch_tokens": output.patch_tokens, "text_embeds": output.text_embeds}
        terms = pvl.SegmentationLoss()(output.logits, target, **features)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        return terms.dice.item()

    losses = [step() for _ in range(30)]

    assert losses[-1] < 0.5 * losses[0]
    for name, gradient in gradients(model).items():
        assert (gradient is not None) == name.startswith(("head.", "clip.pvl_adapters.")), name
        assert gradient is None or torch.isfinite(gradient).all(), name


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaking() -> pvl.MedCLIPSeg:
    return speaking_segmenter()


def test_sentences_are_turned_into_ids_by_the_tokenizer_of_the_host(speaking):
    ids = open_clip.SimpleTokenizer(context_length=16)(SENTENCES)

    assert torch.equal(speaking.tokenize(SENTENCES), ids)
    assert torch.equal(speaking.tokenize(SENTENCES[0]), ids[:1])
    assert torch.equal(speaking(HOST.image, SENTENCES).logits, speaking(HOST.image, ids).logits)


@pytest.mark.parametrize("name", ["open_clip-bert", "transformers-clip"])
@pytest.mark.filterwarnings("ignore:a sentence has")
def test_a_hugging_face_tokenizer_may_be_given(name, words):
    host = BY_NAME[name]
    clip = host.build()
    if name == "transformers-clip":
        clip.config.text_config.eos_token_id = clip.text_model.eos_token_id = 3
    tokenizer = transformers.AutoTokenizer.from_pretrained(words)
    model = pvl.MedCLIPSeg(pvl.inject_adapters(clip, CONFIG), tokenizer=tokenizer).eval()

    encoded = model.tokenize(SENTENCES)
    together = model(host.image, SENTENCES).logits
    one_by_one = [model(host.image[b : b + 1], SENTENCES[b]).logits for b in range(3)]

    assert encoded["attention_mask"].sum(dim=1).tolist() == [6, 7, 4]
    torch.testing.assert_close(together, torch.cat(one_by_one), atol=1e-4, rtol=1e-4)
    assert model.tokenize("tumor " * 100)["input_ids"].shape == (1, host.positions)


@pytest.mark.parametrize("name", ["open_clip-inlined_text", "open_clip-bert", "transformers-clip"])
def test_a_host_that_does_not_tell_its_tokenizer_asks_for_one(name):
    with pytest.raises(ValueError, match=rf"{VOCABULARY}.*tokenizer="):
        segmenter(BY_NAME[name]).tokenize("a tumor")


# --- arguments of predict --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"text": HOST.ids[:1]}, "3 images and 1 sentences"),
        ({"text": HOST.ids + VOCABULARY}, f"{VOCABULARY}"),
        ({"image": HOST.image[:, :, :-1]}, "32 x 48"),
        ({"image": HOST.image * torch.nan}, "NaN or infinite"),
    ],
    ids=["one_text", "vocabulary", "size", "nan"],
)
def test_inputs_that_do_not_fit_are_refused_and_leave_every_mode_as_it_was(arguments, told):
    model = segmenter()
    expected = model(HOST.image, HOST.text).logits
    model.train().head.mask_head.eval()
    modes = {name: module.training for name, module in model.named_modules()}

    with pytest.raises(ValueError, match=told):
        model.predict(**{"image": HOST.image, "text": HOST.text, "prepared": True, "num_samples": 2, **arguments})

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(model.eval()(HOST.image, HOST.text).logits, expected)


def test_an_error_in_the_middle_of_predicting_leaves_every_mode_as_it_was():
    model, calls = segmenter().train(), []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("second sample")

    handle = model.head.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        model.predict(HOST.image, HOST.text, num_samples=3, prepared=True, memory_budget=1)
    handle.remove()

    assert all(module.training for module in (model, model.head, *model.clip.pvl_adapters))
    assert model.predict(HOST.image, HOST.text, num_samples=1, prepared=True).probability.isfinite().all()


# --- images (see test_images.py for what may be given) ----------------------------------------------------------------


def test_images_are_normalised_with_the_statistics_of_the_host_unless_others_are_set():
    flat = np.full((20, 30, 3), (255, 0, 51), dtype=np.uint8)
    clip = injected(HOST)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    ours = pvl.MedCLIPSegConfig(image_mean=mean, image_std=std)

    set_here = pvl.MedCLIPSeg(clip, config=ours).prepare(flat)
    backwards = pvl.MedCLIPSegConfig(image_mean=mean, image_std=std, channel_order="BGR")
    clip.visual.image_mean, clip.visual.image_std = mean, std  # as open_clip's factory does
    of_the_host = pvl.MedCLIPSeg(clip).prepare(flat)

    color = torch.tensor([1.0, 0.0, 0.2])
    for prepared, order in ((set_here, color), (pvl.MedCLIPSeg(clip, config=backwards).prepare(flat), color.flip(0))):
        expected = (order - torch.tensor(mean)) / torch.tensor(std)
        torch.testing.assert_close(prepared, expected.view(1, 3, 1, 1).expand(1, 3, *IMAGE_SIZE))
    torch.testing.assert_close(of_the_host, set_here)
