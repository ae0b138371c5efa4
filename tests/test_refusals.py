"""Mistakes: each is answered by an error that tells what it must, and leaves the host as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from hosts import BY_NAME, CORE_HOSTS, Host
from support import CONFIG, assert_same_bits, gradients, injected, object_state, randomise, unchanged
from tiny_models import JOINT_WIDTH, VOCABULARY, transformer, vit
from torch import Tensor, nn

import pvl_adapter as pvl


@pytest.fixture(params=CORE_HOSTS, ids=str)
def host(request: pytest.FixtureRequest) -> Host:
    return request.param


ONE = CORE_HOSTS[0]

# --- injection -------------------------------------------------------------------------------------------------------


def test_injecting_twice_and_other_configurations_are_refused(host):
    model, bare = injected(host), host.build()
    expected = host.run(model)

    with unchanged(model), pytest.raises(ValueError, match="remove_adapters"):
        pvl.inject_adapters(model, CONFIG)
    with unchanged(bare), pytest.raises(TypeError, match="PVLConfig"):
        pvl.inject_adapters(bare, {"dim": 8})
    for beyond in (0, 7):
        layer = min(host.depths) + beyond
        with unchanged(bare), pytest.raises(ValueError, match=rf"layers .*{layer}.*0 to {min(host.depths) - 1}"):
            pvl.inject_adapters(bare, pvl.PVLConfig(layers=[1, layer]))

    assert torch.equal(host.run(model), expected)


def test_default_layers_need_towers_of_three_blocks():
    model = open_clip.CLIP(JOINT_WIDTH, vit(2), transformer(3))

    with unchanged(model), pytest.raises(ValueError, match=r"2 blocks.*PVLConfig\(layers="):
        pvl.inject_adapters(model)
    pvl.inject_adapters(model, pvl.PVLConfig(layers=[1]))


NO_TOKEN_TOWERS: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(2, 2),
    "modified_resnet": lambda: open_clip.CLIP(
        JOINT_WIDTH, {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32, "head_width": 8}, transformer(3)
    ),
    "convnext": lambda: open_clip.CLIP(
        JOINT_WIDTH, {"timm_model_name": "test_convnext", "image_size": 32}, transformer(3)
    ),
    "image_tower_alone": lambda: BY_NAME["open_clip-bert"].build().visual,
    "text_tower_alone": lambda: BY_NAME["transformers-clip"].build().text_model,
    "nothing": lambda: None,
    "name": lambda: "ViT-B-16",
}


@pytest.mark.parametrize("make", NO_TOKEN_TOWERS.values(), ids=NO_TOKEN_TOWERS)
def test_models_without_two_token_towers_are_refused_by_name(make):
    model = make()

    with pytest.raises(TypeError, match=type(model).__name__):
        pvl.inject_adapters(model, CONFIG)
    if isinstance(model, nn.Module):
        with unchanged(model), pytest.raises(pvl.UnsupportedModelError, match="supported"):
            pvl.inject_adapters(model, CONFIG)


USES = {
    "remove_adapters": lambda model: pvl.remove_adapters(model),
    "disable_adapters": lambda model: pvl.disable_adapters(model).__enter__(),
    "sampling": lambda model: pvl.sampling(model).__enter__(),
    "encode": lambda model: pvl.encode(model, ONE.image, ONE.text),
    "save_adapters": lambda model: pvl.save_adapters(model, "never_written"),
    "MedCLIPSeg": lambda model: pvl.MedCLIPSeg(model),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_model_without_adapters_is_refused_with_how_to_get_them(use):
    model = ONE.build()

    with unchanged(model), pytest.raises(ValueError, match="inject_adapters"):
        use(model)


# --- calls -----------------------------------------------------------------------------------------------------------


def _second_with(value: float) -> Callable[[Tensor], Tensor]:
    """Puts a value into the second of the batch."""

    def change(given: Tensor) -> Tensor:
        given[1, ..., 1] = value
        return given

    return change


IMAGE = r"\[batch, 3, height, width\]"
IDS = r"\[batch, tokens\]"
WRONG_IMAGES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "fewer": (lambda image: image[:2], "2 images and 3 sentences"),
    "nan": (_second_with(float("nan")), r"\[1\]"),
    "infinite": (_second_with(float("-inf")), r"\[1\]"),
    "size": (lambda image: image[..., :-1], "pixels"),
    "turned": (lambda image: image[..., :-8, :].mT, "pixels"),
    "channels": (lambda image: image[:, :1], IMAGE),
    "one": (lambda image: image[0], IMAGE),
    "integer": (lambda image: image.to(torch.uint8), "uint8"),
    "array": (lambda image: image.numpy(), "ndarray"),
    "missing": (lambda image: None, "missing"),
}
WRONG_IDS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "fewer": (lambda ids: ids[:1], "3 images and 1 sentences"),
    "long": (lambda ids: nn.functional.pad(ids, (0, 8)), "20 tokens"),
    "beyond": (_second_with(VOCABULARY), str(VOCABULARY)),
    "below": (_second_with(-1), "-1"),
    "float": (lambda ids: ids.float(), IDS),
    "flat": (lambda ids: ids[0], IDS),
    "empty": (lambda ids: ids[:, :0], "0 tokens"),
}


WRONG_INPUTS = [*(("image", name) for name in WRONG_IMAGES), *(("text", name) for name in WRONG_IDS)]


@pytest.mark.parametrize("which", WRONG_INPUTS, ids="-".join)
def test_wrong_inputs_are_refused_and_the_next_call_is_as_before(host, which):
    model = injected(host)
    before, expected = object_state(model), host.call(model)
    arguments = {"image": host.image, "text": host.text}
    if which[0] == "image":
        change, told = WRONG_IMAGES[which[1]]
        arguments["image"] = change(host.image)
    else:
        change, told = WRONG_IDS[which[1]]
        arguments["text"] = host.text_of(change(host.ids))

    for call in (lambda: model(**host.arguments(**arguments)), lambda: pvl.encode(model, **arguments)):
        with pytest.raises(ValueError, match=told):
            call()

    assert object_state(model) == before
    assert_same_bits(host.call(model), expected)


def test_a_call_with_one_input_alone_or_none_in_the_batch_is_refused(host):
    model = injected(host)
    for missing in (host.image_key, host.ids_key):
        arguments = host.arguments(host.image, host.text)
        del arguments[missing]
        with pytest.raises(ValueError, match="disable_adapters"):
            model(**arguments)
    with pytest.raises(ValueError, match=r"empty|batch"):
        host.call(model, host.image[:0], host.text_of(host.ids[:0]))


def test_a_text_shorter_than_the_context_is_encoded_or_refused_with_what_to_do(host):
    model, shorter = injected(host), host.text_of(host.ids[:, :-1])
    try:
        with pvl.disable_adapters(model):
            host.run(model, text=shorter)
    except RuntimeError:
        with pytest.raises(ValueError, match=r"11 tokens.*pad"):
            host.run(model, text=shorter)
    else:
        assert host.run(model, text=shorter).isfinite().all()


@pytest.mark.parametrize("text", ["a polyp", ["a polyp"], {"ids": None}, None], ids=repr)
def test_encode_takes_token_ids_only(text):
    with pytest.raises(ValueError, match=r"token ids|input_ids|missing"):
        pvl.encode(injected(ONE), ONE.image, text)


@pytest.mark.parametrize("shape", [(3, 11), (1, 12), (2, 12), (12,)], ids=str)
def test_an_attention_mask_of_another_shape_is_refused(shape):
    host = BY_NAME["transformers-clip"]
    model = injected(host)
    expected = host.call(model)
    mask = torch.ones(shape, dtype=torch.long)
    mask[..., -2:] = 0

    with pytest.raises(ValueError, match="mask"):
        host.call(model, text={"input_ids": host.ids, "attention_mask": mask})

    assert_same_bits(host.call(model), expected)


NOISE = ONE.noise(CONFIG)
WRONG_DRAWS: dict[str, tuple[dict[str, Any], str]] = {
    "no_samples": ({"sample": True, "num_samples": 0}, "num_samples is 0"),
    "samples_of_nothing": ({"num_samples": 4}, "sample=True"),
    "generator_for_nothing": ({"generator": torch.Generator()}, "sample=True"),
    "too_few_pairs": ({"noise": NOISE[:1]}, "1 pairs.*2 adapters"),
    "swapped": ({"noise": [pvl.NoisePair(image=pair.text, text=pair.image) for pair in NOISE]}, r"\(3, 7, 8\)"),
    "width": ({"noise": [pvl.NoisePair(*(noise[..., :7] for noise in pair)) for pair in NOISE]}, r"\(3, 12, 7\)"),
}


@pytest.mark.parametrize(("settings", "told"), WRONG_DRAWS.values(), ids=WRONG_DRAWS)
def test_wrong_draws_are_refused_and_the_next_call_is_as_before(settings, told):
    model = injected(ONE)
    expected = ONE.call(model)

    with pytest.raises(ValueError, match=told):
        pvl.encode(model, ONE.image, ONE.text, **settings)

    assert_same_bits(ONE.call(model), expected)


def test_a_host_that_runs_a_tower_again_on_other_inputs_is_refused():
    model = ONE.build()
    own = model.forward
    model.forward = lambda image, text: (own(image, text), model.encode_text(text[:2]))
    pvl.inject_adapters(model, CONFIG)

    with pytest.raises(RuntimeError, match="twice"):
        ONE.call(model)


@pytest.mark.parametrize("path", ["visual.transformer", "transformer"])
def test_a_tower_that_does_not_run_its_blocks_is_refused(path):
    model, given = pvl.MedCLIPSeg(injected(ONE)).eval(), (ONE.image, ONE.ids)
    model.clip.get_submodule(path).forward = lambda hidden, **_: hidden

    for way in (
        lambda: model.clip(*given),
        lambda: pvl.encode(model.clip, *given),
        lambda: model.predict(*given, num_samples=0, prepared=True),
    ):
        with pytest.raises(RuntimeError, match="never ran the blocks of"):
            way()


# --- what hosts can do besides ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before_injection", "after_injection"])
def test_gradient_checkpointing_trains_as_without(host, when):
    def train(model: nn.Module) -> dict[str, Tensor | None]:
        randomise(model.pvl_adapters)
        with pvl.sampling(model.train(), sample=False):
            host.run(model).square().sum().backward()
        return gradients(model.pvl_adapters)

    def switch_on(model: nn.Module) -> None:
        (getattr(model, "gradient_checkpointing_enable", None) or model.set_grad_checkpointing)()

    config = pvl.PVLConfig(layers=(0, 2), dim=8, tower_dropout=True)  # blocks checkpoint in train mode only
    expected = train(pvl.inject_adapters(host.build(), config))
    model = host.build()

    if when == "before_injection":
        switch_on(model)
    pvl.inject_adapters(model, config)
    if when == "after_injection":
        switch_on(model)

    torch.testing.assert_close(train(model), expected, atol=1e-5, rtol=1e-4)
