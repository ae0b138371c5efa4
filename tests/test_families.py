"""Families whose inputs or tokens are not CLIP's, hosts whose blocks cannot be followed, and other image sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import pytest
import tiny_models
import torch
import transformers
from hosts import BY_NAME
from support import assert_same_bits, leaves, normal, randomise, unchanged
from thread_oracle import PlainTower, assert_equal_to_lockstep, run_in_threads
from tiny_models import JOINT_WIDTH, PAD, PATCH, transformer, vit
from torch import Tensor, nn

import pvl_adapter as pvl

CONFIG = pvl.PVLConfig(dim=8)
IDS = BY_NAME["transformers-clip"].ids
TEXT = {"input_ids": IDS, "attention_mask": (IDS != PAD).long()}
SIGLIP2_IMAGE = {
    "pixel_values": normal(3, 9, 3 * PATCH**2),
    "pixel_attention_mask": torch.tensor([[1] * 6 + [0] * 3] * 3),
    "spatial_shapes": torch.tensor([[2, 3]] * 3),
}


@dataclass(frozen=True)
class Unusual:
    """A model, what it is called with, its blocks, and the grid of its patch tokens (None if it has none)."""

    name: str
    make: Callable[[], nn.Module]
    image: dict[str, Tensor]
    rows: tuple[str, str]
    grid: tuple[int, int] | None
    text: dict[str, Tensor]
    methods: tuple[str, str] = ("get_image_features", "get_text_features")

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make().eval().requires_grad_(False)

    def inject(self, **settings: Any) -> nn.Module:
        model = pvl.inject_adapters(self.build(), pvl.PVLConfig(dim=8, **settings))
        randomise(model.pvl_adapters)
        return model

    def run(self, model: nn.Module) -> Any:
        return model(**self.image, **self.text)

    def joint(self, model: nn.Module) -> pvl.JointFeatures:
        image = self.image if len(self.image) > 1 else next(iter(self.image.values()))
        return pvl.encode(model, image, self.text.get("text", self.text))


def _unusual(name: str, make: Callable[[], nn.Module], image: Any, grid: Any, **more: Any) -> Unusual:
    image = image if isinstance(image, dict) else {"pixel_values": image}
    rows = ("vision_model.encoder.layers", "text_model.encoder.layers")
    return Unusual(f"transformers-{name}", make, image, **{"rows": rows, "grid": grid, "text": TEXT, **more})


UNUSUAL = (
    Unusual(
        "open_clip-coca",
        tiny_models.coca,
        {"image": normal(3, 3, 32, 48)},
        ("visual.transformer.resblocks", "text.transformer.resblocks"),
        None,
        {"text": IDS},
        ("encode_image", "encode_text"),
    ),
    _unusual(
        "flava",
        tiny_models.hf_flava,
        normal(3, 3, 32, 32),
        (2, 2),
        rows=("image_model.encoder.layer", "text_model.encoder.layer"),
    ),
    _unusual("siglip2", tiny_models.hf_siglip2, SIGLIP2_IMAGE, (2, 3)),
    _unusual("xclip", tiny_models.hf_xclip, normal(3, 2, 3, 32, 32), None),
    _unusual(
        "groupvit",
        tiny_models.hf_groupvit,
        normal(3, 3, 64, 64),
        None,
        rows=("vision_model.encoder.stages.0.layers", "text_model.encoder.layers"),
    ),
)


@pytest.fixture(params=UNUSUAL, ids=str)
def unusual(request: pytest.FixtureRequest) -> Unusual:
    return request.param


@torch.no_grad()
def test_an_unusual_family_keeps_its_own_answer_without_adapters_and_changes_it_with_them(unusual):
    model = unusual.build()
    expected = unusual.run(model)

    with torch.enable_grad():
        pvl.inject_adapters(model, CONFIG)
    randomise(model.pvl_adapters)
    got = unusual.run(model)
    with pvl.disable_adapters(model):
        assert_same_bits(unusual.run(model), expected)
    assert_same_bits(unusual.run(copy.deepcopy(model)), got)
    pvl.remove_adapters(model)

    assert_same_bits(unusual.run(model), expected)
    pairs = zip(leaves(got), leaves(expected), strict=True)
    assert any((a - b).abs().max() > 1e-3 for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point())


def test_an_unusual_family_trains_its_adapters_alone_and_gives_the_features_it_has(unusual):
    model = unusual.inject()

    features = unusual.joint(model)
    (features.image_embeds.square().sum() + features.text_embeds.square().sum()).backward()

    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("pvl_adapters."), name
        assert parameter.grad is None or parameter.grad.isfinite().all()
    width = features.image_embeds.shape[1]
    assert features.image_embeds.shape == features.text_embeds.shape == (3, width)
    assert features.text_tokens.shape == (3, IDS.shape[1], width)
    if unusual.grid is None:
        assert features.patch_tokens is None
        with pytest.raises(ValueError, match="patches"):
            pvl.MedCLIPSeg(model)
    else:
        assert features.grid == unusual.grid
        assert features.patch_tokens.shape == (3, unusual.grid[0] * unusual.grid[1], width)


@pytest.mark.parametrize("unusual", [u for u in UNUSUAL if "xclip" not in u.name], ids=str, indirect=True)
def test_an_unusual_family_equals_the_oracle(unusual):
    """Not X-CLIP, whose adapters see the frames of a video together and its blocks one at a time."""
    model, plain = unusual.inject(mask_padding=False), unusual.build()
    adapters, layers = copy.deepcopy(model.pvl_adapters), range(1, len(model.pvl_adapters) + 1)
    options = {"normalize": False} if unusual.name == "open_clip-coca" else {}

    def tower(side: int) -> PlainTower:
        method, inputs = getattr(plain, unusual.methods[side]), (unusual.image, unusual.text)[side]
        return PlainTower(plain.get_submodule(unusual.rows[side]), lambda: method(*inputs.values(), **options))

    expected = run_in_threads((tower(0), tower(1)), adapters, layers)

    assert_equal_to_lockstep(unusual.joint(model), expected, model.pvl_adapters, adapters)


def test_padded_patches_of_siglip2_are_read_by_nothing():
    unusual = next(u for u in UNUSUAL if u.name == "transformers-siglip2")
    model = unusual.inject()
    changed = {**SIGLIP2_IMAGE, "pixel_values": SIGLIP2_IMAGE["pixel_values"].clone()}
    changed["pixel_values"][:, 6:] += 1.0

    got, expected = pvl.encode(model, changed, TEXT), pvl.encode(model, SIGLIP2_IMAGE, TEXT)

    for name in ("image_embeds", "text_embeds", "patch_tokens"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-5, rtol=0.0)


# --- options of transformers hosts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"return_dict": False}, {"output_hidden_states": True}, {"return_loss": True}], ids=str
)
def test_options_give_what_they_give_without_adapters(options):
    host = BY_NAME["transformers-clip"]
    model = pvl.inject_adapters(host.build(), CONFIG)

    got, expected = host.call(model, **options), host.call(host.build(), **options)

    assert type(got) is type(expected)
    assert [each.shape for each in leaves(got)] == [each.shape for each in leaves(expected)]
    if "output_hidden_states" in options:
        vision, text = got.vision_model_output, got.text_model_output
        torch.testing.assert_close(vision.hidden_states[-1], vision.last_hidden_state)
        torch.testing.assert_close(model.text_model.final_layer_norm(text.hidden_states[-1]), text.last_hidden_state)


def test_attention_weights_are_refused_by_name():
    host = BY_NAME["transformers-clip"]
    model = pvl.inject_adapters(host.build(), CONFIG)
    model.set_attn_implementation("eager")

    with pytest.raises(ValueError, match="output_attentions"):
        host.call(model, output_attentions=True)


def test_the_end_token_tells_padding_where_there_is_no_attention_mask():
    host = BY_NAME["transformers-clip"]
    model = pvl.inject_adapters(host.build(), CONFIG)
    ids, mask = host.text["input_ids"], host.text["attention_mask"]
    expected = host.run(model)

    without = model(input_ids=ids, pixel_values=host.image)
    other_padding = {"input_ids": ids.masked_fill(mask == 0, 7), "attention_mask": mask}

    assert_same_bits(torch.cat(host.features(without), dim=-1), expected)
    torch.testing.assert_close(host.run(model, text=other_padding), expected)


# --- blocks that are given what nobody knows of -----------------------------------------------------------------------


class DepthDependent(nn.Module):
    """A transformer that tells every block its depth."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.resblocks, self.width, self.batch_first = own.resblocks, own.width, True

    def get_cast_dtype(self) -> torch.dtype:
        return torch.float32

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        for depth, block in enumerate(self.resblocks):
            x = block(x, attn_mask=torch.full((x.shape[1], x.shape[1]), -float(depth)).triu(1))
        return x


class Skipping(DepthDependent):
    """A transformer that leaves its second block out."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        for depth, block in enumerate(self.resblocks):
            x = x if depth == 1 else block(x, attn_mask=attn_mask)
        return x


@pytest.mark.parametrize("kind", [DepthDependent, Skipping])
def test_a_host_whose_blocks_cannot_be_followed_is_refused_and_left_alone(kind):
    model = BY_NAME["open_clip-inlined_text"].build()
    model.visual.transformer = kind(model.visual.transformer)

    with unchanged(model), pytest.raises(pvl.UnsupportedModelError, match=r"visual\.transformer\.resblocks"):
        pvl.inject_adapters(model, CONFIG)


def test_patch_dropout_and_layer_drop_stay_asleep_or_are_refused():
    host = BY_NAME["open_clip-inlined_text"]
    model = open_clip.CLIP(JOINT_WIDTH, vit(4, patch_dropout=0.5), transformer(3))
    with unchanged(model), pytest.raises(ValueError, match="tower_dropout"):
        pvl.inject_adapters(model, pvl.PVLConfig(dim=8, tower_dropout=True))
    pvl.inject_adapters(model, CONFIG).train()
    assert pvl.encode(model, host.image, host.text).patch_tokens.shape == (3, 6, JOINT_WIDTH)

    host = BY_NAME["open_clip-m2m_100"]
    model = host.build()
    model.text.transformer.layerdrop = 0.9
    pvl.inject_adapters(model, pvl.PVLConfig(dim=8, tower_dropout=True)).train()
    for _ in range(5):
        assert host.run(model).isfinite().all()
    assert model.text.transformer.layerdrop == 0.9


# --- other sizes than the training size -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [("transformers-clip", (32, 64)), ("transformers-siglip", (48, 32)), ("transformers-owlvit", (64, 32))],
)
def test_transformers_hosts_take_other_sizes_where_asked_to_interpolate(name, size):
    host = BY_NAME[name]
    model = pvl.inject_adapters(host.build(), CONFIG)
    image = normal(3, 3, *size)

    with pytest.raises(ValueError, match="interpolate_pos_encoding"):
        pvl.encode(model, image, host.text)
    features = pvl.encode(model, {"pixel_values": image, "interpolate_pos_encoding": True}, host.text)
    output = model(**host.arguments(image, host.text), interpolate_pos_encoding=True)

    assert features.grid == (size[0] // 16, size[1] // 16)
    assert features.patch_tokens.shape[:2] == (3, size[0] * size[1] // 256)
    torch.testing.assert_close(
        nn.functional.normalize(features.image_embeds, dim=-1), output.image_embeds, atol=1e-6, rtol=1e-5
    )


def test_hosts_take_other_sizes_where_they_are_built_for_them():
    dinov2, timm = BY_NAME["transformers-dual-dinov2-bert"], BY_NAME["open_clip-timm-bert"]
    fixed, dynamic = pvl.inject_adapters(timm.build(), CONFIG), timm.build()
    dynamic.visual.trunk.dynamic_img_size = True
    embed = dynamic.visual.trunk.patch_embed
    embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, "NHWC"
    pvl.inject_adapters(dynamic, CONFIG)
    rebuilt = open_clip.create_model("ViT-B-32", force_image_size=(64, 96)).eval()
    pvl.inject_adapters(rebuilt, pvl.PVLConfig(layers=[3], dim=8))

    always = pvl.inject_adapters(dinov2.build(), CONFIG)
    assert pvl.encode(always, normal(3, 3, 32, 64), dinov2.text).grid == (2, 4)
    assert pvl.encode(dynamic, normal(3, 3, 64, 32), timm.text).grid == (4, 2)
    for model, height in ((fixed, 64), (dynamic, 60)):
        with pytest.raises(ValueError, match="force_image_size"):
            pvl.encode(model, normal(3, 3, height, 32), timm.text)
    text = open_clip.get_tokenizer("ViT-B-32")(["a polyp"])
    assert pvl.encode(rebuilt, normal(1, 3, 64, 96), text).grid == (2, 3)


# --- the tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Align", "Blip2", "BridgeTower"])
def test_well_known_classes_that_cannot_work_are_refused_with_the_reason(name):
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")())

    with pytest.raises(pvl.UnsupportedModelError, match=rf"{name}Model: its .*CLIPModel"):
        pvl.inject_adapters(model)


def test_roberta_positions_that_padding_takes_are_not_offered_as_context():
    host = BY_NAME["transformers-dual-vit-roberta"]
    model = pvl.inject_adapters(host.build(), CONFIG)

    with pytest.raises(ValueError, match=r"19 .*18"):
        pvl.encode(model, host.image, torch.ones(3, 19, dtype=torch.long))
