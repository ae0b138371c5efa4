"""Families whose inputs or tokens are not CLIP's, what any family refuses, and other sizes than the training size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hosts
import open_clip
import pytest
import torch
import transformers
from hosts import BY_NAME, JOINT_WIDTH
from support import assert_same_bits, leaves, normal, randomise, unchanged
from thread_oracle import assert_equal_to_lockstep, run_in_threads
from torch import Tensor, nn

import pvl_adapter as pvl
from pvl_adapter.lockstep import lockstep_of

CONFIG = pvl.PVLConfig(dim=8)
IDS = BY_NAME["transformers-clip"].ids
TEXT = {"input_ids": IDS, "attention_mask": (IDS != hosts.PAD).long()}


@dataclass(frozen=True)
class Unusual:
    """A model, what it is called with, and the shape of its patch tokens (None if it has none)."""

    name: str
    make: Callable[[], nn.Module]
    image: dict[str, Tensor]
    text: dict[str, Tensor]
    grid: tuple[int, int] | None

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval().requires_grad_(False)

    def run(self, model: nn.Module) -> Any:
        return model(**self.image, **self.text)


def flava() -> nn.Module:
    multimodal = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text, image = hosts._hf_bert_text(3, 0.0), hosts._hf_image(5, 0.0)
    return hosts._hf(
        "Flava", text, image, image_key="image_config", multimodal_config=multimodal, projection_dim=JOINT_WIDTH
    )


def siglip2() -> nn.Module:
    text = hosts._hf_text(3, 0.0, projection_size=hosts.IMAGE_WIDTH)
    image = hosts._hf_image(5, 0.0, num_patches=9)
    del image["image_size"]
    return hosts._hf("Siglip2", text, image)


def xclip() -> nn.Module:
    video = {"num_frames": 2, "mit_hidden_size": 16, "mit_intermediate_size": 32, "mit_num_hidden_layers": 1}
    image = hosts._hf_image(5, 0.0, **video, mit_num_attention_heads=2)
    text = hosts._hf_text(3, 0.0)
    return hosts._hf("XCLIP", text, image, projection_dim=JOINT_WIDTH, prompt_num_attention_heads=2)


def groupvit() -> nn.Module:
    groups = {"depths": [4, 2], "num_group_tokens": [4, 0], "num_output_groups": [4, 0]}
    image = hosts._hf_image(4, 0.0, image_size=4 * hosts.PATCH, **groups)
    del image["num_hidden_layers"]
    sizes = {"projection_dim": JOINT_WIDTH, "projection_intermediate_dim": 20}
    return hosts._hf("GroupViT", hosts._hf_text(3, 0.0), image, **sizes)


SIGLIP2_IMAGE = {
    "pixel_values": normal(3, 9, 3 * hosts.PATCH**2),
    "pixel_attention_mask": torch.tensor([[1] * 6 + [0] * 3] * 3),
    "spatial_shapes": torch.tensor([[2, 3]] * 3),
}
UNUSUAL = (
    Unusual("open_clip-coca", lambda: hosts._coca(0.0), {"image": normal(3, 3, 32, 48)}, {"text": IDS}, None),
    Unusual("transformers-flava", flava, {"pixel_values": normal(3, 3, 32, 32)}, TEXT, (2, 2)),
    Unusual("transformers-siglip2", siglip2, SIGLIP2_IMAGE, TEXT, (2, 3)),
    Unusual("transformers-xclip", xclip, {"pixel_values": normal(3, 2, 3, 32, 32)}, TEXT, None),
    Unusual("transformers-groupvit", groupvit, {"pixel_values": normal(3, 3, 64, 64)}, TEXT, None),
)


@pytest.fixture(params=UNUSUAL, ids=str)
def unusual(request: pytest.FixtureRequest) -> Unusual:
    return request.param


def joint(unusual: Unusual, model: nn.Module) -> pvl.JointFeatures:
    text = unusual.text.get("text", unusual.text)
    image = unusual.image if len(unusual.image) > 1 else next(iter(unusual.image.values()))
    return pvl.encode(model, image, text)


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


def test_an_unusual_family_trains_all_its_adapters_and_nothing_else(unusual):
    model = pvl.inject_adapters(unusual.build(), CONFIG)
    randomise(model.pvl_adapters)

    features = joint(unusual, model)
    (features.image_embeds.square().sum() + features.text_embeds.square().sum()).backward()

    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("pvl_adapters."), name
        assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize("unusual", [u for u in UNUSUAL if "xclip" not in u.name], ids=str, indirect=True)
def test_an_unusual_family_equals_two_waiting_threads(unusual):
    """Not X-CLIP, whose adapters see the frames of a video together and its blocks one at a time."""
    model = pvl.inject_adapters(unusual.build(), pvl.PVLConfig(dim=8, mask_padding=False))
    randomise(model.pvl_adapters)
    adapters = copy.deepcopy(model.pvl_adapters)

    expected = run_in_threads(unusual.build(), {**unusual.image, **unusual.text}, adapters, lockstep_of(model))

    assert_equal_to_lockstep(joint(unusual, model), expected, model.pvl_adapters, adapters)


def test_an_unusual_family_gives_the_joint_features_it_has(unusual):
    features = joint(unusual, pvl.inject_adapters(unusual.build(), CONFIG))

    width = features.image_embeds.shape[1]
    assert features.image_embeds.shape == features.text_embeds.shape == (3, width)
    assert features.text_tokens.shape == (3, IDS.shape[1], width)
    if unusual.grid is None:
        assert features.patch_tokens is None
    else:
        assert features.grid == unusual.grid
        assert features.patch_tokens.shape == (3, unusual.grid[0] * unusual.grid[1], width)


@pytest.mark.parametrize("unusual", [u for u in UNUSUAL if u.grid is None], ids=str, indirect=True)
def test_a_family_without_patch_tokens_cannot_be_segmented_with(unusual):
    model = pvl.inject_adapters(unusual.build(), CONFIG)

    with pytest.raises(ValueError, match="patches"):
        pvl.MedCLIPSeg(model)


def test_padded_patches_of_siglip2_are_read_by_nothing():
    unusual = next(u for u in UNUSUAL if u.name == "transformers-siglip2")
    model = pvl.inject_adapters(unusual.build(), CONFIG)
    randomise(model.pvl_adapters)
    changed = {**SIGLIP2_IMAGE, "pixel_values": SIGLIP2_IMAGE["pixel_values"].clone()}
    changed["pixel_values"][:, 6:] += 1.0

    got, expected = pvl.encode(model, changed, TEXT), pvl.encode(model, SIGLIP2_IMAGE, TEXT)

    for name in ("image_embeds", "text_embeds", "patch_tokens"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-5, rtol=0.0)


# --- blocks that are given what nobody knows of -----------------------------------------------------------------------


class DepthDependent(nn.Module):
    """A transformer that tells every block its depth."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.resblocks, self.width, self.batch_first = transformer.resblocks, transformer.width, True

    def get_cast_dtype(self) -> torch.dtype:
        return torch.float32

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        for depth, block in enumerate(self.resblocks):
            mask = torch.full((x.shape[1], x.shape[1]), -float(depth)).triu(1)
            x = block(x, attn_mask=mask)
        return x


class Skipping(DepthDependent):
    """A transformer that leaves its second block out."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        for depth, block in enumerate(self.resblocks):
            x = x if depth == 1 else block(x, attn_mask=attn_mask)
        return x


@pytest.mark.parametrize(("kind", "message"), [(DepthDependent, "other arguments"), (Skipping, "order")])
def test_a_host_whose_blocks_cannot_be_followed_is_refused_and_left_alone(kind, message):
    model = BY_NAME["open_clip-inlined_text"].build()
    model.visual.transformer = kind(model.visual.transformer)

    with unchanged(model), pytest.raises(pvl.UnsupportedModelError, match=message):
        pvl.inject_adapters(model, CONFIG)


def test_patch_dropout_stays_asleep_or_is_refused():
    vision = {**hosts._vit(4), "patch_dropout": 0.5}
    model = open_clip.CLIP(JOINT_WIDTH, vision, hosts._transformer(3))
    host = BY_NAME["open_clip-inlined_text"]

    with unchanged(model), pytest.raises(ValueError, match="tower_dropout"):
        pvl.inject_adapters(model, pvl.PVLConfig(dim=8, tower_dropout=True))
    pvl.inject_adapters(model, CONFIG).train()

    assert pvl.encode(model, host.image, host.text).patch_tokens.shape == (3, 6, JOINT_WIDTH)


def test_layer_drop_stays_asleep_in_training():
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


def test_hosts_that_always_interpolate_take_other_sizes_unasked():
    host = BY_NAME["transformers-dual-dinov2-bert"]
    model = pvl.inject_adapters(host.build(), CONFIG)

    assert pvl.encode(model, normal(3, 3, 32, 64), host.text).grid == (2, 4)


def test_timm_hosts_take_other_sizes_where_they_are_dynamic():
    host = BY_NAME["open_clip-timm-bert"]
    model = host.build()
    fixed = pvl.inject_adapters(host.build(), CONFIG)
    model.visual.trunk.dynamic_img_size = True
    model.visual.trunk.patch_embed.strict_img_size = False
    model.visual.trunk.patch_embed.flatten = False
    model.visual.trunk.patch_embed.output_fmt = "NHWC"
    pvl.inject_adapters(model, CONFIG)

    assert pvl.encode(model, normal(3, 3, 64, 32), host.text).grid == (4, 2)
    with pytest.raises(ValueError, match="force_image_size"):
        pvl.encode(fixed, normal(3, 3, 64, 32), host.text)
    with pytest.raises(ValueError, match="force_image_size"):
        pvl.encode(model, normal(3, 3, 60, 32), host.text)


def test_open_clip_builds_for_another_size_and_is_joined_at_it():
    model = open_clip.create_model("ViT-B-32", force_image_size=(64, 96)).eval()
    pvl.inject_adapters(model, pvl.PVLConfig(layers=[3], dim=8))
    text = open_clip.get_tokenizer("ViT-B-32")(["a polyp"])

    assert pvl.encode(model, normal(1, 3, 64, 96), text).grid == (2, 3)


# --- the tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Align", "Blip2", "BridgeTower"])
def test_well_known_classes_that_cannot_work_are_refused_with_the_reason(name):
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")())

    with pytest.raises(pvl.UnsupportedModelError, match=rf"{name}Model: its .*; supported are .*CLIPModel"):
        pvl.inject_adapters(model)


def test_roberta_positions_that_padding_takes_are_not_offered_as_context():
    host = BY_NAME["transformers-dual-vit-roberta"]
    model = pvl.inject_adapters(host.build(), CONFIG)

    assert lockstep_of(model).towers.text.context_length(model) == host.positions
    with pytest.raises(ValueError, match="19 tokens, this model takes at most 18"):
        pvl.encode(model, host.image, torch.ones(3, 19, dtype=torch.long))
