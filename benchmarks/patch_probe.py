"""What the frozen patch tokens of a CLIP hold, before any adapter is trained: pretrained against random.

    python benchmarks/patch_probe.py runs/clip            # writes results/patch_probe.json and prints a table

For the tokens after each block, and the projected ones at the end, of synthetic subjects (200 slices to fit a linear
map on, 100 of other subjects to test it):

    structures      AUROC of a linear probe (ridge) for the structures that a patch shows, mean over structures
    grey levels     share of the variance of a patch's pixels that a linear map explains
    effective rank  exp of the entropy of the tokens' spectrum (Roy and Vetterli 2007), of as many as there are channels
    likeness        mean cosine of two patches of one picture; 1 is no difference at all
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from einops import rearrange
from harness import write
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from pvl_adapter.data import SegmentationDataset

EXAMPLES = Path(__file__).parents[1] / "examples"
SLICES = {"Train": 200, "Test": 100}
RIDGE = 1e-2


def load(name: str) -> Any:
    """A CLIP: a folder of open_clip's, or the name of an architecture with random weights as train.py gives it."""
    if Path(name).is_dir():
        return open_clip.create_model(f"local-dir:{name}").eval()
    open_clip.add_model_config(EXAMPLES / "backbones")
    torch.manual_seed(0)
    clip = open_clip.create_model(name)
    for embedding in (clip.token_embedding.weight, clip.positional_embedding, clip.visual.positional_embedding):
        torch.nn.init.normal_(embedding)
    return clip.eval()


def slices(folder: Path, split: str, size: tuple[int, int], patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [n, 3, H, W]; share of each structure in each patch, [n, N, K]; which structures are labelled, [n, K]."""
    data = SegmentationDataset(folder, split.lower(), size=size)
    names = sorted({row.mask.removesuffix(".png").split("_", 4)[4] for row in data.rows})
    rows: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(data.rows):
        rows[row.image].append(at)
    images, shares, known = [], [], []
    for image in list(rows)[: SLICES[split]]:
        samples = [data[at] for at in rows[image]]
        share, which = torch.zeros(size[0] // patch * (size[1] // patch), len(names)), torch.zeros(len(names))
        for at, sample in zip(rows[image], samples, strict=True):
            number = names.index(data.rows[at].mask.removesuffix(".png").split("_", 4)[4])
            blocks = rearrange(sample["mask"].float(), "(y p) (x q) -> (y x) (p q)", p=patch, q=patch)
            share[:, number], which[number] = blocks.mean(dim=1), 1
        images.append(samples[0]["image"].float() / 255.0)
        shares.append(share)
        known.append(which)
    return torch.stack(images), torch.stack(shares), torch.stack(known).bool()


@torch.no_grad()
def tokens_of(clip: Any, images: Tensor) -> dict[str, Tensor]:
    """Patch tokens [n, N, C] after each block, and projected at the end."""
    cfg = open_clip.get_model_preprocess_cfg(clip)
    mean, std = (torch.tensor(cfg[name])[:, None, None] for name in ("mean", "std"))
    kept: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda _, __, out, number=number: kept.update({f"block {number}": out[:, 1:]}))
        for number, block in enumerate(clip.visual.transformer.resblocks, 1)
    ]
    clip.visual((images - mean) / std)
    for hook in hooks:
        hook.remove()
    last = kept[f"block {len(hooks)}"]
    return {**kept, "projected": clip.visual.ln_post(last) @ clip.visual.proj}


def linear_map(tokens: Tensor, targets: Tensor) -> Tensor:
    """Ridge regression with a bias, [C + 1, K]."""
    design = F.pad(tokens, (0, 1), value=1.0).double()
    gram = design.mT @ design
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, design.mT @ targets.double())


def probe(clip: Any, fit: tuple[Tensor, ...], test: tuple[Tensor, ...]) -> dict[str, dict[str, float]]:
    figures, patch = {}, clip.visual.patch_size[0]
    at_fit, at_test = tokens_of(clip, fit[0]), tokens_of(clip, test[0])
    pixels = [rearrange(each[0].mean(1), "n (y p) (x q) -> (n y x) (p q)", p=patch, q=patch) for each in (fit, test)]
    for name in at_fit:
        one, other = at_fit[name].flatten(0, 1), at_test[name].flatten(0, 1)
        mean, std = one.mean(dim=0), one.std(dim=0) + 1e-6
        one, other = (one - mean) / std, (other - mean) / std
        apply = lambda weights, other=other: F.pad(other, (0, 1), value=1.0).double() @ weights  # noqa: E731
        aurocs = []
        count = at_fit[name].shape[1]
        for number in range(fit[1].shape[-1]):
            of_fit, of_test = (each[2][:, number].repeat_interleave(count) for each in (fit, test))
            truth = test[1].flatten(0, 1)[of_test, number] > 0.3
            if of_fit.sum() < count or not 0 < truth.sum() < len(truth):
                continue
            found = apply(linear_map(one[of_fit], fit[1].flatten(0, 1)[of_fit, number : number + 1]))
            aurocs.append(float(binary_auroc(found[of_test, 0].float(), truth.int())))
        truth, mean_pixels = pixels[1], pixels[1].mean(dim=0)
        painted = apply(linear_map(one, pixels[0]))
        spectrum = torch.linalg.svdvals((at_test[name].flatten(0, 1) - at_test[name].mean(dim=(0, 1))).double()) ** 2
        share = spectrum / spectrum.sum()
        alike = F.normalize(at_test[name], dim=-1)
        alike = (alike @ alike.mT).mean(dim=(1, 2))
        figures[name] = {
            "structures": sum(aurocs) / len(aurocs),
            "grey levels": 1.0 - float((painted - truth).square().sum() / (truth - mean_pixels).square().sum()),
            "effective rank": float((-(share * share.clamp_min(1e-12).log()).sum()).exp()),
            "likeness": float(alike.mean()),
        }
    return {name: {column: round(value, 4) for column, value in of.items()} for name, of in figures.items()}


def main(args: argparse.Namespace) -> None:
    figures = {}
    for name in [*args.clips, "small-patch-16"]:
        clip = load(name)
        fit, test = (slices(args.data, split, clip.visual.image_size, clip.visual.patch_size[0]) for split in SLICES)
        figures[name] = probe(clip, fit, test)
    write("patch_probe", {"figures": figures})
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("clips", nargs="+", help="folders of pretrain_clip.py")
    parser.add_argument("--data", type=Path, default=Path("data/Colin27_subjects"), help="(%(default)s)")
    main(parser.parse_args())
