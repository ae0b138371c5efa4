"""Write a model as ONNX, which runs without torch and without this library, and check the file with onnxruntime.

    pvl-adapter export runs/MNI152-mni152-seed0/best model.onnx
    pvl-adapter export MODEL mean.onnx --no-noise                    # the mean pass alone, without sampling

The file takes images, sentences as token ids and, for samples, noise; docs/onnx.md tells how to use it. It is run once,
on a random image, and compared with torch. Needs the extra "onnx".
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pvl_adapter.cli.options import add_model_options, load_model, stop
from pvl_adapter.hub.download import Hub, find_model

TOLERANCE = 1e-3
"""Of probabilities; rounding in float32 is far below it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, placed=False)
    parser.add_argument("file", type=Path, help="to write, as model.onnx")
    parser.add_argument("--text", default="a tumor", help="to check it with (%(default)s)")
    parser.add_argument("--no-noise", action="store_true", help="leave out the inputs for samples: the mean pass alone")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
        stop(f'{" and ".join(missing)} not installed: pip install "pvl-adapter[onnx]"')
    if args.file.is_dir():
        parser.error(f"{args.file} is a folder, expected a file such as {args.file / 'model.onnx'}")
    find_model(args.model, hub=Hub())
    model = load_model(args)
    import pvl_adapter as pvl

    pvl.export_onnx(model, args.file, text=args.text, noise=not args.no_noise)
    written = [file for file in (args.file, Path(f"{args.file}.data")) if file.is_file()]
    print(f"wrote {', '.join(f'{file} ({file.stat().st_size / 1e6:,.1f} MB)' for file in written)}")
    off = largest_difference(model, args.file, args.text)
    print(f"probabilities of a random image differ by at most {off:.1e} from torch's")
    if not off <= TOLERANCE:
        stop(f"that is more than {TOLERANCE:g}, so do not use {args.file}; please report the model")
    return 0


def largest_difference(model: Any, file: Path, text: str) -> float:
    """Between the probabilities of onnxruntime and of torch for one image, sentence and draw of noise."""
    import onnxruntime  # type: ignore[import-untyped]
    import torch

    import pvl_adapter as pvl

    session = onnxruntime.InferenceSession(str(file))
    generator, tokens = torch.Generator().manual_seed(0), model.tokenize(text)
    ids = {"input_ids": tokens} if isinstance(tokens, torch.Tensor) else dict(tokens)
    inputs = {"image": torch.randn(1, 3, *model.image_size, generator=generator), **ids}
    for put in session.get_inputs():
        if put.name.endswith("_noise"):  # [1, A, V, C] or [1, A, L, C]
            sizes = (size if isinstance(size, int) else len(next(iter(ids.values()))[0]) for size in put.shape[1:])
            inputs[put.name] = torch.randn(1, *sizes, generator=generator)
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    noise = None
    if "image_noise" in inputs:
        pairs = zip(inputs["image_noise"].unbind(1), inputs["text_noise"].unbind(1), strict=True)
        noise = [pvl.NoisePair(*pair) for pair in pairs]
    with torch.no_grad():
        logits = model(inputs["image"], tokens, sample=noise is not None, noise=noise).logits
    return float((torch.from_numpy(found).sigmoid() - logits.sigmoid()).abs().max())
