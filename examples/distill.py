"""Teach a model to say in one pass what sampling says in many, from images and sentences without masks.

    python examples/distill.py runs/MNI152-mni152-seed0/last --data data/MNI152 --output one_pass
    python examples/distill.py TahaKoleilat/MedCLIPSeg --checkpoint BUSI --images ultrasound/ --text "a tumor" "a cyst"
    python examples/distill.py MODEL --table rows.csv --output one_pass       # columns image and text; masks not needed

Writes a folder for `pvl_adapter.from_pretrained`, whose `predict(..., num_samples="distilled")` takes one pass. The
model's own weights stay as they are. Take images like those it is to be used on, a few hundred pairs of image and
sentence; with several sentences each image is asked all of them.
Cost: for the small network of examples/train.py 2 minutes on 2 CPU cores. For the published network sampling is what
takes time: about 0.5 s a sample on 2 CPU cores, so an hour for 300 pairs with --samples 12; use a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import pvl_adapter as pvl
from pvl_adapter.data import SegmentationDataset, read_table

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, .pth file or hub repository")
    add("--checkpoint", help="of the published ones: the dataset it was trained on")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="dataset in the released layout, of which the training rows are used")
    source.add_argument("--table", type=Path, help=".csv, .jsonl or .xlsx with image (relative to it) and text")
    source.add_argument("--images", type=Path, help="folder of images, with --text")
    add("--text", nargs="+", help="sentences, each asked of each image of --images")
    add("--samples", type=int, default=16, help="of each pair (%(default)s)")
    add("--steps", type=int, default=2000, help="of training (%(default)s)")
    add("--seed", type=int, default=0, help="of all randomness (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--output", type=Path, default=Path("one_pass"), help="folder for the model (%(default)s)")
    args = parser.parse_args(argv)
    if bool(args.images) != bool(args.text):
        parser.error("--images and --text belong together")
    return args


def pairs(args: argparse.Namespace) -> list[tuple[object, str]]:
    if args.data:
        rows = SegmentationDataset(args.data, "train")
        return [(rows[index]["image"], rows[index]["text"]) for index in range(len(rows))]
    if args.table:
        return [(args.table.parent / row.image, row.text) for row in read_table(args.table)]
    images = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in SUFFIXES)
    return [(image, text) for image in images for text in args.text]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    model = pvl.from_pretrained(args.model, checkpoint=args.checkpoint, device=args.device)
    images, prompts = map(list, zip(*pairs(args), strict=True))
    report = pvl.distill(model, images, prompts, samples=args.samples, steps=args.steps, seed=args.seed, progress=True)
    print(f"taught on {report.pairs} pairs, judged by {report.held_out}, in {report.seconds:.0f} s")
    print(f"error of the probability: {report.probability_error:.4f}, of the mean pass {report.mean_pass_error:.4f}")
    print(f"as good as {report.worth_samples:.0f} independent samples")
    print(f"saved in {model.save_pretrained(args.output)}")


if __name__ == "__main__":
    main()
