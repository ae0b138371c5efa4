"""Small networks that turn a prediction's evidence into scores; promises rest on these, whatever they are worth.

They are learned on subjects apart from those that a promise is made with, so a poor score makes a promise less useful,
never untrue. Each is a perceptron of one hidden layer on standardised numbers, small enough for JSON.

Shape alphabet: M examples, F numbers of each, B batch, H W pixels, P numbers of a pixel, K components.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvl_adapter.trust.evidence import Evidence, logits_of

THRESHOLDS = torch.cat([torch.tensor([-1.0]), torch.linspace(-12.0, 12.0, 800).sigmoid(), torch.tensor([1.0])])
"""Of scores of pixels and pairs, rising."""

Loss = Callable[[Tensor, Tensor], Tensor]
_LEAST_SCALE = 1e-3


class Perceptron(nn.Module):
    """One number from F: a linear map plus a hidden layer, of standardised inputs."""

    mean: Tensor
    scale: Tensor

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.linear, self.inner, self.outer = nn.Linear(inputs, 1), nn.Linear(inputs, hidden), nn.Linear(hidden, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.linear.weight)

    def forward(self, numbers: Tensor) -> Tensor:
        """[..., F] to [...]."""
        numbers = self._standardised(numbers, slice(None))
        return (self.linear(numbers) + self.outer(F.gelu(self.inner(numbers))))[..., 0]

    def of_pixels(self, pixels: Tensor, pairs: Tensor) -> Tensor:
        """The same of numbers of pixels [B, H, W, P], followed by those of their pair, [B, F - P]: [B, H, W]."""
        own, shared = slice(pixels.shape[-1]), slice(pixels.shape[-1], None)
        pixels, pairs = self._standardised(pixels, own), self._standardised(pairs, shared)[:, None, None]
        linear, inner = (
            F.linear(pixels, layer.weight[:, own]) + F.linear(pairs, layer.weight[:, shared], layer.bias)
            for layer in (self.linear, self.inner)
        )
        return (linear + self.outer(F.gelu(inner)))[..., 0]

    def _standardised(self, numbers: Tensor, some: slice) -> Tensor:
        return ((numbers - self.mean[some]) / self.scale[some]).clamp(-6.0, 6.0)  # never far outside what was learned

    @classmethod
    def learn(
        cls, numbers: Tensor, targets: Tensor, loss: Loss, *, hidden: int, steps: int, decay: float
    ) -> Perceptron:
        """From examples [M, F] with targets [M]; always the same one from the same examples."""
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(0)
            net = cls(numbers.shape[1], hidden)
            net.mean.copy_(numbers.mean(dim=0))
            net.scale.copy_(numbers.std(dim=0).clamp_min(_LEAST_SCALE))
            optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2, weight_decay=decay)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for _ in range(steps):
                some = torch.randint(len(numbers), (min(len(numbers), 8192),))
                optimizer.zero_grad()
                loss(net(numbers[some]), targets[some]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        return net.requires_grad_(False)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Perceptron:
        tensors = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in state.items()}
        net = cls(len(tensors["mean"]), len(tensors["inner.bias"]))
        net.load_state_dict(tensors)
        return net.requires_grad_(False)


class Directions(NamedTuple):
    """Where vectors differ most.

    Attributes:
        center: Their mean, [D].
        vectors: Main directions over the deviations along them, the largest first, [K, D].
    """

    center: Tensor
    vectors: Tensor

    def project(self, vectors: Tensor) -> Tensor:
        """[B, D] to [B, K]."""
        return (vectors - self.center) @ self.vectors.T


class Neighbours(NamedTuple):
    """What is usual.

    Attributes:
        center: Mean of the vectors, [D].
        whitening: From the offset of a vector to numbers without correlation, [D, D].
        vectors: Usual ones, whitened, [N, D].
    """

    center: Tensor
    whitening: Tensor
    vectors: Tensor

    def distance(self, vectors: Tensor) -> Tensor:
        """From vectors [B, D] to the third nearest usual one, [B]."""
        apart = torch.cdist((vectors - self.center) @ self.whitening, self.vectors)  # [B, N]
        return apart.kthvalue(min(3, apart.shape[1]), dim=1).values


def about_pairs(evidence: Evidence, images: Directions, texts: Directions) -> Tensor:
    """See `Scorer.about_pairs`."""
    likes = [of.project(each) for of, each in ((images, evidence.image), (texts, evidence.text))]
    return torch.cat([evidence.pairs, *likes], dim=1)


def gain(refined: Tensor) -> Tensor:
    """How dear the expected share of wrong pixels may be for a pixel to be in the mask, scaled to [0, 1], [B, H, W].

    Of the masks of likeliest pixels, the best at a price is the one with the most expected share of the truth minus the
    price times the expected wrong share. It shrinks as the price rises; prices are slopes of the concave hull of the
    two shares.
    """
    limits = THRESHOLDS[::4].contiguous()  # enough within a picture
    levels = torch.bucketize(refined.flatten(1).contiguous(), limits)  # [B, H W], the higher the likelier
    zeros = torch.zeros(len(refined), len(limits) + 1, dtype=torch.float64)
    count = zeros.scatter_add(1, levels, torch.ones_like(levels, dtype=torch.float64)).flip(1).cumsum(dim=1)  # [B, L]
    mass = zeros.scatter_add(1, levels, refined.flatten(1).double()).flip(1).cumsum(dim=1)
    found = mass / mass[:, -1:].clamp_min(1e-9)
    wrong = torch.where(count > 0, 1.0 - mass / count.clamp_min(1.0), 0.0)
    found, wrong = (F.pad(each, (1, 0)).float() for each in (found, wrong))  # from the empty mask
    slopes = (found[:, None] - found[:, :, None]) / (wrong[:, None] - wrong[:, :, None]).clamp_min(1e-6)  # [B, i, j]
    slopes = slopes.triu(1).flip(2).cummax(dim=2).values.flip(2)  # the steepest from i to j or beyond
    price = torch.where(torch.ones_like(slopes).triu(1) > 0, slopes, torch.inf).amin(dim=1)[:, 1:]  # [B, L]
    price = price.flip(1).gather(1, levels).view_as(refined)
    return price / (1.0 + price)


@dataclass(frozen=True)
class Scorer:
    """Scores of pixels and pairs, from the evidence in a prediction.

    Attributes:
        temperature: Factor and offset of the logits of a calibrated probability.
        pixels: Logit of a refined probability, of the evidence of pixel and pair.
        density: Logit whose odds are the probability over the area of the truth, where there is something to find.
            Of all masks of a mean area, those of the densest pixels find the largest mean share of the truth.
        present: Logit of the chance that there is something to find.
        loss: Logit of the expected loss, one minus the Dice.
        area_error: Log of the expected error of the expected area.
        images: Directions of what images are like.
        texts: Likewise of sentences.
        usual: Appearances of images.
        outer: What orders the pixels of outer masks: "probability", "refined", "density" or "gain".
        inner: Likewise the inner masks.
        loss_start: Which of `THRESHOLDS` on the expected loss is tested first.
        pixel_start: Likewise on the uncertainty.
    """

    temperature: tuple[float, float]
    pixels: Perceptron
    density: Perceptron
    present: Perceptron
    loss: Perceptron
    area_error: Perceptron
    images: Directions
    texts: Directions
    usual: Neighbours
    outer: str = "density"
    inner: str = "gain"
    loss_start: int = 0
    pixel_start: int = 0

    def calibrated(self, probability: Tensor) -> Tensor:
        factor, offset = self.temperature
        if self.temperature == (1.0, 0.0):
            return probability
        return (factor * logits_of(probability) + offset).sigmoid()  # on the probability's device

    def refined(self, evidence: Evidence) -> Tensor:
        """Probability in the light of all evidence, [B, H, W]."""
        return self.pixels.of_pixels(evidence.pixels, evidence.pairs).sigmoid()

    def outer_scores(self, evidence: Evidence) -> Tensor:
        """The higher, the sooner a pixel is in the outer mask, [B, H, W]."""
        return self._order(self.outer, evidence)

    def inner_scores(self, evidence: Evidence) -> Tensor:
        """The higher, the sooner a pixel is in the inner mask, [B, H, W]."""
        return self._order(self.inner, evidence)

    def _order(self, name: str, evidence: Evidence) -> Tensor:
        """Scores in [0, 1] whose thresholds give nested masks, [B, H, W]."""
        if name == "probability":
            return evidence.probability
        if name == "density":
            return self.density.of_pixels(evidence.pixels, evidence.pairs).sigmoid()
        return gain(self.refined(evidence)) if name == "gain" else self.refined(evidence)

    def presence_score(self, evidence: Evidence) -> Tensor:
        return self.present(self.about_pairs(evidence))

    def risk(self, evidence: Evidence) -> Tensor:
        """Expected loss, one minus the Dice, [B]."""
        return self.loss(self.about_pairs(evidence)).sigmoid()

    def area(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Expected area, and a scale of its error: shares of the image, 2 x [B].

        The scale is the root of the expected error: between that, whose errors are overdone, and the same for all.
        """
        return self.refined(evidence).mean(dim=(1, 2)), (self.area_error(self.about_pairs(evidence)) / 2).exp()

    def about_pairs(self, evidence: Evidence) -> Tensor:
        """Numbers of each pair, with the main ones of what image and sentence are like, [B, F + 2 K]."""
        return about_pairs(evidence, self.images, self.texts)

    def distance(self, evidence: Evidence) -> Tensor:
        """From the images that this was learned on, [B]."""
        return self.usual.distance(evidence.appearance)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Scorer:
        made = {**state, "temperature": tuple(state["temperature"])}
        kinds: dict[str, Any] = {"images": Directions, "texts": Directions, "usual": Neighbours}
        for name, kind in kinds.items():
            made[name] = kind(*(torch.as_tensor(state[name][of], dtype=torch.float32) for of in kind._fields))
        made |= {
            name: Perceptron.from_dict(state[name]) for name in ("pixels", "density", "present", "loss", "area_error")
        }
        return cls(**made)
