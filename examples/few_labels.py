"""Train a method on a few labelled subjects, and score it in domain and out of it.

    python examples/make_brains.py --subjects 400 Colin27
    python examples/make_brains.py --subjects 40 MNI152 INIA19
    python examples/few_labels.py adapters --labelled 3 --data data/Colin27_subjects --backbone runs/clip

The methods, all with the same rows, augmentation, batches and number of steps:

    adapters        what this library is for; the next five change one thing about it
    deterministic   no penalty for uncertain keys (beta 0), no sampling of values
    one-way         images read the text, the text never reads an image
    hard-targets    the contrastive loss knows only a row's own sentence as right
    no-contrastive  without that loss
    head            no adapters: the pixel head on the frozen CLIP, as in CLIPSeg
    lora            no adapters: LoRA in the blocks of both towers (PEFT), and the same head
    unet            MONAI's BasicUNet with an output for each structure; it takes of a sentence the name alone
    unet-text       the same with one output, scaled and shifted by the CLIP's embedding of the sentence (FiLM)

Test sets: other subjects of the brain that was trained on; the same four times with a fault of the scan (bias field,
noise, inverted contrast, a third of the resolution; MONAI's transforms); subjects of MNI152 and of INIA19, a macaque,
where the training sentences know the structure.

Takes the options of examples/train.py too. Writes scores.json: by test set, DSC and NSD (tolerance 2 pixels) of rows
with something to find, ECE of pixels, AURC of rows by review score, AUROC of absent structures by largest probability,
and the DSC of each subject, for paired tests.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

METHODS: dict[str, dict[str, Any]] = {  # what of train.py's arguments each changes
    "adapters": {},
    "deterministic": {"adapters": {"beta": 0.0}, "sample": False},
    "one-way": {},
    "hard-targets": {},
    "no-contrastive": {"loss": {"contrastive_weight": 0.0}},
    "head": {"sample": False},
    "lora": {"sample": False},
    "unet": {"sample": False},
    "unet-text": {"sample": False},
}
EPOCH = 50  # batches; the rows are gone through as often as that takes


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and what is left for examples/train.py."""
    line = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="and the options of examples/train.py",
        allow_abbrev=False,
    )
    add = line.add_argument
    add("method", choices=METHODS)
    add("--labelled", type=int, required=True, help="subjects whose masks are used")
    add("--steps", type=int, default=500, help="instead of epochs (%(default)s)")
    add("--test-subjects", type=int, default=10, help="of each test set (%(default)s)")
    add("--others", type=Path, nargs="*", help="further test sets (MNI152_subjects and INIA19_subjects beside --data)")
    own, others = line.parse_known_args(argv)
    if min(own.labelled, own.steps, own.test_subjects) < 1 or own.steps % EPOCH:
        line.error(f"expected --labelled and --test-subjects from 1, and --steps a multiple of {EPOCH}")
    return own, others


if __name__ == "__main__":
    OPTIONS = parse()  # before the imports that take seconds

import numpy as np
import peft
import torch
import torch.nn.functional as F
import train
from brain_atlases import DATA, SIDES
from monai.networks.nets import BasicUNet
from monai.transforms import RandBiasField, RandRicianNoise, RandSimulateLowResolution
from torch import Tensor, nn
from torch.utils.data import Subset

import pvl_adapter as pvl
from pvl_adapter.data import SegmentationDataset
from pvl_adapter.trust import scores

STRUCTURES = sorted((f"{side} {name}" for side in SIDES for name in DATA["structures"]), key=len, reverse=True)
FAULTS: dict[str, Callable[[Tensor], Any]] = {  # of an image [1, H, W] in [0, 1]
    "bias field": RandBiasField(prob=1.0, coeff_range=(0.3, 0.6)),
    "noise": RandRicianNoise(prob=1.0, mean=0.0, std=0.15, sample_std=False),
    "inverted": lambda image: (image.max() - image) * (image > 0.02),
    "low resolution": RandSimulateLowResolution(prob=1.0, upsample_mode="bilinear", zoom_range=(0.33, 0.34)),
}

# ---- networks -------------------------------------------------------------------------------------------------------


def build(args: argparse.Namespace) -> nn.Module:
    """The network of a method."""
    model = train.build_model(args)
    if args.method == "lora":
        clip, config = pvl.remove_adapters(model.clip), pvl.PVLConfig.from_dict(args.adapters)
        lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["c_fc", "c_proj"])
        pvl.inject_adapters(peft.inject_adapter_in_model(lora, clip), config)
        model = pvl.MedCLIPSeg(clip, config=model.config, tokenizer=model.tokenizer)
    adapters = [module for module in model.modules() if isinstance(module, pvl.PVLAdapter)]
    if args.method == "one-way":
        for adapter in adapters:
            adapter.register_forward_hook(lambda _, __, updates: (updates[0], torch.zeros_like(updates[1])))
    if args.method in ("head", "lora"):
        for adapter in adapters:  # which then add exactly nothing
            nn.init.zeros_(adapter.vision_up.weight)
            nn.init.zeros_(adapter.text_up.weight)
            adapter.vision_up.requires_grad_(False)
            adapter.text_up.requires_grad_(False)
    if args.method.startswith("unet"):
        return UNet(model, text=args.method == "unet-text")
    return model


class UNet(nn.Module):
    """MONAI's BasicUNet with what `train.Trainer` asks of a network.

    Args:
        model: Whose images, and whose embeddings of sentences it takes; frozen.
        text: One output that a sentence conditions, instead of an output for each structure.
    """

    def __init__(self, model: pvl.MedCLIPSeg, *, text: bool) -> None:
        super().__init__()
        self.model, self.config, self.image_size = model.requires_grad_(False), model.config, model.image_size
        outputs, features = 1 if text else len(STRUCTURES), (16, 16, 32, 64, 128, 16)
        self.unet = BasicUNet(spatial_dims=2, in_channels=3, out_channels=outputs, features=features)
        self.films, self._embeds = nn.ModuleDict(), None
        if text:
            width = self.embed(["a word"]).shape[-1]
            for name, channels in {"down_1": 16, "down_2": 32, "down_3": 64, "down_4": 128, "upcat_4": 64}.items():
                film = self.films[name] = nn.Linear(width, 2 * channels)
                nn.init.zeros_(film.weight)
                nn.init.zeros_(film.bias)
                getattr(self.unet, name).register_forward_hook(self._condition(film))

    def _condition(self, film: nn.Linear) -> Callable[..., Tensor]:
        def change(_: nn.Module, __: Any, features: Tensor) -> Tensor:
            scale, shift = film(self._embeds)[..., None, None].chunk(2, dim=1)  # [B, C, 1, 1] each
            return features * (1.0 + scale) + shift

        return change

    def prepare(self, images: Any) -> Tensor:
        return self.model.prepare(images)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """The frozen CLIP's embeddings of sentences, [B, D]."""
        with pvl.disable_adapters(self.model.clip):
            embeds = self.model.clip.encode_text(self.model.tokenize(texts))
        return F.layer_norm(embeds, embeds.shape[-1:])

    def forward(self, images: Tensor, texts: Sequence[str], **_: Any) -> pvl.SegmentationOutput:
        if self.films:
            self._embeds = self.embed(texts)
            logits = self.unet(images)[:, 0]
        else:
            channels = torch.tensor([STRUCTURES.index(structure_of(text)) for text in texts])
            logits = self.unet(images)[torch.arange(len(texts)), channels]
        return pvl.SegmentationOutput(logits, None, None)

    @torch.no_grad()
    def predict(self, images: Any, texts: Sequence[str], **_: Any) -> SimpleNamespace:
        self.eval()
        probability = self(self.prepare(images), texts).logits.sigmoid()
        return SimpleNamespace(probability=probability, mask=probability > 0.5)


def structure_of(text: str) -> str | None:
    """The structure that a sentence names."""
    return next((name for name in STRUCTURES if name in text), None)


# ---- training -------------------------------------------------------------------------------------------------------


class FewLabels(train.Trainer):
    """A training on a few subjects, of any of the methods."""

    def build(self) -> nn.Module:
        return build(self.args)

    def read_data(self) -> tuple[train.Rows, train.Rows]:
        (data,) = self.open_split("train", 100)
        subjects = sorted({row.subject for row in data.rows})
        if self.args.labelled > len(subjects):
            raise ValueError(f"--labelled is {self.args.labelled}, but {data.name} has {len(subjects)} subjects")
        order = torch.randperm(len(subjects), generator=torch.Generator().manual_seed(self.args.seed))
        chosen = {subjects[at] for at in order[: self.args.labelled]}
        rows = [at for at, row in enumerate(data.rows) if row.subject in chosen]
        return train.Rows([Subset(data, rows)], self.transform, self.args.seed), train.Rows([])

    def batches(self, epoch: int) -> list[list[tuple[int, int]]]:
        turns, made = 0, []
        while len(made) < EPOCH:
            made += super().batches(epoch * EPOCH + turns)
            turns += 1
        return made[:EPOCH]

    def losses(self, batch: dict[str, Any]) -> pvl.LossTerms:
        method = self.args.method
        if not method.startswith("unet") and method != "hard-targets":
            return super().losses(batch)
        out = self.model(self.network.prepare(batch["image"]), batch["text"], sample=self.args.sample)
        nothing = torch.zeros(len(out.logits), 1, 1)
        terms = self.loss(out.logits, batch["mask"], patch_tokens=nothing, text_embeds=nothing[:, 0])
        total = self.loss.dice_weight * terms.dice + self.loss.bce_weight * terms.bce
        contrastive = torch.zeros(())
        if method == "hard-targets":
            contrastive = hard_contrastive_loss(out.patch_tokens, out.text_embeds, self.loss.temperature)
        return replace(terms, total=total + self.loss.contrastive_weight * contrastive, contrastive=contrastive)

    def export(self, name: str) -> None:
        pass  # hundreds of models would fill a disk

    def write_results(self) -> None:
        self.network.eval()
        tests = {name: judge(self.network, *test, self.args) for name, test in test_sets(self).items()}
        content = {"method": self.args.method, "labelled": self.args.labelled, "seed": self.args.seed}
        content |= {"backbone": self.args.backbone, "rows": len(self.rows), "steps": self.progress.step}
        content |= {"seconds": round(self.progress.seconds, 1), "tests": tests}
        new = self.args.output / "scores.json.new"
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        new.rename(new.with_suffix(""))  # whole, or not there
        shutil.rmtree(self.args.output / "checkpoints")
        print({name: round(each["dsc"], 4) for name, each in tests.items()})


def hard_contrastive_loss(patch_tokens: Tensor, text_embeds: Tensor, temperature: float) -> Tensor:
    """As `pvl.soft_contrastive_loss`, but only a row's own sentence is right."""
    image_embeds = F.normalize(patch_tokens, dim=-1).mean(dim=1)  # [B, D]
    logits = image_embeds @ text_embeds.mT / temperature
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2


# ---- scores ---------------------------------------------------------------------------------------------------------

Row = tuple[Any, str, np.ndarray, str]  # image, sentence, mask, subject


def test_sets(trainer: FewLabels) -> dict[str, tuple[SegmentationDataset, Callable[[Any], Any] | None]]:
    """Datasets by name, each with the fault that its images get."""
    args, network = trainer.args, trainer.network
    options = {"size": network.image_size, "resize": network.config.resize}
    (home,) = (Path(train.find_dataset(name, data=args.data_folder)) for name in args.data)
    own = SegmentationDataset(home, "test", **options)
    others = args.others
    if others is None:
        others = [home.with_name(f"{name}_subjects") for name in ("MNI152", "INIA19")]
    tests = {own.name: (own, None)} | {fault: (own, change) for fault, change in FAULTS.items()}
    return tests | {folder.name: (SegmentationDataset(folder, "test", **options), None) for folder in others}


def rows_of(
    data: SegmentationDataset, change: Callable[[Any], Any] | None, count: int, known: set[str]
) -> Iterator[Row]:
    """Rows of the first subjects of a test set, of structures that are known, with a fault or without."""
    subjects = set(sorted({row.subject for row in data.rows})[:count])
    for at, row in enumerate(data.rows):
        if row.subject not in subjects or structure_of(row.text) not in known:
            continue
        each = data[at]
        image = each["image"]
        if change is not None:
            if hasattr(change, "set_random_state"):
                change.set_random_state(seed=at)
            grey = torch.as_tensor(change(image[:1].float() / 255.0)).clamp(0.0, 1.0)
            image = (255.0 * grey).round().to(torch.uint8).expand(3, -1, -1)
        yield image, each["text"], each["mask"].numpy(), row.subject


def judge(network: Any, data: SegmentationDataset, change: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The scores of a test set."""
    known = {name for name in STRUCTURES if "ventricle" not in name}  # Colin27's labels have none
    rows = list(rows_of(data, change, args.test_subjects, known))
    bins = scores.calibration(np.zeros((0, 0)), np.zeros((0, 0), dtype=bool))
    found = []
    for first in range(0, len(rows), 30):
        images, texts, truths, subjects = zip(*rows[first : first + 30], strict=True)
        prediction = network.predict(torch.stack(images), texts, num_samples=8 if args.sample else 0)
        maps = prediction.probability, prediction.mask
        for probability, mask, truth, subject in zip(*maps, truths, subjects, strict=True):
            bins += scores.calibration(probability, truth)
            hit, area = float((probability * mask).sum()), float(probability.sum() + mask.sum())
            few = 1e-4 * mask.numel()
            found.append(
                {
                    "subject": subject,
                    "positive": bool(truth.any()),
                    "dsc": scores.dice(mask, truth),
                    "nsd": scores.surface_dice(mask, truth),
                    "doubt": 1.0 - (2.0 * hit + few) / (area + few),
                    "largest": float(probability.max()),
                }
            )
    positive = [row for row in found if row["positive"]]
    subjects = sorted({row["subject"] for row in positive})
    return {
        "dsc": float(np.mean([row["dsc"] for row in positive])),
        "nsd": float(np.mean([row["nsd"] for row in positive])),
        "ece": bins.expected_error,
        "aurc": scores.risk_coverage([row["doubt"] for row in found], [1.0 - row["dsc"] for row in found]).aurc,
        "absent_auroc": scores.detection_auroc([row["largest"] for row in found], [row["positive"] for row in found]),
        "rows": len(found),
        "subjects": {
            subject: round(float(np.mean([row["dsc"] for row in positive if row["subject"] == subject])), 5)
            for subject in subjects
        },
    }


def main(own: argparse.Namespace, others: Sequence[str]) -> None:
    args = train.parse(others)
    changes = METHODS[own.method]
    args.epochs = own.steps // EPOCH
    args.sample = changes.get("sample", args.sample)
    args.adapters, args.loss = ({**getattr(args, name), **changes.get(name, {})} for name in ("adapters", "loss"))
    train.main(argparse.Namespace(**vars(args), **vars(own)), FewLabels)


if __name__ == "__main__":
    main(*OPTIONS)
