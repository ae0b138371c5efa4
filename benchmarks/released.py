"""The published network at full size with random weights, and the authors' way of predicting with it."""

from __future__ import annotations

import torch
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.hub.official import load_meta_state

PROMPT_TOKENS = 15  # of a prompt, on average; the rest of 256 is padding, which the published weights read


def released_network(*, seed: int = 0) -> pvl.MedCLIPSeg:
    """The network in eval mode; weights are normal with deviation 0.02 and norms 1, so activations stay in range."""
    generator = torch.Generator().manual_seed(seed)
    model = pvl.OfficialConfig().build()
    tensors = {}
    for name, like in model.state_dict().items():
        is_norm_weight = like.ndim == 1 and name.endswith("weight")
        tensors[name] = (
            torch.ones(like.shape) if is_norm_weight else 0.02 * torch.randn(like.shape, generator=generator)
        )
    load_meta_state(model, tensors, source="here")
    return model


def image_and_prompt(batch: int = 1, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Prepared images [B, 3, 224, 224] and token ids [B, 256], padded."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.zeros(batch, 256, dtype=torch.long)
    text[:, :PROMPT_TOKENS] = torch.randint(1, 30522, (batch, PROMPT_TOKENS), generator=generator)
    return torch.randn(batch, 3, 224, 224, generator=generator), text


@torch.no_grad()
def predict_as_released(model: pvl.MedCLIPSeg, image: Tensor, text: Tensor, *, num_samples: int = 30) -> Tensor:
    """Mean probability [B, H, W] as the authors do: one pass thrown away, then pass after pass, all logits kept."""

    def one_pass() -> Tensor:
        joint = pvl.encode(model.clip, image, text, sample=True)  # all of both towers
        return model.head(joint.patch_tokens, joint.text_embeds, grid=joint.grid, size=image.shape[-2:])

    one_pass()
    logits = [one_pass() for _ in range(num_samples)]
    return torch.stack(logits).sigmoid().mean(dim=0)
