"""Padding that nobody reads: it is not computed, and the results are those of computing it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import BATCH, BY_NAME, PAD, Host
from support import CONFIG, assert_close_gradients, blocks, gradients, images, injected, normal, segmenter
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import pvl_adapter as pvl

CAUSAL = ("open_clip-inlined_text", "open_clip-text_transformer")
MASKING = (
    "open_clip-bert",
    "open_clip-timm-bert",
    "open_clip-xlm-roberta",
    "open_clip-m2m_100",
    "open_clip-mt5",
    "transformers-altclip",
    "transformers-chineseclip",
    "transformers-blip",
    "transformers-dual-clip-bert",
    "transformers-dual-vit-roberta",
)
EACH_KIND = (CAUSAL[0], "open_clip-bert", "transformers-blip")
READING = ("open_clip-timm-map_pool", "open_clip-text_transformer-bidirectional", "transformers-siglip")


def config_of(masked: bool) -> pvl.PVLConfig:
    """An adapter before the first block, and blocks after the last one."""
    return pvl.PVLConfig(layers=CONFIG.layers[:1], dim=8, mask_padding=masked)


def ids_of(host: Host, *, equal: bool = False) -> Tensor:
    """Token ids padded to all positions; sentences of unequal length, or three times the same."""
    ids = F.pad(host.ids, (0, host.positions - host.text_length), value=PAD)
    return ids[[1, 1, 1]] if equal else ids


def noise_of(host: Host, *, tokens: int) -> list[pvl.NoisePair]:
    return [pvl.NoisePair(image=normal(BATCH, host.image_tokens, 8), text=normal(BATCH, tokens, 8, seed=1))]


def outputs(host: Host, model: nn.Module, ids: Tensor, *, everything: bool) -> list[Tensor]:
    """Of pairs with given noise; all text tokens are computed if `everything` is wanted."""
    noise = noise_of(host, tokens=ids.shape[1])
    joint = pvl.encode(model, host.image, host.text_of(ids), noise=noise, text_tokens=everything)
    return [joint.patch_tokens, joint.image_embeds, joint.text_embeds]


def flops(host: Host, model: nn.Module, ids: Tensor, *, everything: bool = False) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # which it counts
        outputs(host, model, ids, everything=everything)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "masked", "equal"),
    [
        pytest.param(name, masked, equal, marks=[] if name in EACH_KIND or masked != equal else pytest.mark.slow)
        for name in (*CAUSAL, *MASKING)
        for masked in (True, False)
        for equal in (False, True)
    ],
)
def test_results_and_gradients_are_those_of_computing_everything_at_fewer_products(name, masked, equal):
    host = BY_NAME[name]
    model, ids = injected(host, config=config_of(masked)), ids_of(host, equal=equal)
    found = []
    for everything in (False, True):
        model.zero_grad()
        values = outputs(host, model, ids, everything=everything)
        sum(value.square().mean() for value in values).backward()
        found.append((values, {key: grad for key, grad in gradients(model).items() if grad is not None}))
    (got, got_gradients), (expected, expected_gradients) = found

    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert_close_gradients(got_gradients, expected_gradients)
    assert flops(host, model, ids) < flops(host, model, ids, everything=True)


@pytest.mark.parametrize("name", [*CAUSAL, *MASKING])
def test_padding_costs_no_products_where_adapters_mask_it(name):
    host = BY_NAME[name]
    model, ids = injected(host, config=config_of(True)), ids_of(host)
    more_padding = ids.clone()
    more_padding[:, 6:] = PAD
    more_padding[more_padding.argmax(dim=1) == 0, 5] = ids.max()  # sentences that were longer end here
    longest = int((more_padding != PAD).sum(dim=1).max())

    if name not in (*CAUSAL, "transformers-altclip"):  # which take one length alone, or project every token
        assert flops(host, model, more_padding) == flops(host, model, more_padding[:, :longest])
    assert flops(host, model, more_padding) < flops(host, model, ids)


@pytest.mark.parametrize("name", MASKING)
def test_padding_that_adapters_read_is_a_query_but_neither_key_nor_value(name):
    """So each block saves two projections of the padding, and the last one, after the adapter, all the rest too."""
    host = BY_NAME[name]
    model, ids = injected(host, config=pvl.PVLConfig(layers=(2,), dim=8, mask_padding=False)), ids_of(host)
    padding = ids.shape[1] - int((ids != PAD).sum(dim=1).max())
    width = host.widths[1]

    saved = flops(host, model, ids, everything=True) - flops(host, model, ids)

    two_projections, rest = 2 * 2 * width**2, 6 * 2 * width**2  # for one token: query, output, and the inner layer's
    attention = 0 if name == "transformers-blip" else 2 * 2 * ids.shape[1] * width  # BLIP's own code masks it later
    assert saved >= BATCH * padding * (host.depths[1] * (two_projections + attention) + rest)


@pytest.mark.parametrize("name", READING)
def test_towers_that_read_padding_compute_it(name):
    host = BY_NAME[name]
    model, ids = injected(host, config=config_of(True)), ids_of(host)

    for got, expected in zip(*(outputs(host, model, ids, everything=each) for each in (False, True)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["open_clip-bert", "transformers-dual-vit-roberta", *CAUSAL[:1]])
@pytest.mark.parametrize("way", ["checkpointing", "autocast", "bfloat16", "float64", "eager"])
def test_other_ways_to_compute_give_what_they_give_of_everything(name, way):
    host = BY_NAME[name]
    settings = {"layers": (0, 1), "dim": 8, "mask_padding": False, "gradient_checkpointing": way == "checkpointing"}
    model, ids = injected(host, config=pvl.PVLConfig(**settings)).train(), ids_of(host)
    text = model.text.transformer if name == "open_clip-bert" else model
    if way == "eager" and name not in CAUSAL:
        text.set_attn_implementation("eager")
    model = model.double() if way == "float64" else model.bfloat16() if way == "bfloat16" else model
    image = host.image.to(next(model.parameters()).dtype)
    context = torch.autocast("cpu", dtype=torch.bfloat16) if way == "autocast" else nullcontext()
    found = []
    for everything in (False, True):
        model.zero_grad()
        with context:
            joint = pvl.encode(model, image, host.text_of(ids), sample=False, text_tokens=everything)
            (joint.patch_tokens.float().square().mean() + joint.text_embeds.float().square().mean()).backward()
        found.append((joint, {key: grad for key, grad in gradients(model).items() if grad is not None}))
    (got, got_gradients), (expected, expected_gradients) = found

    rounding = 0.1 if way in ("autocast", "bfloat16") else 1e-12 if way == "float64" else 2e-6
    torch.testing.assert_close(got.patch_tokens, expected.patch_tokens, atol=rounding, rtol=0.0)
    torch.testing.assert_close(got.text_embeds, expected.text_embeds, atol=rounding, rtol=0.0)
    if rounding < 0.1:
        assert_close_gradients(got_gradients, expected_gradients)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("name", ["open_clip-bert", "transformers-dual-clip-bert", *CAUSAL[:1]])
def test_predictions_ignore_padding_where_it_is_masked_and_hooks_everywhere(name, masked):
    host = BY_NAME[name]
    model = segmenter(host, config=config_of(masked))
    pixels, ids = images(), ids_of(host)

    def predicted(some: Tensor) -> Tensor:
        return model.predict(pixels, host.text_of(some), num_samples=4).probability

    expected = predicted(ids)
    if masked and name not in CAUSAL:
        torch.testing.assert_close(predicted(ids[:, : host.text_length]), expected, atol=1e-6, rtol=0.0)
    for block in blocks(model.clip).values():
        block.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(predicted(ids), expected, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("equal", [False, True], ids=["unequal", "equal"])
def test_attention_needs_no_mask_where_all_sentences_are_equally_long(equal):
    """So a GPU can take its flash attention."""
    host, masks, original = BY_NAME["open_clip-bert"], [], F.scaled_dot_product_attention
    model, ids = injected(host, config=config_of(False)), ids_of(host, equal=equal)

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is original:
                masks.append((kwargs or {}).get("attn_mask"))
            return func(*args, **(kwargs or {}))

    with Watch():
        outputs(host, model, ids, everything=False)

    assert len(masks) >= host.depths[1]
    assert all(mask is None for mask in masks) == equal


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["open_clip-bert", "transformers-dual-clip-bert"])
def test_a_sentence_of_padding_alone_gets_what_its_tower_makes_of_it(name, attention):
    host = BY_NAME[name]
    model, ids = injected(host, config=config_of(False)), ids_of(host)
    (model.text.transformer if name == "open_clip-bert" else model.text_model).set_attn_implementation(attention)
    ids[1] = PAD

    for got, expected in zip(*(outputs(host, model, ids, everything=each) for each in (False, True)), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_hooks_on_blocks_see_all_tokens():
    host = BY_NAME["open_clip-bert"]
    model, ids = injected(host, config=config_of(False)), ids_of(host)
    fewer, seen = flops(host, model, ids), set()
    for name, block in blocks(model).items():
        if "text" in name:
            block.register_forward_hook(lambda _, __, output: seen.add(output.shape[1]))

    assert flops(host, model, ids) > fewer
    assert seen == {host.positions}


def test_an_adapter_can_update_the_first_text_tokens_alone():
    adapter = pvl.PVLAdapter(8, 6, 4)
    vision, text = normal(2, 5, 8), normal(2, 7, 6)

    expected = adapter(vision, text, sample=False)
    got = adapter(vision, text, sample=False, text_rows=3)

    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1][:, :3])
