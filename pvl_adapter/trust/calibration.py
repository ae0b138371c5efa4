"""A calibration: what a model may promise about its predictions, counted on held-out subjects.

Promises hold for the next subject that is like those (exchangeable with them), predicted in the same way by the same
weights. They do not hold for every single image, nor for other scanners, species or kinds of sentence: those are
flagged where the images or the words show it.

Shape alphabet: B batch, H W pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from pvl_adapter.atomic import write_atomically
from pvl_adapter.distilled_head import weights_hash, weights_stamp
from pvl_adapter.monte_carlo import NUM_SAMPLES, Auto
from pvl_adapter.trust.conformal import Ranks
from pvl_adapter.trust.evidence import evidence_of
from pvl_adapter.trust.scorer import Directions, Neighbours, Scorer

if TYPE_CHECKING:
    from pvl_adapter.prediction import Prediction
    from pvl_adapter.segmentation import MedCLIPSeg

_KIND, _VERSION = "pvl_adapter.trust.Calibration", 1
UNLIKE = 0.05
"""An image is flagged if fewer than this share of the calibration's are as far from what is usual, or none is."""


class Presence(NamedTuple):
    """Whether there is something to find.

    Attributes:
        p_absent: [B]; were the target absent, so small a number would come up with at most its own probability.
        p_present: [B]; likewise, were it present.
        verdict: Of each pair: "present", "absent", or "unsure" where neither can be ruled out at the level alpha.
    """

    p_absent: Tensor
    p_present: Tensor
    verdict: list[str]


@dataclass(eq=False)
class Calibration:
    """Promises of a model; made by `pvl_adapter.trust.calibrate`.

    Attributes:
        alpha: What may be missed, wrong, or outside, on average over subjects.
        confidence: Chance with which the abstention limits hold, over draws of the calibration's subjects.
        weights: Hash of the weights that it is of.
        sampling: The arguments of `predict` that it holds for.
        facts: What it rests on: dataset, subjects, cases, and what the promises cost there.
        scorer: Scores of pixels and pairs.
        outer_threshold: Of the scores of pixels; None where nothing can be promised.
        inner_threshold: Likewise.
        absent: Presence scores of cases with nothing to find; None if there were too few subjects with one.
        present: Negative presence scores of the other cases; likewise.
        area_factor: How many times the scale of its error the expected area is off at most; None if it cannot be told.
        volume_factor: Likewise, of the sum over all slices of a subject.
        loss_limit: Mean loss (one minus the Dice) of the pairs that are not abstained from.
        loss_threshold: On the expected loss; None if no such promise can be kept.
        pixel_limit: Share of wrong pixels among those that are not abstained from.
        pixel_threshold: On the uncertainty in nats; None likewise.
        familiar: Distances of the images from what is usual.
        tokens: Token ids in the sentences.
    """

    alpha: float
    confidence: float
    weights: str
    sampling: dict[str, Any]
    facts: dict[str, Any]
    scorer: Scorer
    outer_threshold: float | None
    inner_threshold: float | None
    absent: Ranks | None
    present: Ranks | None
    area_factor: float | None
    volume_factor: float | None
    loss_limit: float
    loss_threshold: float | None
    pixel_limit: float
    pixel_threshold: float | None
    familiar: Ranks
    tokens: frozenset[int]
    stamp: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        numbers: list[Any] = []
        for value in (getattr(of, each.name) for of in (self, self.scorer) for each in fields(of)):
            if isinstance(value, torch.nn.Module):
                numbers += value.state_dict().values()
            elif isinstance(value, (float, tuple)):
                numbers += value if isinstance(value, tuple) else [value]
        if not all(np.isfinite(each).all() for each in numbers):
            raise ValueError("the calibration holds NaN or infinite numbers, expected finite ones; calibrate again")

    # ---- what it may be used for ------------------------------------------------------------------------------------

    def check(self, model: MedCLIPSeg, *, hashed: bool = False) -> None:
        """Raise ValueError if the model has other weights; cheap where none was written to since the last check.

        `hashed` reads them in any case.
        """
        distilled = self.sampling.get("num_samples") == "distilled"
        if (stamp := weights_stamp(model, distilled=distilled)) == self.stamp and not hashed:
            return
        if weights_hash(model, distilled=distilled) != self.weights:
            raise ValueError(
                "the calibration is of other weights: the model is another one, or was trained since; calibrate it "
                "by pvl_adapter.trust.calibrate(model, held_out_dataset)"
            )
        self.stamp = stamp

    def check_prompts(self, model: MedCLIPSeg, sentences: list[str]) -> None:
        """Raise ValueError if most sentences hold words that the calibration's have not."""
        unseen = self.unseen(model.tokenize(sentences))
        if unseen.float().mean() > 0.5:
            example = sentences[int(unseen.nonzero()[0, 0])]
            raise ValueError(
                f"{int(unseen.sum())} of {len(sentences)} sentences hold words that those of the calibration do not, "
                f"as {example!r}: they are of another prompt set; calibrate on sentences of this kind"
            )

    def unusable_reason(self, model: MedCLIPSeg, sampling: Mapping[str, Any]) -> str:
        """Why there is no promise for a prediction made in this way; empty if there is one."""
        if differing := sorted(name for name in sampling if sampling[name] != self.sampling.get(name)):
            named = ", ".join(f"{name}={self.sampling.get(name)}" for name in differing)
            return f"the model was calibrated for predict({named}, ...); predict so, or calibrate for this way"
        try:
            self.check(model)
        except ValueError as error:
            return str(error)
        return ""

    def unseen(self, tokens: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Which sentences hold token ids that none of the calibration's have, bool [B]."""
        ids = tokens if isinstance(tokens, Tensor) else tokens["input_ids"]
        known = torch.isin(ids, torch.tensor(sorted(self.tokens), device=ids.device))
        if isinstance(tokens, Mapping) and "attention_mask" in tokens:
            known |= tokens["attention_mask"] == 0  # padding, which depends on the sentences beside it
        return ~known.all(dim=1)

    # ---- promises of a prediction -----------------------------------------------------------------------------------

    def outer_mask(self, prediction: Prediction) -> Tensor | None:
        """With what the inner mask holds, so that the one is in the other."""
        if self.outer_threshold is None:
            return None
        evidence = evidence_of(prediction)
        outer = self.scorer.outer_scores(evidence) > self.outer_threshold
        if self.inner_threshold is None:
            return outer
        return outer | (self.scorer.inner_scores(evidence) > self.inner_threshold)

    def inner_mask(self, prediction: Prediction) -> Tensor | None:
        threshold = self.inner_threshold
        return None if threshold is None else self.scorer.inner_scores(evidence_of(prediction)) > threshold

    def calibrated_probability(self, prediction: Prediction) -> Tensor:
        return self.scorer.calibrated(prediction.probability)

    def presence(self, prediction: Prediction) -> Presence | None:
        if self.absent is None or self.present is None:
            return None
        scores = self.scorer.presence_score(evidence_of(prediction)).double().cpu().numpy()
        p_absent, p_present = self.absent.p_value(scores), self.present.p_value(-scores)
        ruled_out = zip(p_absent <= self.alpha, p_present <= self.alpha, strict=True)
        words = {(True, False): "present", (False, True): "absent"}
        return Presence(
            torch.from_numpy(p_absent),
            torch.from_numpy(p_present),
            [words.get((bool(absent), bool(present)), "unsure") for absent, present in ruled_out],
        )

    def area_interval(self, prediction: Prediction) -> Tensor | None:
        """Shares of the image, [B, 2]."""
        return self.interval_of_sums(*self.area_moments(prediction), volume=False)

    def volume_interval(self, prediction: Prediction) -> Tensor | None:
        """Of the sum over all slices of one subject, in images, [2]."""
        return self.interval_of_sums(*(each.sum() for each in self.area_moments(prediction)), volume=True)

    def area_moments(self, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Expected area and a scale of its error, shares of the image, 2 x [B]; sums may be gathered batch by batch."""
        return self.scorer.area(evidence_of(prediction))

    def interval_of_sums(self, expected: Tensor, error: Tensor, *, volume: bool) -> Tensor | None:
        """Of areas [...] or of volumes, their sums over all slices of a subject: [..., 2]."""
        if (factor := self.volume_factor if volume else self.area_factor) is None:
            return None
        interval = torch.stack([expected - factor * error, expected + factor * error], dim=-1).clamp_min(0)
        return interval if volume else interval.clamp_max(1)

    def abstained(self, prediction: Prediction) -> Tensor | None:
        threshold = self.loss_threshold
        return None if threshold is None else ~(self.scorer.risk(evidence_of(prediction)) < threshold)

    def abstained_pixels(self, prediction: Prediction) -> Tensor | None:
        return None if self.pixel_threshold is None else ~(prediction.uncertainty < self.pixel_threshold)

    def familiarity(self, prediction: Prediction) -> Tensor:
        """Were an image like the calibration's, so small a number would come up with at most its own probability."""
        distance = self.scorer.distance(evidence_of(prediction)).double().numpy()
        return torch.from_numpy(self.familiar.p_value(distance))

    def flagged(self, prediction: Prediction) -> Tensor:
        least = max(UNLIKE, 1.0 / (self.familiar.subjects + 1.0))  # of few subjects: farther than all of them
        return (self.familiarity(prediction) <= least) | cast(Tensor, prediction.unseen).cpu()

    # ---- files ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; arrays are strings of numbers, so that a line holds one."""
        state = {each.name: _packed(getattr(self, each.name)) for each in fields(self) if each.name != "stamp"}
        return {"kind": _KIND, "version": _VERSION, **state, "checksum": _checksum(state)}

    @classmethod
    def from_dict(cls, state: Any) -> Calibration:
        """Raises: ValueError: If that is no calibration, or a damaged one."""
        try:
            if state["kind"] != _KIND or state["version"] != _VERSION:
                raise ValueError(f"it is {state['kind']} of version {state['version']}, expected {_KIND} of {_VERSION}")
            names = [each.name for each in fields(cls) if each.name != "stamp"]
            if state["checksum"] != _checksum({name: state[name] for name in names}):
                raise ValueError("its numbers are not those that were saved")
            made = {name: _unpacked(state[name]) for name in names}
            made["scorer"] = Scorer.from_dict(made["scorer"])
            for name in ("absent", "present", "familiar"):
                made[name] = made[name] and Ranks(made[name]["scores"], made[name]["shares"])
            return cls(**{**made, "tokens": frozenset(made["tokens"])})
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"the calibration is damaged or of another version ({error}); calibrate again") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write JSON, to be kept apart from the model; `model.save_pretrained` keeps it beside the weights."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: MedCLIPSeg) -> Calibration:
        """Read what `save` wrote and give it to the model.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or of other weights than the model's.
        """
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}); calibrate again") from error
        calibration = cls.from_dict(state)
        calibration.check(model)
        model.calibration = calibration
        return calibration


def _checksum(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def sampling_arguments(
    *, num_samples: int | Auto | str = NUM_SAMPLES, antithetic: bool = True, threshold: float = 0.5, **others: Any
) -> dict[str, Any]:
    """The arguments of `predict` that a calibration depends on, JSON-ready."""
    return {"num_samples": str(num_samples), "antithetic": antithetic, "threshold": threshold}


def with_promises(
    model: MedCLIPSeg, prediction: Prediction, tokens: Tensor | Mapping[str, Tensor], sampling: Mapping[str, Any]
) -> Prediction:
    """A prediction with what its model promises of it, made as `sampling` says, or why it promises nothing."""
    if (calibration := model.calibration) is None:
        return prediction
    if reason := calibration.unusable_reason(model, sampling):
        return replace(prediction, no_promise=reason)
    return replace(prediction, calibration=calibration, unseen=calibration.unseen(tokens))


def _packed(value: Any) -> Any:
    if isinstance(value, Scorer):
        return {each.name: _packed(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, torch.nn.Module):
        return {name: _packed(tensor) for name, tensor in value.state_dict().items()}
    if isinstance(value, (Ranks, Directions, Neighbours)):
        return {name: _packed(array) for name, array in value._asdict().items()}
    if isinstance(value, (Tensor, np.ndarray)):
        array = value.cpu().numpy() if isinstance(value, Tensor) else value
        return {"shape": list(array.shape), "values": " ".join(map(str, array.ravel()))}  # the shortest exact ones
    return sorted(value) if isinstance(value, frozenset) else list(value) if isinstance(value, tuple) else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"shape", "values"}:
        return np.array(value["values"].split(), dtype=np.float64).reshape(value["shape"])
    return {name: _unpacked(each) for name, each in value.items()} if isinstance(value, dict) else value
