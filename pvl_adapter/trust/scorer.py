"""Small networks that turn a prediction's evidence into scores; promises rest on these, whatever they are worth.

They are learned on subjects apart from those that a promise is made with, so a poor score makes a promise less useful,
never untrue. Each is a perceptron of one hidden layer on standardised numbers, small enough for JSON.

Shape alphabet: M examples, F numbers of each, B batch, H W pixels, P numbers of a pixel, K components.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pvl_adapter.trust.evidence import logits_of, pair_evidence, pixel_evidence

if TYPE_CHECKING:
    from pvl_adapter.prediction import Prediction

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
        numbers = ((numbers - self.mean) / self.scale).clamp(-6.0, 6.0)  # never far outside what was learned
        return (self.linear(numbers) + self.outer(F.gelu(self.inner(numbers))))[..., 0]

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

    def refined(self, prediction: Prediction) -> Tensor:
        """Probability in the light of all evidence, [B, H, W]."""
        return self.pixels(joint_evidence(prediction)).sigmoid()

    def outer_scores(self, prediction: Prediction) -> Tensor:
        """The higher, the sooner a pixel is in the outer mask, [B, H, W]."""
        return self.order(self.outer, prediction)

    def inner_scores(self, prediction: Prediction) -> Tensor:
        """The higher, the sooner a pixel is in the inner mask, [B, H, W]."""
        return self.order(self.inner, prediction)

    def order(self, name: str, prediction: Prediction) -> Tensor:
        """Scores in [0, 1] whose thresholds give nested masks, [B, H, W]."""
        if name == "probability":
            return prediction.probability.float().cpu()
        if name == "density":
            return self.density(joint_evidence(prediction)).sigmoid()
        return precision(self.refined(prediction)) if name == "precision" else self.refined(prediction)

    def presence_score(self, prediction: Prediction) -> Tensor:
        return self.present(pair_evidence(prediction))

    def risk(self, prediction: Prediction) -> Tensor:
        """Expected loss, one minus the Dice, [B]."""
        return self.loss(pair_evidence(prediction)).sigmoid()

    def area(self, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Expected area and its likely error, shares of the image, 2 x [B]."""
        expected = self.refined(prediction).mean(dim=(1, 2))
        return expected, self.area_error(pair_evidence(prediction)).exp()

    def distance(self, prediction: Prediction) -> Tensor:
        """From the images that this was learned on, [B]."""
        offset = prediction.summary.float().cpu().chunk(2, dim=1)[0] - self.center
        return (offset @ self.directions.T).square().sum(dim=1).sqrt()

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Scorer:
        made = {**state, "temperature": tuple(state["temperature"])}
        made |= {name: torch.as_tensor(state[name], dtype=torch.float32) for name in ("center", "directions")}
        made |= {
            name: Perceptron.from_dict(state[name]) for name in ("pixels", "density", "present", "loss", "area_error")
        }
        return cls(**made)


def joint_evidence(prediction: Prediction) -> Tensor:
    """Evidence of pixels, with that of their pair, [B, H, W, P + F]."""
    pixel, pair = pixel_evidence(prediction), pair_evidence(prediction)
    everywhere = pair[:, :, None, None].expand(-1, -1, *pixel.shape[-2:])  # [B, F, H, W]
    return rearrange(torch.cat([pixel, everywhere], dim=1), "b p h w -> b h w p")
