"""One training step: the released way against ours, and what each measure brings, in one run.

    python benchmarks/training_step.py      # 6 minutes on 2 cores, 6 GiB; writes results/training_step.json

The published configuration at full size with random weights, batch 8. The released way: float32, every prompt padded to
256 tokens, torch's own attention layers. Ours, measure by measure: attention with its tokens in one order throughout;
padding left out where nobody reads it, which is all that the released weights allow; padding masked in the adapters, as
new models do, so that none of it is computed (prompts have 15 tokens here, as on average); the frozen CLIP in bfloat16
and autocast for adapters and head; gradient checkpointing if wanted. Frozen blocks before the first adapter record no
gradients in any of them.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from contextlib import nullcontext

import torch
from harness import peak_memory, side_by_side, write
from released import image_and_prompt, released_network

import pvl_adapter as pvl
import pvl_adapter.joint_run as joint_run_module
import pvl_adapter.lockstep as lockstep_module
from pvl_adapter.hub.checkpoint_folder import cast
from pvl_adapter.lockstep import lockstep_of

BATCH = 8
REPEATS = 2


def step_of(
    model: pvl.MedCLIPSeg,
    *,
    ordered: bool = True,
    spared: bool = True,
    masked: bool = False,
    low: bool = False,
    checkpointing: bool = False,
) -> Callable[[], float]:
    """One forward and backward pass; gradients are dropped again, as the optimiser's state is the same for all."""
    image, text = image_and_prompt(BATCH)
    image = image.to(torch.bfloat16 if low else torch.float32)
    attention, real_tokens = lockstep_module.batch_first_attention, joint_run_module.real_tokens
    target = (torch.randn(BATCH, 224, 224, generator=torch.Generator().manual_seed(0)) > 0).float()
    loss = pvl.SegmentationLoss()
    config = lockstep_of(model.clip).config

    def step() -> float:
        lockstep = lockstep_of(model.clip)
        lockstep.config = dataclasses.replace(config, mask_padding=masked, gradient_checkpointing=checkpointing)
        lockstep_module.batch_first_attention = attention if ordered else nullcontext
        joint_run_module.real_tokens = real_tokens if spared else lambda token_mask: None
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = model(image, text)
        terms = loss(out.logits.float(), target, patch_tokens=out.patch_tokens, text_embeds=out.text_embeds)
        terms.total.backward()
        model.zero_grad(set_to_none=True)
        gc.collect()
        return terms.total.item()

    return step


def main() -> None:
    exact, low = released_network(), released_network()
    cast(low, device=None, dtype=torch.bfloat16)
    ways = {
        "released": step_of(exact, ordered=False, spared=False),
        "attention": step_of(exact, spared=False),
        "attention_spared": step_of(exact),
        "attention_masked": step_of(exact, masked=True),
        "attention_masked_bfloat16": step_of(low, masked=True, low=True),
        "attention_masked_bfloat16_checkpointing": step_of(low, masked=True, low=True, checkpointing=True),
    }
    seconds = side_by_side(ways, repeats=REPEATS)
    memory = {name: peak_memory(step) / 2**20 for name, step in ways.items()}
    torch.manual_seed(0)
    losses = {}
    for name, step in ways.items():
        torch.manual_seed(0)
        losses[name] = step()
    write(
        "training_step",
        {
            "weights": "random",
            "batch": BATCH,
            "seconds": seconds,
            "times_faster": {name: seconds["released"] / value for name, value in seconds.items()},
            "peak_mib_above_the_model": memory,
            "share_of_memory": {name: value / memory["released"] for name, value in memory.items()},
            "loss": losses,
        },
    )


if __name__ == "__main__":
    main()
