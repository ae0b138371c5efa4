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
from pvl_adapter.check_blocks import eval_mode
from pvl_adapter.config import MedCLIPSegConfig
from pvl_adapter.images import Pictures, prepare_images, to_pil
from pvl_adapter.injection import JointFeatures, SharedStart, encode
from pvl_adapter.kernels import fast_linears
from pvl_adapter.lockstep import Draw as AdapterDraw
from pvl_adapter.lockstep import lockstep_of
from pvl_adapter.monte_carlo import MonteCarloConfig, NoiseFn, given_noise, image_number, monte_carlo, seeded_noise
from pvl_adapter.prediction import Prediction
from pvl_adapter.tokenization import Tokenizer, find_tokenizer, tokenize

_TENSORS_OF_A_BLOCK = 14  # about as many at once as wide as the tokens: their fourfold inner layer, queries, keys, ...
_TENSORS_OF_THE_HEAD = 4
_CPU_BUDGET = 160 * 2**20  # four samples of the published network: more do not fit the caches and are slower

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
        self.provenance: dict[str, Any] = {}
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
    def context_length(self) -> int | None:
        """Tokens of a sentence that the text tower takes at most; None without a limit."""
        return lockstep_of(self.clip).towers.text.context_length(self.clip)

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
        tokens = self.tokenize(text)
        joint = encode(self.clip, image, tokens, sample=sample, generator=generator, noise=noise)
        return SegmentationOutput(
            logits=self._logits(joint, size=(image.shape[-2], image.shape[-1])),
            patch_tokens=cast(Tensor, joint.patch_tokens),  # seen to in __init__
            text_embeds=joint.text_embeds,
        )

    def _logits(self, joint: JointFeatures, *, size: tuple[int, int]) -> Tensor:
        dtype = next(self.head.parameters()).dtype
        patch_tokens, text_embeds = cast(Tensor, joint.patch_tokens).to(dtype), joint.text_embeds.to(dtype)
        return self.head(patch_tokens, text_embeds, grid=joint.grid, size=size)  # [B, H, W]

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

        Padding that all of a batch has is cut off where it changes nothing: it costs as much as words.

        Raises:
            ValueError: If `text` holds sentences and no tokenizer was given or found.
        """
        if isinstance(text, Tensor):
            return self._without_padding(text).to(self.device)
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

    def _without_padding(self, ids: Tensor) -> Tensor:
        """[B, L] cut to the longest sentence, where neither towers nor adapters look at padding."""
        lockstep = lockstep_of(self.clip)
        tower = lockstep.towers.text
        looking = not lockstep.config.mask_padding or not tower.ignores_padding(self.clip)
        if looking or ids.device.type != "cpu" or ids.ndim != 2 or not ids.numel():  # a GPU would have to wait
            return ids
        real = tower.token_mask(self.clip, {tower.key: ids}).any(dim=0)  # [L]
        return ids[:, : max(1, int((real * torch.arange(1, len(real) + 1)).max()))]

    @torch.no_grad()
    def predict(
        self,
        image: Pictures,
        text: Prompts,
        *,
        num_samples: int | str = 30,
        threshold: float = 0.5,
        seed: int = 0,
        generator: torch.Generator | None = None,
        noise: Sequence[NoisePair] | None = None,
        antithetic: bool = True,
        tolerance: float = 0.01,
        percentile: float = 99.0,
        max_samples: int = 128,
        memory_budget: int | None = None,
        return_samples: bool = False,
    ) -> Prediction:
        """Segment what a sentence describes, and say where the model hesitates.

        Runs in eval mode and leaves every train mode as it was. What comes before the first adapter is computed once
        for all samples. The same call gives the same answer: an image's samples depend on `seed` and its own content,
        not on the images beside it, on memory or on the device (but for rounding).

        Args:
            image: A picture or several (path, PIL image, array, tensor), or a prepared float tensor [B, 3, H, W].
            text: One sentence per image, several sentences for a single image, or their token ids.
            num_samples: Stochastic passes S; 0 is one deterministic pass with the adapters' mean values; "auto" adds
                pairs of passes to each image until `percentile` percent of its pixels have a standard error of the
                probability below `tolerance`, or `max_samples` is reached.
            threshold: Probability above which a pixel belongs to the mask.
            seed: Of the draws.
            generator: Gives its next number as seed.
            noise: The draws themselves, instead of `seed` and `antithetic`: for each adapter the text values'
                [S, B, L, C] and the image values' [S, B, V, C].
            antithetic: Draw in pairs, each the other's negative: far fewer samples give the same error. An odd last
                sample has no partner.
            tolerance: For "auto".
            percentile: For "auto".
            max_samples: For "auto".
            memory_budget: Bytes that the samples of one forward may take, besides the model; None means 160 MiB on
                the CPU and half of what is free on a GPU. Where it proves too much, fewer samples are taken at a time.
            return_samples: Keep every sample's probabilities in the result.

        Returns:
            Maps at the network's image size.

        Raises:
            ValueError: If an argument is out of range, or the inputs are not what the model takes.
        """
        sampling = MonteCarloConfig(num_samples, antithetic and noise is None, tolerance, percentile, max_samples)
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold is {threshold}, expected a probability between 0 and 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or more")
        if generator is not None:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        pictures = to_pil(image)  # opened once
        images, tokens = self.prepare(pictures or image), self.tokenize(text)
        if not torch.isfinite(images).all():
            raise ValueError("image holds NaN or infinite values, expected finite numbers")
        with eval_mode(self), fast_linears(self):
            start = SharedStart(self.clip, images, tokens)
            noise_of = self._noise(start, images, sampling, seed=seed, noise=noise)

            def draw(pairs: Sequence[int], samples: Sequence[int]) -> Tensor:
                drawn = noise_of(pairs, samples) if sampling.num_samples else None  # else the mean pass
                rows = [pair for _ in samples for pair in pairs]
                joint = start.encode(rows, draw=AdapterDraw(sample=drawn is not None, noise=drawn))
                logits = self._logits(joint, size=(images.shape[-2], images.shape[-1]))
                return rearrange(logits, "(s b) h w -> s b h w", b=len(pairs))

            statistics, kept = monte_carlo(
                draw,
                batch=start.batch,
                sampling=sampling,
                rows=self._rows(start, memory_budget),
                keep=return_samples,
            )
        return Prediction.from_statistics(statistics, threshold=threshold, samples=kept, pictures=pictures)

    def _noise(
        self,
        start: SharedStart,
        images: Tensor,
        sampling: MonteCarloConfig,
        *,
        seed: int,
        noise: Sequence[NoisePair] | None,
    ) -> NoiseFn:
        lockstep = lockstep_of(self.clip)
        width, adapters = lockstep.config.dim, len(lockstep.points)
        text_shape, vision_shape = (start.state.text_tokens, width), (start.state.image_tokens, width)
        if noise is not None:
            return given_noise(
                noise,
                num_samples=sampling.num_samples,
                batch=start.batch,
                adapters=adapters,
                text_shape=text_shape,
                vision_shape=vision_shape,
            )
        return seeded_noise(
            seed=seed,
            images=[image_number(image) for image in images.expand(start.batch, -1, -1, -1)],
            adapters=adapters,
            text_shape=text_shape,
            vision_shape=vision_shape,
            antithetic=sampling.antithetic,
            device=self.device,
        )

    def _rows(self, start: SharedStart, memory_budget: int | None) -> int:
        """How many samples of one pair fit the budget, by the largest tensors of a block and of the upscaler."""
        towers = lockstep_of(self.clip).towers
        tokens = max(
            start.state.image_tokens * towers.image.width(self.clip),
            start.state.text_tokens * towers.text.width(self.clip),
        )
        features = start.state.image_tokens * 4 ** len(self.head.upscale) * self.head.dim
        per_row = 4 * (_TENSORS_OF_A_BLOCK * tokens + _TENSORS_OF_THE_HEAD * features)
        if memory_budget is None:
            on_gpu = self.device.type == "cuda"
            memory_budget = torch.cuda.mem_get_info(self.device)[0] // 2 if on_gpu else _CPU_BUDGET
        return max(1, int(memory_budget // per_row))

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
        from pvl_adapter.hub.checkpoint_folder import save_checkpoint_folder

        whole = whole if config is None else bool(config["whole"])
        return save_checkpoint_folder(self, save_directory, whole=whole, card=model_card_kwargs)

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
