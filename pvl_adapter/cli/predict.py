"""Find what sentences describe in images, scans and DICOM series; list results for review, most doubtful first.

    pvl-adapter predict MODEL scan.nii.gz --text "the left hippocampus" --output found
    pvl-adapter predict MODEL scans/ --text "the liver" "the spleen" --output found   # and one label map of both
    pvl-adapter predict MODEL series/ --preset organs.csv --largest-component --output found
    pvl-adapter predict TahaKoleilat/MedCLIPSeg --checkpoint BUSI questions.csv --output found
    pvl-adapter predict --manifest found/manifest.json --output again                 # the same run, byte for byte
    accelerate launch -m pvl_adapter predict ...                                      # on all GPUs

MODEL is what `pvl_adapter.from_pretrained` takes. An INPUT is an image (PNG, JPEG, BMP, TIFF, GIF, WebP), a NIfTI
volume, a DICOM file, one slice or frame of those (scan.nii.gz#z=40, cine.dcm#frame=3), a folder of all that, or a table
(CSV, TSV, JSONL, xlsx) with a column for the image, relative to the table, and one for its sentence. DICOM slices of
one folder and series that have a position in space are one input.

Writes to --output (results), for each input in its own geometry:

    image   NAME_mask.png (0 or 255), NAME_probability.png and NAME_uncertainty.png (65535 is 1, or ln 2 nats)
    NIfTI   NAME_mask.nii.gz, NAME_probability.nii.gz and NAME_uncertainty.nii.gz (nats; NaN in slices not asked for)
    DICOM   NAME.seg.dcm, a SEG that refers to the input; review.csv notes what an input lacks for one
    all     NAME_overlay.jpg, for a look; with --abstain NAME_abstain, pixels to leave to a human; with --maps
            NAME.npz of an image, all maps as floats

and review.csv, a line for each input and sentence, sorted by review score; manifest.json, what the run was made with;
.runs, the logs by which a run goes on. NAME is the input's, with its subfolders. Of several sentences NAME_SENTENCE_...
are written for each, and label maps NAME_labels... that do not depend on the order of the sentences.

The same command again does what is left, and what has changed; results do not depend on when it was killed. Started
several times, on any machines that share the folders, its processes divide the work. Exit code: 0 all inputs are
done, 1 some could not be read or predicted (review.csv says why) or the disk is full, 2 nothing was begun.

Cost: the published network takes 7 s for a slice with 30 samples on 2 CPU cores, and 1 s with --num-samples auto
where it is sure (docs/inference.md).
"""

from __future__ import annotations

import argparse
import math
import os
import re
from pathlib import Path

from pvl_adapter.cli.manifest import Repeat, take_arguments
from pvl_adapter.cli.options import add_options, check_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, batch="images, or slices of a volume,")
    add = parser.add_argument
    add("inputs", metavar="INPUT", nargs="+", help="image, volume, DICOM file, folder or table")
    add("--text", nargs="+", action="extend", default=[], help="sentences, each asked of each input that is no table")
    add("--preset", type=Path, metavar="FILE", help="instead of --text: a table of labels with sentence, name, color")
    add("--manifest", type=Path, action=Repeat, help="instead of MODEL, INPUT and settings: those of an earlier run")
    add("--threads", type=int, default=min(8, os.cpu_count() or 1), help="that read, and as many write (%(default)s)")
    add("--quiet", action="store_true", help="no progress bar")
    add = parser.add_argument_group("results").add_argument
    add("--abstain", type=float, metavar="NATS", help="mark pixels with more uncertainty; at most ln 2 = 0.693")
    add("--maps", action="store_true", help="write all maps as floats too")
    add("--no-overlay", dest="overlay", action="store_false", help="no NAME_overlay.jpg")
    add("--largest-component", action="store_true", help="keep of each mask the largest connected part")
    add("--fill-holes", action="store_true", help="fill the holes of masks")
    add = parser.add_argument_group("volumes and images of more than 8 bits").add_argument
    axes = "sagittal x, coronal y, axial z, or the average of all (NIfTI: z; DICOM: as acquired)"
    add("--axis", choices=("x", "y", "z", "all"), help=axes)
    add("--slices", metavar="START:STOP[:STEP]", help="of each volume, from 0 (all)")
    levels = "what is black and white, in units of the input (see pvl_adapter.data.read_image)"
    add("--window", type=float, nargs=2, metavar=("CENTER", "WIDTH"), help=levels)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    args.repeated = None
    if args.manifest:
        take_arguments(parser, args)
    if args.abstain is not None and not 0.0 <= args.abstain <= math.log(2.0):
        parser.error(f"--abstain is {args.abstain}, expected 0 to {math.log(2.0):.4g}")
    if not all(text.strip() for text in args.text):
        parser.error("--text holds an empty sentence; say what is to be found")
    if args.text and args.preset:
        parser.error("got --text and --preset, expected one of them")
    if args.slices and args.axis == "all":
        parser.error("got --slices with --axis all, expected one axis; name it, or take all slices")
    if args.slices and not re.fullmatch(r"\d*:\d*(:[1-9]\d*)?", args.slices):
        parser.error(f"--slices is {args.slices}, expected a range of slices, START:STOP or START:STOP:STEP")
    check_options(parser, args)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    check(parser, args)
    from pvl_adapter.cli.predicting import run  # takes seconds to import, which a wrong option need not wait for

    return run(args)
