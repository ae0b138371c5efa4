"""Teaching a head what sampling would find, see distilled_head.py: pairs, their samples, training, and judgement.

Shape alphabet: B batch, M image and prompt pairs, N patches, D joint width, K width of the head, h w patch grid, H W
pixels.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pvl_adapter.config import is_int, require
from pvl_adapter.distilled_head import BINS, DistilledHead, mean_passes, moments, weights_hash, weights_stamp
from pvl_adapter.engine import run_samples
from pvl_adapter.head import PixelHead
from pvl_adapter.images import ImageLike
from pvl_adapter.joint import JointFeatures
from pvl_adapter.monte_carlo import MonteCarloConfig
from pvl_adapter.noise import PAIRS, Draws, image_keys
from pvl_adapter.sample_statistics import binary_entropy

if TYPE_CHECKING:
    from pvl_adapter.segmentation import MedCLIPSeg

_TINY = 1e-6  # keeps probabilities off 0 and 1, and variances off 0, where roots and entropies have no finite gradient
_IMPORTANCE = (4e3, 5e2, 1e3)  # of probability, deviation and epistemic uncertainty
_BATCH = 12  # pairs of a training step
_FEWEST = 20  # pairs to teach with


@dataclass(frozen=True)
class DistillReport:
    """How well a head does on image and prompt pairs of images that were held out.

    Attributes:
        pairs: It was taught on, shuffled ones included.
        held_out: Pairs it was judged by.
        samples: Of each taught pair.
        probability_error: Root mean square error of its probability; the samples' own error is taken off.
        mean_pass_error: Likewise of the mean pass.
        worth_samples: How many independent samples have the same error.
        seconds: That it took.
    """

    pairs: int
    held_out: int
    samples: int
    probability_error: float
    mean_pass_error: float
    worth_samples: float
    seconds: float


def distill(
    model: MedCLIPSeg,
    images: Sequence[ImageLike],
    prompts: Sequence[str] | Tensor,
    *,
    samples: int = 16,
    steps: int = 2000,
    held_out: float = 0.1,
    shuffled: float = 3.0,
    seed: int = 0,
    progress: bool = False,
) -> DistillReport:
    """Teach a head to say in one pass what the sampler says in many; it becomes `model.distilled`.

    Needs images and prompts alone, no masks. The model's own weights are left as they are. Some images are held out:
    they tell how wrong the head is, and how unlike the others a pair may be before it has to be sampled.

    Args:
        model: Whose samples are to be predicted.
        images: As `predict` takes them, one for each prompt; the same image may come with several prompts.
        prompts: What is asked of each: sentences, or token ids [M, L].
        samples: Stochastic passes of each pair that the head learns from; held-out pairs get twice as many.
        steps: Of training.
        held_out: Share of the images (not of the pairs) to hold out.
        shuffled: How many pairs of an image and another's prompt to make besides, for each pair that is given.
        seed: Of samples, split and training.
        progress: Show a progress bar.

    Raises:
        ValueError: If an argument is out of range, or there are too few pairs or different images.
    """
    require(is_int(samples) and samples >= 4, "samples", samples, "4 or more")
    require(is_int(steps) and steps > 0, "steps", steps, "1 or more")
    require(0.0 < held_out < 1.0, "held_out", held_out, "a share of the images between 0 and 1")
    require(shuffled >= 0.0, "shuffled", shuffled, "0 or more")
    if len(images) != len(prompts) or len(images) < _FEWEST:
        raise ValueError(
            f"got {len(images)} images and {len(prompts)} prompts, expected one prompt for each of at least {_FEWEST} "
            "images; repeat an image to ask several things of it"
        )
    started, dice = time.perf_counter(), random.Random(seed)
    keys = [int(image_keys(model.prepare(image))) for image in images]
    different = sorted(set(keys))
    few = round(held_out * len(different))
    if not 0 < few < len(different):
        raise ValueError(f"got {len(different)} different images, too few to hold out {held_out:.0%} of them")
    aside = set(dice.sample(different, few))
    taught = [k for k, key in enumerate(keys) if key not in aside]
    judged = [(k, k) for k, key in enumerate(keys) if key in aside]
    pairs = [(k, k) for k in taught]
    pairs += [(dice.choice(taught), dice.choice(taught)) for _ in range(round(shuffled * len(taught)))]
    lessons = _sample(model, images, prompts, pairs, samples=samples, seed=seed, progress=progress)
    exam = _sample(model, images, prompts, judged, samples=2 * samples, seed=seed + 1, progress=progress)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        head = DistilledHead(model.head.dim).to(model.device)
        _teach(head, model.head, lessons, steps=steps, progress=progress)
    head.facts["held_out"] = len(judged)
    figures = _judge(head, model.head, exam)
    seconds = time.perf_counter() - started
    report = DistillReport(pairs=len(pairs), held_out=len(judged), samples=samples, seconds=seconds, **figures)
    head.facts |= {**asdict(report), "weights": weights_hash(model)}
    head.stamp = weights_stamp(model)
    model.distilled = head.requires_grad_(False)
    return report


@dataclass(frozen=True)
class _InPairs(MonteCarloConfig):
    """All samples are antithetic pairs, which know the mean best: errors of the spread average out over lessons."""

    @property
    def draws(self) -> Draws:
        return PAIRS


class _Lessons(NamedTuple):
    """Mean passes, and what sampling found.

    Attributes:
        patch_tokens: [M, N, D].
        text_embeds: [M, D].
        grid: h and w.
        found: Mean, variance and squared error of the mean of the logits, [M, 3, H, W].
    """

    patch_tokens: Tensor
    text_embeds: Tensor
    grid: tuple[int, int]
    found: Tensor

    def batch(self, rows: Tensor | slice) -> tuple[JointFeatures, Tensor]:
        text = self.text_embeds[rows]
        return JointFeatures(self.patch_tokens[rows], self.grid, text, None, text), self.found[rows]

    @property
    def batches(self) -> list[slice]:
        return [slice(first, first + _BATCH) for first in range(0, len(self.found), _BATCH)]


def _sample(
    model: MedCLIPSeg,
    images: Sequence[ImageLike],
    prompts: Sequence[str] | Tensor,
    pairs: Sequence[tuple[int, int]],
    *,
    samples: int,
    seed: int,
    progress: bool,
) -> _Lessons:
    """Lessons from pairs of the index of an image and that of a prompt."""
    from tqdm import tqdm

    features, found, count = [], [], samples // 2
    config = _InPairs(2 * count)
    for image, prompt in tqdm(pairs, desc="sampling", disable=not progress):
        part, tokens = model.image_part(images[image]), model.tokenize(prompts[prompt : prompt + 1])
        features += mean_passes(model, part, tokens, rows=1)
        with torch.no_grad():
            run = run_samples(model, part, tokens, config=config, seed=seed, memory_budget=None, keep=False)
        halves, means = run.statistics.half_differences, run.statistics.pairs
        variance, error = halves / count + means.squares / (count - 1), means.squares / (count - 1) / count
        found.append(torch.stack([means.mean, variance, error], dim=1))
    tokens, text = (torch.cat([getattr(each, name) for each in features]) for name in ("patch_tokens", "text_embeds"))
    return _Lessons(tokens, text, features[0].grid, torch.cat(found))


def _teach(head: DistilledHead, pixel_head: PixelHead, lessons: _Lessons, *, steps: int, progress: bool) -> None:
    from tqdm import tqdm

    count, size = len(lessons.found), (lessons.found.shape[-2], lessons.found.shape[-1])
    with torch.no_grad():
        for some in lessons.batches:
            head.normal(lessons.batch(some)[0], pixel_head, size=size)  # in train mode: the norms take their inputs in
    head.eval()
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    stride = max(1, size[0] // (lessons.grid[0] * 2 ** len(pixel_head.upscale)) // 2)  # neighbours are alike
    for _ in tqdm(range(steps), desc="teaching", disable=not progress):
        joint, found = lessons.batch(torch.randint(count, (_BATCH,)))
        mean, deviation = head.normal(joint, pixel_head, size=size)
        y, x = torch.randint(stride, (2,)).tolist()
        loss = _loss(*(each[..., y::stride, x::stride] for each in (mean, deviation, found)))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    summaries = lessons.batch(slice(None))[0].summary()  # [M, 2 D]
    head.center.copy_(summaries.mean(dim=0))
    shrinkage = 0.01 * summaries.var(dim=0).mean() * torch.eye(len(head.center), device=summaries.device)
    head.whitening.copy_(torch.linalg.inv(torch.linalg.cholesky(summaries.T.cov() + shrinkage)).T)


def _loss(mean: Tensor, deviation: Tensor, found: Tensor) -> Tensor:
    """Weighted squared errors of probability, deviation and epistemic uncertainty."""
    off = _summed_up(mean, deviation) - _summed_up(found[:, 0], found[:, 1].sqrt())  # [3, b, ...]
    return (off.square().flatten(1).mean(dim=1) * torch.tensor(_IMPORTANCE, device=off.device)).sum()


def _summed_up(mean: Tensor, deviation: Tensor) -> Tensor:
    probability, entropy, variance, _ = moments(mean, deviation)
    epistemic = binary_entropy(probability.clamp(_TINY, 1.0 - _TINY)) - entropy
    return torch.stack([probability, (variance + _TINY).sqrt(), epistemic])


@torch.no_grad()
def _judge(head: DistilledHead, pixel_head: PixelHead, exam: _Lessons) -> dict[str, float]:
    """Sets the head's own error and the limit of its doubt; returns figures for `DistillReport`."""
    size = (exam.found.shape[-2], exam.found.shape[-1])
    doubts, sums, counts = [], torch.zeros(BINS), torch.zeros(BINS)
    totals = torch.zeros(3)  # squared errors of the head and of the mean pass, variance of a sample
    for some in exam.batches:
        joint, found = exam.batch(some)
        one = head(joint, pixel_head, size=size)
        probability, _, variance, slope = moments(found[:, 0], found[:, 1].sqrt())
        noise = slope.square() * found[:, 2]  # squared error of the samples' own probability
        off = (one.maps["probability"] - probability).square() - noise  # [b, H, W]
        mean_pass = pixel_head(joint.patch_tokens, joint.text_embeds, grid=joint.grid, size=size).sigmoid()
        before = (mean_pass - probability).square() - noise
        totals += torch.stack([off.sum(), before.sum(), variance.sum()]).cpu()
        index = torch.bucketize(one.maps["variance"], head.edges).flatten().cpu()
        sums += torch.bincount(index, weights=off.flatten().cpu(), minlength=BINS)
        counts += torch.bincount(index, minlength=BINS)
        doubts.append(one.doubt)
    seen = counts.nonzero()[:, 0]
    errors = (sums / counts).clamp_min(0.0).sqrt()[seen]
    head.errors.copy_(torch.from_numpy(np.interp(range(BINS), seen, errors)))  # an empty bin is like its neighbours
    head.limit.copy_(1.5 * torch.cat(doubts).quantile(0.95))  # nearer, the head is better than few samples
    error, before, variance = (totals / exam.found[:, 0].numel()).clamp_min(1e-12).tolist()
    return {
        "probability_error": math.sqrt(error),
        "mean_pass_error": math.sqrt(before),
        "worth_samples": variance / error,
    }
