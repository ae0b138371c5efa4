"""Mistakes: each is answered by an error that says what was got and what is expected, and leaves the host as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
import transformers
from hosts import BY_NAME, CORE_HOSTS, END, VOCABULARY, Host
from support import CONFIG, assert_same_bits, gradients, injected, object_state, randomise, unchanged
from torch import Tensor, nn

import pvl_adapter as pvl


@pytest.fixture(params=CORE_HOSTS, ids=str)
def host(request: pytest.FixtureRequest) -> Host:
    """How mistakes are answered does not depend on the family: the core hosts stand for all."""
    return request.param


TEXT = {"context_length": 12, "vocab_size": VOCABULARY, "width": 24, "heads": 3, "layers": 3}


# --- injection -------------------------------------------------------------------------------------------------------


def test_injecting_twice_is_refused(host):
    model = injected(host)
    expected = host.run(model)

    with unchanged(model), pytest.raises(ValueError, match=r"has adapters already.*remove_adapters"):
        pvl.inject_adapters(model, CONFIG)

    assert torch.equal(host.run(model), expected)


@pytest.mark.parametrize("beyond", [0, 7])
def test_layers_out_of_range_are_refused(host, beyond):
    model, depth = host.build(), min(host.depths)

    with unchanged(model), pytest.raises(ValueError, match=rf"layers .*{depth + beyond}.*0 to {depth - 1}"):
        pvl.inject_adapters(model, pvl.PVLConfig(layers=[1, depth + beyond]))


@pytest.mark.parametrize("layers", [[-1], [1, 1], [], [0.5], [True], ["1"]], ids=str)
def test_layers_that_are_no_distinct_indices_are_refused(layers):
    with pytest.raises(ValueError, match=r"layers is .*distinct block indices counted from 0"):
        pvl.PVLConfig(layers=layers)


def test_default_layers_need_towers_of_three_blocks():
    model = open_clip.CLIP(16, {"layers": 2, "width": 32, "head_width": 8, "patch_size": 16, "image_size": 32}, TEXT)

    with unchanged(model), pytest.raises(ValueError, match=r"2 blocks.*PVLConfig\(layers="):
        pvl.inject_adapters(model)
    pvl.inject_adapters(model, pvl.PVLConfig(layers=[1]))


def test_a_configuration_of_another_type_is_refused(host):
    model = host.build()

    with unchanged(model), pytest.raises(TypeError, match=r"config is a dict.*PVLConfig"):
        pvl.inject_adapters(model, {"dim": 8})


def _open_clip_with(vision: dict[str, Any]) -> nn.Module:
    return open_clip.CLIP(16, vision, TEXT)


def _align() -> nn.Module:
    config = transformers.AlignConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "intermediate_size": 48,
        },
        vision_config={"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1},
        projection_dim=16,
    )
    return transformers.AlignModel(config)


NO_TOKEN_TOWERS = {
    "linear": lambda: nn.Linear(2, 2),
    "sequential": lambda: nn.Sequential(nn.Linear(2, 2)),
    "modified_resnet": lambda: _open_clip_with({"layers": (1, 1, 1, 1), "width": 8, "image_size": 32, "head_width": 8}),
    "convnext": lambda: _open_clip_with({"timm_model_name": "test_convnext", "image_size": 32}),
    "align": _align,
    "image_tower_alone": lambda: BY_NAME["open_clip-bert"].build().visual,
    "text_tower_alone": lambda: BY_NAME["transformers-clip"].build().text_model,
}


@pytest.mark.parametrize("make", NO_TOKEN_TOWERS.values(), ids=NO_TOKEN_TOWERS)
def test_models_without_two_token_towers_are_refused_with_what_is_supported(make):
    model = make()

    with unchanged(model), pytest.raises(pvl.UnsupportedModelError, match=rf"{type(model).__name__}.*supported are"):
        pvl.inject_adapters(model, CONFIG)


def test_an_unsupported_model_may_be_caught_as_a_type_error():
    assert issubclass(pvl.UnsupportedModelError, TypeError)


@pytest.mark.parametrize("value", [None, "ViT-B-16", 3], ids=repr)
def test_what_is_no_model_is_refused(value):
    with pytest.raises(TypeError, match=type(value).__name__):
        pvl.inject_adapters(value)


USES = {
    "remove_adapters": lambda model, host: pvl.remove_adapters(model),
    "disable_adapters": lambda model, host: pvl.disable_adapters(model).__enter__(),
    "sampling": lambda model, host: pvl.sampling(model).__enter__(),
    "encode": lambda model, host: pvl.encode(model, host.image, host.text),
    "save_adapters": lambda model, host: pvl.save_adapters(model, "never_written"),
    "MedCLIPSeg": lambda model, host: pvl.MedCLIPSeg(model),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_model_without_adapters_is_refused_with_how_to_get_them(host, use):
    model = host.build()

    with unchanged(model), pytest.raises(ValueError, match=r"no adapters.*inject_adapters"):
        use(model, host)


# --- calls -----------------------------------------------------------------------------------------------------------


def _with_ids(change: Callable[[Tensor, Host], Tensor]) -> Callable[[Host], dict[str, Any]]:
    return lambda host: {"text": host.text_of(change(host.ids, host))}


def _with_image(change: Callable[[Tensor], Any]) -> Callable[[Host], dict[str, Any]]:
    return lambda host: {"image": change(host.image)}


def _with_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(image: Tensor) -> Tensor:
        image[1, 2, 3, 4] = value
        return image

    return change


def _with_token(token: int) -> Callable[[Tensor, Host], Tensor]:
    def change(ids: Tensor, host: Host) -> Tensor:
        ids[1, 1] = token
        return ids

    return change


MISTAKES: dict[str, tuple[Callable[[Host], dict[str, Any]], str]] = {
    "fewer_images": (_with_image(lambda image: image[:2]), "2 images and 3 sentences.*one sentence for each image"),
    "fewer_sentences": (_with_ids(lambda ids, _: ids[:1]), "3 images and 1 sentences.*one sentence for each image"),
    "nan_image": (_with_image(_with_value(float("nan"))), r"NaN or infinite.*\[1\].*finite"),
    "infinite_image": (_with_image(_with_value(float("-inf"))), r"NaN or infinite.*\[1\].*finite"),
    "image_size": (_with_image(lambda image: image[..., :-1]), "pixels, this model takes.*resize"),
    "image_turned": (_with_image(lambda image: image[..., :-8, :].mT), "pixels, this model takes.*resize"),
    "channels": (_with_image(lambda image: image[:, :1]), r"\(3, 1, .*expected.*\[batch, 3, height, width\]"),
    "one_image": (_with_image(lambda image: image[0]), r"\(3, .*expected.*\[batch, 3, height, width\]"),
    "channels_last": (_with_image(lambda image: image.permute(0, 2, 3, 1)), r"expected.*\[batch, 3, height, width\]"),
    "integer_image": (_with_image(lambda image: image.to(torch.uint8)), "uint8.*expected a floating-point tensor"),
    "array_image": (_with_image(lambda image: image.numpy()), "ndarray.*expected a floating-point tensor"),
    "missing_image": (_with_image(lambda image: None), "missing.*images and sentences"),
    "long_text": (
        _with_ids(lambda ids, host: torch.nn.functional.pad(ids, (0, host.positions - ids.shape[1] + 1))),
        "tokens, this model takes (at most|exactly) (12|18)",
    ),
    "token_beyond": (_with_ids(_with_token(VOCABULARY)), f"to {VOCABULARY}.*vocabulary has {VOCABULARY}.*tokenizer"),
    "token_below": (_with_ids(_with_token(-1)), f"from -1 to {END}.*vocabulary"),
    "float_text": (_with_ids(lambda ids, _: ids.float()), r"float32.*expected integer token ids \[batch, tokens\]"),
    "boolean_text": (_with_ids(lambda ids, _: ids.bool()), r"bool.*expected integer token ids \[batch, tokens\]"),
    "flat_text": (_with_ids(lambda ids, _: ids[0]), r"\(12,\), expected integer token ids \[batch, tokens\]"),
    "no_tokens": (_with_ids(lambda ids, _: ids[:, :0]), "0 tokens"),
}  # fmt: skip


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_wrong_inputs_are_refused_and_the_next_call_is_as_before(host, mistake, message):
    model = injected(host)
    before, expected = object_state(model), host.call(model)
    arguments = {"image": host.image, "text": host.text, **mistake(host)}

    with pytest.raises(ValueError, match=message):
        model(**host.arguments(**arguments))
    with pytest.raises(ValueError, match=message):
        pvl.encode(model, **arguments)

    assert object_state(model) == before
    assert_same_bits(host.call(model), expected)


@pytest.mark.parametrize("missing", ["image", "text"])
def test_a_call_with_one_input_alone_is_refused_with_what_to_do(host, missing):
    model = injected(host)
    arguments = host.arguments(host.image, host.text)
    del arguments[host.image_key if missing == "image" else host.ids_key]

    with pytest.raises(ValueError, match=r"missing.*images and sentences.*disable_adapters"):
        model(**arguments)


def test_an_empty_batch_is_refused(host):
    with pytest.raises(ValueError, match=r"(empty|0 images|batch)"):
        host.call(injected(host), host.image[:0], host.text_of(host.ids[:0]))


def test_a_text_shorter_than_the_context_is_encoded_or_refused_with_what_to_do(host):
    model = injected(host)

    try:
        with pvl.disable_adapters(model):
            host.run(model, text=host.text_of(host.ids[:, :-1]))
        shorter_is_allowed = True
    except RuntimeError:
        shorter_is_allowed = False

    if shorter_is_allowed:
        assert host.run(model, text=host.text_of(host.ids[:, :-1])).isfinite().all()
    else:
        with pytest.raises(ValueError, match=r"11 tokens, this model takes exactly 12; pad"):
            host.run(model, text=host.ids[:, :-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a polyp", "str.*token ids"),
        (["a polyp"], "list.*token ids"),
        ({"ids": None}, "'input_ids'"),
        (None, "missing"),
    ],
    ids=repr,
)
def test_encode_takes_token_ids_only(host, text, message):
    with pytest.raises(ValueError, match=message):
        pvl.encode(injected(host), host.image, text)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample": True, "num_samples": 0}, "num_samples is 0.*1 or more"),
        ({"num_samples": 4}, "sample=True"),
        ({"generator": torch.Generator()}, "sample=True"),
        ({"noise": []}, "0 pairs.*2 adapters"),
        ({"noise": [(torch.zeros(3, 12, 8), torch.zeros(3, 2, 8))] * 2}, r"noise.*\(3, 2, 8\).*expected"),
        ({"noise": [(torch.zeros(3, 12, 7), torch.zeros(3, 7, 7))] * 2}, r"noise.*\(3, 12, 7\).*expected"),
    ],
    ids=["no_samples", "samples_of_nothing", "generator_for_nothing", "too_few_pairs", "image_draws", "width"],
)
def test_wrong_draws_are_refused_and_the_next_call_is_as_before(host, settings, message):
    model = injected(host)
    expected = host.call(model)

    with pytest.raises(ValueError, match=message):
        pvl.encode(model, host.image, host.text, **settings)

    assert_same_bits(host.call(model), expected)


@pytest.mark.parametrize("where", ["adapter", "block", "projection"])
def test_after_an_error_in_the_middle_of_a_run_the_next_call_is_as_before(host, where):
    model = injected(host)
    before, expected = object_state(model), host.call(model)
    places = {
        "adapter": model.pvl_adapters[-1],
        "block": next(m for m in model.modules() if isinstance(m, (nn.MultiheadAttention, nn.GELU))
                      or type(m).__name__ == "CLIPAttention"),
        "projection": [m for m in model.modules() if isinstance(m, nn.LayerNorm)][-1],
    }  # fmt: skip

    def fail(*_: object) -> None:
        raise KeyError(where)

    handle = places[where].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match=where):
        host.call(model)
    handle.remove()

    assert object_state(model) == before
    assert_same_bits(host.call(model), expected)
    assert_same_bits(pvl.encode(model, host.image, host.text).image_embeds.isfinite().all(), torch.tensor(True))


def test_calling_a_host_from_its_own_hook_is_refused(host):
    model = injected(host)
    handle = model.pvl_adapters[0].register_forward_pre_hook(lambda *_: host.call(model) and None)

    with pytest.raises(RuntimeError, match="already running"):
        host.call(model)

    handle.remove()
    host.call(model)


# --- what hosts can do besides ---------------------------------------------------------------------------------------


def _checkpoint(model: nn.Module) -> None:
    switch = getattr(model, "gradient_checkpointing_enable", None) or model.set_grad_checkpointing
    switch()


@pytest.mark.parametrize("when", ["before_injection", "after_injection", "by_configuration"])
def test_gradient_checkpointing_trains_exactly_or_is_refused_by_name(host, when):
    def train(model: nn.Module) -> dict[str, Tensor | None]:
        randomise(model.pvl_adapters)
        with pvl.sampling(model.train(), sample=False):
            host.run(model).square().sum().backward()
        return gradients(model.pvl_adapters)

    config = pvl.PVLConfig(layers=(0, 2), dim=8, tower_dropout=True)  # blocks checkpoint in train mode only
    expected = train(pvl.inject_adapters(host.build(), config))
    model = host.build()

    try:
        if when == "before_injection":
            _checkpoint(model)
            pvl.inject_adapters(model, config)
        elif when == "after_injection":
            _checkpoint(pvl.inject_adapters(model, config))
        else:
            pvl.inject_adapters(model, dataclasses.replace(config, gradient_checkpointing=True))
        got = train(model)
    except (RuntimeError, ValueError) as error:
        assert "checkpointing" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
