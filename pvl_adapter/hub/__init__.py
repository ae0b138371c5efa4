"""Trained models: the published ones, our own folders, and the CLIPs to start from."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pvl_adapter.hub.catalogue import CHECKPOINTS, Checkpoint, find_checkpoint, list_checkpoints

if TYPE_CHECKING:
    from pvl_adapter.hub.backbones import Backbone, load_backbone
    from pvl_adapter.hub.loading import from_pretrained
    from pvl_adapter.hub.official import OFFICIAL_ADAPTER_PARTS, OfficialConfig, official_to_ours, rename_official

__all__ = [
    "CHECKPOINTS",
    "OFFICIAL_ADAPTER_PARTS",
    "Backbone",
    "Checkpoint",
    "OfficialConfig",
    "find_checkpoint",
    "from_pretrained",
    "list_checkpoints",
    "load_backbone",
    "official_to_ours",
    "rename_official",
]


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is first asked for."""
    for module in ("backbones", "loading", "official"):
        if name in __all__ and hasattr(found := import_module(f"{__name__}.{module}"), name):
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
