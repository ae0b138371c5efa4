"""Runs the samples of a prediction: both towers once up to the first adapter, then as many rows at a time as fit.

Under `torch.autocast` the samples are computed in its type. One mean pass in float32 and one in that type tell what
rounding does to the logits. Samples are shifted by half of it, since their rounding is only partly that of the mean
pass, and the other half goes into the error bar.

Shape alphabet: B batch, s b samples and images of one chunk, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from pvl_adapter.joint import SharedPrefix, eval_mode
from pvl_adapter.kernels import batch_first_attention, fast_linears, usable_dtype, warn_of_slow_bfloat16
from pvl_adapter.lockstep import lockstep_of
from pvl_adapter.monte_carlo import MonteCarlo, MonteCarloConfig
from pvl_adapter.noise import MEAN, Draws, NoiseFn, on_device, seeded_noise
from pvl_adapter.wrappers import gathered

if TYPE_CHECKING:
    from pvl_adapter.image_part import ImagePart
    from pvl_adapter.segmentation import MedCLIPSeg

_TENSORS_OF_A_BLOCK = 14  # about as many at once as wide as the tokens: their fourfold inner layer, queries, keys, ...
_TENSORS_OF_THE_HEAD = 8  # at the upscaled resolution, with those of the convolutions' own
_CPU_BUDGET = 320 * 2**20  # four samples of the published network: more do not fit the caches and are slower


def run_samples(
    model: MedCLIPSeg,
    part: ImagePart,
    tokens: Tensor | Mapping[str, Tensor],
    *,
    config: MonteCarloConfig,
    seed: int,
    memory_budget: int | None,
    keep: bool,
    prefixes: dict[bool, SharedPrefix] | None = None,
) -> MonteCarlo:
    """Compute the samples of a batch.

    Args:
        model: In whatever mode, in which it is left.
        part: B images, or one for all sentences.
        tokens: Of B sentences.
        config: How many samples.
        seed: Of their noise.
        memory_budget: Bytes that the samples of one forward may take; None as `MedCLIPSeg.predict` says.
        keep: Keep the samples.
        prefixes: What several calls for the same inputs share: kept here by the first, taken from here by the others.

    Raises:
        ValueError: If the inputs are not what the model takes.
    """
    images, size = part.pixels, (part.pixels.shape[-2], part.pixels.shape[-1])
    prefixes = {} if prefixes is None else prefixes

    def prefix_of(rounded: bool) -> SharedPrefix:
        if rounded not in prefixes:
            prefixes[rounded] = SharedPrefix(model.clip, images, tokens, known=part.prefixes, kernels=(dtype, rounded))
        return prefixes[rounded]

    with predicting(model) as rounded:
        dtype = torch.get_autocast_dtype(model.device.type) if rounded else None
        prefix = prefix_of(rounded)
        noise_fn = _noise_fn(model, prefix, part.keys, seed=seed, draws=config.draws)
        rows = fitting_rows(model, prefix, memory_budget)
        monte_carlo = MonteCarlo(shape=(prefix.batch, *size), device=images.device, config=config, rows=rows, keep=keep)
        shift = None
        if rounded and config.num_samples != 0:
            shift = -_mean_logits(model, prefix, rows=rows, size=size) / 2  # [B, H, W]
            with torch.autocast(model.device.type, enabled=False), fast_linears(model):
                shift += _mean_logits(model, prefix_of(False), rows=rows, size=size) / 2
            monte_carlo.statistics.rounding = shift
        while (chunk := monte_carlo.next_chunk()) is not None:
            try:
                noise = None if chunk.samples == range(MEAN, 0) else noise_fn(chunk.images, chunk.samples)
                joint = prefix.encode([pair for _ in chunk.samples for pair in chunk.images], noise=noise)
                logits = model.pixel_logits(joint, size=size)
            except (RuntimeError, MemoryError) as error:
                monte_carlo.shrink(chunk, error)
                continue
            logits = rearrange(logits, "(s b) h w -> s b h w", b=len(chunk.images)).float()
            features = torch.cat([joint.likeness(), joint.summary()], dim=-1)  # [R, 3 + 2 D]
            monte_carlo.statistics.add_features(
                chunk.images, rearrange(features, "(s b) d -> s b d", s=len(chunk.samples))
            )
            monte_carlo.add(chunk, logits if shift is None else logits + shift[on_device(chunk.images, shift.device)])
    return monte_carlo


@contextmanager
def predicting(model: MedCLIPSeg) -> Iterator[bool]:
    """Inside, the model is in eval mode, other threads' runs wait, and linear layers take the fastest way.

    Yields whether samples are computed in autocast's type.
    """
    device = model.device.type
    with lockstep_of(model.clip).exclusive(), eval_mode(model), gathered(model):
        warn_of_slow_bfloat16(model)
        if not torch.is_autocast_enabled(device):
            with fast_linears(model):
                yield False
        elif usable_dtype(torch.get_autocast_dtype(device), device) == torch.float32:
            with torch.autocast(device, enabled=False), fast_linears(model):
                yield False
        else:
            with batch_first_attention():
                yield True


def _mean_logits(model: MedCLIPSeg, prefix: SharedPrefix, *, rows: int, size: tuple[int, int]) -> Tensor:
    """Logits of the mean pass, [B, H, W], float32, at most `rows` at a time."""
    return torch.cat([model.pixel_logits(joint, size=size).float() for joint in prefix.mean_passes(rows)])


def _noise_fn(model: MedCLIPSeg, prefix: SharedPrefix, keys: Tensor, *, seed: int, draws: Draws) -> NoiseFn:
    lockstep = lockstep_of(model.clip)
    return seeded_noise(
        seed=seed,
        images=keys,
        adapters=len(lockstep.points) if lockstep.local.enabled else 0,
        vision_shape=(prefix.prefix.image.tokens, lockstep.config.dim),
        text_shape=(prefix.prefix.text.tokens, lockstep.config.dim),
        draws=draws,
    )


def fitting_rows(model: MedCLIPSeg, prefix: SharedPrefix, memory_budget: int | None) -> int:
    """How many samples of one pair fit the budget, by the largest tensors of a block and of the upscaler."""
    lockstep, found = lockstep_of(model.clip), prefix.prefix
    widths = [tower.width(model.clip) for tower in (lockstep.towers.image, lockstep.towers.text)]
    tokens = max(found.image.tokens * widths[0], found.text.tokens * widths[1])
    features = found.image.tokens * 4 ** len(model.head.upscale) * model.head.dim
    noise = len(lockstep.points) * (found.image.tokens + found.text.tokens) * lockstep.config.dim
    size = next(model.head.parameters()).element_size()
    per_row = size * (_TENSORS_OF_A_BLOCK * tokens + _TENSORS_OF_THE_HEAD * features) + 4 * noise
    if memory_budget is None:
        on_gpu = model.device.type == "cuda"
        memory_budget = torch.cuda.mem_get_info(model.device)[0] // 2 if on_gpu else _CPU_BUDGET
    return max(1, int(memory_budget // per_row))
