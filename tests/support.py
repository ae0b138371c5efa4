"""What several test files share."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hosts import BY_NAME, Host
from PIL import Image
from tiny_models import JOINT_WIDTH, transformer, vit
from torch import Tensor, nn

import pvl_adapter as pvl

CONFIG = pvl.PVLConfig(layers=(0, 2), dim=8)
HOST = BY_NAME["open_clip-inlined_text"]  # where any will do
FEW_HOSTS = [BY_NAME[name] for name in ("open_clip-inlined_text", "open_clip-timm-bert", "transformers-clip")]
MAPS = ("probability", "uncertainty", "aleatoric", "epistemic", "variance", "standard_error")


def injected(host: Host, *, config: pvl.PVLConfig = CONFIG, dropout: float = 0.0) -> nn.Module:
    """The host with adapters whose every parameter matters, in eval mode; always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = pvl.inject_adapters(host.build(dropout=dropout), config)
    randomise(model.pvl_adapters)
    return model


def segmenter(
    host: Host = HOST, *, config: pvl.PVLConfig = CONFIG, dropout: float = 0.0, **settings: Any
) -> pvl.MedCLIPSeg:
    """In eval mode, with logits on both sides of zero; a host that does not tell its normalisation is given one."""
    told = pvl.MedCLIPSegConfig(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    settings = {"config": told, **settings} if "dual" in host.name else settings
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = pvl.MedCLIPSeg(injected(host, config=config, dropout=dropout), **settings).eval()
    randomise(model.head, seed=1)
    return model


def speaking_segmenter() -> pvl.MedCLIPSeg:
    """On a host of 16 positions with the vocabulary of OpenAI's CLIP, whose tokenizer open_clip carries."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.CLIP(JOINT_WIDTH, vit(3), transformer(3, context_length=16, vocab_size=49408))
        return pvl.MedCLIPSeg(pvl.inject_adapters(clip, CONFIG)).eval()


def images(count: int = 3, *, size: tuple[int, int] = (20, 30)) -> list[Image.Image]:
    """Images as a user has them, of another size than the network's."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]


def predict(model: pvl.MedCLIPSeg, number: int | pvl.Auto = 4, **settings: object) -> pvl.Prediction:
    """A prediction of `images()` and the sentences of HOST, by so many samples."""
    return model.predict(images(), HOST.ids, num_samples=number, **settings)


def randomise(module: nn.Module, *, seed: int = 0) -> nn.Module:
    """Give every parameter a value that no initialisation has, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same in every type."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def maps(prediction: pvl.Prediction, index: int | slice = slice(None)) -> list[Tensor]:
    """Of a prediction, or of one of its pairs."""
    return [getattr(prediction, name)[index] for name in MAPS]


def assert_same_maps(got: list[Tensor], expected: list[Tensor], *, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, expected, atol=atol, rtol=0.0, equal_nan=True)


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Frozen weights choose another kernel of MultiheadAttention, equal but for rounding."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    """A module's weights as float64 arrays."""
    return {name: array(tensor) for name, tensor in module.state_dict().items()}


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of both towers: three or more modules of one class in a row."""
    rows = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not name.startswith("pvl_adapters")
    }
    return {
        f"{name}.{index}": block
        for name, row in rows.items()
        if len(row) > 2 and len({type(block) for block in row}) == 1
        for index, block in enumerate(row)
    }


def assert_close_gradients(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """Every entry within 1e-4 of the largest of all."""
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= 1e-4 * largest, name


def leaves(output: Any) -> list[Any]:
    """The tensors (and other values) inside whatever a model returns, in order."""
    if isinstance(output, Mapping):
        return [leaf for value in output.values() for leaf in leaves(value)]
    if isinstance(output, (tuple, list)):
        return [leaf for value in output for leaf in leaves(value)]
    return [output]


def assert_same_bits(got: Any, expected: Any) -> None:
    """Equal without any tolerance, types included."""
    assert type(got) is type(expected)
    got, expected = leaves(got), leaves(expected)
    assert len(got) == len(expected)
    assert any(isinstance(leaf, Tensor) for leaf in got)
    for one, other in zip(got, expected, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, atol=0.0, rtol=0.0, equal_nan=True)
        else:
            assert one == other


def object_state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that adapters might leave behind: attributes, hooks, flags, and weights by value."""
    state: dict[str, Any] = {"class": type(model), "keys": list(model.state_dict())}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        registered = {
            key: list(value) for key, value in vars(module).items() if key[0] == "_" and isinstance(value, dict)
        }
        state[f"module {name}"] = (id(module), type(module), sorted(vars(module)), own, registered)
    for name, parameter in model.named_parameters():
        state[f"parameter {name}"] = (id(parameter), parameter.requires_grad, parameter.dtype, _bytes(parameter))
    for name, buffer in model.named_buffers():
        state[f"buffer {name}"] = (buffer.dtype, _bytes(buffer))
    return state


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Check that what happens inside leaves the model as it was."""
    before = object_state(model)
    yield
    assert object_state(model) == before


def edit_json(file: Callable[[Path], Path], change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Damages a folder by changing what one of its JSON files says."""

    def damage(folder: Path) -> None:
        values = json.loads(file(folder).read_text())
        change(values)
        file(folder).write_text(json.dumps(values))

    return damage


def truncate(file: Callable[[Path], Path], keep: float) -> Callable[[Path], object]:
    """Damages a folder by cutting one of its files."""

    def damage(folder: Path) -> None:
        content = file(folder).read_bytes()
        file(folder).write_bytes(content[: int(keep * len(content))])

    return damage


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """What a full disk is like: writing more than `room` bytes to one file fails (POSIX only)."""
    resource = pytest.importorskip("resource", reason="limits on file sizes need POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def kill_while(write: Callable[[], object], *, room: int) -> None:
    """Run `write` in a child process that is killed when it has written `room` bytes to one file (POSIX only)."""
    resource = pytest.importorskip("resource", reason="limits on file sizes need POSIX")
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            with full_disk(room):
                write()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
