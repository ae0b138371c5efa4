"""Train text-guided segmentation on a real brain scan, without any download.

    python examples/train.py

Axial slices of the MNI152 T1 template, which the nilearn package holds, with its grey matter, white matter and brain
as targets, each asked for in several phrasings. The frozen CLIP is a small one with RANDOM weights; only adapters and
pixel head are trained. `--clip ViT-B-16 --pretrained openai` and `--clip openai/clip-vit-base-patch16` work the same
way.

Cost: 6 minutes on 2 CPU cores, 1.8 GiB of memory. Expect on held-out slices (none nearer than 4 mm to a training
slice) a Dice of about 0.91 for grey matter, 0.89 for white matter and 0.99 for the brain; and text decides: the mask
asked for as white matter scores about 0.05 against grey matter.

Writes to --output: scores.json, brain.png, losses.jsonl and checkpoint.pt. `--resume` goes on exactly where a run was
stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure
from nilearn import datasets
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_f1_score
from tqdm import tqdm
from transformers import AutoModel

import pvl_adapter as pvl
from pvl_adapter.serialization import check_tensors, write_atomically

# ---- data -----------------------------------------------------------------------------------------------------------
# For your own pictures replace this part: the rest only needs `draw_batch` and some `Slices` to score.

TARGETS = ("grey matter", "white matter", "whole brain")
PHRASINGS = (
    "{}",
    "the {}",
    "segment the {}",
    "{} in this MRI slice",
    "where is the {}?",
    "a mask of the {}",
    "T1 image, axial view, {}",
)
UNSEEN_PHRASING = "outline all of the {} on this axial scan"  # never trained on
HEIGHTS = range(-40, 73)  # mm; here all three targets can be seen
SQUARE = slice(2, 194), slice(21, 213)  # columns and rows, of 1 mm, that hold the brain


@dataclass(frozen=True)
class Slices:
    """Axial slices: images [Z, 3, H, W] as the model takes them, masks [Z, target, H, W] of 0 and 1, heights in mm."""

    images: Tensor
    masks: Tensor
    heights: list[int]

    def at(self, heights: list[int]) -> Slices:
        index = [self.heights.index(height) for height in heights]
        return Slices(images=self.images[index], masks=self.masks[index], heights=heights)


def load_slices(model: pvl.MedCLIPSeg) -> Slices:
    """The MNI152 T1 template and its tissue maps, which the nilearn package holds, at the size the model takes."""

    def axial(volume: Any) -> np.ndarray:
        bottom = -int(volume.affine[2, 3])  # the index of height 0
        heights = slice(bottom + HEIGHTS.start, bottom + HEIGHTS.stop)
        voxels = np.asarray(volume.dataobj, dtype=np.float32)[SQUARE[0], SQUARE[1], heights]
        return np.flip(rearrange(voxels, "x y z -> z y x"), axis=1).clip(0.0, 1.0)  # [Z, H, W], front of the head up

    scan = axial(datasets.load_mni152_template(resolution=1))
    grey = axial(datasets.load_mni152_gm_template(resolution=1))
    white = axial(datasets.load_mni152_wm_template(resolution=1))
    brain = axial(datasets.load_mni152_brain_mask(resolution=1))
    shares = torch.from_numpy(np.stack([grey, white, brain], axis=1))  # [Z, target, H, W]
    shares = F.interpolate(shares, size=model.image_size, mode="bilinear", antialias=True)
    return Slices(images=model.prepare(list(scan)).cpu(), masks=(shares > 0.5).float(), heights=list(HEIGHTS))


def split(slices: Slices) -> tuple[Slices, Slices]:
    """Training and held-out slices: of every 20 mm 10 to train on, a gap of 3, 4 held out, a gap of 3.

    Without the gaps a held-out slice would have a near copy, 1 mm away, in the training set.
    """
    position = {height: (height - HEIGHTS.start) % 20 for height in slices.heights}
    train = [height for height in slices.heights if position[height] < 10]
    held_out = [height for height in slices.heights if 13 <= position[height] < 17]
    return slices.at(train), slices.at(held_out)


def draw_batch(slices: Slices, size: int, *, generator: torch.Generator) -> tuple[Tensor, list[str], Tensor]:
    """Random slices, targets and phrasings: images [B, 3, H, W], B sentences, masks [B, H, W]."""

    def draw(count: int) -> list[int]:
        return torch.randint(count, (size,), generator=generator).tolist()

    index, target = draw(len(slices.heights)), draw(len(TARGETS))
    sentences = [PHRASINGS[p].format(TARGETS[t]) for t, p in zip(target, draw(len(PHRASINGS)), strict=True)]
    images, masks = augment(slices.images[index], slices.masks[index, target], generator=generator)
    return images, sentences, masks


def augment(images: Tensor, masks: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turn by up to 15 degrees, scale by up to 10 %, mirror every other picture, and change its contrast by 10 %."""
    size = len(images)
    turn, zoom, contrast = 2.0 * torch.rand(3, size, generator=generator) - 1.0  # each in [-1, 1]
    mirror = 2.0 * torch.randint(2, (size,), generator=generator) - 1.0
    scale, angle, zero = 1.0 + 0.1 * zoom, math.radians(15.0) * turn, torch.zeros(size)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([mirror * cosine, -sine, zero, mirror * sine, cosine, zero])
    grid = F.affine_grid(rearrange(matrix, "(i j) b -> b i j", i=2), [size, 1, *images.shape[-2:]], align_corners=False)
    both = torch.cat([images * (1.0 + 0.1 * contrast)[:, None, None, None], masks[:, None]], dim=1)  # [B, 4, H, W]
    both = F.grid_sample(both, grid, padding_mode="border", align_corners=False)
    return both[:, :3], (both[:, 3] > 0.5).float()


# ---- model ----------------------------------------------------------------------------------------------------------

SMALL_CLIP = {
    "embed_dim": 128,
    "vision_cfg": {"layers": 6, "width": 192, "head_width": 48, "patch_size": 8, "image_size": 112},
    "text_cfg": {"layers": 6, "width": 128, "heads": 4, "context_length": 32, "vocab_size": 49408},
}
SMALL_ADAPTERS = pvl.PVLConfig(layers=range(1, 5), dim=64)
RANDOM_WEIGHTS = (
    "the frozen CLIP is a small one with RANDOM weights, so that nothing need be downloaded; the scores show what "
    "adapters and head have learnt. For real use start from a trained CLIP: --clip ViT-B-16 --pretrained openai"
)


def build_model(args: argparse.Namespace) -> pvl.MedCLIPSeg:
    """A frozen CLIP, joined by adapters, with a pixel head on top."""
    torch.manual_seed(args.seed)
    if args.clip is None:
        clip, config = open_clip.CLIP(**SMALL_CLIP), SMALL_ADAPTERS
        # Made for training, words start out so small that the first block drowns them; frozen, they would stay so.
        nn.init.normal_(clip.token_embedding.weight)
    elif is_open_clip(args.clip):
        clip, config = open_clip.create_model(args.clip, pretrained=args.pretrained), pvl.PVLConfig()
    else:
        clip, config = AutoModel.from_pretrained(args.clip, dtype=torch.float32), pvl.PVLConfig()
    return pvl.MedCLIPSeg(pvl.inject_adapters(clip, config)).to(args.device)


def is_open_clip(name: str | None) -> bool:
    return name is not None and "/" not in name and not Path(name).is_dir()  # otherwise a Hugging Face id or a folder


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def fingerprint(model: nn.Module) -> str:
    """Of the frozen weights: they are not saved, so a run can only go on with the same ones."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---- loop -----------------------------------------------------------------------------------------------------------


CHECKPOINT = "checkpoint.pt"


class Training:
    """What changes from step to step; saved and loaded, it goes on exactly as if it had not stopped."""

    def __init__(self, model: pvl.MedCLIPSeg, args: argparse.Namespace) -> None:
        self.model, self.batch_size = model, args.batch_size
        self.loss = pvl.SegmentationLoss()
        self.optimizer = torch.optim.Adam(trainable(model).values(), lr=args.lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=args.steps)
        self.generator = torch.Generator().manual_seed(args.seed)  # of batches; the adapters draw from torch's own
        self.losses: list[dict[str, float]] = []
        self.seconds = 0.0
        self.settings = {
            **{name: getattr(args, name) for name in ("clip", "pretrained", "seed", "steps", "batch_size", "lr")},
            "frozen_weights": fingerprint(model),
        }

    def step(self, slices: Slices) -> float:
        device = self.model.device
        images, sentences, masks = draw_batch(slices, self.batch_size, generator=self.generator)
        out = self.model(images.to(device), sentences)
        terms = self.loss(out.logits, masks.to(device), patch_tokens=out.patch_tokens, text_embeds=out.text_embeds)
        self.optimizer.zero_grad()
        terms.total.backward()
        self.optimizer.step()
        self.schedule.step()
        losses = {name: getattr(terms, name).item() for name in ("total", "dice", "bce", "contrastive")}
        if not math.isfinite(losses["total"]):
            raise SystemExit(f"the losses of step {len(self.losses) + 1} are {losses}; try a smaller --lr")
        self.losses.append({"step": len(self.losses) + 1, **losses})
        return losses["total"]

    def save(self, path: Path) -> None:
        device = self.model.device
        state = {
            "settings": self.settings,
            "trainable": {name: parameter.detach() for name, parameter in trainable(self.model).items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "random_device": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(),
            "losses": self.losses,
            "seconds": self.seconds,
        }
        write_atomically(path, lambda temporary: torch.save(state, temporary))

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, if it was made with the same settings."""
        state = read_checkpoint(path)
        saved, mine = state["settings"], self.settings
        if differing := sorted(name for name in saved | mine if saved.get(name) != mine.get(name)):
            faults = "; ".join(f"{name} is {mine.get(name)!r}, expected {saved.get(name)!r}" for name in differing)
            raise SystemExit(
                f"cannot resume: {path} was made with other settings: {faults}. Give those, or leave out --resume and "
                "choose another --output"
            )
        parameters = trainable(self.model)
        check_tensors(state["trainable"], parameters, source=path)
        for name, parameter in parameters.items():
            parameter.data.copy_(state["trainable"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.losses, self.seconds = state["losses"], state["seconds"]
        self.generator.set_state(state["batches"])
        torch.set_rng_state(state["random"])
        if state["random_device"] is not None and self.model.device.type != "cpu":
            torch.get_device_module(self.model.device).set_rng_state(state["random_device"])


def read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise SystemExit(
            f"cannot resume: {path} is damaged ({reason}). Delete it and start again without --resume"
        ) from error
    if not isinstance(state, dict) or "settings" not in state:
        raise SystemExit(f"cannot resume: {path} was not written by this script; choose another --output")
    return state


def train(training: Training, slices: Slices, args: argparse.Namespace) -> None:
    """Take the steps that remain, and write a checkpoint now and then."""
    training.model.train()
    done, before, started = len(training.losses), training.seconds, time.perf_counter()
    with tqdm(total=args.steps, initial=done, desc="training", unit="step") as bar:
        for step in range(done + 1, args.steps + 1):
            bar.set_postfix(loss=f"{training.step(slices):.3f}", refresh=False)
            bar.update()
            training.seconds = before + time.perf_counter() - started
            if step % args.checkpoint_every == 0 or step == args.steps:
                training.save(args.output / CHECKPOINT)
    lines = "".join(json.dumps(losses) + "\n" for losses in training.losses)  # of all steps, also those before a resume
    write_atomically(args.output / "losses.jsonl", lambda path: path.write_text(lines))


# ---- report ---------------------------------------------------------------------------------------------------------


def evaluate(model: pvl.MedCLIPSeg, slices: Slices, phrasing: str, *, args: argparse.Namespace) -> dict[str, Any]:
    """Scores of what `predict` says when asked for each target in the given phrasing."""
    masks = {}
    for target in TARGETS:
        sentence = phrasing.format(target)
        parts = [
            model.predict(images, [sentence] * len(images), num_samples=args.num_samples, seed=args.seed).mask
            for images in slices.images.split(args.batch_size)
        ]
        masks[target] = torch.cat(parts).cpu()  # [Z, H, W]
    labels = dict(zip(TARGETS, slices.masks.unbind(dim=1), strict=True))
    return {
        "phrasing": phrasing,
        "dice": {target: dice(masks[target], labels[target]) for target in TARGETS},
        # Does text decide? What was asked for as white matter should not be grey matter.
        "wrong_tissue": dice(masks["white matter"], labels["grey matter"]),
    }


def dice(masks: Tensor, labels: Tensor) -> float:
    """Mean over slices of the Dice coefficient, which is the F1 score of the pixels."""
    return round(binary_f1_score(masks.int(), labels.int(), multidim_average="samplewise").mean().item(), 4)


def draw_picture(model: pvl.MedCLIPSeg, slices: Slices, path: Path, *, args: argparse.Namespace) -> None:
    """The largest slice under one prompt per row: slice, label, probability, uncertainty."""
    z = int(slices.masks[:, -1].sum(dim=(1, 2)).argmax())
    prompts = [f"segment the {target}" for target in TARGETS]
    prediction = model.predict(slices.images[z : z + 1], prompts, num_samples=args.num_samples, seed=args.seed)
    columns = {
        "slice": (slices.images[z, :1].expand(len(prompts), -1, -1), {"cmap": "gray"}),
        "label": (slices.masks[z], {"cmap": "gray"}),
        "probability": (prediction.probability.cpu(), {"cmap": "viridis", "vmin": 0.0, "vmax": 1.0}),
        "uncertainty (nats)": (prediction.uncertainty.cpu(), {"cmap": "magma", "vmin": 0.0, "vmax": math.log(2.0)}),
    }
    figure = Figure(figsize=(8.4, 6.6), layout="constrained")
    axes = figure.subplots(len(prompts) + 1, len(columns), height_ratios=[1.0] * len(prompts) + [0.05])
    for column, (title, (maps, style)) in enumerate(columns.items()):
        axes[0, column].set_title(title)
        for axis, data in zip(axes[:-1, column], maps, strict=True):
            picture = axis.imshow(data, **style)
            axis.set(xticks=[], yticks=[])
        if "vmax" in style:
            figure.colorbar(picture, cax=axes[-1, column], orientation="horizontal")
        else:
            axes[-1, column].axis("off")
    for axis, prompt in zip(axes[:-1, 0], prompts, strict=True):
        axis.set_ylabel(f"\u201c{prompt}\u201d", fontsize=9)
    figure.savefig(path, dpi=90)


def write_report(training: Training, slices: Slices, held_out: Slices, *, args: argparse.Namespace) -> None:
    """Score the held-out slices, and write `scores.json` and `brain.png`."""
    model, started = training.model, time.perf_counter()
    seen = evaluate(model, held_out, PHRASINGS[0], args=args)
    unseen = evaluate(model, held_out, UNSEEN_PHRASING, args=args)
    draw_picture(model, held_out, args.output / "brain.png", args=args)
    packages = ("pvl-adapter", "torch", "open_clip_torch", "transformers", "nilearn")
    scores = {
        "note": RANDOM_WEIGHTS if args.clip is None else None,
        "seen_phrasing": seen,
        "unseen_phrasing": unseen,
        "num_samples": args.num_samples,
        "slices": {"train_mm": slices.heights, "held_out_mm": held_out.heights},
        "trainable_parameters": sum(parameter.numel() for parameter in trainable(model).values()),
        "seconds": {"training": round(training.seconds, 1), "report": round(time.perf_counter() - started, 1)},
        "settings": training.settings,
        "device": f"{model.device}, {torch.get_num_threads()} CPU threads",
        "versions": {name: version(name) for name in packages},
        "commit": git_commit(),
    }
    text = json.dumps(scores, indent=2) + "\n"
    write_atomically(args.output / "scores.json", lambda path: path.write_text(text))
    for name, result in (("a phrasing seen in training", seen), ("a phrasing never seen", unseen)):
        figures = ", ".join(f"{target} {value:.3f}" for target, value in result["dice"].items())
        print(f"held-out Dice, {name}: {figures}; wrong tissue {result['wrong_tissue']:.3f}")
    print(f"scores.json, brain.png, losses.jsonl and {CHECKPOINT} are in {args.output}")


def git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return ran.stdout.strip()


# ---- command line ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    print(f"note: {RANDOM_WEIGHTS}" if args.clip is None else f"CLIP: {args.clip}")
    model = build_model(args)
    pvl.print_trainable_parameters(model)
    slices, held_out = split(load_slices(model))
    print(f"{len(slices.heights)} slices to train on, {len(held_out.heights)} held out")
    training = Training(model, args)
    if args.resume:
        training.load(args.output / CHECKPOINT)
    train(training, slices, args)
    write_report(training, slices, held_out, args=args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--clip",
        help="open_clip name (ViT-B-16), or Hugging Face id or folder (openai/clip-vit-base-patch16); "
        "left out: a small CLIP with random weights, no download",
    )
    add("--pretrained", help="with an open_clip name: which weights, a tag (openai) or a file")
    add("--steps", type=int, default=450, help="training steps (%(default)s)")
    add("--batch-size", type=int, default=24, help="pairs of slice and sentence per step (%(default)s)")
    add("--lr", type=float, default=2e-3, help="learning rate of Adam, falls to 0 by a cosine (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, batches and draws (%(default)s)")
    add("--num-samples", type=int, default=10, help="stochastic passes per prediction (%(default)s)")
    add("--output", type=Path, default=Path("runs/brain"), help="folder for all results (%(default)s)")
    add("--checkpoint-every", type=int, default=50, help="steps between checkpoints (%(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoint in --output, exactly where it stopped")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute (%(default)s)")
    args = parser.parse_args(argv)

    for name in ("steps", "batch_size", "lr", "num_samples", "checkpoint_every"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected a number above 0")
    if is_open_clip(args.clip) != (args.pretrained is not None):
        parser.error(
            f"--clip is {args.clip} and --pretrained {args.pretrained}, expected --pretrained with an open_clip name "
            "(--clip ViT-B-16 --pretrained openai) and with nothing else"
        )
    checkpoint = args.output / CHECKPOINT
    if args.resume and not checkpoint.is_file():
        parser.error(f"--resume found no {checkpoint}; start without it, or name the --output of an earlier run")
    if not args.resume and checkpoint.exists():
        parser.error(f"{checkpoint} exists already; go on from it with --resume, or choose another --output")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        torch.empty(0, device=args.device)
    except (OSError, RuntimeError, AssertionError) as error:
        parser.error(f"--output {args.output} or --device {args.device} cannot be used: {error}")
    return args


if __name__ == "__main__":
    main()
