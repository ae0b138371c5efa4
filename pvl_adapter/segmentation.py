"""MedCLIPSeg: a pixel head on the joint features of two joined CLIP towers.

Implements the segmentation model of MedCLIPSeg (arXiv 2602.20423; github HealthX-Lab/MedCLIPSeg, commit 8d7ef36):
the sentence becomes a mask query, the patches an upscaled feature map, and their dot product the logits.

Shape alphabet: B batch, S samples, N patches, L text tokens, D joint width, h w patch grid, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from pvl_adapter.adapter import NoisePair
from pvl_adapter.config import MedCLIPSegConfig
from pvl_adapter.inference import Prediction, monte_carlo
from pvl_adapter.injection import encode, lockstep_of
from pvl_adapter.preprocessing import Pictures, prepare_images
from pvl_adapter.recording import eval_mode
from pvl_adapter.tokenization import Tokenizer, find_tokenizer, tokenize

Prompts = str | Sequence[str] | Tensor | Mapping[str, Tensor]
"""Sentences, token ids [B, L], or the mapping a Hugging Face tokenizer returns."""


@dataclass(frozen=True)
class SegmentationOutput:
    """Logits of a batch, with what the losses need besides.

    Attributes:
        logits: [B, H, W], at the size of the images.
        patch_tokens: [B, N, D], not normalised.
        text_embeds: [B, D], not normalised.
    """

    logits: Tensor
    patch_tokens: Tensor
    text_embeds: Tensor


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
        query = self.mask_head(F.normalize(text_embeds, dim=-1))  # [B, D]
        patches = F.normalize(patch_tokens, dim=-1)
        features = self.upscale(rearrange(patches, "b (h w) d -> b d h w", h=grid[0], w=grid[1]))  # [B, D, 4h, 4w]
        logits = einsum(features, query, "b d h w, b d -> b h w")
        return F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]  # [B, H, W]


class MedCLIPSeg(nn.Module, ModelHubMixin):
    """Text-guided segmentation with uncertainty, on any CLIP that `inject_adapters` has joined.

    `origin` says where a loaded model comes from: repository, file, hash, training data.

    Args:
        clip: An injected model; it becomes a submodule.
        config: Of head and preprocessing; None means the defaults.
        tokenizer: Turns a list of sentences into token ids [B, L] or into the mapping a Hugging Face tokenizer
            returns. None finds the host's own when a sentence is first given.

    Raises:
        ValueError: If `clip` has no adapters.
    """

    def __init__(
        self, clip: nn.Module, *, config: MedCLIPSegConfig | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        super().__init__()
        lockstep = lockstep_of(clip)
        self.config = MedCLIPSegConfig() if config is None else config
        self.clip = clip
        self.tokenizer = tokenizer
        self.origin: dict[str, Any] = {}
        dim = lockstep.towers.joint_width(clip)
        if dim is None:
            raise ValueError(
                f"{type(clip).__name__} has no way to bring single patches into the space of its sentences, so it "
                "cannot be segmented with; take a CLIP whose image tower projects its tokens"
            )
        reference = next(lockstep.adapter(0).parameters())
        self.head = PixelHead(dim, num_upscale=self.config.num_upscale).to(reference.device, reference.dtype)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images the network takes."""
        return lockstep_of(self.clip).towers.image.image_size(self.clip)

    @property
    def device(self) -> torch.device:
        return next(self.head.parameters()).device

    def forward(
        self,
        image: Tensor,
        text: Prompts,
        *,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        noise: Sequence[NoisePair] | None = None,
    ) -> SegmentationOutput:
        """Logits for image and sentence pairs.

        Args:
            image: [B, 3, H, W], prepared by `prepare`.
            text: One sentence per image, or their token ids.
            sample: Draw the adapters' values; None draws in train mode only.
            generator: Source of the draws, if `sample` is given.
            noise: The draws themselves, one pair per adapter; implies `sample=True`.
        """
        joint = encode(self.clip, image, self.tokenize(text), sample=sample, generator=generator, noise=noise)
        patch_tokens = cast(Tensor, joint.patch_tokens)  # seen to in __init__
        size = (image.shape[-2], image.shape[-1])
        dtype = next(self.head.parameters()).dtype
        logits = self.head(patch_tokens.to(dtype), joint.text_embeds.to(dtype), grid=joint.grid, size=size)
        return SegmentationOutput(logits=logits, patch_tokens=patch_tokens, text_embeds=joint.text_embeds)

    def prepare(self, pictures: Pictures) -> Tensor:
        """Pictures as the network takes them, [B, 3, H, W] on the model's device; see `prepare_images`."""
        tower, config = lockstep_of(self.clip).towers.image, self.config
        mean, std = tower.normalization(self.clip)
        images = prepare_images(
            pictures,
            size=self.image_size,
            mean=config.image_mean or mean,
            std=config.image_std or std,
            channel_order=config.channel_order,
            resize=config.resize,
        )
        return images.to(self.device, next(tower.blocks(self.clip).parameters()).dtype)

    def tokenize(self, text: Prompts) -> Tensor | dict[str, Tensor]:
        """Token ids of sentences, on the model's device; ids are passed through.

        Raises:
            ValueError: If `text` holds sentences and no tokenizer was given or found.
        """
        if isinstance(text, Tensor):
            return text.to(self.device)
        if isinstance(text, Mapping):
            return {name: ids.to(self.device) for name, ids in text.items()}
        if self.tokenizer is None:
            self.tokenizer = find_tokenizer(self.clip)
        fixed = self.config.context_length
        length = fixed or lockstep_of(self.clip).towers.text.context_length(self.clip)
        sentences = [text] if isinstance(text, str) else list(text)
        return self.tokenize(
            tokenize(self.tokenizer, sentences, context_length=length, pad_to_context=fixed is not None)
        )

    @torch.no_grad()
    def predict(
        self,
        image: Pictures,
        text: Prompts,
        *,
        num_samples: int = 30,
        threshold: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """Segment what a sentence describes, and say where the model hesitates.

        Runs in eval mode and leaves every train mode as it was.

        Args:
            image: A picture or several (path, PIL image, array), or a prepared float tensor [B, 3, H, W].
            text: One sentence per image, or their token ids.
            num_samples: Stochastic passes S.
            threshold: Probability above which a pixel belongs to the mask.
            generator: Source of the draws, on the model's device.

        Returns:
            Maps at the network's image size.

        Raises:
            ValueError: If `num_samples` is below 1, or the inputs are not what the model takes.
        """
        images, tokens = self.prepare(image), self.tokenize(text)
        if not torch.isfinite(images).all():
            raise ValueError("image holds NaN or infinite values, expected finite numbers")
        with eval_mode(self):
            return monte_carlo(
                lambda: self(images, tokens, sample=True, generator=generator).logits,
                num_samples=num_samples,
                threshold=threshold,
            )

    @classmethod
    def from_pretrained(cls, repo_or_folder: str | os.PathLike[str], **kwargs: Any) -> MedCLIPSeg:  # type: ignore[override]
        """Load a trained segmenter; see `pvl_adapter.from_pretrained`."""
        from pvl_adapter.hub.loading import from_pretrained

        return from_pretrained(repo_or_folder, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        whole: bool = True,
        model_card_kwargs: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a folder that `from_pretrained` loads: safetensors, configuration, tokenizer and model card.

        Args:
            save_directory: Made if it is missing. Everything is written elsewhere first: a failure leaves it as it was.
            whole: Write the frozen CLIP too, so that the folder needs nothing else; otherwise adapters and head only,
                with a note of which CLIP they belong to.
            model_card_kwargs: For the model card: `intended_use`, `training_data` (sentences) and `scores` (figures by
                name).
            config: As `push_to_hub` hands it on: `{"whole": ...}`.

        Returns:
            The folder.

        Raises:
            ValueError: If the whole is wanted and the CLIP does not tell what it is; see `load_backbone`.
        """
        from pvl_adapter.hub.bundle import save_bundle

        whole = whole if config is None else bool(config["whole"])
        return save_bundle(self, save_directory, whole=whole, card=model_card_kwargs)

    def push_to_hub(self, repo_id: str, *, whole: bool = True, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes, in one commit.

        Args:
            repo_id: `owner/name`, made if it does not exist.
            whole: See `save_pretrained`.
            kwargs: Those of `huggingface_hub.ModelHubMixin.push_to_hub` (`private`, `token`, `commit_message`,
                `model_card_kwargs`, ...).

        Returns:
            Address of the commit.
        """
        return super().push_to_hub(repo_id, config={"whole": whole}, **kwargs)
