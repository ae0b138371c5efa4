"""Count on held-out subjects what a model may promise, and save that with the model.

    pvl-adapter calibrate runs/subjects/last --data Colin27_subjects
    pvl-adapter calibrate MODEL --table held_out.csv --images img --masks label --alpha 0.05
    pvl-adapter calibrate TahaKoleilat/MedCLIPSeg --checkpoint BUSI --data BUSI --by image --output calibrated

Takes subjects that the model was neither trained nor chosen on, with a column Subject in their table. Afterwards
predictions of the model have outlines that hold or miss at most a share alpha of the structure, verdicts on its
presence, intervals of its area, and cases to leave to a human: see docs/trust.md. Promises hold for subjects and
sentences like these, and only for the same --num-samples and --threshold; `predict` with others makes none.

The calibration is saved in the model's own folder, where it takes the place of an earlier one. A .pth file or a model
of the hub has no such folder: give --output, and the whole model is saved there. `evaluate` on other subjects tells
whether the promises hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pvl_adapter.cli.datasets import add_data_options, check_data_options, check_rows, find_splits
from pvl_adapter.cli.info import describe, promises
from pvl_adapter.cli.options import add_model_options, check_options, load_model, stop
from pvl_adapter.hub.download import Hub, find_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="folder for the calibrated model (the model's own)")
    add_model_options(parser)
    add_data_options(parser, split="val")
    add = parser.add_argument_group("promises").add_argument
    add("--alpha", type=float, default=0.1, help="what may be missed, wrong or outside at most (%(default)s)")
    limit = "mean loss, 1 - Dice, that cases may have which are not abstained from (%(default)s)"
    add("--loss-limit", type=float, default=0.25, help=limit)
    limit = "share of wrong ones among the pixels that are not abstained from (%(default)s)"
    add("--pixel-limit", type=float, default=0.05, help=limit)
    independent = "what is independent of another: subjects, as the table names them, or images (%(default)s)"
    add("--by", choices=("subject", "image"), default="subject", help=independent)
    add = parser.add_argument_group("prediction").add_argument
    add("--num-samples", default="30", help="as promises are to hold for: a number, 0 or auto (%(default)s)")
    add("--threshold", type=float, default=0.5, help="likewise (%(default)s)")
    add("--batch-size", type=int, default=16, help="rows predicted at a time (%(default)s)")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    check_data_options(parser, args)
    folder = find_model(args.model, hub=Hub())
    own = folder is not None and (folder / "model.safetensors").is_file() and not args.checkpoint
    if args.output is None and not own:
        parser.error(f"{args.model} is no folder to save a calibration in; give --output, a folder for the whole model")
    if args.output is None and args.dtype:
        parser.error("--dtype changes the weights that would be saved; give --output, a folder for that model")
    if args.output is not None and (args.output / "model.safetensors").exists():
        parser.error(f"--output {args.output} holds a model already; choose another folder")
    args.output = args.output or folder
    check_options(parser, args)
    splits = find_splits(args)
    if len(splits) > 1:
        stop(f"got {len(splits)} datasets or prompt designs, expected one: promises hold for rows like those of one")
    model, whole = load_model(args), not own or describe(args.model)["whole"]
    check_rows(splits)
    from pvl_adapter.trust import calibrate

    names = ("alpha", "loss_limit", "pixel_limit", "by", "batch_size", "num_samples", "threshold")
    options = {name: getattr(args, name) for name in names}
    calibration = calibrate(model, splits[0].data, progress=True, **options)
    model.save_pretrained(args.output, whole=whole)
    facts = calibration.facts
    print(
        f"{facts['learned_on']} subjects taught the scores; {facts['subjects']} others, {facts['cases']} cases, allow:"
    )
    print(*(f"  {sentence}" for sentence in promises(calibration.to_dict())), sep="\n")
    print(f"saved in {args.output}; it holds for --num-samples {args.num_samples} --threshold {args.threshold:g}")
    return 0
