"""Small copies of what is published: the official network, a BERT's tokenizer, models of open_clip."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from hub_server import HubServer
from safetensors.torch import load_file
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.hub.official import OFFICIAL_TOKENIZER

TINY_RELEASED = pvl.OfficialConfig(
    image_size=32,
    patch_size=16,
    vision_width=32,
    vision_layers=4,
    vision_heads=4,
    vision_intermediate=64,
    joint_width=16,
    vocab_size=64,
    context_length=12,
    positions=16,
    text_width=32,
    text_layers=4,
    text_heads=4,
    text_intermediate=64,
    layers=(1, 2),
    adapter_dim=8,
)
GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = load_file(GOLDENS / "medclipseg_tiny.safetensors")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "one", "tumor", "polyp", "at", "the", "left", "right"]
VISION = {"image_size": [32, 48], "layers": 3, "width": 32, "head_width": 8, "patch_size": 16}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 4}


def official_checkpoint(tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """As the official code saves one; without tensors that of the recorded small network."""
    recorded = {name.removeprefix("checkpoint."): GOLDEN[name] for name in GOLDEN if name.startswith("checkpoint.")}
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}}
    return {
        "model": tensors or recorded,
        "epoch": 3,
        "optimizer": {"state": state, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]},
        "scheduler": {"T_max": 100, "last_epoch": 3, "_last_lr": [1e-4]},
        "best_loss": 0.5,
    }


def published_sizes() -> dict[str, list[int]]:
    """Shapes of the tensors of a published checkpoint, by their official names."""
    layout = json.loads((GOLDENS / "published_checkpoint_layout.json").read_text())["tensors"]
    return {name: shape for name, (shape, _) in layout.items()}


def serve_tokenizer(hub: HubServer) -> None:
    """As BiomedBERT's repository holds it, beside weights that nobody needs."""
    vocabulary = [*WORDS[:5], "a", "tumor", "on", "the", "left", "##s", "##side"]
    vocabulary += [f"[unused{number}]" for number in range(TINY_RELEASED.vocab_size - len(vocabulary))]
    hub.add(OFFICIAL_TOKENIZER, "vocab.txt", "\n".join(vocabulary).encode())
    hub.add(OFFICIAL_TOKENIZER, "config.json", json.dumps({"model_type": "bert", "vocab_size": 64}).encode())
    hub.add(OFFICIAL_TOKENIZER, "tokenizer_config.json", json.dumps({"do_lower_case": True}).encode())
    hub.add(OFFICIAL_TOKENIZER, "pytorch_model.bin", b"not needed")


def write_words(folder: Path) -> Path:
    """A small BERT's configuration and tokenizer, as the hub would have them."""
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 48}
    transformers.BertConfig(vocab_size=40, max_position_embeddings=18, **sizes).save_pretrained(folder)
    return folder


def register_open_clip(folder: Path, words: Path) -> dict[str, str]:
    """Make three small models known to open_clip; their names there."""
    timm = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    bert = {
        "hf_model_name": str(words),
        "hf_tokenizer_name": str(words),
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "hf_proj_type": "mlp",
        "context_length": 16,
    }
    canonical = {**TEXT, "tokenizer_kwargs": {"clean": "canonicalize"}}
    kinds = {"native": (VISION, TEXT), "bert": (VISION, bert), "timm": (timm, canonical)}
    for name, (vision, text) in kinds.items():
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
        (folder / f"pvl-test-{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return {name: f"pvl-test-{name}" for name in kinds}


@contextmanager
def forget_open_clip() -> Iterator[None]:
    """Afterwards open_clip knows the models that it knew before."""
    configs, paths = open_clip.factory._MODEL_CONFIGS, open_clip.factory._MODEL_CONFIG_PATHS
    before = dict(configs), list(paths)
    try:
        yield
    finally:
        configs.clear()
        configs.update(before[0])
        paths[:] = before[1]
