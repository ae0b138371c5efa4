"""The model that examples/evaluate.py and examples/predict.py are asked to use."""

from __future__ import annotations

import argparse
import hashlib

import torch

import pvl_adapter as pvl


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", help="of the published ones: the dataset it was trained on")
    add("--fraction", type=int, default=100, help="of the published ones: percent of the training data (%(default)s)")
    add("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the frozen CLIP (as stored)")


def load_model(args: argparse.Namespace) -> pvl.MedCLIPSeg:
    """The model of `args.model` and of those options; errors as of `pvl.from_pretrained`."""
    return pvl.from_pretrained(
        args.model,
        checkpoint=args.checkpoint,
        fraction=args.fraction,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=args.dtype and getattr(torch, args.dtype),
    )


def hash_of(model: pvl.MedCLIPSeg) -> str:
    """Of all weights, their type, and of how pictures reach them."""
    hashed = hashlib.sha256(repr(model.config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype}".encode())
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
