"""Loading a published checkpoint: our first and second load against torch.load and load_state_dict, in one run.

    python benchmarks/load_time.py      # 2 minutes on 2 cores, 3 GiB of disk; writes results/load_time.json

A synthetic checkpoint in the full published layout (random values, optimizer state included, 1 GB), each load in a new
process, in turns. Memory that is mapped from a file is counted where it has been touched; the first prediction touches
all of it, so time and memory are given up to the model and up to the first pass.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import peak_memory, write

from pvl_adapter.hub.download import sha256
from pvl_adapter.hub.loading import load_official
from pvl_adapter.hub.official import OfficialConfig, official_to_ours, rename_official
from pvl_adapter.segmentation import MedCLIPSeg

REPEATS = 3
LAYOUT = Path(__file__).parent.parent / "tests" / "goldens" / "published_checkpoint_layout.json"


def make_checkpoint(folder: Path) -> Path:
    """Under the hash of its content, as the hub's cache keeps it."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for name, (shape, _) in json.loads(LAYOUT.read_text())["tensors"].items()}
    model = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    trained = [tensor for name, tensor in model.items() if not name.startswith(("vision_", "text_", "logit_"))]
    moments = {k: {"exp_avg": tensor.clone(), "exp_avg_sq": tensor.clone()} for k, tensor in enumerate(trained)}
    path = folder / "checkpoint.pth"
    torch.save({"model": model, "epoch": 100, "optimizer": {"state": moments}, "scheduler": {}, "best_loss": 0.1}, path)
    return path.rename(folder / sha256(path))


def plain(path: Path, converted: Path) -> MedCLIPSeg:
    """As anybody would: build with values, unpickle everything, copy."""
    empty = OfficialConfig().build()
    model = empty.to_empty(device="cpu")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(rename_official(checkpoint["model"]))
    embeddings = model.clip.text.transformer.embeddings
    embeddings.position_ids.copy_(torch.arange(embeddings.position_ids.shape[1]))
    embeddings.token_type_ids.zero_()
    return model


def ours(path: Path, converted: Path) -> MedCLIPSeg:
    return load_official(path, network=OfficialConfig(), converted=converted)


def child(way: str, path: Path, converted: Path) -> None:
    """Measure one load in this process and print the figures."""
    OfficialConfig().build()  # imports open_clip and transformers, which are not what is measured
    loaded: list[MedCLIPSeg] = []
    seconds: dict[str, float] = {}

    def load() -> None:
        started = time.perf_counter()
        loaded.append({"plain": plain, "ours": ours}[way](path, converted))
        seconds["to_model"] = time.perf_counter() - started

    def load_and_run() -> None:
        started = time.perf_counter()
        load()
        with torch.no_grad():
            loaded[0](torch.zeros(1, 3, 224, 224), torch.ones(1, 256, dtype=torch.long))
        seconds["to_first_pass"] = time.perf_counter() - started

    with torch.no_grad():
        memory = peak_memory(load_and_run)
    size = sum(tensor.numel() * tensor.element_size() for tensor in loaded[0].state_dict().values())
    name = official_to_ours("mask_head.0.weight")
    check = float(loaded[0].state_dict()[name].double().sum())
    print(json.dumps({**seconds, "peak_over_tensors": memory / size, "check": check}))


def main() -> None:
    figures: dict[str, list[dict[str, float]]] = {"plain": [], "first_load": [], "second_load": []}
    with tempfile.TemporaryDirectory() as folder:
        path, converted = make_checkpoint(Path(folder)), Path(folder, "converted")
        for _ in range(REPEATS):
            shutil.rmtree(converted, ignore_errors=True)
            for name, way in (("plain", "plain"), ("first_load", "ours"), ("second_load", "ours")):
                command = [sys.executable, __file__, way, str(path), str(converted)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                figures[name].append(json.loads(output.splitlines()[-1]))
        size = path.stat().st_size
    checks = {run["check"] for runs in figures.values() for run in runs}
    keys = ("to_model", "to_first_pass", "peak_over_tensors")
    medians = {
        name: {key: round(statistics.median(run[key] for run in runs), 3) for key in keys}
        for name, runs in figures.items()
    }
    write("load_time", {"checkpoint_mib": size / 2**20, "same_values": len(checks) == 1, **medians})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
