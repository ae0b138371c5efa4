"""MedCLIPSeg: text-guided segmentation with uncertainty, on two joined CLIP towers and a pixel head.

Implements the segmentation model of MedCLIPSeg (arXiv 2602.20423; github HealthX-Lab/MedCLIPSeg, commit 8d7ef36).

Shape alphabet: B batch, S samples, N patches, L text tokens, D joint width, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from pvl_adapter.adapter import NoisePair
from pvl_adapter.config import MedCLIPSegConfig, is_int, require
from pvl_adapter.ensemble import Weights, sample_members
from pvl_adapter.head import PixelHead
from pvl_adapter.image_part import ImagePart
from pvl_adapter.images import Images, prepare_images, to_pil
from pvl_adapter.joint import JointFeatures, encode
from pvl_adapter.lockstep import lockstep_of
from pvl_adapter.monte_carlo import NUM_SAMPLES, Auto, MonteCarloConfig
from pvl_adapter.prediction import Prediction
from pvl_adapter.tokenization import Tokenizer, find_tokenizer, tokenize
from pvl_adapter.trust.calibration import sampling_arguments, with_promises

if TYPE_CHECKING:
    from pvl_adapter.distilled_head import DistilledHead
    from pvl_adapter.trust.calibration import Calibration

Prompts = str | Sequence[str] | Tensor | Mapping[str, Tensor]
"""Sentences, token ids [B, L], or the mapping a Hugging Face tokenizer returns."""


class SegmentationOutput(NamedTuple):
    """Logits of a batch, with what the losses need besides.

    Attributes:
        logits: [B, H, W], at the size of the images.
        patch_tokens: [B, N, D], not normalised.
        text_embeds: [B, D], not normalised.
        kl: As in `JointFeatures`, if asked for.
    """

    logits: Tensor
    patch_tokens: Tensor
    text_embeds: Tensor
    kl: Tensor | None = None


class MedCLIPSeg(nn.Module, ModelHubMixin):
    """Text-guided segmentation with uncertainty, on any CLIP that `inject_adapters` has joined.

    `provenance` says where a loaded model comes from: repository, file, hash, training data.

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
        self.distilled: DistilledHead | None = None  # see `pvl_adapter.distill`
        self.calibration: Calibration | None = None  # see `pvl_adapter.trust.calibrate`
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
        kl: bool = False,
    ) -> SegmentationOutput:
        """Logits for image and sentence pairs.

        Args:
            image: [B, 3, H, W], prepared by `prepare`.
            text: One sentence per image, or their token ids.
            sample: Sample the adapters' values; None samples in train mode only.
            generator: Source of the noise, if `sample` is given.
            noise: The noise itself, one pair per adapter; implies `sample=True`.
            kl: Compute the KL divergence of the adapters' values too, for `SegmentationLoss`.
        """
        tokens = self.tokenize(text)
        with lockstep_of(self.clip).exclusive():
            joint = encode(
                self.clip, image, tokens, sample=sample, generator=generator, noise=noise, text_tokens=False, kl=kl
            )
            return SegmentationOutput(
                logits=self.pixel_logits(joint, size=(image.shape[-2], image.shape[-1])),
                patch_tokens=cast(Tensor, joint.patch_tokens),  # seen to in __init__
                text_embeds=joint.text_embeds,
                kl=joint.kl,
            )

    def pixel_logits(self, joint: JointFeatures, *, size: tuple[int, int]) -> Tensor:
        """Logits [B, H, W] from joint features, at a size in pixels."""
        dtype = next(self.head.parameters()).dtype
        patch_tokens, text_embeds = cast(Tensor, joint.patch_tokens).to(dtype), joint.text_embeds.to(dtype)
        return self.head(patch_tokens, text_embeds, grid=joint.grid, size=size)  # [B, H, W]

    def prepare(self, images: Images) -> Tensor:
        """Images as the network takes them, [B, 3, H, W] on the model's device; see `prepare_images`.

        Raises:
            ValueError: If something is no image, or how to normalise it is not known.
        """
        tower, config = lockstep_of(self.clip).towers.image, self.config
        mean, std = tower.normalization(self.clip) or (None, None)
        mean, std = config.image_mean or mean, config.image_std or std
        if mean is None or std is None:
            raise ValueError(
                f"how images are normalised for this {type(self.clip).__name__} is not known: its weights do not tell, "
                "and no processor is saved beside them; say it as MedCLIPSeg(clip, config=MedCLIPSegConfig("
                "image_mean=(...), image_std=(...)))"
            )
        prepared = prepare_images(
            images,
            size=self.image_size,
            mean=mean,
            std=std,
            channel_order=config.channel_order,
            resize=config.resize,
        )
        return self._placed(prepared)

    def _placed(self, images: Tensor) -> Tensor:
        blocks = lockstep_of(self.clip).towers.image.blocks(self.clip)
        return images.to(self.device, next(blocks.parameters()).dtype)

    @torch.no_grad()
    def image_part(self, image: Images, *, prepared: bool = False) -> ImagePart:
        """Images to ask several sentences about, one after the other: `predict(part, text)` gives to the last bit what
        `predict(image, text)` does, and neither opens them nor runs the image tower up to the first adapter again.

        It is good for this model as long as no weight is changed or moved; `predict` refuses it afterwards.

        Args:
            image: As for `predict`.
            prepared: Likewise.

        Raises:
            ValueError: As `predict` does for images.
        """
        if prepared and not (isinstance(image, Tensor) and image.ndim == 4 and image.is_floating_point()):
            raise ValueError(
                "prepared=True is for a float tensor [batch, 3, height, width] that model.prepare has made"
            )
        images = () if prepared else to_pil(image)  # opened once
        pixels = self._placed(image) if isinstance(image, Tensor) and prepared else self.prepare(images)
        with lockstep_of(self.clip).exclusive():
            return ImagePart(pixels, images).bind(self)

    def tokenize(self, text: Prompts) -> Tensor | dict[str, Tensor]:
        """Token ids of sentences, on the model's device; ids are passed through.

        Raises:
            ValueError: If `text` holds no sentences, or no tokenizer was given or found.
        """
        if isinstance(text, Tensor):
            return text.to(self.device)
        if isinstance(text, Mapping):
            return {name: ids.to(self.device) for name, ids in text.items()}
        sentences = [text] if isinstance(text, str) else text
        if self.tokenizer is None:
            self.tokenizer = find_tokenizer(self.clip)
        fixed = self.config.context_length
        length = fixed or lockstep_of(self.clip).towers.text.context_length(self.clip)
        return self.tokenize(
            tokenize(
                self.tokenizer,
                sentences,
                context_length=length,
                pad_to_context=fixed is not None,
                clean=self.config.clean_prompts,
            )
        )

    @torch.no_grad()
    def predict(
        self,
        image: Images | ImagePart,
        text: Prompts,
        *,
        num_samples: int | Auto | Literal["distilled"] = NUM_SAMPLES,
        threshold: float = 0.5,
        seed: int | torch.Generator = 0,
        antithetic: bool = True,
        prepared: bool = False,
        memory_budget: int | None = None,
        return_samples: bool = False,
        members: Sequence[Weights] = ({},),
    ) -> Prediction:
        """Segment what a sentence describes, and say where the model hesitates.

        Runs in eval mode and leaves every train mode as it was. What comes before the first adapter is computed once
        for all samples. The same call gives the same answer: an image's samples depend on `seed` and its own content,
        not on the images beside it, on memory or on the device (but for rounding). Calls from several threads wait for
        one another.

        Args:
            image: An image or several: path, PIL image, array or tensor, of 8 bits or float in [0, 1]; or what
                `image_part` has made of them.
            text: One sentence per image, several sentences for a single image, or their token ids.
            num_samples: Stochastic passes S; 0 is one deterministic pass with the adapters' mean values; `Auto` adds
                pairs of passes until the probability is known well enough; "distilled" takes one pass and the head that
                `pvl_adapter.distill` has taught, and samples what that head doubts.
            threshold: Probability above which a pixel belongs to the mask.
            seed: Of the noise: a number, or a generator whose next number is taken.
            antithetic: Take a few samples in pairs of opposite noise, which tell the mean best, and take a pixel's
                logit for normal over samples (error_bars.py). False averages independent samples, as released.
            prepared: `image` is a tensor [B, 3, H, W] that `prepare` has made.
            memory_budget: Bytes that the samples of one forward may take, besides the model; None means 320 MiB on
                the CPU and half of what is free on a GPU. Where it proves too much, fewer samples are taken at a time.
            return_samples: Keep every sample's probabilities in the result.
            members: Of a deep ensemble, see `Ensemble`.

        Returns:
            Maps at the network's image size.

        Raises:
            ValueError: If an argument is out of range, the inputs are not what the model takes, or the network's output
                holds NaN.
        """
        distilled = num_samples == "distilled"
        config = MonteCarloConfig(NUM_SAMPLES if num_samples == "distilled" else num_samples, antithetic)
        if distilled and (return_samples or len(members) > 1):
            raise ValueError(
                "a distilled prediction has no samples to return, and no members; ask for a number of samples"
            )
        is_probability = isinstance(threshold, (int, float)) and 0.0 <= threshold <= 1.0
        require(is_probability, "threshold", threshold, "a probability between 0 and 1")
        if isinstance(seed, torch.Generator):
            seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
        require(is_int(seed) and seed >= 0, "seed", seed, "an integer, 0 or more, or a torch.Generator")
        is_budget = memory_budget is None or (is_int(memory_budget) and memory_budget > 0)
        require(is_budget, "memory_budget", memory_budget, "a positive number of bytes, or None")
        part = image if isinstance(image, ImagePart) else self.image_part(image, prepared=prepared)
        tokens = self.tokenize(text)
        how: dict[str, Any] = {"threshold": threshold, "memory_budget": memory_budget}
        more: dict[str, Any] = {"members": members, "seed": seed, "config": config, "keep": return_samples}
        sampled = partial(sample_members, self, part, tokens, **how, **more)
        with lockstep_of(self.clip).exclusive():  # another thread's ensemble swaps weights, which are looked at here
            part.check(self)
            if distilled:
                from pvl_adapter.distilled_head import predict_in_one_pass

                found = predict_in_one_pass(self, part, tokens, **how, sample=sampled)
            else:
                found = sampled()
            texts = () if isinstance(text, (Tensor, Mapping)) else (text,) if isinstance(text, str) else tuple(text)
            looks = part.appearance.expand(len(found.mask), -1)
            found = replace(found, images=part.images, texts=texts, appearance=looks)
            arguments = sampling_arguments(num_samples=num_samples, antithetic=antithetic, threshold=threshold)
            return found if len(members) > 1 else with_promises(self, found, tokens, arguments)

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
