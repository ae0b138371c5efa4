"""The pixel head: from patch tokens and a sentence embedding to a logit per pixel.

Implements the segmentation head of MedCLIPSeg (arXiv 2602.20423; github HealthX-Lab/MedCLIPSeg, commit 8d7ef36): the
sentence becomes a mask query, the patches an upscaled feature map, and their dot product the logits.

Shape alphabet: B batch, N patches, D joint width, h w patch grid, H W pixels.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn


class UpscaleBlock(nn.Module):
    """Doubles a feature map: transposed convolution, GELU, depthwise convolution, LayerNorm over channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.gelu(self.conv1(x)))  # [B, D, 2h, 2w]
        x = self.norm(rearrange(x, "b d h w -> b h w d"))
        return rearrange(x, "b h w d -> b d h w")


class PixelHead(nn.Module):
    """Turns patch tokens and a sentence embedding into a logit per pixel.

    Args:
        dim: Joint width D.
        num_upscale: Scale blocks, each doubling the patch grid.
    """

    def __init__(self, dim: int, *, num_upscale: int = 2) -> None:
        super().__init__()
        self.dim = dim
        self.mask_head = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)
        )
        self.upscale = nn.Sequential(*(UpscaleBlock(dim) for _ in range(num_upscale)))

    def forward(
        self, patch_tokens: Tensor, text_embeds: Tensor, *, grid: tuple[int, int], size: tuple[int, int]
    ) -> Tensor:
        """Compute logits.

        Args:
            patch_tokens: [B, N, D].
            text_embeds: [B, D].
            grid: Rows h and columns w of patches, h * w = N.
            size: Height H and width W of the result.

        Returns:
            [B, H, W].
        """
        features, query = self.features(patch_tokens, text_embeds, grid=grid)  # [B, D, 4h, 4w], [B, D]
        return self.logits(features, query, size=size)

    def features(self, patch_tokens: Tensor, text_embeds: Tensor, *, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The upscaled feature map, [B, D, 4h, 4w], and the mask query, [B, D]; arguments as in `forward`."""
        query = self.mask_head(F.normalize(text_embeds, dim=-1))  # [B, D]
        patches = F.normalize(patch_tokens, dim=-1)
        return self.upscale(rearrange(patches, "b (h w) d -> b d h w", h=grid[0], w=grid[1])), query

    @staticmethod
    def logits(features: Tensor, query: Tensor, *, size: tuple[int, int]) -> Tensor:
        """Logits [B, H, W] of what `features` gives."""
        logits = einsum(features, query, "b d h w, b d -> b h w")
        return F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]  # [B, H, W]
