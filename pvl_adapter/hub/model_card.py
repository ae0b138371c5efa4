"""Where a saved model comes from, and the model card that says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pvl_adapter.hub.weights import hash_tensors, is_frozen

_UNKNOWN = "Not stated by whoever saved this model."
_LOADED = "_pvl_loaded"  # the attribute in which a loaded model keeps its provenance and the hash of its weights
_FACTS = ("repo", "file", "revision", "sha256")


def note_provenance(model: Any, provenance: Mapping[str, Any]) -> None:
    """Tell a loaded model where it comes from, in a way that shows at saving whether it was trained since."""
    model.provenance = dict(provenance)
    setattr(model, _LOADED, (_trained_hash(model), dict(provenance)))


def saved_provenance(
    model: Any, *, intended_use: str | None = None, training_data: str | None = None, scores: Any = None
) -> dict[str, Any]:
    """What is known of a model that is about to be saved; an empty argument says that there is nothing.

    Training data and scores of a model that was trained after loading are dropped: they are of other weights.
    """
    known = dict(model.provenance)
    before, loaded = getattr(model, _LOADED, (None, dict[str, Any]()))
    if before is not None and before != _trained_hash(model):
        start = loaded.get("fine_tuned_from", loaded)
        known = {name: value for name, value in known.items() if name not in loaded or loaded[name] != value}
        if facts := {name: start[name] for name in _FACTS if start.get(name)}:
            known["fine_tuned_from"] = facts
    given = {"intended_use": intended_use, "training_data": training_data, "scores": scores}
    known |= {name: value for name, value in given.items() if value is not None}
    return {name: value for name, value in known.items() if value or name not in given}


def model_card(model: nn.Module, description: Mapping[str, Any]) -> str:
    """A README.md with the hub's metadata, from what config.json holds."""
    from huggingface_hub import ModelCardData

    provenance = description["provenance"]
    tags = ["medical-imaging", "clip", "text-guided-segmentation", "uncertainty", "pvl-adapter"]
    data = ModelCardData(library_name="pvl-adapter", license=None, pipeline_tag="image-segmentation", tags=tags)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    contents = (
        "The whole network, its frozen CLIP included; it loads without a network."
        if description["whole"]
        else f"Adapters and pixel head only; the frozen CLIP is {description['backbone'].get('name') or 'not named'}."
    )
    rows = [f"| {name} | {value} |" for name, value in provenance.get("scores", {}).items()]
    return f"""---
{data.to_yaml()}
---

# MedCLIPSeg: text-guided segmentation with uncertainty

{contents} {trained:,} of {total:,} parameters are trained.

```python
import pvl_adapter as pvl

model = pvl.from_pretrained("this folder, or its owner/name on the hub")
prediction = model.predict("image.png", "one medium irregular tumor at the right")
prediction.mask, prediction.probability, prediction.uncertainty
```

## Intended use

{provenance.get("intended_use", "Research on segmentation of medical images of the kind that it was trained on.")}

**Not a medical device.** Nothing here has been assessed for diagnosis or treatment. The uncertainty map says where the
model hesitates, not where it is wrong: a model can be sure of a mistake, above all on images or sentences unlike those
it was trained on.

## Training data

{provenance.get("training_data") or _UNKNOWN}

## Scores

{chr(10).join(["| | |", "|---|---:|", *rows]) if rows else _UNKNOWN}

{_one_pass(description.get("distilled"))}{_promises(description.get("calibration"))}## Method and provenance

MedCLIPSeg, Koleilat et al., CVPR 2026 ([arXiv 2602.20423](https://arxiv.org/abs/2602.20423)).
{_sentence("Converted from", provenance)}{_sentence("Fine-tuned from", provenance.get("fine_tuned_from", {}))}
"""


def _one_pass(facts: Mapping[str, Any] | None) -> str:
    """Of a distilled head."""
    if not facts:
        return ""
    return f"""## Uncertainty in one pass

`model.predict(..., num_samples="distilled")` says in one pass what sampling says in many, by a small head that was
taught on {facts["pairs"]} image and prompt pairs. On {facts["held_out"]} pairs of other images its probability is wrong
by {facts["probability_error"]:.4f} (root mean square), as much as that of {facts["worth_samples"]:.0f} independent
samples; the mean pass alone by {facts["mean_pass_error"]:.4f}.

"""


def _promises(state: Mapping[str, Any] | None) -> str:
    """Of a calibration."""
    if not state:
        return ""
    facts, alpha, held = state["facts"], _percent(state["alpha"]), _percent(1 - state["alpha"])
    arguments = ", ".join(f"{name}={value}" for name, value in state["sampling"].items())
    return f"""## Promises

Calibrated on {facts["cases"]} image and sentence pairs of {facts["subjects"]} subjects ({facts["dataset"]}); for
`predict({arguments})`. They hold on average over subjects like those, asked in sentences like those, not for others:
`prediction.flagged` says which images or sentences are unlike them.

- `outer_mask` misses at most {alpha} of the structure; it has {facts["outer_area_over_truth"]:.2f} times its area.
- At most {alpha} of `inner_mask` is something else; it holds {facts["inner_share_of_truth"]:.0%} of the structure.
- `area_interval` holds the area in {held} of the pairs.
- Pairs that are not `abstained` from ({facts["kept"]:.0%}) have a mean Dice of at least {1 - state["loss_limit"]:.4g},
  with a confidence of {_percent(state["confidence"])}.

"""


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"  # of 0.975, not 98%


def _sentence(words: str, facts: Mapping[str, Any]) -> str:
    known = ", ".join(f"{name} `{facts[name]}`" for name in _FACTS if facts.get(name))
    return f"{words} {known}." if known else ""


def _trained_hash(model: nn.Module) -> str | None:
    """Of adapters, head and whatever else is being trained; None on the meta device."""
    state = model.state_dict(keep_vars=True)
    trained = {name: tensor for name, tensor in state.items() if tensor.requires_grad or not is_frozen(name)}
    trained = {name: tensor for name, tensor in trained.items() if not name.startswith("distilled.")}
    return None if any(tensor.is_meta for tensor in trained.values()) else hash_tensors(trained)
