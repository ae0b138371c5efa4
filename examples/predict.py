"""Segment pictures, scans and DICOM series with a trained model, and list them for review, most doubtful first.

    python examples/predict.py runs/MNI152-brains-seed0/best pictures/ --text "the white matter of the brain"
    python examples/predict.py MODEL scan.nii.gz --text "the left hippocampus" "the brainstem" --slices 30:60
    python examples/predict.py MODEL series/ --text "the liver" --abstain 0.5 --num-samples auto
    python examples/predict.py TahaKoleilat/MedCLIPSeg --checkpoint BUSI questions.csv

MODEL is what `pvl_adapter.from_pretrained` takes. An INPUT is a picture, a NIfTI volume, a DICOM file, one slice or
frame of those (scan.nii.gz#z=40, cine.dcm#frame=3), a folder of all that, or a table (CSV, TSV, JSONL, xlsx) with a
column for the picture, relative to the table, and one for its sentence. DICOM slices of one folder and series that have
a place in space are one input; nothing else is taken together. Every slice is predicted by itself, so a tilted gantry
does no harm. Writes to --output (results), in the input's own geometry:

    picture    NAME_mask.png (0 or 255), NAME_probability.png and NAME_uncertainty.png (65535 is 1, or ln 2 nats),
               NAME_overlay.png, NAME.npz. A picture with an EXIF orientation is turned upright first
    NIfTI      NAME_mask.nii.gz (uint8), NAME_probability.nii.gz and NAME_uncertainty.nii.gz (float32, nats) with the
               input's shape, affine, qform and sform. Slices not asked for are 0, in the uncertainty NaN: 0 nats would
               say that the model was sure. NAME_overlay.png is the slice with the largest find
    DICOM      NAME.seg.dcm, a binary SEG that refers to the input (its label is the sentence, its code "tissue"), or
               in review.csv what the input lacks for one. NAME.npz holds the maps [slices, rows, columns] and the SOP
               instances: a fractional SEG has 8 bits, no nats and few viewers. NAME_overlay.png; of a single frame
               all that a picture gets
    --abstain  NAME_abstain.png or .nii.gz, a second segment, a map in the .npz: pixels to be left to a human

NAME is the input's, with its subfolders, and the sentence if there are several; if it is taken, a hash makes it unique.
review.csv has a line for each input and sentence, by review score (see `Prediction.review_score`; of a volume all its
slices together; found_mm2 and found_ml count the slices that were asked for). Failed inputs are at its end, with the
reason, and make the exit code 1. It is rewritten as the run goes on: the same command again skips what is done, unless
model, settings or input have changed. A killed run loses no more than one volume or batch of pictures.

Cost: the published network takes 15 s for a slice with 30 samples on 2 CPU cores, 10 s with --dtype bfloat16, and about
1 s with --num-samples auto where it is sure (docs/inference.md).
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from dicom_stacks import DicomStack
from model_options import add_model_options, hash_of, load_model
from review import Review, digest, slug
from sources import ENDINGS, Source, find_sources
from stacks import AXES, Answer, NiftiStack, PictureStack
from tqdm import tqdm

import pvl_adapter as pvl
from pvl_adapter.data.issues import reason

STACKS = {"picture": PictureStack, "nifti": NiftiStack, "dicom": DicomStack}
Question = tuple[Source, dict[str, Any]]  # and its line of review.csv


def run(model: pvl.MedCLIPSeg, args: argparse.Namespace) -> Counter[str]:
    """Answer all questions whose answer is not there; what fails is noted, and the rest goes on."""
    review = Review(args.output)
    asked: dict[tuple[str, str], Question] = {}
    for source in args.sources:
        sentences, settings = source.texts or args.text, settings_of(source, args)
        for text in sentences:
            name = source.name + (f"_{slug(text)}" if len(sentences) > 1 else "")
            row = review.new_row(source.place, text, name=name, settings=settings)
            asked.setdefault((source.place, text), (source, row))
    todo = [question for question in asked.values() if args.overwrite or not review.is_done(question[1])]
    counts = Counter({"predicted": 0, "failed": 0, "done before": len(asked) - len(todo)})
    try:
        with tqdm(total=len(asked), initial=len(asked) - len(todo), unit="input") as bar:
            for pictures, alike in groupby(todo, key=lambda question: question[0].kind == "picture"):
                for together in batches(list(alike), args.batch_size if pictures else 1):
                    for row in answer(model, together, args, bar=bar):
                        counts["failed" if row["error"] else "predicted"] += 1
                        review.add(row)
                    bar.update(len(together))
    finally:
        review.write()
    return counts


def answer(
    model: pvl.MedCLIPSeg, questions: Sequence[Question], args: argparse.Namespace, *, bar: tqdm
) -> list[dict[str, Any]]:
    """Predict together; if that fails, one by one, so that a broken picture is told and harms no other."""
    started = time.perf_counter()
    try:
        answers = [
            Answer(STACKS.get(source.kind, PictureStack)(source, args), row["sentence"]) for source, row in questions
        ]
        predict(model, answers, args, bar=bar)
        rows = [
            row | write(one, args.output / row["name"], args) for one, (_, row) in zip(answers, questions, strict=True)
        ]
    except Exception as error:  # whatever a file causes, the others are predicted
        rows = [row | {"error": reason(error, most=1000)} for _, row in questions]
    if rows[0]["error"]:
        if len(questions) > 1:  # not in the handler: the error holds the memory of what failed
            return [row for question in questions for row in answer(model, [question], args, bar=bar)]
        tqdm.write(f"failed: {rows[0]['input']}: {rows[0]['error']}", file=sys.stderr)
    seconds = round((time.perf_counter() - started) / len(questions), 3)
    return [row | {"seconds": seconds} for row in rows]


def predict(model: pvl.MedCLIPSeg, answers: Sequence[Answer], args: argparse.Namespace, *, bar: tqdm) -> None:
    """Fill the answers, with slices of one after the other in a batch."""
    sampling = {name: getattr(args, name) for name in ("num_samples", "threshold", "seed")}
    slices = [(answer, number) for answer in answers for number in answer.stack.numbers]
    for done, batch in enumerate(batches(slices, args.batch_size)):
        bar.set_postfix_str(f"{batch[0][0].stack.source.name} {done * args.batch_size}/{len(slices)}")
        pictures = [answer.stack.read(number) for answer, number in batch]
        predicted = model.predict(pictures, [answer.text for answer, _ in batch], **sampling)
        for index, (answer, number) in enumerate(batch):
            answer.add(number, predicted, index)


def write(answer: Answer, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write an answer to files that begin with `path`, and tell of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = "; ".join(file.relative_to(args.output).as_posix() for file in answer.stack.write(path, answer))
    return {**answer.measures(), "files": files, "note": "; ".join(answer.stack.notes)}


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def settings_of(source: Source, args: argparse.Namespace) -> str:
    """Changes with all that changes what is written."""
    files = [(file.stat().st_size, file.stat().st_mtime_ns) for file in source.files if file.is_file()]
    names = ("num_samples", "threshold", "seed", "abstain", "window", "axis", "slices", "model_hash")
    return digest([files, *(getattr(args, name) for name in names)])


# ---- command line ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, .pth file or hub repository")
    add("inputs", metavar="INPUT", nargs="+", help="picture, volume, DICOM file, folder or table")
    add("--text", nargs="+", action="extend", default=[], help="sentences, each asked of each input that is no table")
    add("--output", type=Path, default=Path("results"), help="folder for all results (%(default)s)")
    add("--overwrite", action="store_true", help="predict again what is done")
    add_model_options(parser)
    how = parser.add_argument_group("prediction").add_argument
    how("--num-samples", default="30", help="a number, 0 for one pass without sampling, or auto (%(default)s)")
    how("--threshold", type=float, default=0.5, help="probability above which a pixel is found (%(default)s)")
    how("--abstain", type=float, metavar="NATS", help="mark pixels with more uncertainty; at most ln 2 = 0.693")
    how("--seed", type=int, default=0, help="of the samples (%(default)s)")
    how("--batch-size", type=int, default=8, help="slices or pictures predicted at a time (%(default)s)")
    cut = parser.add_argument_group("volumes and deep pictures").add_argument
    cut("--axis", choices=tuple(AXES), default="z", help="of NIfTI: sagittal x, coronal y, axial z (%(default)s)")
    every = slice(None)
    cut("--slices", type=slices_of, default=every, metavar="START:STOP[:STEP]", help="of each volume, from 0 (all)")
    levels = "what is black and white, in units of the input (see pvl_adapter.data.read_picture)"
    cut("--window", type=float, nargs=2, metavar=("CENTER", "WIDTH"), help=levels)
    return parser


def slices_of(text: str) -> slice:
    if not re.fullmatch(r"\d*:\d*(:[1-9]\d*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of slices, expected START:STOP or START:STOP:STEP")
    return slice(*(int(number) if number else None for number in text.split(":")))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    line = parser()
    args = line.parse_args(argv)
    if args.num_samples.isdecimal():
        args.num_samples = int(args.num_samples)
    elif args.num_samples != "auto":
        line.error(f"--num-samples is {args.num_samples}, expected a number, 0 or more, or auto")
    for name, most in (("threshold", 1.0), ("abstain", math.log(2.0))):
        if (value := getattr(args, name)) is not None and not 0.0 <= value <= most:
            line.error(f"--{name} is {value}, expected 0 to {most:.4g}")
    for name, least in (("batch_size", 1), ("seed", 0)):
        if getattr(args, name) < least:
            line.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected {least} or more")
    if not all(text.strip() for text in args.text):
        line.error("--text holds an empty sentence; say what is to be found")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output):
            pass
    except OSError as error:
        line.error(f"--output {args.output} cannot be written to ({error.strerror}); choose another folder")
    try:
        args.sources = list(find_sources(args.inputs, output=args.output))
    except (OSError, ValueError) as error:
        line.error(str(error))
    if not args.sources:
        line.error(f"{', '.join(args.inputs)} holds no input; known are {', '.join(ENDINGS)} and DICOM files")
    if not args.text and not all(source.texts for source in args.sources):
        line.error("--text is missing: say what is to be found, or give a table with a sentence for each input")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if an input failed."""
    args = parse(argv)
    try:
        model = load_model(args)
        args.model_hash = hash_of(model)[:16]
        counts = run(model, args)
    except (OSError, ValueError) as error:  # of the model or review.csv; those of inputs are in it
        raise SystemExit(f"cannot go on: {error}") from error
    print(f"{', '.join(f'{count} {what}' for what, count in counts.items())}; see {args.output / 'review.csv'}")
    return int(bool(counts["failed"]))


if __name__ == "__main__":
    sys.exit(main())
