"""Probabilistic vision-language adapters for any CLIP, and text-guided segmentation with uncertainty."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvl_adapter import trust
    from pvl_adapter.adapter import NoisePair, PVLAdapter
    from pvl_adapter.attention import ProbCrossAttention, probabilistic_attention
    from pvl_adapter.config import MedCLIPSegConfig, PVLConfig
    from pvl_adapter.distillation import DistillReport, distill
    from pvl_adapter.distilled_head import DistilledHead
    from pvl_adapter.ensemble import Ensemble
    from pvl_adapter.export import export_onnx
    from pvl_adapter.head import PixelHead
    from pvl_adapter.hub import Backbone, OfficialConfig, from_pretrained, list_checkpoints, load_backbone
    from pvl_adapter.hub.adapter_folder import load_adapters, save_adapters
    from pvl_adapter.images import prepare_images, prepare_masks
    from pvl_adapter.injection import inject_adapters, print_trainable_parameters, remove_adapters
    from pvl_adapter.joint import JointFeatures, disable_adapters, encode, sampling
    from pvl_adapter.losses import (
        LossTerms,
        SegmentationLoss,
        SoftContrastiveLoss,
        dice_loss,
        kl_loss,
        soft_contrastive_loss,
    )
    from pvl_adapter.monte_carlo import Auto
    from pvl_adapter.prediction import Prediction
    from pvl_adapter.segmentation import MedCLIPSeg, SegmentationOutput
    from pvl_adapter.towers import UnsupportedModelError

__version__ = "0.1.0"

__all__ = [
    "Auto",
    "Backbone",
    "DistillReport",
    "DistilledHead",
    "Ensemble",
    "JointFeatures",
    "LossTerms",
    "MedCLIPSeg",
    "MedCLIPSegConfig",
    "NoisePair",
    "OfficialConfig",
    "PVLAdapter",
    "PVLConfig",
    "PixelHead",
    "Prediction",
    "ProbCrossAttention",
    "SegmentationLoss",
    "SegmentationOutput",
    "SoftContrastiveLoss",
    "UnsupportedModelError",
    "dice_loss",
    "disable_adapters",
    "distill",
    "encode",
    "export_onnx",
    "from_pretrained",
    "inject_adapters",
    "kl_loss",
    "list_checkpoints",
    "load_adapters",
    "load_backbone",
    "prepare_images",
    "prepare_masks",
    "print_trainable_parameters",
    "probabilistic_attention",
    "remove_adapters",
    "sampling",
    "save_adapters",
    "soft_contrastive_loss",
    "trust",
]

_MODULES = {
    "adapter": "NoisePair PVLAdapter",
    "attention": "ProbCrossAttention probabilistic_attention",
    "config": "MedCLIPSegConfig PVLConfig",
    "distillation": "DistillReport distill",
    "distilled_head": "DistilledHead",
    "ensemble": "Ensemble",
    "export": "export_onnx",
    "head": "PixelHead",
    "hub": "Backbone OfficialConfig from_pretrained list_checkpoints load_backbone",
    "hub.adapter_folder": "load_adapters save_adapters",
    "images": "prepare_images prepare_masks",
    "injection": "inject_adapters print_trainable_parameters remove_adapters",
    "joint": "JointFeatures disable_adapters encode sampling",
    "losses": "LossTerms SegmentationLoss SoftContrastiveLoss dice_loss kl_loss soft_contrastive_loss",
    "monte_carlo": "Auto",
    "prediction": "Prediction",
    "segmentation": "MedCLIPSeg SegmentationOutput",
    "towers": "UnsupportedModelError",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is first asked for."""
    if name == "trust":
        return import_module("pvl_adapter.trust")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
