"""How a host's images are normalised, where its library keeps that in a file: transformers' image processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RGB = tuple[float, float, float]
Normalization = tuple[RGB, RGB]
"""Mean and standard deviation of red, green and blue, for pixels in [0, 1]."""

OPENAI: Normalization = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: Normalization = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

_FILES = ("preprocessor_config.json", "processor_config.json")  # of an image processor alone, and of a whole processor


def saved_normalization(name: str, *, revision: str | None = None) -> Normalization | None:
    """Read the normalisation from the image processor saved with a checkpoint, without a network.

    Args:
        name: Folder, or name of a hub repository whose files may be in the cache.
        revision: Commit of the repository the model was loaded from, if known.

    Returns:
        None if there is no such file, or it does not say.

    Raises:
        ValueError: If the file is not JSON, or does not hold numbers for red, green and blue.
    """
    for file in _FILES:
        path = _locate(name, file, revision)
        if path is None:
            continue
        try:
            settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            settings = settings.get("image_processor", settings)
            if settings.get("do_normalize") is False:
                return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
            if settings.get("image_mean") is not None and settings.get("image_std") is not None:
                return _rgb(settings["image_mean"]), _rgb(settings["image_std"])
        except (AttributeError, TypeError, ValueError) as error:  # JSON errors are ValueErrors
            raise ValueError(f"{path} is not the file of an image processor ({error}); delete or replace it") from error
    return None


def _locate(name: str, file: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).is_dir():
        return path if (path := Path(name, file)).is_file() else None
    try:
        found = [try_to_load_from_cache(name, file, revision=each) for each in (revision, None)]
    except HFValidationError:  # a folder that is gone
        return None
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _rgb(values: Any) -> RGB:
    red, green, blue = (values,) * 3 if isinstance(values, (int, float)) else values
    return float(red), float(green), float(blue)
