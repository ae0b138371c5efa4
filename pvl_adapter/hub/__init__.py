"""Trained models: the published ones, our own folders, and the CLIPs to start from."""

from pvl_adapter.hub.backbones import Backbone, load_backbone
from pvl_adapter.hub.catalogue import CHECKPOINTS, Checkpoint, find_checkpoint, list_checkpoints
from pvl_adapter.hub.loading import from_pretrained
from pvl_adapter.hub.released import RELEASED_ADAPTER_PARTS, ReleasedNetwork, released_to_ours, rename_released

__all__ = [
    "CHECKPOINTS",
    "RELEASED_ADAPTER_PARTS",
    "Backbone",
    "Checkpoint",
    "ReleasedNetwork",
    "find_checkpoint",
    "from_pretrained",
    "list_checkpoints",
    "load_backbone",
    "released_to_ours",
    "rename_released",
]
