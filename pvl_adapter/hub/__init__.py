"""Trained models: the published ones, our own folders, and the CLIPs to start from."""

from pvl_adapter.hub.backbones import Backbone, load_backbone
from pvl_adapter.hub.catalogue import CHECKPOINTS, Checkpoint, find_checkpoint, list_checkpoints
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
