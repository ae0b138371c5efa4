"""Options that commands share, and the model they name; imports torch only when it is needed."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pvl_adapter.hub.download import Hub, find_model

if TYPE_CHECKING:
    import pvl_adapter as pvl


def add_options(parser: argparse.ArgumentParser, *, batch: str) -> None:
    """The shared options; `batch` says what --batch-size counts."""
    add = parser.add_argument
    add(
        "-o",
        "--output",
        metavar="FOLDER",
        type=Path,
        default=Path("results"),
        help="folder for all results (%(default)s)",
    )
    add("--overwrite", action="store_true", help="do again what is done")
    add_model_options(parser)
    add = parser.add_argument_group("prediction").add_argument
    add("--num-samples", default="30", help="a number, 0 for one pass without sampling, or auto (%(default)s)")
    add("--threshold", type=float, default=0.5, help="probability above which a pixel is found (%(default)s)")
    add("--seed", type=int, default=0, help="of the samples (%(default)s)")
    add("--batch-size", type=int, default=8, help=f"{batch} predicted at a time (%(default)s)")


def add_model_options(parser: argparse.ArgumentParser, *, placed: bool = True) -> None:
    """Which model and, if that is not settled, where and in which type."""
    parser.add_argument("model", metavar="MODEL", help="folder, .pth file or hub repository")
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", help="of the published ones: the dataset it was trained on")
    add("--fraction", type=int, default=100, help="of the published ones: percent of the training data (%(default)s)")
    if not placed:
        parser.set_defaults(device="cpu", dtype=None, num_samples=0)
        return
    add("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the frozen CLIP (as stored)")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what is out of range, a model that is not there, and an output folder that cannot be written to."""
    if args.num_samples != "auto":
        if not args.num_samples.isdecimal():
            parser.error(f"--num-samples is {args.num_samples}, expected a number, 0 or more, or auto")
        args.num_samples = int(args.num_samples)
    if not 0.0 <= args.threshold <= 1.0:
        parser.error(f"--threshold is {args.threshold}, expected 0 to 1")
    for name, least in (("batch_size", 1), ("seed", 0), ("workers", 0), ("limit", 1), ("threads", 1)):
        if (value := getattr(args, name, None)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected {least} or more")
    found = find_model(args.model, hub=Hub())
    if found is not None and found.is_file():
        from pvl_adapter.image_files import DICOM_SUFFIXES, IMAGE_SUFFIXES, VOLUME_SUFFIXES

        if found.name.lower().endswith((*IMAGE_SUFFIXES, *VOLUME_SUFFIXES, *DICOM_SUFFIXES)):
            parser.error(f"{args.model} is an image, expected a model; MODEL comes first")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output):
            pass
    except OSError as error:
        parser.error(f"--output {args.output} cannot be written to ({error.strerror}); choose another folder")


def load_model(args: argparse.Namespace) -> pvl.MedCLIPSeg:
    """The model that is asked for; also turns `args.num_samples` into what `predict` takes."""
    import torch

    import pvl_adapter as pvl
    from pvl_adapter.image_files import reason

    count = torch.cuda.device_count()
    device = args.device or ("cuda" if count else "cpu")
    if device == "cuda" and count:  # each process of a launcher has its own GPU, if there are several
        device = f"cuda:{local_rank() % count}"
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # AssertionError, RuntimeError and others, as torch was built
        stop(f"--device {device} cannot be used ({reason(error)}); give --device cpu, or leave it out")
    try:
        model = pvl.from_pretrained(
            args.model,
            checkpoint=args.checkpoint,
            fraction=args.fraction,
            device=device,
            dtype=args.dtype and getattr(torch, args.dtype),
        )
    except Exception as error:  # damaged files make libraries raise almost anything
        stop(f"the model {args.model} cannot be loaded: {reason(error, most=1000)}")
    args.num_samples = pvl.Auto() if args.num_samples == "auto" else args.num_samples
    return model


def local_rank() -> int:
    """Which of a launcher's processes on this machine this is."""
    return int(os.environ.get("LOCAL_RANK", 0))


def hash_of(model: pvl.MedCLIPSeg) -> str:
    """Of all weights, their type, and of how images reach them."""
    import torch

    hashed = hashlib.sha256(repr(model.config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype}".encode())
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def stop(message: object) -> NoReturn:
    """End with a message and exit code 2, as argparse does."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
