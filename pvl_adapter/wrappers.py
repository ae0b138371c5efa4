"""What other libraries may do to a host: PEFT's tuners work beside our adapters, FSDP2 around the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def tuner_parts(host: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts that PEFT's tuner layers have added to a host, by name; their base layers are the host's own."""
    for prefix, module in host.named_modules():
        if hasattr(module, "adapter_layer_names"):  # how PEFT's layers list their parts
            for name, part in module.named_children():
                if name != "base_layer":
                    yield f"{prefix}.{name}", part


def tuner_parameters(host: nn.Module) -> set[str]:
    """Names of the parameters that PEFT has put into a host: they go on training beside our adapters."""
    return {f"{prefix}.{name}" for prefix, part in tuner_parts(host) for name, _ in part.named_parameters()}


def refuse_wrappers(host: nn.Module, adapters: nn.Module, *, blocks: Sequence[nn.Module]) -> None:
    """Raise RuntimeError where another library has wrapped an injected host so that its results would be wrong."""
    if torch.compiler.is_compiling():
        return
    in_adapters = any(hasattr(module, "adapter_layer_names") for module in adapters.modules())
    frozen = not any(parameter.requires_grad for parameter in adapters.parameters())
    if in_adapters or (frozen and host.training and any(True for _ in tuner_parts(host))):
        raise RuntimeError(
            "PEFT was applied after inject_adapters and has "
            + ("put its layers into" if in_adapters else "frozen")
            + " the PVL adapters. Apply PEFT to the CLIP first and call inject_adapters(clip) then: both are trained"
        )
    if any(is_sharded(block) for block in blocks):
        raise RuntimeError(
            "fully_shard was applied to single blocks of this CLIP. Its hooks gather a block's weights when its tower "
            "calls it, but joined towers run their blocks earlier; apply fully_shard to the whole model alone"
        )
    own = (part for block in blocks if type(block).__module__.startswith("open_clip.") for part in block.modules())
    if any(callable(getattr(part, "weight", None)) for part in own):  # a method in quantised layers
        raise RuntimeError(
            "torch.ao.quantization was applied to blocks of open_clip, which then fail when they look at the type of "
            "their weights; quantise the pixel head and the adapters alone, or use bfloat16"
        )


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2's `fully_shard` was applied to this very module."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, the weights that `fully_shard` has spread over processes are whole, for calls past `model.forward`."""
    sharded: list[Any] = [module for module in model.modules() if is_sharded(module)]
    try:
        for module in sharded:
            module.unshard()
        yield
    finally:
        for module in sharded:
            module.reshard()
