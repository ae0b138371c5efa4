"""Time and memory that adapters add to a CLIP's forward, against the bare host in the same run.

    python benchmarks/injection_cost.py      # 4 minutes on 2 cores, 5 GiB; writes results/injection_cost.json

Full-size open_clip models with random weights, batch 4, float32, eval mode: one deterministic pass. The bare host is
the injected one with its adapters disabled; its output is checked to equal the frozen host's, bit for bit.
"""

from __future__ import annotations

import open_clip
import torch
from harness import peak_memory, side_by_side, write

import pvl_adapter as pvl

MODELS = ("ViT-B-16", "ViT-L-14")
BATCH = 4
REPEATS = 9


@torch.no_grad()
def measure(name: str) -> dict[str, float | bool | str]:
    torch.manual_seed(0)
    clip = open_clip.create_model(name).requires_grad_(False).eval()
    size = clip.visual.image_size
    image = torch.randn(BATCH, 3, *size)
    text = open_clip.get_tokenizer(name)(["one medium irregular tumor at the right"] * BATCH)
    untouched = clip(image, text)
    pvl.inject_adapters(clip)

    def bare() -> None:
        with pvl.disable_adapters(clip):
            clip(image, text)

    def injected() -> None:
        clip(image, text)

    with pvl.disable_adapters(clip):
        same = all(torch.equal(got, expected) for got, expected in zip(clip(image, text), untouched, strict=True))
    seconds = side_by_side({"bare": bare, "injected": injected}, repeats=REPEATS)
    memory = {way.__name__: peak_memory(way) for way in (bare, injected)}
    adapters = sum(parameter.numel() for parameter in clip.pvl_adapters.parameters())
    return {
        "model": name,
        "disabled_is_bare_bit_for_bit": same,
        "bare_seconds": seconds["bare"],
        "injected_seconds": seconds["injected"],
        "time_ratio": seconds["injected"] / seconds["bare"],
        "bare_peak_mib": memory["bare"] / 2**20,
        "injected_peak_mib": memory["injected"] / 2**20,
        "added_parameters": adapters,
        "added_parameters_ratio": adapters / (sum(p.numel() for p in clip.parameters()) - adapters),
    }


if __name__ == "__main__":
    write("injection_cost", {"batch": BATCH, "weights": "random", "models": [measure(name) for name in MODELS]})
