"""Write docs/coverage.md: which CLIPs can take adapters, how many, and why the others cannot.

    python docs/make_coverage.py            # write; about a minute on 2 cores, little memory
    python docs/make_coverage.py --check    # exit 1 if the table is not current

Every model is built full-size on the meta device, without weights and without a network, and `inject_adapters` is
called on it. Text configurations that open_clip downloads are written out below.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import open_clip
import torch
import transformers
from torch import nn

import pvl_adapter as pvl
from pvl_adapter.lockstep import lockstep_of

TABLE = Path(__file__).with_name("coverage.md")

HUB_TEXT_CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "roberta-base": transformers.RobertaConfig(max_position_embeddings=514, type_vocab_size=1),
    "xlm-roberta-base": transformers.XLMRobertaConfig(
        vocab_size=250002, max_position_embeddings=514, type_vocab_size=1
    ),
    "xlm-roberta-large": transformers.XLMRobertaConfig(
        vocab_size=250002,
        max_position_embeddings=514,
        type_vocab_size=1,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
    ),
    "google/mt5-base": transformers.MT5Config(d_model=768, d_ff=2048, num_layers=12, num_heads=12),
    "google/mt5-xl": transformers.MT5Config(d_model=2048, d_ff=5120, num_layers=24, num_heads=32),
    "facebook/nllb-200-distilled-600M": transformers.M2M100Config(vocab_size=256206),
    "facebook/nllb-200-distilled-1.3B": transformers.M2M100Config(
        vocab_size=256206, encoder_layers=24, encoder_ffn_dim=8192
    ),
}

TRANSFORMERS_CLASSES = (
    *("CLIP", "Siglip", "Siglip2", "MetaClip2", "CLIPSeg", "OwlViT", "Owlv2", "Aimv2", "AltCLIP", "ChineseCLIP"),
    *("Blip", "Flava", "XCLIP", "GroupViT", "Align", "Blip2", "BridgeTower", "VideoPrismClip"),
)
DUAL_IMAGE = {
    "clip": transformers.CLIPVisionConfig,
    "siglip": transformers.SiglipVisionConfig,
    "vit": transformers.ViTConfig,
    "dinov2": transformers.Dinov2Config,
    "dinov2_with_registers": transformers.Dinov2WithRegistersConfig,
}
DUAL_TEXT = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}


@dataclass(frozen=True)
class Row:
    """The result for one model; `reason` is empty where adapters were put in."""

    name: str
    encoders: str = ""
    depths: tuple[int, int] = (0, 0)
    points: int = 0
    parameters: int = 0
    patches: bool = False
    reason: str = ""


def open_clip_rows() -> Iterator[Row]:
    """One row for each of open_clip's configurations."""

    def hub_config(name: str, **_: object) -> transformers.PretrainedConfig:
        return HUB_TEXT_CONFIGS[name]

    with mock.patch("open_clip.hf_model.AutoConfig.from_pretrained", hub_config):
        for name in open_clip.list_models():
            yield row(name, partial(open_clip.create_model, name, pretrained_hf=False, device="meta"))


def transformers_rows() -> Iterator[Row]:
    """One row for each class, in its default configuration."""
    for name in TRANSFORMERS_CLASSES:
        model, config = (
            getattr(transformers, f"{name}Model"),
            getattr(transformers, f"{name.removesuffix('Clip')}Config"),
        )
        yield row(model.__name__, partial(model, config()))
    for image, image_config in DUAL_IMAGE.items():
        for text, text_config in DUAL_TEXT.items():
            config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(image_config(), text_config())
            name = f"VisionTextDualEncoderModel ({image}, {text})"
            yield row(name, partial(transformers.VisionTextDualEncoderModel, config))


def row(name: str, build: Callable[[], nn.Module]) -> Row:
    """Build a model without weights and put adapters into it."""
    with torch.device("meta"):
        model = build()
    try:
        pvl.inject_adapters(model)
    except pvl.UnsupportedModelError as error:
        return Row(name=name, reason=str(error).split(": ", 1)[1].split("; supported are")[0])
    towers = lockstep_of(model).towers
    return Row(
        name=name,
        encoders=", ".join(type(tower.encoder_module(model)).__name__ for tower in (towers.image, towers.text)),
        depths=(len(towers.image.blocks(model)), len(towers.text.blocks(model))),
        points=len(lockstep_of(model).points),
        parameters=sum(parameter.numel() for parameter in lockstep_of(model).adapters.parameters()),
        patches=towers.joint_width(model) is not None,
    )


def render(open_clip_table: list[Row], transformers_table: list[Row]) -> str:
    """The page, in Markdown."""
    parts = [
        "# Which CLIPs can take adapters",
        "Written by `python docs/make_coverage.py`, which calls `inject_adapters` with the default configuration on\n"
        "each model, full-size, on the meta device. *Encoders* are the classes that loop over the blocks of the image\n"
        "and the text tower, *depths* their numbers of blocks, *adapters* how many join them, *added* the adapters'\n"
        "parameters. *Patches* says whether `encode` gives patch tokens in the joint space, which `MedCLIPSeg` needs.",
    ]
    for title, rows in (("open_clip configurations", open_clip_table), ("transformers classes", transformers_table)):
        taken, refused = [r for r in rows if not r.reason], [r for r in rows if r.reason]
        parts += [
            f"## {title}: {len(taken)} of {len(rows)}",
            "\n".join(
                ["| model | encoders | depths | adapters | added | patches |", "|---|---|---|---:|---:|---|"]
                + [
                    f"| {r.name} | {r.encoders} | {r.depths[0]} / {r.depths[1]} | {r.points} | "
                    f"{r.parameters / 1e6:.1f} M | {'yes' if r.patches else 'no'} |"
                    for r in taken
                ]
            ),
            f"Refused, {len(refused)}:",
            "\n".join(["| model | why |", "|---|---|"] + [f"| {r.name} | {r.reason} |" for r in refused]),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    page = render(list(open_clip_rows()), list(transformers_rows()))
    if not arguments.check:
        TABLE.write_text(page)
        return 0
    if not TABLE.is_file() or TABLE.read_text() != page:
        print(f"{TABLE} is not current; run python docs/make_coverage.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
