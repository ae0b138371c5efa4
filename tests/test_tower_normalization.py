"""Images are normalised as the host was trained, or the host says that it does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
import transformers
from hosts import BY_NAME

from pvl_adapter.towers import find_towers

OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
OWN = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
PROCESSOR = transformers.ViTImageProcessor(image_mean=OWN[0], image_std=OWN[1])


pytestmark = pytest.mark.filterwarnings("error:no image processor")


def family(name: str) -> Any:
    """A model of transformers in its default configuration, without weights."""
    with torch.device("meta"):
        return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")())


def build(name: str) -> Any:
    return BY_NAME[f"transformers-{name}"].build()


def normalization(host: Any) -> Any:
    return find_towers(host).image.normalization(host)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, OPENAI) for name in ("CLIP", "MetaClip2", "AltCLIP", "ChineseCLIP", "Blip", "OwlViT", "Owlv2")),
        *((name, OPENAI) for name in ("Aimv2", "Flava")),
        *((name, HALF) for name in ("Siglip", "Siglip2")),
        ("CLIPSeg", IMAGENET),
        *((name, None) for name in ("XCLIP", "GroupViT")),  # not known for certain
    ],
)
def test_each_family_has_the_normalization_its_checkpoints_are_trained_with(name, expected):
    assert normalization(family(name)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("clip-bert", OPENAI), ("siglip-roberta", HALF), ("vit-roberta", None), ("dinov2-bert", None)],
)
def test_a_dual_encoder_has_that_of_its_image_tower(name, expected):
    assert normalization(build(f"dual-{name}")) == expected


@pytest.mark.parametrize("name", ["clip", "siglip", "dual-vit-roberta"])
def test_the_processor_saved_beside_a_model_is_asked_first(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)

    assert normalization(transformers.AutoModel.from_pretrained(tmp_path)) == OWN


def test_a_processor_of_images_and_text_is_read_too(tmp_path):
    build("clip").save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSOR.to_dict()}))

    assert normalization(transformers.AutoModel.from_pretrained(tmp_path)) == OWN


def test_a_dual_encoder_asks_the_processor_of_its_image_tower(tmp_path):
    dual = build("dual-vit-roberta")
    dual.vision_model.save_pretrained(tmp_path / "image")
    dual.text_model.save_pretrained(tmp_path / "text")
    PROCESSOR.save_pretrained(tmp_path / "image")

    built = transformers.VisionTextDualEncoderModel.from_vision_text_pretrained(
        str(tmp_path / "image"), str(tmp_path / "text")
    )

    assert normalization(built) == OWN


@pytest.mark.parametrize("commit", ["0" * 40, "1" * 40])
def test_the_processor_in_the_cache_of_the_hub_is_read_without_a_network(commit, tmp_path, monkeypatch):
    """Of the model's own commit, or else of the newest that is there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.file_download, "HF_HUB_CACHE", str(tmp_path), raising=False)
    repository = tmp_path / "models--owner--name"
    PROCESSOR.save_pretrained(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    host = build("clip")
    host.config._name_or_path, host.config._commit_hash = "owner/name", commit

    assert normalization(host) == OWN


@pytest.mark.parametrize("name", ["owner/name", "a/folder/that/is/gone"])
def test_a_checkpoint_without_its_processor_is_normalised_by_family_and_says_so(name):
    host = build("clip")
    host.config._name_or_path = name

    with pytest.warns(UserWarning, match=f"{name}.*image_mean"):
        assert normalization(host) == OPENAI


def test_a_processor_that_does_not_normalise_leaves_pixels_as_they_are(tmp_path):
    host = build("siglip")
    host.config._name_or_path = str(tmp_path)
    transformers.ViTImageProcessor(do_normalize=False).save_pretrained(tmp_path)

    mean, std = normalization(host)

    pixels = torch.tensor([0.0, 0.3, 1.0])
    assert torch.equal((pixels - torch.tensor(mean)) / torch.tensor(std), pixels)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"image_mean": [0.5], "image_std": [0.5, 0.5, 0.5]}', '{"image_mean": "half", "image_std": 0.5}'],
)
def test_a_damaged_processor_is_refused_by_name(content, tmp_path):
    host = build("siglip")
    host.config._name_or_path = str(tmp_path)
    Path(tmp_path, "preprocessor_config.json").write_text(content)

    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        normalization(host)


def test_open_clip_hosts_have_what_their_factory_set():
    settings = {"mean": OWN[0], "std": OWN[1]}
    clip = open_clip.create_model("ViT-B-32", force_preprocess_cfg=settings, device="meta")

    assert normalization(clip) == OWN
