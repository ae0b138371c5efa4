"""The PVL adapter: two token streams exchange evidence through a narrow two-way probabilistic attention.

Implements the adapter of MedCLIPSeg (arXiv 2602.20423; github HealthX-Lab/MedCLIPSeg, commit 8d7ef36). Image tokens
read the text first, then text tokens read the updated image.

Shape alphabet: B batch, V image tokens, L text tokens, C adapter width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pvl_adapter.attention import ProbCrossAttention
from pvl_adapter.fused import CounterNoise


class NoisePair(NamedTuple):
    """Standard normal noise for one adapter's values, or the counters that it is made from.

    Attributes:
        image: Of the values that text tokens read from the image, [B, V, C], or [S, B, V, C] to average S samples.
        text: Of the values that image tokens read from the text, [B, L, C] or [S, B, L, C].
    """

    image: Tensor | CounterNoise
    text: Tensor | CounterNoise


class TwoWayLayer(nn.Module):
    """Image tokens query the text, then text tokens query the updated image tokens.

    Args:
        dim: Token width C.
        beta: Weight of the uncertainty penalty.
        gate_init: Initial gate of both attentions.
        learn_beta: Learn each attention's weight, from `beta` on.
    """

    def __init__(self, dim: int, *, beta: float = 2.35, gate_init: float = 0.0, learn_beta: bool = False) -> None:
        super().__init__()
        self.image_to_text = ProbCrossAttention(dim, beta=beta, gate_init=gate_init, learn_beta=learn_beta)
        self.text_to_image = ProbCrossAttention(dim, beta=beta, gate_init=gate_init, learn_beta=learn_beta)

    def forward(
        self,
        vision_tokens: Tensor,
        text_tokens: Tensor,
        *,
        text_mask: Tensor | None = None,
        vision_mask: Tensor | None = None,
        text_rows: int | None = None,
        sample: bool = True,
        num_samples: int = 1,
        noise: NoisePair | None = None,
        generator: torch.Generator | None = None,
        kl: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the updated tokens, [B, V, C] and [B, L or text_rows, C]; arguments as in `PVLAdapter.forward`."""
        if noise is not None and not isinstance(noise, NoisePair):
            raise TypeError(f"noise is a {type(noise).__name__}, expected a NoisePair(image=..., text=...)")
        vision_noise, text_noise = (None, None) if noise is None else noise
        vision_tokens = self.image_to_text(
            vision_tokens,
            text_tokens,
            context_mask=text_mask,
            sample=sample,
            num_samples=num_samples,
            noise=text_noise,
            generator=generator,
            kl=kl,
        )
        text_tokens = self.text_to_image(
            text_tokens[:, :text_rows],
            vision_tokens,
            context_mask=vision_mask,
            sample=sample,
            num_samples=num_samples,
            noise=vision_noise,
            generator=generator,
            kl=kl,
        )
        return vision_tokens, text_tokens


class PVLAdapter(nn.Module):
    """Projects both towers' tokens to a common width, lets them exchange evidence, and returns updates to add.

    Args:
        vision_dim: Width of the image tower's tokens.
        text_dim: Width of the text tower's tokens.
        dim: Adapter width C.
        beta: Weight of the uncertainty penalty.
        gate_init: Initial gate of both attentions.
        learn_beta: Learn each attention's weight, from `beta` on.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        dim: int = 256,
        *,
        beta: float = 2.35,
        gate_init: float = 0.0,
        learn_beta: bool = False,
    ) -> None:
        super().__init__()
        self.vision_down = nn.Linear(vision_dim, dim, bias=False)
        self.text_down = nn.Linear(text_dim, dim, bias=False)
        self.two_way = TwoWayLayer(dim, beta=beta, gate_init=gate_init, learn_beta=learn_beta)
        self.vision_up = nn.Linear(dim, vision_dim, bias=False)
        self.text_up = nn.Linear(dim, text_dim, bias=False)

    def forward(
        self,
        vision_tokens: Tensor,
        text_tokens: Tensor,
        *,
        text_mask: Tensor | None = None,
        vision_mask: Tensor | None = None,
        text_rows: int | None = None,
        sample: bool = True,
        num_samples: int = 1,
        noise: NoisePair | None = None,
        generator: torch.Generator | None = None,
        kl: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute what is to be added to each stream.

        Args:
            vision_tokens: [B, V, vision_dim], class token included.
            text_tokens: [B, L, text_dim].
            text_mask: [B, L] bool, True where a text token is real; None lets the image read padding too.
            vision_mask: [B, V] bool, likewise for towers that pad their patches.
            text_rows: How many text tokens, the first ones, are to be updated; None means all.
            sample: Sample the values; False uses their means.
            num_samples: How many value samples each attention averages.
            noise: The noise to use: for the image values [B, V, C] and for the text values [B, L, C].
            generator: Source of the noise when `noise` is not given.
            kl: A list to append KL divergences from N(0, 1) to: of the text's values, then of the image's, each [B, C].

        Returns:
            Updates in the tokens' own types, [B, V, vision_dim] and [B, L or text_rows, text_dim].

        Raises:
            ValueError: If shapes do not fit together.
        """
        for name, tokens, down in (("vision", vision_tokens, self.vision_down), ("text", text_tokens, self.text_down)):
            if tokens.ndim != 3 or tokens.shape[-1] != down.in_features:
                raise ValueError(
                    f"{name}_tokens has shape {tuple(tokens.shape)}, expected [batch, tokens, {down.in_features}]"
                )
        dtype = self.two_way.image_to_text.gate.dtype  # the towers may run in another type than the adapters
        vision, text = self.two_way(
            self.vision_down(vision_tokens.to(dtype)),  # [B, V, C]
            self.text_down(text_tokens.to(dtype)),  # [B, L, C]
            text_mask=text_mask,
            vision_mask=vision_mask,
            text_rows=text_rows,
            sample=sample,
            num_samples=num_samples,
            noise=noise,
            generator=generator,
            kl=kl,
        )
        return (
            self.vision_up(vision).to(vision_tokens.dtype),  # [B, V, vision_dim]
            self.text_up(text).to(text_tokens.dtype),  # [B, L, text_dim]
        )
