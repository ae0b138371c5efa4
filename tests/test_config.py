"""Configurations: checked when built, frozen, JSON both ways."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

import pvl_adapter as pvl


def test_the_defaults_are_those_of_the_paper_but_for_padding():
    config = pvl.PVLConfig()

    assert (config.layers, config.dim, config.beta, config.gate_init) == (None, 256, 2.35, 0.0)
    assert config.mask_padding
    assert not config.tower_dropout
    assert not config.gradient_checkpointing
    assert not config.learn_beta


@pytest.mark.parametrize(
    "layers", [range(1, 4), [3, 1, 2], (1, 2, 3), {1, 2, 3}, iter([1, 2, 3])], ids=lambda x: type(x).__name__
)
def test_layers_may_be_any_iterable_and_are_kept_in_order(layers):
    assert pvl.PVLConfig(layers=layers).layers == (1, 2, 3)


WRONG = {
    pvl.PVLConfig: {
        "layers": ([], [-1], [1, 1], [1.0], [True], "12", 3),
        "dim": (0, -8, 8.0, True, "8"),
        "beta": (-0.1, math.nan, math.inf, "2.35", None),
        "gate_init": (math.nan, -math.inf, None),
        "mask_padding": (1, None),
        "tower_dropout": ("yes",),
        "gradient_checkpointing": (0,),
        "learn_beta": (1,),
    },
    pvl.MedCLIPSegConfig: {
        "image_mean": ((0.5, 0.5), (0.5, 0.5, math.nan), "rgb", 0.5),
        "image_std": ((0.5, 0.5, 0.0), (0.5, -0.5, 0.5), (0.5, 0.5, 0.5, 0.5)),
        "num_upscale": (-1, 1.5, True),
        "channel_order": ("GBR",),
        "resize": ("nearest",),
        "context_length": (0, 7.5, True),
        "clean_prompts": (1,),
    },
}
CASES = [(kind, name, value) for kind, of in WRONG.items() for name, values in of.items() for value in values]


@pytest.mark.parametrize(("kind", "field", "value"), CASES, ids=str)
def test_settings_out_of_range_are_refused_by_name(kind, field, value):
    with pytest.raises(ValueError, match=rf"{field} is .*expected"):
        kind(**{field: value})


CONFIGS = [  # with the least values that are allowed
    pvl.PVLConfig(),
    pvl.PVLConfig(layers=[0], dim=1, beta=0),
    pvl.PVLConfig(beta=0.1, learn_beta=True),
    pvl.MedCLIPSegConfig(context_length=1, resize="opencv_bilinear", channel_order="BGR", clean_prompts=True),
    pvl.PVLConfig(layers=range(1, 11), dim=8, beta=0.5, gate_init=-1.5, mask_padding=False, tower_dropout=True),
    pvl.MedCLIPSegConfig(),
    pvl.MedCLIPSegConfig(image_mean=[0.1, 0.2, 0.3], image_std=(0.4, 0.5, 1), num_upscale=0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_json_gives_the_same_configuration_back(config):
    text = config.to_json()

    again = type(config).from_json(text)

    assert again == config
    assert hash(again) == hash(config)
    assert again.to_json() == text
    assert set(json.loads(text)) == {field.name for field in dataclasses.fields(config)}
    assert type(config).from_dict(config.to_dict()) == config


@pytest.mark.parametrize("kind", [pvl.PVLConfig, pvl.MedCLIPSegConfig], ids=lambda kind: kind.__name__)
def test_an_unknown_setting_is_refused_with_what_is_known(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}.*'colour'.*known are.*newer"):
        kind.from_json('{"colour": "red"}')


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"dim"'], ids=repr)
def test_text_that_is_no_json_object_is_refused(text):
    with pytest.raises(ValueError, match=r"(?i)json|expect|no field"):
        pvl.PVLConfig.from_json(text)
