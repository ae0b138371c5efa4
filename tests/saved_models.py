"""Models with a tokenizer to be saved, and how two models are compared."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fakes import TINY_RELEASED, official_checkpoint
from hosts import Host
from safetensors.torch import load_file, save_file
from support import CONFIG, randomise
from torch import Tensor

import pvl_adapter as pvl

SENTENCES = ["a tumor at the left", "one polyp"]


def official(words: Path) -> pvl.MedCLIPSeg:
    """The recorded small network, as loaded from a file of the official code."""
    return copy.deepcopy(_official(words))


@cache
def _official(words: Path) -> pvl.MedCLIPSeg:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(official_checkpoint(), file := Path(folder, "tiny.pth"))
        return pvl.from_pretrained(file, network=TINY_RELEASED, tokenizer=words)


def with_adapters(backbone: pvl.Backbone, *, adapters: pvl.PVLConfig = CONFIG, **settings: Any) -> pvl.MedCLIPSeg:
    """A segmenter whose every parameter matters, in eval mode."""
    randomise(pvl.inject_adapters(backbone.clip, adapters).pvl_adapters)
    model = pvl.MedCLIPSeg(backbone.clip, tokenizer=backbone.tokenizer, **settings).eval()
    randomise(model.head, seed=1)
    return model


def of_open_clip(name: str, **settings: Any) -> pvl.MedCLIPSeg:
    torch.manual_seed(0)
    return with_adapters(pvl.load_backbone(name), **settings)


def logits(model: pvl.MedCLIPSeg, text: Any = None, *, image: Tensor | None = None) -> Tensor:
    """Of the same images and the same draws."""
    if image is None:
        image = torch.randn(2, 3, *model.image_size, generator=torch.Generator().manual_seed(1))
    image = image.to(next(model.clip.parameters()).dtype)
    with torch.no_grad():
        draws = torch.Generator().manual_seed(0)
        return model(image, SENTENCES if text is None else text, sample=True, generator=draws).logits


def probability(model: pvl.MedCLIPSeg) -> Tensor:
    """By samples of a seed."""
    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(1))
    return model.predict(image, SENTENCES, num_samples=4, seed=7).probability


def assert_equal_models(got: pvl.MedCLIPSeg, expected: pvl.MedCLIPSeg, host: Host | None = None) -> None:
    """In every weight, setting, training flag, and in their logits."""
    given = {} if host is None else {"text": host.text, "image": host.image}
    assert torch.equal(logits(got, **given), logits(expected, **given))
    assert host is not None or got.config == expected.config
    assert not any(module.training for module in got.modules())
    one, other = got.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name
    flags = [{name: p.requires_grad for name, p in m.named_parameters()} for m in (got, expected)]
    assert flags[0] == flags[1]


def weights_file(folder: Path) -> Path:
    return folder / "model.safetensors"


def config_file(folder: Path) -> Path:
    return folder / "config.json"


def vocabulary(folder: Path) -> Path:
    (found,) = folder.glob("tokenizer-*/tokenizer.json")
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(
    weights: Callable[[Path], Path],
    config: Callable[[Path], Path],
    kind: str,
    *,
    tensors: Callable[[dict[str, Tensor]], object] = len,
    description: Callable[[dict[str, Any]], object] = len,
) -> Callable[[Path], object]:
    """Damages a folder by a change of its tensors, or of the description in both of its places (`len` changes none)."""

    def damage(folder: Path) -> None:
        values, known = load_file(weights(folder)), json.loads(config(folder).read_text())
        tensors(values)
        description(known)
        config(folder).write_text(json.dumps(known))
        save_file(values, weights(folder), metadata={kind: json.dumps(known)})

    return damage
