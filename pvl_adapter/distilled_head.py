"""Uncertainty in one pass: a small head that learns from the mean pass what sampling would find.

A pixel's logit is close to normal over samples (error_bars.py), so its mean and deviation say all that a `Prediction`
holds, and Gauss-Hermite quadrature turns them into every map, of one distribution: epistemic is a mutual information.
The head reads both off the features of the mean pass. The sampler teaches it, on images without masks (a form of
ensemble distribution distillation, Malinin, Mlodozeniec and Gales, 2020, arXiv 1905.00076). What it gets wrong on
images it was not taught on becomes its error bar.

Shape alphabet: B batch, M image and prompt pairs, N patches, D joint width, K width of the head, h w patch grid, H W
pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pvl_adapter.config import is_int
from pvl_adapter.engine import fitting_rows, predicting
from pvl_adapter.error_bars import NormalLogits
from pvl_adapter.head import PixelHead
from pvl_adapter.joint import JointFeatures, SharedPrefix
from pvl_adapter.prediction import Prediction, refuse_nan
from pvl_adapter.sample_statistics import binary_entropy

if TYPE_CHECKING:
    from pvl_adapter.image_part import ImagePart
    from pvl_adapter.segmentation import MedCLIPSeg

_X, _WEIGHTS = np.polynomial.hermite_e.hermegauss(7)
_NODES = tuple(zip(_X.tolist(), (_WEIGHTS / _WEIGHTS.sum()).tolist(), strict=True))  # of a standard normal
BINS = 16  # of the predicted variance, each with its own error
_FIGURES = ("pairs", "held_out", "samples", "probability_error", "mean_pass_error", "worth_samples", "seconds")


class OnePass(NamedTuple):
    """What a distilled head says of a mean pass.

    Attributes:
        maps: The float maps of `Prediction` by name, [B, H, W]; `standard_error` is that of held-out images.
        logits: As in `Prediction`.
        doubt: [B], a squared distance from the pairs that were taught. Above 1 it is 1.5 times what 95% of held-out
            pairs stay below: sample it.
    """

    maps: dict[str, Tensor]
    logits: NormalLogits
    doubt: Tensor


class DistilledHead(nn.Module):
    """Predicts mean and deviation of the samples' logits from the mean pass.

    Args:
        dim: Joint width D.
        width: K.

    Attributes:
        facts: What `DistillReport` holds, `width`, and a hash of the weights that it was taught for.
    """

    edges: Tensor
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
        self.around = nn.Conv2d(width, width, 3, padding=1)
        self.coarse = nn.Conv2d(width, width, 3, padding=1)
        self.directions = nn.Conv2d(width, width // 4, 1)
        self.out = nn.Conv2d(width, 2, 1)
        nn.init.zeros_(self.out.weight)  # begins with the mean pass
        nn.init.zeros_(cast(Tensor, self.out.bias))
        self.register_buffer("edges", torch.logspace(-9.0, -1.5, BINS - 1))  # between bins of the variance
        self.register_buffer("errors", torch.zeros(BINS))  # of the probability in each bin
        self.register_buffer("center", torch.zeros(2 * dim))  # of `JointFeatures.summary`
        self.register_buffer("whitening", torch.eye(2 * dim))
        self.register_buffer("limit", torch.ones(()))
        self.stamp: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_facts(cls, dim: int, facts: Any) -> DistilledHead | None:
        """An untaught head of the shape that a saved one had; None without one, ValueError if that is damaged."""
        if facts is None:
            return None
        names = {"weights", "width", *_FIGURES}
        if not isinstance(facts, Mapping) or facts.keys() != names or not is_int(facts["width"]):
            raise ValueError(f"a distilled head is described by {facts!r}, expected {sorted(names)}; save it again")
        head = cls(dim, width=facts["width"]).requires_grad_(False).eval()
        head.facts = dict(facts)
        return head

    def check(self, model: MedCLIPSeg) -> None:
        """Raise ValueError if the model has other weights than those the head was taught for.

        Cheap where no weight has been replaced or written to since the last check; otherwise all are hashed again.
        """
        if (stamp := weights_stamp(model)) == self.stamp:
            return
        if weights_hash(model) != self.facts["weights"]:
            raise ValueError(
                "the distilled head was taught for other weights: the model was trained or changed since; teach it "
                "again by pvl_adapter.distill(model, images, prompts), or predict from samples"
            )
        self.stamp = stamp

    def forward(self, joint: JointFeatures, pixel_head: PixelHead, *, size: tuple[int, int]) -> OnePass:
        """What sampling would find, from the joint features of a mean pass, at a size H, W in pixels; float32."""
        mean, deviation = self.normal(joint, pixel_head, size=size)
        probability, aleatoric, variance, slope = moments(mean, deviation)
        total = binary_entropy(probability)
        doubt = ((joint.summary() - self.center) @ self.whitening).square().sum(dim=-1) / self.limit  # [B]
        error = self.errors[torch.bucketize(variance, self.edges)]  # [B, H, W]
        maps = {
            "probability": probability,
            "uncertainty": total,
            "aleatoric": aleatoric,
            "epistemic": (total - aleatoric).clamp_min(0.0),  # below 0 by rounding alone
            "variance": variance,
            "standard_error": error,
        }
        degrees = torch.full_like(doubt, max(3.0, self.facts["held_out"] - 1.0))
        many = torch.full_like(doubt, 1e3)  # the error bar holds the error of the variance already
        off = (error / slope.clamp_min(1e-30)).square().clamp_max(1e6)
        return OnePass(maps, NormalLogits(mean, deviation.square(), off, many, degrees), doubt)

    def normal(self, joint: JointFeatures, pixel_head: PixelHead, *, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the logits, 2 x [B, H, W]."""
        dtype = next(pixel_head.parameters()).dtype
        tokens, text = cast(Tensor, joint.patch_tokens).to(dtype), joint.text_embeds.to(dtype)
        with torch.no_grad():
            features, query = pixel_head.features(tokens, text, grid=joint.grid)  # [B, D, 4h, 4w], [B, D]
            fine_size = (features.shape[-2], features.shape[-1])
            logits = pixel_head.logits(features, query, size=fine_size)[:, None].float()  # [B, 1, 4h, 4w]
            products = features * query[:, :, None, None]
            pixels = torch.cat([features, products, logits.clamp(-15.0, 15.0), logits.sigmoid()], dim=1)
            text, text_length = F.normalize(text, dim=-1), text.norm(dim=-1, keepdim=True).log()
            tokens, lengths = F.normalize(tokens, dim=-1), tokens.norm(dim=-1, keepdim=True).log()
            patches = torch.cat([tokens, tokens * text[:, None], lengths], dim=-1)  # [B, N, 2 D + 1]
            patches = rearrange(patches, "b (h w) d -> b d h w", h=joint.grid[0])
        asked = self.text(self.text_norm(torch.cat([text, text_length], dim=-1).float()))  # [B, K]
        coarse = F.gelu(self.patch(self.patch_norm(patches.float())) + asked[:, :, None, None])  # [B, K, h, w]
        coarse = coarse + F.gelu(self.around(coarse))
        fine = F.interpolate(self.coarse(coarse), size=fine_size, mode="bilinear")
        fine = fine + self.pixel(self.pixel_norm(pixels.float()))  # [B, K, 4h, 4w]
        # What is linear in independent noise has as its variance a sum of squares.
        variance = self.directions(fine).square().mean(dim=1, keepdim=True)  # [B, 1, 4h, 4w]
        shift, factor = self.out(F.gelu(fine)).split(1, dim=1)  # 2 x [B, 1, 4h, 4w]
        maps = torch.cat([logits + 0.3 * shift, factor + 0.5 * (variance + 1e-3).log()], dim=1)
        mean, log_deviation = F.interpolate(maps, size=size, mode="bilinear").unbind(dim=1)  # 2 x [B, H, W]
        return mean, log_deviation.clamp(-8.0, 4.0).exp()


def moments(mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of p, the sigmoid of a normal variable: mean, mean entropy, variance and mean slope, in the shape of `mean`."""
    total, entropy, squares, slope = (torch.zeros_like(mean) for _ in range(4))
    for x, weight in _NODES:
        logit = mean + x * deviation
        p = logit.sigmoid()
        total = total + weight * p
        squares = squares + weight * p.square()
        entropy = entropy + weight * (F.softplus(logit) - logit * p)
        slope = slope + weight * (p - p.square())
    return total.clamp(0.0, 1.0), entropy, (squares - total.square()).clamp_min(0.0), slope


def predict_in_one_pass(
    model: MedCLIPSeg,
    part: ImagePart,
    tokens: Tensor | Mapping[str, Tensor],
    *,
    threshold: float,
    rows: int | None = None,
    memory_budget: int | None = None,
    sample: Callable[[list[int]], Prediction] | None = None,
) -> Prediction:
    """A prediction by the distilled head.

    Args:
        model: With a distilled head.
        part: B images, or one for all sentences.
        tokens: Of B sentences.
        threshold: As for `predict`.
        rows: How many pairs are computed at a time; None means as many as fit the budget.
        memory_budget: As for `predict`.
        sample: Predicts the pairs of a list from samples; called for those that the head doubts. None never samples.

    Raises:
        ValueError: If there is no head, or one that was taught for other weights.
    """
    head = model.distilled
    if head is None:
        raise ValueError('num_samples is "distilled", but this model was not taught; see pvl_adapter.distill')
    head.check(model)
    size = (part.pixels.shape[-2], part.pixels.shape[-1])
    passes = mean_passes(model, part, tokens, rows=rows, memory_budget=memory_budget)
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        found = [head(joint, model.head, size=size) for joint in passes]
        extra = {name: torch.cat([getattr(each, name)() for each in passes]) for name in ("likeness", "summary")}
    maps = {name: torch.cat([each.maps[name] for each in found]) for name in found[0].maps}
    logits = NormalLogits(*map(torch.cat, zip(*(each.logits for each in found), strict=True)))
    refuse_nan(maps["probability"])
    count = torch.ones(len(logits.mean), dtype=torch.long)
    extra["area_deviation"] = torch.zeros_like(logits.mean[:, 0, 0])
    mask = maps["probability"] > threshold
    prediction = Prediction(mask, num_samples=count, logits=logits, threshold=threshold, **maps, **extra)  # type: ignore[arg-type]
    doubtful = (torch.cat([each.doubt for each in found]) > 1.0).nonzero()[:, 0].tolist() if sample else []
    if sample and doubtful:
        sampled = sample(doubtful)
        for name in ("mask", *maps, *extra, "num_samples"):
            getattr(prediction, name)[doubtful] = getattr(sampled, name)
        for mine, other in zip(logits, sampled.logits, strict=True):
            mine[doubtful] = other.to(mine.dtype)
    return prediction


def mean_passes(
    model: MedCLIPSeg,
    part: ImagePart,
    tokens: Tensor | Mapping[str, Tensor],
    *,
    rows: int | None = None,
    memory_budget: int | None = None,
) -> list[JointFeatures]:
    """Joint features of images and tokens with the adapters' mean values, a few pairs at a time."""
    exact = torch.autocast(model.device.type, enabled=False)  # a single pass would keep all of its rounding
    with torch.no_grad(), exact, predicting(model):
        prefix = SharedPrefix(model.clip, part.pixels, tokens, known=part.prefixes, kernels=(None, False))
        return prefix.mean_passes(rows or fitting_rows(model, prefix, memory_budget))


def weights_stamp(model: MedCLIPSeg, *, distilled: bool = False) -> tuple[tuple[int, int], ...]:
    """Changes when a weight is replaced or written to (but not by way of its `data`); also of the distilled head."""
    parts = [model.clip.parameters(), model.clip.buffers(), model.head.parameters()]
    if distilled and model.distilled is not None:
        parts += [model.distilled.parameters(), model.distilled.buffers()]
    return tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in chain(*parts))


def weights_hash(model: MedCLIPSeg, *, distilled: bool = False) -> str:
    """Of all weights, on request with the distilled head's, rounded to bfloat16."""
    from pvl_adapter.hub.weights import hash_tensors

    state = model.state_dict()
    own = {name: tensor for name, tensor in state.items() if distilled or not name.startswith("distilled.")}
    return hash_tensors(own, dtype=torch.bfloat16)
