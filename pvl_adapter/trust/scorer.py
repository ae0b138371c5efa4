"""Small networks that turn a prediction's evidence into scores; promises rest on these, whatever they are worth.

They are learned on subjects apart from those that a promise is made with, so a poor score makes a promise less useful,
never untrue. Each is a perceptron of one hidden layer on standardised numbers, small enough for JSON.

Shape alphabet: M examples, F numbers of each, B batch, H W pixels, P numbers of a pixel, K components.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvl_adapter.trust.evidence import Evidence, logits_of

THRESHOLDS = torch.cat([torch.tensor([-1.0]), torch.linspace(-12.0, 12.0, 400).sigmoid(), torch.tensor([1.0])])
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
        cls, numbers: Tensor, targets: Tensor, loss: Loss, *, hidden: int = 16, steps: int = 600, decay: float = 1e-2
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


def precision(refined: Tensor) -> Tensor:
    """Expected share of true pixels in the smallest mask of likeliest pixels that holds each pixel, [B, H, W]."""
    ordered, order = refined.flatten(1).sort(dim=1, descending=True, stable=True)
    count = torch.arange(1, ordered.shape[1] + 1, dtype=torch.float64)
    means = (ordered.double().cumsum(dim=1) / count).float()
    return torch.empty_like(means).scatter_(1, order, means).view_as(refined)


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
        center: Of the summaries' image part, [D].
        directions: Whitened main directions of it, [K, D].
        outer: What orders the pixels of outer masks: "probability", "refined", "density" or "precision".
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
    center: Tensor
    directions: Tensor
    outer: str = "density"
    inner: str = "precision"
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
        return precision(self.refined(evidence)) if name == "precision" else self.refined(evidence)

    def presence_score(self, evidence: Evidence) -> Tensor:
        return self.present(evidence.pairs)

    def risk(self, evidence: Evidence) -> Tensor:
        """Expected loss, one minus the Dice, [B]."""
        return self.loss(evidence.pairs).sigmoid()

    def area(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Expected area and its likely error, shares of the image, 2 x [B]."""
        return self.refined(evidence).mean(dim=(1, 2)), self.area_error(evidence.pairs).exp()

    def distance(self, evidence: Evidence) -> Tensor:
        """From the images that this was learned on, [B]."""
        offset = evidence.image - self.center
        return (offset @ self.directions.T).square().sum(dim=1).sqrt()

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Scorer:
        made = {**state, "temperature": tuple(state["temperature"])}
        made |= {name: torch.as_tensor(state[name], dtype=torch.float32) for name in ("center", "directions")}
        made |= {
            name: Perceptron.from_dict(state[name]) for name in ("pixels", "density", "present", "loss", "area_error")
        }
        return cls(**made)
