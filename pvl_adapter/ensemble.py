"""Deep ensembles: several trained sets of adapters and pixel heads over one frozen CLIP.

Lakshminarayanan, Pritzel and Blundell, 2017 (arXiv 1612.01474). Each member draws its own samples. The maps are those
of the even mixture of members, so the epistemic one holds what members disagree about too.

Shape alphabet: B batch, M members, S samples, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pvl_adapter.engine import run_samples
from pvl_adapter.error_bars import NormalLogits
from pvl_adapter.lockstep import lockstep_of
from pvl_adapter.monte_carlo import MonteCarloConfig
from pvl_adapter.prediction import Prediction
from pvl_adapter.sample_statistics import binary_entropy

if TYPE_CHECKING:
    from pvl_adapter.image_part import ImagePart
    from pvl_adapter.segmentation import MedCLIPSeg

Weights = Mapping[str, Tensor]
"""Trained weights by their names in `MedCLIPSeg`; none of them stand for the model's own."""

_Result = TypeVar("_Result")


class Ensemble:
    """Predicts with several models that share one frozen CLIP, of which there is one copy in memory.

    Args:
        models: Trained models, or what `from_pretrained` takes. The first holds the CLIP and the preprocessing, of the
            others adapters and pixel head alone are kept.

    Attributes:
        model: The first model; move it to another device, and the ensemble follows.
        members: The weights of each member, the first one's being the model's own.

    Raises:
        ValueError: If there is none, or one has another CLIP or other settings than the first.
    """

    def __init__(self, models: Sequence[MedCLIPSeg | str | os.PathLike[str]]) -> None:
        from pvl_adapter.hub.checkpoint_folder import member_weights
        from pvl_adapter.hub.loading import from_pretrained

        if not models or isinstance(models, (str, os.PathLike)):
            raise ValueError(f"models is {models!r}, expected a list of trained models or of their folders")
        first = models[0]
        self.model = from_pretrained(first) if isinstance(first, (str, os.PathLike)) else first
        self.members: list[Weights] = [{}, *member_weights(models[1:], like=self.model)]

    def predict(self, image: Any, text: Any, **settings: Any) -> Prediction:
        """Segment with all members; arguments as for `MedCLIPSeg.predict`, `num_samples` being that of each member.

        What comes before the first adapter is computed once for all members. The first member draws the samples that
        it draws by itself, each other one noise of its own, from `seed` and its place.

        Returns:
            Maps of the mixture of members. `samples` holds those of one member after the other, [M S, B, H, W].
        """
        return self.model.predict(image, text, members=self.members, **settings)


def call_with(model: MedCLIPSeg, weights: Weights, call: Callable[[], _Result]) -> _Result:
    """Make a call while the model has these weights, which are not copied; other threads' runs wait."""
    swapped = {f"model.{name}": weight.to(model.device) for name, weight in weights.items()}
    with lockstep_of(model.clip).exclusive():
        return functional_call(_Holder(model), swapped, (call,))


def sample_members(
    model: MedCLIPSeg,
    part: ImagePart,
    tokens: Tensor | Mapping[str, Tensor],
    pairs: list[int] | None = None,
    *,
    members: Sequence[Weights],
    seed: int,
    threshold: float,
    config: MonteCarloConfig,
    memory_budget: int | None,
    keep: bool,
) -> Prediction:
    """Of all pairs or some, the samples of every member, see `run_samples`; the members share what comes before the
    first adapter."""
    if pairs is not None:
        part = part.rows(pairs)
        tokens = tokens[pairs] if isinstance(tokens, Tensor) else {name: ids[pairs] for name, ids in tokens.items()}
    found: list[Prediction] = []
    how: dict[str, Any] = {"config": config, "memory_budget": memory_budget, "keep": keep, "prefixes": {}}
    for number, weights in enumerate(members):
        call = partial(run_samples, model, part, tokens, seed=member_seed(seed, number), **how)
        run = call_with(model, weights, call)
        found.append(Prediction.from_statistics(run.statistics, threshold=threshold, samples=run.samples))
    return found[0] if len(found) == 1 else mixture(found, threshold=threshold)


class _Holder(nn.Module):
    """A module whose forward is any call, for `functional_call` to swap the weights of the model that it holds."""

    def __init__(self, model: MedCLIPSeg) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], _Result]) -> _Result:
        return call()


def member_seed(seed: int, member: int) -> int:
    """A seed for each member, `seed` itself for the first: the member's number is put above its bits."""
    return seed | member << 62 * (1 + seed.bit_length() // 62)  # noise.py reads 62 bits at a time


def mixture(found: Sequence[Prediction], *, threshold: float) -> Prediction:
    """The prediction of an even mixture of members from theirs; its `logits` have the mixture's mean and variance."""

    def stacked(name: str, of: Sequence[Any] = found) -> Tensor:
        return torch.stack([getattr(each, name) for each in of])  # [M, B, H, W]

    def variance(mean: str, within: str, of: Sequence[Any] = found) -> Tensor:
        """Within and between members; a member's single sample tells nothing of the former."""
        return stacked(within, of).nan_to_num(0.0).mean(dim=0) + stacked(mean, of).var(dim=0, correction=0)

    probability, aleatoric = stacked("probability").mean(dim=0), stacked("aleatoric").mean(dim=0)
    epistemic = (binary_entropy(probability) - aleatoric).clamp_min(0.0)  # below 0 by rounding alone
    fits = [each.logits for each in found]
    return replace(
        found[0],
        mask=probability > threshold,
        probability=probability,
        uncertainty=aleatoric + epistemic,
        aleatoric=aleatoric,
        epistemic=epistemic,
        variance=variance("probability", "variance"),
        standard_error=stacked("standard_error").square().sum(dim=0).sqrt() / len(found),
        num_samples=stacked("num_samples").sum(dim=0),
        area_deviation=(
            stacked("area_deviation").square().mean(dim=0)
            + stacked("probability").mean(dim=(2, 3)).var(dim=0, correction=0)
        ).sqrt(),
        likeness=stacked("likeness").mean(dim=0),
        summary=stacked("summary").mean(dim=0),
        logits=NormalLogits(
            mean=stacked("mean", fits).mean(dim=0),
            variance=variance("mean", "variance", fits),
            mean_variance=stacked("mean_variance", fits).sum(dim=0) / len(found) ** 2,
            variance_degrees=stacked("variance_degrees", fits).sum(dim=0),
            mean_degrees=stacked("mean_degrees", fits).sum(dim=0),
        ),
        samples=None if found[0].samples is None else torch.cat([s.samples for s in found if s.samples is not None]),
        no_promise="an ensemble is not calibrated; predict with one model",
    )
