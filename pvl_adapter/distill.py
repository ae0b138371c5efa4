"""Uncertainty in one pass: a small head that learns from the mean pass what sampling would find.

A pixel's logit is close to normal over samples, so its mean and standard deviation say all that a `Prediction` holds:
Gauss-Hermite quadrature turns both into every map, of one distribution, so that epistemic is a mutual information and
never negative. The head reads them off the features of the mean pass. It is taught by the sampler on images without
masks (a form of ensemble distribution distillation, Malinin, Mlodozeniec and Gales, 2020, arXiv 1905.00076), and what
it gets wrong on images it was not taught on becomes its error bar.

Shape alphabet: B batch, N patches, D joint width, K width of the head, h w patch grid, H W pixels.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from pvl_adapter.config import is_int, require
from pvl_adapter.head import PixelHead
from pvl_adapter.images import ImageLike
from pvl_adapter.joint import JointFeatures, SharedPrefix, eval_mode
from pvl_adapter.lockstep import lockstep_of
from pvl_adapter.noise import image_keys
from pvl_adapter.sample_statistics import binary_entropy

if TYPE_CHECKING:
    from pvl_adapter.segmentation import MedCLIPSeg

_NODES, _WEIGHTS = (each.tolist() for each in np.polynomial.hermite_e.hermegauss(7))
_TINY = 1e-7  # keeps probabilities off 0 and 1, where the entropy has no finite gradient
_BINS = 16  # of the predicted deviation, each with its own error
_BATCH = 12
_FEWEST = 20  # image and prompt pairs


class OnePass(NamedTuple):
    """What a distilled head says of a mean pass.

    Attributes:
        probability: Mean over samples, as predicted, [B, H, W].
        aleatoric: Mean of the samples' entropies in nats, [B, H, W]; the entropy of `probability` is never less.
        variance: Of one sample's probability, [B, H, W].
        standard_error: Root mean square error of `probability`, as measured on held-out images, [B, H, W].
        doubt: [B]. Above 1 an image is less like those the head was taught on than 99% of held-out ones: sample it.
    """

    probability: Tensor
    aleatoric: Tensor
    variance: Tensor
    standard_error: Tensor
    doubt: Tensor


@dataclass(frozen=True)
class DistillReport:
    """How well a head does on the image and prompt pairs that were held out.

    Attributes:
        pairs: Image and prompt pairs it was taught on, shuffled prompts included.
        held_out: Pairs it was judged by; none of their images was taught.
        samples: Of each pair.
        probability_error: Root mean square error of its probability; the samples' own error is taken off.
        mean_pass_error: Likewise of the mean pass.
        worth_samples: How many independent samples have the same error.
        variance_ratio: Its variance over that of the samples, both averaged over pixels.
        seconds: That teaching took.
    """

    pairs: int
    held_out: int
    samples: int
    probability_error: float
    mean_pass_error: float
    worth_samples: float
    variance_ratio: float
    seconds: float


class DistilledHead(nn.Module):
    """Predicts mean and deviation of the samples' logits from the mean pass.

    Args:
        dim: Joint width D.
        width: K.

    Attributes:
        facts: Of its teaching: what `DistillReport` holds, and a hash of the weights it was taught for.
    """

    error_edges: Tensor
    errors: Tensor
    center: Tensor
    whitening: Tensor
    limit: Tensor

    def __init__(self, dim: int, *, width: int = 64) -> None:
        super().__init__()
        self.facts: dict[str, Any] = {"width": width}
        self.pixel_norm = nn.BatchNorm2d(2 * dim + 2, affine=False, momentum=None)
        self.patch_norm = nn.BatchNorm2d(2 * dim + 1, affine=False, momentum=None)
        self.text_norm = nn.BatchNorm1d(dim + 1, affine=False, momentum=None)
        self.pixel = nn.Conv2d(2 * dim + 2, width, 1)
        self.patch = nn.Conv2d(2 * dim + 1, width, 1)
        self.text = nn.Linear(dim + 1, width, bias=False)
        self.around = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, 2, 1)
        nn.init.zeros_(self.out.weight)  # begins with the mean pass
        nn.init.constant_(cast(Tensor, self.out.bias), 0.0)
        for name, shape in (("error_edges", (_BINS - 1,)), ("errors", (_BINS,)), ("center", (width,))):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("whitening", torch.eye(width))
        self.register_buffer("limit", torch.ones(()))
        self.stamp: tuple[Any, ...] = ()

    @classmethod
    def from_facts(cls, dim: int, facts: Any) -> DistilledHead | None:
        """An untaught head of the shape that a saved one had; None without one, ValueError if that is damaged."""
        if facts is None:
            return None
        if not isinstance(facts, dict) or not is_int(facts.get("width")) or not isinstance(facts.get("weights"), str):
            raise ValueError(f"a distilled head is described by {facts!r}, expected its width, weights and figures")
        head = cls(dim, width=facts["width"]).requires_grad_(False).eval()
        head.facts = dict(facts)
        return head

    def check(self, model: MedCLIPSeg) -> None:
        """Raise ValueError if the model has other weights than those the head was taught for.

        Cheap where no weight has been replaced or written to since the last check; otherwise all are hashed again.
        """
        stamp = _stamp(model)
        if stamp != self.stamp and weights_hash(model) != self.facts["weights"]:
            raise ValueError(
                "the distilled head was taught for other weights: the model was trained since; teach it again by "
                "pvl_adapter.distill(model, images, prompts), or predict from samples"
            )
        self.stamp = stamp

    def forward(self, joint: JointFeatures, pixel_head: PixelHead, *, size: tuple[int, int]) -> OnePass:
        """Maps from the joint features of a mean pass, at a size H, W in pixels; computed in float32."""
        mean, deviation, summary = self.normal(joint, pixel_head, size=size)
        probability, second, entropy = moments(mean, deviation)
        variance = (second - probability.square()).clamp_min(0.0)
        error = self.errors[torch.bucketize(variance, self.error_edges)]  # [B, H, W]
        doubt = ((summary - self.center) @ self.whitening).square().sum(dim=-1) / self.limit  # [B]
        return OnePass(probability, entropy, variance, error, doubt)

    def normal(
        self, joint: JointFeatures, pixel_head: PixelHead, *, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation of the logits, [B, H, W], and a summary of each pair, [B, K]."""
        dtype = next(pixel_head.parameters()).dtype
        patch_tokens, text_embeds = cast(Tensor, joint.patch_tokens).to(dtype), joint.text_embeds.to(dtype)
        with torch.no_grad():
            features, query = pixel_head.features(patch_tokens, text_embeds, grid=joint.grid)
            fine_size = (features.shape[-2], features.shape[-1])
            logits = pixel_head.logits(features, query, size=fine_size)[:, None].float()  # [B, 1, 4h, 4w]
            products = features * query[:, :, None, None]  # [B, D, 4h, 4w]
            pixels = torch.cat([features, products, logits.clamp(-15.0, 15.0), logits.sigmoid()], dim=1)
            text, length = F.normalize(text_embeds, dim=-1), text_embeds.norm(dim=-1, keepdim=True).log()
            patches, lengths = F.normalize(patch_tokens, dim=-1), patch_tokens.norm(dim=-1, keepdim=True).log()
            patches = torch.cat([patches, patches * text[:, None], lengths], dim=-1)  # [B, N, 2 D + 1]
            patches = rearrange(patches, "b (h w) d -> b d h w", h=joint.grid[0])
        own = self.text(self.text_norm(torch.cat([text, length], dim=-1).float()))  # [B, K]
        coarse = F.gelu(self.patch(self.patch_norm(patches.float())) + own[:, :, None, None])  # [B, K, h, w]
        coarse = coarse + F.gelu(self.around[0](coarse))
        fine = F.interpolate(self.around[1](coarse), size=fine_size, mode="bilinear")  # [B, K, 4h, 4w]
        fine = F.gelu(self.pixel(self.pixel_norm(pixels.float())) + fine)
        summary = fine.mean(dim=(2, 3))  # [B, K]
        shift, spread = self.out(fine + F.gelu(self.mix(fine))).split(1, dim=1)  # 2 x [B, 1, 4h, 4w]
        maps = torch.cat([logits + 0.3 * shift, spread - 1.0], dim=1)
        mean, spread = F.interpolate(maps, size=size, mode="bilinear").unbind(dim=1)  # 2 x [B, H, W]
        return mean, spread.clamp(-8.0, 4.0).exp(), summary


def moments(mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means of p, p squared and the entropy of p, for p the sigmoid of a normal variable; in the shape of `mean`."""
    sums = [torch.zeros_like(mean) for _ in range(3)]
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        logit = mean + node * deviation
        p = logit.sigmoid()
        for k, value in enumerate((p, p.square(), F.softplus(logit) - logit * p)):
            sums[k] = sums[k] + weight / sum(_WEIGHTS) * value
    return sums[0].clamp(0.0, 1.0), sums[1], sums[2]


def distill(
    model: MedCLIPSeg,
    images: Sequence[ImageLike],
    prompts: Sequence[str] | Tensor,
    *,
    samples: int = 24,
    steps: int = 2000,
    held_out: float = 0.15,
    shuffled: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> DistillReport:
    """Teach a head to say in one pass what the sampler says in many; it becomes `model.distilled`.

    Needs images and prompts alone, no masks. The model's own weights are left as they are. Some images are held out:
    they tell how wrong the head is, and how unlike the others an image may be before it has to be sampled.

    Args:
        model: Whose samples are to be predicted.
        images: As `predict` takes them, one for each prompt; the same image may come with several prompts.
        prompts: What is asked of each: sentences, or token ids [M, L].
        samples: Stochastic passes of each pair that the head learns from; held-out pairs get twice as many.
        steps: Of training.
        held_out: Share of the images (not pairs) to hold out.
        shuffled: How many more pairs to make of images and other images' prompts, relative to `images`.
        seed: Of samples, split and training.
        progress: Show a progress bar.

    Raises:
        ValueError: If an argument is out of range, or there are too few pairs or different images.
    """
    require(is_int(samples) and samples >= 4, "samples", samples, "4 or more, to tell a variance from pairs")
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
    pairs = [(k, k) for k in taught]
    pairs += [(dice.choice(taught), dice.choice(taught)) for _ in range(round(shuffled * len(taught)))]
    judged = [(k, k) for k in range(len(images)) if keys[k] in aside]
    lessons = _sample(model, images, prompts, pairs, samples=samples, seed=seed, progress=progress)
    exam = _sample(model, images, prompts, judged, samples=2 * samples, seed=seed + 1, progress=progress)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        head = DistilledHead(model.head.dim).to(model.device)
        _teach(head, model.head, lessons, steps=steps, progress=progress)
    figures = _judge(head, model.head, exam)
    seconds = time.perf_counter() - started
    report = DistillReport(pairs=len(pairs), held_out=len(judged), samples=samples, seconds=seconds, **figures)
    head.facts |= {**asdict(report), "weights": weights_hash(model)}
    head.stamp = _stamp(model)
    model.distilled = head.requires_grad_(False).eval()
    return report


class _Lessons(NamedTuple):
    """Mean passes and what sampling found, of M pairs."""

    patch_tokens: Tensor  # [M, N, D]
    text_embeds: Tensor  # [M, D]
    grid: tuple[int, int]
    targets: Tensor  # [M, 4, H, W]: probability, variance, aleatoric, squared standard error

    def take(self, rows: Tensor) -> tuple[JointFeatures, Tensor]:
        text = self.text_embeds[rows]
        return JointFeatures(self.patch_tokens[rows], self.grid, text, None, text), self.targets[rows]


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
    """Mean passes and samples of pairs, each the index of an image and of a prompt."""
    features, targets, grid = [], [], (0, 0)
    for image, text in tqdm(pairs, desc="sampling", disable=not progress):
        prepared, prompt = model.prepare(images[image]), prompts[text : text + 1]
        joint = mean_pass(model, prepared, prompt)
        found = model.predict(prepared, prompt, num_samples=samples, seed=seed, prepared=True)
        features.append((cast(Tensor, joint.patch_tokens), joint.text_embeds))
        targets.append(
            torch.cat([found.probability, found.variance, found.aleatoric, found.standard_error.square()])  # [4, H, W]
        )
        grid = joint.grid
    patch_tokens, text_embeds = (torch.cat(each) for each in zip(*features, strict=True))
    return _Lessons(patch_tokens, text_embeds, grid, torch.stack(targets))


@torch.no_grad()
def mean_pass(model: MedCLIPSeg, images: Tensor, text: Any) -> JointFeatures:
    """Joint features of prepared images [B, 3, H, W] and their prompts, with the adapters' mean values."""
    with lockstep_of(model.clip).exclusive(), eval_mode(model):
        prefix = SharedPrefix(model.clip, images, model.tokenize(text))
        return prefix.encode(range(prefix.batch), noise=None)


def _teach(head: DistilledHead, pixel_head: PixelHead, lessons: _Lessons, *, steps: int, progress: bool) -> None:
    size = (lessons.targets.shape[-2], lessons.targets.shape[-1])
    count = len(lessons.targets)
    with torch.no_grad():
        for rows in _batches(count):
            head.normal(lessons.take(rows)[0], pixel_head, size=size)  # in train mode: the norms take in their inputs
    head.eval()
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    stride = max(1, size[0] // (lessons.grid[0] * 2 ** len(pixel_head.upscale)))
    for _ in tqdm(range(steps), desc="teaching", disable=not progress):
        joint, targets = lessons.take(torch.randint(count, (_BATCH,)))
        mean, deviation, _ = head.normal(joint, pixel_head, size=size)
        y, x = torch.randint(stride, (2,)).tolist()
        some = (..., slice(y, None, stride), slice(x, None, stride))
        loss = _loss(mean[some], deviation[some], targets[some])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        every = [head.normal(lessons.take(rows)[0], pixel_head, size=size)[2] for rows in _batches(count)]
    summaries = torch.cat(every)  # [M, K]
    head.center.copy_(summaries.mean(dim=0))
    shrinkage = 0.01 * summaries.var(dim=0).mean() * torch.eye(len(head.center), device=summaries.device)
    head.whitening.copy_(torch.linalg.inv(torch.linalg.cholesky(summaries.T.cov() + shrinkage)).T)


def _loss(mean: Tensor, deviation: Tensor, targets: Tensor) -> Tensor:
    """Squared errors of probability, deviation and epistemic uncertainty; none prefers an error of few samples.

    Targets are linear in the samples, so that their noise is without bias: the variance instead of the deviation
    (weighted as the deviation's error would be), and the entropy of the mean by its tangent at the prediction.
    """
    probability, second, entropy = moments(mean, deviation)
    variance = (second - probability.square()).clamp_min(0.0)
    p = probability.clamp(_TINY, 1.0 - _TINY)
    at = p.detach()
    tangent = binary_entropy(at) + ((1.0 - at) / at).log() * (targets[:, 0] - at)
    off_probability = (p - targets[:, 0]).square()
    off_deviation = (variance - targets[:, 1]).square() / (4.0 * (variance.detach() + 1e-5))
    off_epistemic = (binary_entropy(p) - entropy - tangent + targets[:, 2]).square()
    return 1e3 * (off_probability + off_deviation + off_epistemic).mean()


@torch.no_grad()
def _judge(head: DistilledHead, pixel_head: PixelHead, exam: _Lessons) -> dict[str, float]:
    """Sets the head's own error and the limit of its doubt; returns the figures of `DistillReport`."""
    size = (exam.targets.shape[-2], exam.targets.shape[-1])
    found, before = [], []
    for rows in _batches(len(exam.targets)):
        joint, _ = exam.take(rows)
        found.append(head(joint, pixel_head, size=size))
        patch_tokens = cast(Tensor, joint.patch_tokens)
        before.append(pixel_head(patch_tokens, joint.text_embeds, grid=joint.grid, size=size).sigmoid())
    probability, _, variance, _, doubt = (torch.cat(each) for each in zip(*found, strict=True))
    off = (probability - exam.targets[:, 0]).square() - exam.targets[:, 3]  # [M, H, W], the samples' error taken off
    head.limit.copy_(doubt.quantile(0.99))
    head.error_edges.copy_(torch.logspace(-9.0, -1.5, _BINS - 1))
    index = torch.bucketize(variance, head.error_edges).flatten()
    sums = torch.bincount(index, weights=off.flatten(), minlength=_BINS).clamp_min(0.0).cpu()
    counts = torch.bincount(index, minlength=_BINS).cpu()
    seen = counts.nonzero()[:, 0]
    errors = np.interp(range(_BINS), seen, (sums / counts).sqrt()[seen])  # an empty bin is like its neighbours
    head.errors.copy_(torch.from_numpy(errors))
    error, spread = off.mean().clamp_min(1e-12), exam.targets[:, 1].mean()
    mean_error = ((torch.cat(before) - exam.targets[:, 0]).square() - exam.targets[:, 3]).mean().clamp_min(0.0)
    return {
        "probability_error": error.sqrt().item(),
        "mean_pass_error": mean_error.sqrt().item(),
        "worth_samples": (spread / error).item(),
        "variance_ratio": (variance.mean() / spread).item(),
    }


def _batches(count: int) -> list[Tensor]:
    return [torch.arange(first, min(first + _BATCH, count)) for first in range(0, count, _BATCH)]


def _stamp(model: MedCLIPSeg) -> tuple[tuple[int, int], ...]:
    """Changes when a weight is replaced or written to."""
    parts = (model.clip.parameters(), model.clip.buffers(), model.head.parameters())
    return tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in chain(*parts))


def weights_hash(model: MedCLIPSeg) -> str:
    """Hash of all weights but the distilled head's, rounded to bfloat16."""
    from pvl_adapter.hub.weights import hash_tensors

    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("distilled.")}
    return hash_tensors(own, dtype=torch.bfloat16)
