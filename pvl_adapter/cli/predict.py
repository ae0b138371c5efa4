"""Segment images, scans and DICOM series with a trained model, and list them for review, most doubtful first.

    pvl-adapter predict runs/MNI152-mni152-seed0/best images/ --text "the white matter of the brain"
    pvl-adapter predict MODEL scan.nii.gz --text "the left hippocampus" "the brainstem" --slices 30:60
    pvl-adapter predict MODEL series/ --text "the liver" --abstain 0.5 --num-samples auto
    pvl-adapter predict TahaKoleilat/MedCLIPSeg --checkpoint BUSI questions.csv

MODEL is what `pvl_adapter.from_pretrained` takes. An INPUT is an image (PNG, JPEG, BMP, TIFF, GIF, WebP), a NIfTI
volume, a DICOM file, one slice or frame of those (scan.nii.gz#z=40, cine.dcm#frame=3), a folder of all that, or a table
(CSV, TSV, JSONL, xlsx) with a column for the image, relative to the table, and one for its sentence. DICOM slices of
one folder and series that have a position in space are one input. Every slice is predicted by itself, so a tilted
gantry does no harm. Writes to --output (results), in the input's own geometry:

    image      NAME_mask.png (0 or 255), NAME_probability.png and NAME_uncertainty.png (65535 is 1, or ln 2 nats),
               NAME_overlay.png, and NAME.npz, all maps as floats at the network's size (--maps: at the image's). An
               image with an EXIF orientation is turned upright first
    NIfTI      NAME_mask.nii.gz (uint8), NAME_probability.nii.gz and NAME_uncertainty.nii.gz (float32, nats) with the
               input's shape, affine, qform and sform. Slices not asked for are 0, in the uncertainty NaN: 0 nats would
               say that the model was sure. NAME_overlay.png shows the slice with the largest mask
    DICOM      NAME.seg.dcm, a binary SEG that refers to the input (its label is the sentence, its code "tissue"), or
               a note in review.csv that says what the input lacks for one. NAME.npz holds the maps [slices, rows,
               columns] and the SOP instances: a fractional SEG has 8 bits and few viewers. NAME_overlay.png. A single
               frame gets the files of an image as well
    --abstain  NAME_abstain.png or .nii.gz, a second segment, a map in the .npz: pixels to leave to a human

NAME is the input's, with its subfolders, and the sentence if there are several; a hash is added if it is taken. Either
all files of an input are written or none. review.csv has a line for each input and sentence, sorted by review score
(see `Prediction.review_score`; of a volume all its slices together; found_mm2 and found_ml count the slices that were
asked for). Inputs that failed are at its end with the reason, and make the exit code 1. The same command again skips
what is done, unless model, settings or input have changed: a killed run loses at most the last inputs.

Cost: the published network takes 7 s for a slice with 30 samples on 2 CPU cores, and 1 s with --num-samples auto
where it is sure (docs/inference.md).
"""

from __future__ import annotations

import argparse
import math
import re

from pvl_adapter.cli.options import add_options, check_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, batch="slices of a volume")
    add = parser.add_argument
    add("inputs", metavar="INPUT", nargs="+", help="image, volume, DICOM file, folder or table")
    add("--text", nargs="+", action="extend", default=[], help="sentences, each asked of each input that is no table")
    add("--abstain", type=float, metavar="NATS", help="mark pixels with more uncertainty; at most ln 2 = 0.693")
    add("--maps", action="store_true", help="of images: write float maps at the image's own size")
    add = parser.add_argument_group("volumes and images of more than 8 bits").add_argument
    add("--axis", choices=("x", "y", "z"), help="sagittal x, coronal y, axial z (NIfTI: z; DICOM: as acquired)")
    every = slice(None)
    add("--slices", type=slices_of, default=every, metavar="START:STOP[:STEP]", help="of each volume, from 0 (all)")
    levels = "what is black and white, in units of the input (see pvl_adapter.data.read_image)"
    add("--window", type=float, nargs=2, metavar=("CENTER", "WIDTH"), help=levels)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.abstain is not None and not 0.0 <= args.abstain <= math.log(2.0):
        parser.error(f"--abstain is {args.abstain}, expected 0 to {math.log(2.0):.4g}")
    if not all(text.strip() for text in args.text):
        parser.error("--text holds an empty sentence; say what is to be found")
    check_options(parser, args)


def slices_of(text: str) -> slice:
    if not re.fullmatch(r"\d*:\d*(:[1-9]\d*)?", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a range of slices, START:STOP or START:STOP:STEP")
    return slice(*(int(number) if number else None for number in text.split(":")))


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    check(parser, args)
    from pvl_adapter.cli.predicting import run  # takes seconds to import, which a wrong option need not wait for

    return run(args)
