"""Probabilistic vision-language adapters for any CLIP, and text-guided segmentation with uncertainty."""

from pvl_adapter import trust
from pvl_adapter.adapter import NoisePair, PVLAdapter
from pvl_adapter.attention import ProbCrossAttention, probabilistic_attention
from pvl_adapter.config import MedCLIPSegConfig, PVLConfig
from pvl_adapter.distill import DistillReport, distill
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
