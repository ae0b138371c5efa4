"""Train text-guided segmentation on the published datasets, on your own, or on real brains without a download.

    python examples/train.py                                            # MNI152 brain slices, from the nilearn package
    python examples/train.py --data Kvasir --fraction 10 --seed 666 --recipe released    # as in the paper
    python examples/train.py --table train.csv --val-table val.csv --images img --masks label     # your own
    accelerate launch --num_processes 4 examples/train.py --data BUSI BUSBRA --mixed-precision bf16

A recipe (recipes/*.toml) says what is trained and how; --backbone, --epochs and the like override it. Copy this file
and change it: it uses the public API alone. A batch is that of all processes together, so more processes make the same
training faster. Randomness follows from seed, step and row, so --resume continues a killed run exactly.
Writes config.json, log.jsonl, checkpoints/, best/, last/ (for `pvl_adapter.from_pretrained`), figures/, scores.json.
Cost and score: the first command takes 4 minutes on one or two CPU cores, and 2 GiB; expect a validation Dice of 0.60.
Its frozen CLIP is a small one with RANDOM weights: the score shows what adapters and head learn, no more.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import textwrap
import time
import tomllib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
BRAIN = "MNI152"  # trained on when no data is named


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line over the recipe over the defaults below, read before the imports that take seconds."""
    line = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = line.add_argument_group("data").add_argument
    add("--data", nargs="+", help=f"datasets by name or folder, in the released layout; without any data {BRAIN}")
    add("--data-folder", type=Path, default=Path("data"), help="where named datasets are (%(default)s)")
    add("--fraction", type=int, choices=(10, 25, 50, 100), default=100, help="%% of the training rows (%(default)s)")
    add("--table", type=Path, help="instead of --data: your own .csv, .jsonl or .xlsx with image, text, mask")
    add("--val-table", type=Path, help="its validation rows")
    add("--images", type=Path, help="folder of its images (its own)")
    add("--masks", type=Path, help="folder of its masks (its own)")
    add("--window", type=float, nargs=2, metavar=("CENTER", "WIDTH"), help="grey levels shown of 16-bit images")
    add("--workers", type=int, default=1, help="processes that read and augment rows (%(default)s)")
    add = line.add_argument_group("recipe, which may also set").add_argument
    add("--recipe", help="name in recipes/, or a .toml (default; mni152 without any data)")
    add(
        "--backbone",
        default="UniMedCLIP",
        help="of pvl.load_backbone, or backbones/, or a Hugging Face id, or a folder",
    )
    add("--pretrained", help="weights of a model of open_clip: a tag or a file")
    add("--pad-to-context", action="store_true", help="pad every sentence to the whole context")
    add("--epochs", type=int, default=100, help="passes over the training rows (%(default)s)")
    add("--batch-size", type=int, default=24, help="rows of a step, of all processes together (%(default)s)")
    add("--lr", type=float, default=3e-4, help="of Adam (%(default)s)")
    add("--lr-min", type=float, default=0.0, help="where its cosine ends (%(default)s)")
    add("--lr-by", default="step", help="step or epoch: when it changes (%(default)s)")
    add("--warmup", type=int, default=0, help="steps (or epochs) over which it rises (%(default)s)")
    add("--sample", action=argparse.BooleanOptionalAction, default=True, help="adapters' values, or train their means")
    add("--patience", type=int, default=0, help="epochs without a better validation Dice to stop after (never)")
    line.set_defaults(adapters={}, model={}, loss={}, augmentation={})  # tables of a recipe: arguments of what has them
    add = line.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, help="of weights, batches and sampling (%(default)s)")
    add("--accumulate", type=int, default=1, help="compute a batch in so many parts, to save memory (%(default)s)")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help="(%(default)s)")
    add("--cpu", action="store_true", help="even if there is a GPU")
    add("--output", type=Path, help="folder for all results (runs/DATA-RECIPE-seedN)")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output, exactly")
    add("--checkpoint-every", type=int, default=100, help="steps; also after each epoch (%(default)s)")
    add("--tracker", help="tensorboard, wandb, ...: what Accelerate knows and is installed")

    args = line.parse_args(argv)
    name = args.recipe or ("default" if args.data or args.table else "mni152")
    recipe = Path(name) if name.endswith(".toml") else HERE / "recipes" / f"{name}.toml"
    try:
        line.set_defaults(**(values := tomllib.loads(recipe.read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(path.stem for path in (HERE / "recipes").glob("*.toml")))
        line.error(f"--recipe {recipe}: {error}; expected one of {known}, or the path of a .toml")
    if unknown := values.keys() - vars(args).keys():
        line.error(f"--recipe {recipe} has unknown settings {sorted(unknown)}, expected options of --help")
    args = line.parse_args(argv)
    if args.table and args.data:
        line.error("--table and --data exclude each other")
    for option in ("val_table", "images", "masks"):
        if getattr(args, option) and not args.table:
            line.error(f"--{option.replace('_', '-')} belongs to --table, which is missing; give --table train.csv")
    for option in ("epochs", "batch_size", "lr", "accumulate", "checkpoint_every"):
        if not 0 < getattr(args, option) < math.inf:
            line.error(f"{option} is {getattr(args, option)}, expected a number above 0")
    if args.lr_by not in ("step", "epoch"):
        line.error(f"lr_by is {args.lr_by!r}, expected step or epoch")
    args.data = args.data or ([] if args.table else [BRAIN])
    data = args.table.stem if args.table else "+".join(Path(each).name for each in args.data)
    data += "" if args.fraction == 100 else f"_{args.fraction}"
    args.output = args.output or Path("runs") / f"{data}-{recipe.stem}-seed{args.seed}"
    if args.resume != bool(checkpoints(args.output)):
        problem = "has no checkpoint; start without" if args.resume else "has checkpoints already; continue with"
        line.error(f"{args.output} {problem} --resume, or give another --output")
    args.random = not args.pretrained and (HERE / "backbones" / f"{args.backbone}.json").is_file()  # the frozen CLIP
    return args


def is_open_clip_folder(name: str) -> bool:
    return (Path(name) / "open_clip_config.json").is_file()


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("[0-9]*"))


if __name__ == "__main__":
    ARGS = parse()

import open_clip
import pandas
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate
from torchmetrics.functional.classification import binary_f1_score
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import AutoModel

import pvl_adapter as pvl
from pvl_adapter.data import DatasetError, SegmentationDataset, check_datasets, find_dataset, one_of_each_kind


def augmentation(
    *,
    probability: float = 1.0,  # of rotation and scaling
    degrees: float = 0.0,  # largest rotation to either side; what comes in from outside is black
    whole_degrees: bool = False,  # rotate by whole degrees, without scaling
    scale: float = 0.0,  # largest relative change of size
    brightness: float = 0.0,  # largest relative change of the grey levels
    interpolation: str = "bilinear",  # or "nearest"
) -> v2.Transform:
    """Rotate, scale and brighten an image together with its mask."""
    mode = v2.InterpolationMode(interpolation)
    rotate = v2.RandomAffine(degrees, scale=(1.0 - scale, 1.0 + scale), interpolation=mode)
    if whole_degrees:
        rotate = v2.RandomChoice([v2.RandomRotation((turn, turn), mode) for turn in range(-degrees, degrees + 1)])
    return v2.Compose([v2.RandomApply([rotate], p=probability), v2.ColorJitter(brightness=brightness)])


def build_model(args: argparse.Namespace) -> pvl.MedCLIPSeg:
    """A frozen CLIP, joined by adapters, with a pixel head on top."""
    torch.manual_seed(args.seed)
    open_clip.add_model_config(HERE / "backbones")
    name, tokenizer = args.backbone, None
    if is_open_clip_folder(name):
        clip, tokenizer, _ = pvl.load_backbone(f"local-dir:{name}")
    elif Path(name).is_dir() or ("/" in name and not name.startswith(("hf-hub:", "local-dir:"))):
        clip = AutoModel.from_pretrained(name).eval()
    elif name in open_clip.list_models() and not (args.pretrained or args.random):
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(f"{name} would have random weights; give --pretrained a file or one of {tags}")
    else:
        clip, tokenizer, _ = pvl.load_backbone(name, pretrained=args.pretrained)
    if args.random:  # re-initialised at unit variance, since they start too small and stay frozen
        for embedding in (clip.token_embedding.weight, clip.positional_embedding, clip.visual.positional_embedding):
            nn.init.normal_(embedding)
    clip = clip.to(torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32)
    pvl.inject_adapters(clip, pvl.PVLConfig.from_dict(args.adapters))
    model = pvl.MedCLIPSeg(clip, config=pvl.MedCLIPSegConfig.from_dict(args.model), tokenizer=tokenizer)
    if args.pad_to_context:
        model.config = replace(model.config, context_length=model.context_length)
    return model


def schedule(optimizer: torch.optim.Optimizer, args: argparse.Namespace, *, steps_per_epoch: int) -> LRScheduler:
    """A linear rise, then a cosine; to be stepped after every step or epoch, as --lr-by says."""
    total = args.epochs * (steps_per_epoch if args.lr_by == "step" else 1)
    cosine = CosineAnnealingLR(optimizer, T_max=max(1, total - args.warmup), eta_min=args.lr_min)
    if not args.warmup:
        return cosine
    rise = LinearLR(optimizer, start_factor=1.0 / (args.warmup + 1), total_iters=args.warmup)
    return SequentialLR(optimizer, [rise, cosine], milestones=[args.warmup])


@lru_cache(maxsize=1024)  # in each process; a row of 224 x 224 pixels takes 200 kB
def read_row(dataset: Dataset[dict[str, Any]], index: int) -> dict[str, Any]:
    return dataset[index]


class Rows(Dataset[dict[str, Any]]):
    """Rows as {"image": uint8 [3, H, W], "text": str, "mask": bool [H, W]}; the index (epoch, row) augments the row."""

    def __init__(self, datasets: Sequence[Dataset[Any]], transform: v2.Transform | None = None, seed: int = 0) -> None:
        self.data, self.transform, self.seed = ConcatDataset(datasets or [[]]), transform, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        if isinstance(index, int):
            return read_row(self.data, index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, *index)))
            row = read_row(self.data, index[1])
            image, mask = self.transform(tv_tensors.Image(row["image"]), tv_tensors.Mask(row["mask"]))
        return {**row, "image": image.as_subclass(Tensor), "mask": mask.as_subclass(Tensor)}


class Progress(SimpleNamespace):
    """What changes from step to step besides weights, optimizer and scheduler: Accelerate saves it with them."""

    def state_dict(self) -> dict[str, Any]:
        return vars(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Trainer:
    """One training, from its data to its results; override `losses` to train in another way."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.progress = Progress(epoch=0, batch=0, step=0, seconds=0.0, sums={}, since_best=0, best=None, history=[])
        tracking = {"log_with": args.tracker, "project_dir": args.output}
        self.accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision, **tracking)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        parts = self.world * args.accumulate
        if args.batch_size % parts:
            raise ValueError(f"--batch-size is {args.batch_size}, expected a multiple of processes x parts = {parts}")
        try:
            self.loss, self.transform = pvl.SegmentationLoss(**args.loss), augmentation(**args.augmentation)
        except TypeError as error:
            raise ValueError(f"the recipe does not fit: {error}") from error
        self.network = self.evaluated = self.build()  # the latter is validated and saved
        self.rows, self.val_rows = self.read_data()
        self.size, self.queue = args.batch_size // parts, []
        workers = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
        self.loader = DataLoader(self.rows, batch_sampler=self.queue, **workers)  # train_epoch fills the queue
        self.batches_per_epoch = len(self.batches(0))
        optimizer = torch.optim.Adam([each for each in self.network.parameters() if each.requires_grad], lr=args.lr)
        self.scheduler = schedule(optimizer, args, steps_per_epoch=math.ceil(self.batches_per_epoch / args.accumulate))
        self.model, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        self.accelerator.register_for_checkpointing(self.scheduler, self.progress)
        self.accelerator.register_save_state_pre_hook(drop_frozen)

    def build(self) -> nn.Module:
        return build_model(self.args)

    def read_data(self) -> tuple[Rows, Rows]:
        """Rows to train and to validate on; everything that is wrong with them is reported at once."""
        train, val = (self.open_split(split, self.args.fraction) for split in ("train", "val"))
        issues = check_datasets([*train, *val], progress=self.accelerator.is_local_main_process)
        if any(issue.fatal for issue in issues):
            raise DatasetError(issues)
        self.accelerator.print("".join(f"warning: {line}\n" for line in one_of_each_kind(issues)), end="")
        return Rows(train, self.transform, self.args.seed), Rows(val)

    def open_split(self, split: str, fraction: int) -> list[SegmentationDataset]:
        args, network = self.args, self.network
        options = {"size": network.image_size, "resize": network.config.resize, "window": args.window}
        if args.table:
            options |= {"images": args.images, "masks": args.masks, "split": split}
            table = args.table if split == "train" else args.val_table
            return [SegmentationDataset.from_table(table, **options)] if table else []
        with self.accelerator.local_main_process_first():
            if args.data == [BRAIN] and not (args.data_folder / BRAIN).exists():
                make = [sys.executable, str(HERE / "make_brains.py"), BRAIN, "--output", str(args.data_folder)]
                subprocess.run(make, check=True)
        folders = [find_dataset(name, data=args.data_folder) for name in args.data]
        return [SegmentationDataset(folder, split, fraction=fraction, **options) for folder in folders]

    def batches(self, epoch: int) -> list[list[tuple[int, int]]]:
        """This process's share of every batch of an epoch; any number of processes makes the same batches."""
        generator = torch.Generator().manual_seed(hash((self.args.seed, epoch)))
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        order += order[: -len(order) % self.world]  # so that shares are equal
        mine = [(epoch, row) for row in order[self.rank :: self.world]]
        return [mine[first : first + self.size] for first in range(0, len(mine), self.size)]

    def run(self) -> None:
        self.start_or_resume()
        progress, shown = self.progress, {"unit": "batch", "disable": not self.accelerator.is_main_process}
        self.accelerator.print(f"{len(self.rows)} rows to train on, {len(self.val_rows)} to validate on")
        self.accelerator.init_trackers("tracker")
        total, done = (epochs * self.batches_per_epoch for epochs in (self.args.epochs, progress.epoch))
        with tqdm(total=total, initial=done + progress.batch, **shown) as bar:
            while progress.epoch < self.args.epochs and not 0 < self.args.patience <= progress.since_best:
                self.train_epoch(bar)
                self.end_epoch()
        self.accelerator.end_training()
        self.export("last")
        if self.accelerator.is_main_process:
            self.write_results()

    def start_or_resume(self) -> None:
        """Write the settings of a new run, or load the newest checkpoint of one with the same settings."""
        free = ("output", "resume", "checkpoint_every", "tracker", "workers", "data_folder")
        settings = {name: value for name, value in vars(self.args).items() if name not in free}
        settings |= {"processes": self.world, "rows": [len(self.rows), len(self.val_rows)]}
        settings, path = json.loads(json.dumps(settings, default=str)), self.args.output / "config.json"
        if not self.args.resume:
            packages = ("pvl-adapter", "torch", "open_clip_torch", "transformers", "accelerate")
            content = {"settings": settings, "command": sys.argv}
            content["versions"] = {name: version(name) for name in packages}
            if self.accelerator.is_main_process:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(content, indent=2) + "\n")
            return
        saved = json.loads(path.read_text())["settings"]
        if differing := [name for name in saved | settings if saved.get(name) != settings.get(name)]:
            listed = "; ".join(f"{name} is {settings.get(name)!r}, expected {saved.get(name)!r}" for name in differing)
            raise ValueError(f"--resume needs the settings of {path}: {listed}. Give those, or another --output")
        newest = checkpoints(self.args.output)[-1]
        try:
            self.accelerator.load_state(str(newest), strict=False)
        except Exception as error:
            raise ValueError(f"{newest} is damaged ({error}); delete it to resume from the one before") from error

    def train_epoch(self, bar: tqdm) -> None:
        progress, parts, started = self.progress, self.args.accumulate, time.perf_counter() - self.progress.seconds
        self.queue[:] = self.batches(progress.epoch)[progress.batch :]
        self.model.train()
        for batch in self.loader:
            torch.manual_seed(hash((self.args.seed, progress.epoch, progress.batch, self.rank)))  # of adapters' samples
            progress.batch += 1
            last_part = progress.batch % parts == 0 or progress.batch == self.batches_per_epoch
            with nullcontext() if last_part else self.accelerator.no_sync(self.model):
                terms = self.losses(batch)
                self.accelerator.backward(terms.total / parts)
            values = self.accelerator.reduce(torch.stack([*vars(terms).values()]).detach(), reduction="mean").tolist()
            if not all(map(math.isfinite, values)):
                raise ValueError(f"the losses of step {progress.step + 1} are {values}; try a smaller --lr")
            losses = dict(zip(vars(terms), values, strict=True))
            progress.sums = {name: progress.sums.get(name, 0.0) + value for name, value in losses.items()}
            progress.seconds = time.perf_counter() - started
            bar.set_postfix(loss=f"{losses['total']:.3f}", dice=progress.best and f"{progress.best:.3f}", refresh=False)
            bar.update()
            if last_part:
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.args.lr_by == "step":
                    self.scheduler.step()
                progress.step += 1
                self.accelerator.log(losses, step=progress.step)
                if progress.step % self.args.checkpoint_every == 0 and progress.batch < self.batches_per_epoch:
                    self.save_checkpoint()

    def losses(self, batch: dict[str, Any]) -> pvl.LossTerms:
        """Losses of a batch, of which the contrastive one compares the rows of all processes."""
        how = {"sample": self.args.sample, "kl": self.loss.kl_weight > 0}
        out = self.model(self.network.prepare(batch["image"]), batch["text"], **how)
        patch_tokens, text_embeds = out.patch_tokens, out.text_embeds
        if self.world > 1:
            patch_tokens, text_embeds = (torch.cat(all_gather(each)) for each in (patch_tokens, text_embeds))
        masks = batch["mask"].to(self.accelerator.device)
        return self.loss(out.logits, masks, patch_tokens=patch_tokens, text_embeds=text_embeds, kl=out.kl)

    def end_epoch(self) -> None:
        progress = self.progress
        entry = {"epoch": progress.epoch + 1, "step": progress.step}
        entry |= {name: value / self.batches_per_epoch for name, value in progress.sums.items()}
        if len(self.val_rows):
            entry["val_dice"] = self.validate()
            self.accelerator.log({"val_dice": entry["val_dice"]}, step=progress.step)
        if self.args.lr_by == "epoch":
            self.scheduler.step()
        progress.history.append(entry)
        progress.epoch, progress.batch, progress.sums = progress.epoch + 1, 0, {}
        progress.since_best += 1
        if entry.get("val_dice", -1.0) > (-1.0 if progress.best is None else progress.best):
            progress.best, progress.since_best = entry["val_dice"], 0
            self.export("best")
        if self.accelerator.is_main_process:
            (self.args.output / "log.jsonl").write_text("\n".join(map(json.dumps, progress.history)) + "\n")
        self.save_checkpoint()

    def validate(self) -> float:
        """Mean Dice of the deterministic prediction at the network's size; 1 if mask and label are both empty."""
        total = torch.zeros((), device=self.accelerator.device)
        mine = Subset(self.val_rows, range(self.rank, len(self.val_rows), self.world))
        for batch in DataLoader(mine, batch_size=4 * self.args.batch_size):
            masks = self.evaluated.predict(batch["image"], batch["text"], num_samples=0).mask.int()
            dice = binary_f1_score(masks, batch["mask"].to(masks), multidim_average="samplewise", zero_division=1)
            total += dice.sum()
        return self.accelerator.reduce(total).item() / len(self.val_rows)

    def save_checkpoint(self) -> None:
        """Write a checkpoint beside the others, then rename it: a kill leaves whole ones. The last two are kept."""
        new = self.args.output / "checkpoints" / "new"
        self.accelerator.save_state(str(new))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            new.rename(new.with_name(f"{self.progress.step:09d}"))
            for old in checkpoints(self.args.output)[:-2]:
                shutil.rmtree(old)

    def export(self, name: str) -> None:
        if self.accelerator.is_main_process:
            data, best = ", ".join(self.args.data) or self.args.table.name, self.progress.best
            card = {"training_data": f"{data} ({len(self.rows)} rows), by examples/train.py."}
            card["scores"] = {} if best is None else {"best validation Dice": round(best, 4)}
            whole = self.args.random or is_open_clip_folder(self.args.backbone)  # nobody else has its CLIP
            self.evaluated.save_pretrained(self.args.output / name, whole=whole, model_card_kwargs=card)

    def write_results(self) -> None:
        progress, output = self.progress, self.args.output
        (output / "figures").mkdir(exist_ok=True)
        curves = pandas.DataFrame(progress.history).set_index("epoch").drop(columns="step")
        curves.plot(subplots=True, figsize=(6.0, 9.0))[0].figure.savefig(output / "figures" / "curves.png")
        draw_examples(self.evaluated, self.val_rows or self.rows).savefig(output / "figures" / "examples.png")
        scores = {"best_val_dice": progress.best, "last_val_dice": progress.history[-1].get("val_dice")}
        scores |= {"steps": progress.step, "seconds": round(progress.seconds, 1), "random_clip": self.args.random}
        (output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
        print(f"{scores}\nbest/, last/ and figures/ are in {output}; score it by pvl-adapter evaluate")


def drop_frozen(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
    """A hook of Accelerate: checkpoints leave out the frozen CLIP."""
    for model, state in zip(models, weights, strict=True):
        for name in [name for name, each in model.named_parameters() if not each.requires_grad]:
            del state[name]


def draw_examples(model: pvl.MedCLIPSeg, rows: Rows) -> Figure:
    """Four rows: image, label, probability and uncertainty."""
    chosen = default_collate([rows[index] for index in range(0, len(rows), math.ceil(len(rows) / 4))])
    texts, prediction = chosen["text"], model.predict(chosen["image"], chosen["text"], num_samples=10)
    columns = {"image": (chosen["image"].permute(0, 2, 3, 1), "gray", 255), "label": (chosen["mask"], "gray", 1)}
    columns["probability"] = prediction.probability.cpu(), "viridis", 1.0
    columns["uncertainty (nats)"] = prediction.uncertainty.cpu(), "magma", math.log(2.0)
    figure = Figure(figsize=(8.4, 2.2 * len(texts) + 0.5), layout="constrained")
    axes = figure.subplots(len(texts) + 1, 4, height_ratios=[1.0] * len(texts) + [0.05])
    for column, (title, (maps, colors, most)) in zip(axes.T, columns.items(), strict=True):
        for axis, pixels in zip(column, maps, strict=False):
            shown = axis.imshow(pixels, cmap=colors, vmin=0, vmax=most)
            axis.set(xticks=[], yticks=[])
        column[0].set_title(title)
        figure.colorbar(shown, cax=column[-1], orientation="horizontal")  # in a row of their own, so all rows are level
    for axis, text in zip(axes[:, 0], texts, strict=False):
        axis.set_ylabel("\n".join(textwrap.wrap(text, width=30)), fontsize=7)
    return figure


def main(args: argparse.Namespace, trainer: type[Trainer] = Trainer) -> None:
    try:
        trainer(args).run()
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(ARGS)
