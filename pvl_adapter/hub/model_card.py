"""The model card that is saved beside a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_UNKNOWN = "Not stated by whoever saved this model."


def model_card(
    model: nn.Module,
    description: Mapping[str, Any],
    *,
    intended_use: str | None = None,
    training_data: str | None = None,
    scores: Mapping[str, float] | None = None,
) -> str:
    """A README.md with the hub's metadata.

    Args:
        model: For its size.
        description: What config.json holds.
        intended_use: What the model is for; None means a general statement.
        training_data: What it was trained on; None means what the loader knows of its origin.
        scores: Figures by name, in the unit their names say; None means what the loader knows.
    """
    from huggingface_hub import ModelCardData

    origin = description["provenance"]
    data = ModelCardData(
        library_name="pvl-adapter",
        license=None,
        pipeline_tag="image-segmentation",
        tags=["medical-imaging", "clip", "text-guided-segmentation", "uncertainty", "pvl-adapter"],
    )
    figures = scores or origin.get("scores") or {}
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    contents = (
        "The whole network, its frozen CLIP included; it loads without a network."
        if description["whole"]
        else f"Adapters and pixel head only; the frozen CLIP is {description['backbone'].get('name') or 'not named'}."
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""---
{data.to_yaml()}
---

# MedCLIPSeg: text-guided segmentation with uncertainty

{contents} {trained:,} of {total:,} parameters are trained.

```python
import pvl_adapter as pvl

model = pvl.from_pretrained("this folder, or its owner/name on the hub")
prediction = model.predict("picture.png", "one medium irregular tumor at the right")
prediction.mask, prediction.probability, prediction.uncertainty
```

## Intended use

{intended_use or "Research on text-guided segmentation of medical pictures of the kind it was trained on."}

**Not a medical device.** Nothing here has been assessed for diagnosis or treatment. The uncertainty map says where the
model hesitates, not where it is wrong: a model can be sure of a mistake, above all on pictures or sentences unlike
those it was trained on.

## Training data

{training_data or origin.get("training_data") or _UNKNOWN}

## Scores

{("| | |" + chr(10) + "|---|---:|" + chr(10) + table) if table else _UNKNOWN}

## Method and origin

MedCLIPSeg, Koleilat et al., CVPR 2026 ([arXiv 2602.20423](https://arxiv.org/abs/2602.20423)).
{_origin(origin)}
"""


def _origin(origin: Mapping[str, Any]) -> str:
    facts = {name: origin[name] for name in ("repo", "file", "revision", "sha256") if origin.get(name)}
    if not facts:
        return ""
    return "Converted from " + ", ".join(f"{name} `{value}`" for name, value in facts.items()) + "."
