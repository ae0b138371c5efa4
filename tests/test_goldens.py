"""Parity with figures recorded from the released code (REFERENCE.md; github HealthX-Lab/MedCLIPSeg, commit 8d7ef36).

`PVL_GOLDENS` names another folder of files in the same format: every size and setting is read from a file's tensors and
metadata. Where a file does not tell a setting, it is that of `medclipseg_tiny`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.hub import OFFICIAL_ADAPTER_PARTS, rename_official
from pvl_adapter.hub.official import load_meta_state
from pvl_adapter.losses import soft_targets

pytestmark = pytest.mark.golden

FOLDER = Path(os.environ.get("PVL_GOLDENS") or Path(__file__).parent / "goldens")
FORWARD_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4  # of the largest entry


@dataclass(frozen=True)
class Golden:
    """A file of recorded tensors."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    def noise_pairs(self) -> list[pvl.NoisePair]:
        """One pair per adapter, from noise numbered in the order of the calls: the text values come first."""
        noise = self.under("noise.")
        return [pvl.NoisePair(image=noise[str(k + 1)], text=noise[str(k)]) for k in range(0, len(noise), 2)]


def load(name: str) -> Golden:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return Golden({key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {})  # noqa: SIM118


def setting(name: str, *goldens: Golden) -> str:
    """From the first file that tells."""
    return next(golden.metadata[name] for golden in goldens if name in golden.metadata)


def rename_adapter_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        dotted = f".{name}"
        for released, ours in OFFICIAL_ADAPTER_PARTS:
            dotted = dotted.replace(released, ours)
        renamed[dotted[1:]] = tensor
    return renamed


def assert_forward_equal(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=FORWARD_TOLERANCE, rtol=FORWARD_TOLERANCE)


def assert_gradients_equal(got: Mapping[str, Tensor | None], expected: Mapping[str, Tensor]) -> None:
    """Each tensor within the tolerance of its own largest entry.

    Gradients that are zero but for rounding (a key bias shifts all scores alike) are held to that of all tensors.
    """
    assert set(got) == set(expected)
    largest_of_all = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert got[name] is not None, f"{name} got no gradient"
        largest = float(gradient.abs().max())
        largest = largest if largest > 1e-6 * largest_of_all else largest_of_all
        torch.testing.assert_close(
            got[name].reshape(gradient.shape),  # a gate is a scalar there
            gradient,
            atol=GRADIENT_TOLERANCE * largest,
            rtol=0.0,
            msg=lambda message, name=name: f"gradient of {name}: {message}",
        )


def parameter_gradients(module: torch.nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_attention_equals_the_release_forward_and_backward():
    golden = load("prob_cross_attention")
    weights = golden.under("weight.")
    attention = pvl.ProbCrossAttention(weights["q_proj.weight"].shape[0], beta=float(golden.metadata["beta"]))
    attention.load_state_dict(weights)
    query, context = golden["query"].clone().requires_grad_(), golden["context"].clone().requires_grad_()

    output = attention(query, context, noise=golden["noise"])
    output.backward(golden["grad_output"])

    assert_forward_equal(output, golden["output"])
    inputs = {"query": query.grad, "context": context.grad}
    weights = {f"weight.{name}": gradient for name, gradient in parameter_gradients(attention).items()}
    assert_gradients_equal({**inputs, **weights}, golden.under("grad."))


def test_adapter_equals_the_release_forward_and_backward():
    golden = load("pvl_adapter")
    weights = rename_adapter_parts(golden.under("weight."))
    dim, vision_dim = weights["vision_down.weight"].shape
    text_dim = weights["text_down.weight"].shape[1]
    adapter = pvl.PVLAdapter(vision_dim, text_dim, dim, beta=float(golden.metadata["beta"]))
    adapter.load_state_dict(weights)
    vision, text = golden["vision"].clone().requires_grad_(), golden["text"].clone().requires_grad_()

    updates = adapter(
        vision, text, noise=pvl.NoisePair(image=golden["noise.txt_to_img"], text=golden["noise.img_to_txt"])
    )
    torch.autograd.backward(updates, [golden["grad_vision_update"], golden["grad_text_update"]])

    assert_forward_equal(updates[0], golden["vision_update"])
    assert_forward_equal(updates[1], golden["text_update"])
    inputs = {"vision": vision.grad, "text": text.grad}
    expected_inputs = {name: golden[f"grad.{name}"] for name in inputs}
    expected_weights = rename_adapter_parts(golden.under("grad.weight."))
    assert_gradients_equal({**inputs, **parameter_gradients(adapter)}, {**expected_inputs, **expected_weights})


def test_contrastive_loss_equals_the_release_in_targets_loss_and_gradients():
    golden = load("soft_contrastive_loss")
    temperature = float(golden.metadata["temperature"])
    patches, text = golden["patch_tokens"].clone().requires_grad_(), golden["text_features"].clone().requires_grad_()

    loss = pvl.SoftContrastiveLoss(temperature=temperature)(patches, text)
    loss.backward()

    assert_forward_equal(soft_targets(text, temperature=temperature), golden["soft_targets"])
    assert_forward_equal(loss, golden["loss"])
    assert_gradients_equal({"patch_tokens": patches.grad, "text_features": text.grad}, golden.under("grad."))


def test_model_equals_the_release():
    golden = load("medclipseg_tiny")
    model = released_model(golden).eval()

    with torch.no_grad():
        output = model(golden["image"], golden["input_ids"], noise=golden.noise_pairs())
        joint = pvl.encode(model.clip, golden["image"], golden["input_ids"], noise=golden.noise_pairs())

    recorded = golden["image_tokens"]  # the class token, which is the pooled embedding, then the patches
    assert_forward_equal(joint.image_embeds, recorded[:, 0])
    assert_forward_equal(joint.patch_tokens, recorded[:, 1:])
    assert_forward_equal(joint.text_embeds, golden["text_features"])
    assert_forward_equal(output.patch_tokens, recorded[:, 1:])
    assert_forward_equal(output.text_embeds, golden["text_features"])
    assert_forward_equal(output.logits, golden["seg_logits"])


def test_training_step_equals_the_release_in_losses_and_gradients():
    golden, tiny = load("medclipseg_tiny_train"), load("medclipseg_tiny")
    weights = {
        name: float(weight) for weight, name in re.findall(r"([\d.]+) *\* *(\w+)", setting("loss", golden))
    }  # as in "0.5*bce + 0.1*soft_contrastive_loss"
    model = released_model(golden, tiny).train()
    loss = pvl.SegmentationLoss(
        dice_weight=weights["dice_loss_rowwise"],
        bce_weight=weights["bce"],
        contrastive_weight=weights["soft_contrastive_loss"],
        temperature=float(setting("temperature", golden, tiny, load("soft_contrastive_loss"))),
        dice_reduction="row",
    )

    output = model(golden["image"], golden["input_ids"], noise=golden.noise_pairs())
    terms = loss(output.logits, golden["mask"], patch_tokens=output.patch_tokens, text_embeds=output.text_embeds)
    terms.total.backward()

    assert_forward_equal(output.logits, golden["seg_logits"])
    assert_forward_equal(terms.dice, golden["dice_loss_rowwise"])
    assert_forward_equal(terms.bce, golden["bce"])
    assert_forward_equal(terms.contrastive, golden["soft_contrastive_loss"])
    assert_forward_equal(terms.total, golden["total_loss"])
    assert_gradients_equal(parameter_gradients(model), rename_official(golden.under("grad.")))


def released_model(golden: Golden, *fallbacks: Golden) -> pvl.MedCLIPSeg:
    """The network whose tensors a file holds, in the released layout: a native ViT and a Hugging Face BERT."""
    files = (golden, *fallbacks)
    tensors = golden.under("checkpoint.")
    heads = int(setting("heads", *files))
    vision_width, joint_width = tensors["vision_model.proj"].shape
    vision_block = "vision_model.transformer.resblocks.{}.mlp.c_fc.weight"
    text_block = "text_model.transformer.encoder.layer.{}.intermediate.dense.weight"
    vocab_size, text_width = tensors["text_model.transformer.embeddings.word_embeddings.weight"].shape
    config = pvl.OfficialConfig(
        image_size=golden["image"].shape[-1],
        patch_size=tensors["vision_model.conv1.weight"].shape[-1],
        vision_width=vision_width,
        vision_layers=count(tensors, vision_block),
        vision_heads=heads,
        vision_intermediate=len(tensors[vision_block.format(0)]),
        joint_width=joint_width,
        vocab_size=vocab_size,
        context_length=golden["input_ids"].shape[1],
        positions=len(tensors["text_model.transformer.embeddings.position_embeddings.weight"]),
        text_width=text_width,
        text_layers=count(tensors, text_block),
        text_heads=heads,
        text_intermediate=len(tensors[text_block.format(0)]),
        layers=tuple(json.loads(setting("layers", *files))),
        adapter_dim=len(tensors["pvl_adapters.0.proj_txt_down.weight"]),
        beta=float(setting("beta", *files)),
        num_upscale=count(tensors, "upscale.{}.conv1.weight"),
    )
    model = config.build()
    load_meta_state(model, rename_official(tensors), source=FOLDER)
    return model


def count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers, from 0, give a name that is there."""
    number = 0
    while pattern.format(number) in tensors:
        number += 1
    return number
