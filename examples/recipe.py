"""What examples/train.py trains and how: recipes (recipes/*.toml) and the models they describe."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn
from transformers import AutoModel

import pvl_adapter as pvl
from pvl_adapter.lockstep import lockstep_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """What is trained and how.

    Args:
        backbone: For `pvl.load_backbone`, one of backbones/*.json (random weights), or a Hugging Face id or folder.
        pretrained: Weights of a model of open_clip: a tag or a file.
        dim: Adapter width.
        layers: Blocks with an adapter before them; None means all but the first and last.
        mask_padding: Keep the image from reading padding.
        tower_dropout: Train with the frozen towers' own dropout awake.
        gradient_checkpointing: Recompute blocks in the backward pass: less memory, more time.
        channel_order: "RGB" or "BGR".
        resize: "bicubic" or "opencv_bilinear".
        image_mean: None means the backbone's own.
        image_std: Likewise.
        pad_to_context: Pad every sentence to the whole context.
        epochs: Passes over the training rows.
        batch_size: Rows of a step, of all processes together; of an epoch's last rows, as many as there are.
        lr: Learning rate of Adam.
        lr_min: Where its cosine ends.
        lr_by: The cosine falls with every "epoch" or every "step".
        warmup_steps: Steps over which the learning rate rises from 0.
        dice_reduction: See `pvl.SegmentationLoss`.
        dice_weight: Likewise.
        bce_weight: Likewise.
        contrastive_weight: Likewise.
        temperature: Of the soft contrastive loss.
        rotate_probability: Of a picture being turned.
        rotate_degrees: By at most so much either way.
        rotate_whole_degrees: By whole degrees only.
        interpolation: Of turned pictures, "bilinear" or "nearest"; what comes in from outside is black.
        scale: Largest relative change of size.
        contrast: Largest relative change of contrast.
        patience: End after so many validations without a better one; 0 means never.
    """

    backbone: str
    pretrained: str | None = None
    dim: int = 256
    layers: Sequence[int] | None = None
    mask_padding: bool = True
    tower_dropout: bool = False
    gradient_checkpointing: bool = False
    channel_order: str = "RGB"
    resize: str = "bicubic"
    image_mean: Sequence[float] | None = None
    image_std: Sequence[float] | None = None
    pad_to_context: bool = False
    epochs: int = 100
    batch_size: int = 24
    lr: float = 3e-4
    lr_min: float = 0.0
    lr_by: str = "step"
    warmup_steps: int = 0
    dice_reduction: Any = "image"
    dice_weight: float = 0.5
    bce_weight: float = 0.5
    contrastive_weight: float = 0.1
    temperature: float = 0.2
    rotate_probability: float = 0.0
    rotate_degrees: float = 0.0
    rotate_whole_degrees: bool = False
    interpolation: str = "bilinear"
    scale: float = 0.0
    contrast: float = 0.0
    patience: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0")
        for name, choices in {"lr_by": ("epoch", "step"), "interpolation": ("bilinear", "nearest")}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}")

    @classmethod
    def read(cls, name_or_path: str, **overrides: Any) -> Recipe:
        """One of recipes/*.toml by its name, or another by its path; what is overridden by None stays as it is."""
        path = Path(name_or_path) if name_or_path.endswith(".toml") else HERE / "recipes" / f"{name_or_path}.toml"
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            known = ", ".join(sorted(recipe.stem for recipe in (HERE / "recipes").glob("*.toml")))
            raise ValueError(f"there is no recipe {path}; expected one of {known}, or the path of a .toml") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no TOML: {error}") from error
        fields = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - fields):
            raise ValueError(f"{path} has unknown settings {unknown}, expected some of {sorted(fields)}")
        values |= {name: value for name, value in overrides.items() if value is not None}
        if overrides.get("backbone") and not overrides.get("pretrained"):
            values.pop("pretrained", None)  # it belonged to the other backbone
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def loss(self) -> pvl.SegmentationLoss:
        return pvl.SegmentationLoss(
            dice_weight=self.dice_weight,
            bce_weight=self.bce_weight,
            contrastive_weight=self.contrastive_weight,
            temperature=self.temperature,
            dice_reduction=self.dice_reduction,
        )

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr)

    def lr_at(self, step: int, *, steps_per_epoch: int) -> float:
        """Learning rate of a step, counted from 0."""
        total = self.epochs if self.lr_by == "epoch" else self.epochs * steps_per_epoch
        done = step // steps_per_epoch if self.lr_by == "epoch" else step
        cosine = self.lr_min + (self.lr - self.lr_min) * (1.0 + math.cos(math.pi * done / total)) / 2.0
        return cosine * min(1.0, (step + 1) / (self.warmup_steps + 1))


def build_model(recipe: Recipe, *, seed: int, dtype: torch.dtype = torch.float32) -> pvl.MedCLIPSeg:
    """A frozen CLIP, joined by adapters, with a pixel head on top; what is random follows from the seed."""
    torch.manual_seed(seed)
    clip, tokenizer = load_clip(recipe, dtype=dtype)
    adapters = pvl.PVLConfig(
        layers=None if recipe.layers is None else tuple(recipe.layers),
        dim=recipe.dim,
        mask_padding=recipe.mask_padding,
        tower_dropout=recipe.tower_dropout,
        gradient_checkpointing=recipe.gradient_checkpointing,
    )
    pvl.inject_adapters(clip, adapters)
    config = pvl.MedCLIPSegConfig(
        image_mean=recipe.image_mean and tuple(recipe.image_mean),
        image_std=recipe.image_std and tuple(recipe.image_std),
        channel_order=recipe.channel_order,
        resize=recipe.resize,
        context_length=lockstep_of(clip).towers.text.context_length(clip) if recipe.pad_to_context else None,
    )
    return pvl.MedCLIPSeg(clip, config=config, tokenizer=tokenizer)


def load_clip(recipe: Recipe, *, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """A CLIP and its tokenizer, None where it is found by itself."""
    name = recipe.backbone
    if is_random(recipe):
        open_clip.add_model_config(HERE / "backbones")
        clip, tokenizer, _ = pvl.load_backbone(name)
        # Made for training, words and places start out so small that what they are added to drowns them; frozen, they
        # would stay so.
        for embedding in (clip.token_embedding.weight, clip.positional_embedding, clip.visual.positional_embedding):
            nn.init.normal_(embedding)
        return clip.to(dtype), tokenizer
    if Path(name).is_dir() or ("/" in name and not name.startswith(("hf-hub:", "local-dir:"))):
        return AutoModel.from_pretrained(name, dtype=dtype).eval(), None
    clip, tokenizer, _ = pvl.load_backbone(name, pretrained=recipe.pretrained, dtype=dtype)
    return clip, tokenizer


def is_random(recipe: Recipe) -> bool:
    return (HERE / "backbones" / f"{recipe.backbone}.json").is_file()
