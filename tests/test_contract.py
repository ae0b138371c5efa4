"""What adapters promise on every family: equal to the oracle, the host unharmed, adapters alone trained."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS, PAD, Host, Text
from support import CONFIG, assert_same_bits, images, injected, no_fast_path, normal, segmenter, unchanged
from thread_oracle import assert_equal_to_lockstep, plain_towers, run_in_threads
from torch import Tensor

import pvl_adapter as pvl

ALL_LAYERS = {"layers": (0, 1, 2), "dim": 8}
PADDABLE = [host for host in HOSTS if host.positions > host.text_length]


def padded(host: Host) -> Text:
    """The host's text with padding up to all its positions."""
    return host.text_of(F.pad(host.ids, (0, host.positions - host.text_length), value=PAD))


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
def test_features_and_gradients_are_those_of_the_oracle(host, masked):
    model = injected(host, config=pvl.PVLConfig(layers=CONFIG.layers, dim=8, mask_padding=masked))
    adapters, noise = copy.deepcopy(model.pvl_adapters), host.noise(CONFIG)
    towers = plain_towers(host, host.build().requires_grad_(False))

    joint = pvl.encode(model, host.image, host.text, noise=noise)
    expected = run_in_threads(
        towers, adapters, CONFIG.layers, text_mask=host.text_mask if masked else None, noise=noise
    )

    assert_equal_to_lockstep(joint, expected, model.pvl_adapters, adapters)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_call_of_the_host_equals_encode_and_has_the_hosts_own_type(host, training):
    model = injected(host).train(training)

    with pvl.sampling(model, noise=host.noise(CONFIG)):
        joint, output = pvl.encode(model, host.image, host.text), host.call(model)
    by_position = list(host.arguments(host.image, host.text).values())
    if host.text_as_mapping:
        by_position = [host.text["input_ids"], host.image, host.text["attention_mask"]]
    image_features, text_features = host.features(output)

    torch.testing.assert_close(F.normalize(joint.image_embeds, dim=-1), image_features)
    torch.testing.assert_close(F.normalize(joint.text_embeds, dim=-1), text_features)
    assert type(output) is type(host.call(host.build()))
    assert_same_bits(model.eval()(*by_position), host.call(model))
    assert joint.grid == host.grid
    assert joint.patch_tokens.shape == (3, host.grid[0] * host.grid[1], host.joint_width)
    assert joint.text_tokens.shape == (3, host.text_length, host.joint_width)
    assert joint.image_embeds.shape == joint.text_embeds.shape == (3, host.joint_width)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_disabled_adapters_leave_the_host_bit_for_bit(host, training):
    model = host.build(dropout=0.3).train(training)
    model.requires_grad_(False)  # as injection does: torch folds some products otherwise where weights want gradients

    def run() -> object:
        torch.manual_seed(5)
        return host.call(model)

    with no_fast_path():
        expected = run()
        pvl.inject_adapters(model, CONFIG)
        joint = run()
        with pvl.disable_adapters(model):
            assert_same_bits(run(), expected)
        assert_same_bits(run(), joint)
    assert (host.features(joint)[0] - host.features(expected)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_reach_all_adapters_and_nothing_else(host, training):
    model = injected(host).train(training)
    image_features, text_features = host.features(host.call(model))
    weights = normal(*image_features.shape, seed=3)

    (image_features * weights + text_features * weights.flip(0)).sum().backward()

    for name, parameter in model.named_parameters():
        adapter = name.startswith("pvl_adapters.")
        assert parameter.requires_grad == adapter, name
        assert (parameter.grad is not None) == adapter, name
        if adapter:
            assert torch.isfinite(parameter.grad).all(), name
            # A key bias shifts all scores alike, so its true gradient is zero.
            assert parameter.grad.abs().max() > 0 or name.endswith("norm_k.bias"), name


def test_removal_restores_the_very_same_object(host):
    model = host.build(dropout=0.1)
    expected = host.call(model)
    first_child = next(iter(model.train().children()))
    first_child.eval()  # mixed modes and flags are the user's own
    next(first_child.parameters()).requires_grad_(False)

    with unchanged(model):
        assert pvl.inject_adapters(model, CONFIG) is model
        host.run(model.train()).sum().backward()
        torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0).step()
        model.zero_grad()
        host.call(model.eval())
        assert pvl.remove_adapters(model) is model

    with no_fast_path():
        assert_same_bits(host.call(model.eval()), expected)


def test_saved_adapters_load_into_another_host_of_the_same_weights(host, tmp_path):
    model = injected(host)

    pvl.save_adapters(model, tmp_path)
    other = host.build()
    pvl.load_adapters(other, tmp_path)

    assert_same_bits(host.call(other), host.call(model))


def test_a_tower_alone_is_refused_and_works_where_adapters_are_disabled(host):
    model = host.build().requires_grad_(False)
    with torch.no_grad():
        for method, names in host.lone_calls:
            expected = host.call_alone(model, method, names)
            pvl.inject_adapters(model, CONFIG)
            with pytest.raises(RuntimeError, match="disable_adapters"):
                host.call_alone(model, method, names)
            with pvl.disable_adapters(model):
                assert_same_bits(host.call_alone(model, method, names), expected)
            pvl.remove_adapters(model)


def test_wrong_shapes_are_refused_and_the_next_call_is_as_before(host):
    model = injected(host)
    expected = host.call(model)

    for image, ids in ((host.image[:, :1], host.ids), (host.image[0], host.ids), (host.image[:2], host.ids),
                       (host.image, host.ids[0]), (host.image, host.ids.float())):  # fmt: skip
        with pytest.raises(ValueError, match=r"expected|takes"):
            host.call(model, image, host.text_of(ids))
    if host.name != "open_clip-mt5":  # of relative positions
        with pytest.raises(ValueError, match="tokens, this model takes"):
            pvl.encode(model, host.image, host.text_of(F.pad(host.ids, (0, 12))))

    assert_same_bits(host.call(model), expected)


@pytest.mark.parametrize("host", PADDABLE, ids=str)
def test_padding_changes_nothing_if_masked_and_is_read_by_the_image_otherwise(host):
    model = injected(host, config=pvl.PVLConfig(**ALL_LAYERS))
    unmasked = injected(host, config=pvl.PVLConfig(**ALL_LAYERS, mask_padding=False))

    joint, longer = (pvl.encode(model, host.image, text) for text in (host.text, padded(host)))

    for name in ("image_embeds", "text_embeds", "patch_tokens"):
        torch.testing.assert_close(getattr(longer, name), getattr(joint, name), atol=1e-5, rtol=0.0)
    assert (host.run(unmasked, text=padded(host)) - host.run(unmasked)).abs().max() > 1e-3


@torch.no_grad()
def test_a_segmenter_predicts_what_it_computes_whatever_the_neighbours(host):
    model = segmenter(host)
    pixels, order = images(), [2, 0, 1]

    output = model(model.prepare(pixels), host.text)
    mean_pass, sampled = (model.predict(pixels, host.text, num_samples=number) for number in (0, 4))
    shuffled = model.predict([pixels[i] for i in order], host.text_of(host.ids[order]), num_samples=4)

    assert output.logits.shape == sampled.mask.shape == (3, *host.image_size)
    torch.testing.assert_close(mean_pass.probability, output.logits.sigmoid(), atol=1e-5, rtol=0.0)
    for name in ("probability", "variance", "standard_error"):
        got, expected = getattr(shuffled, name), getattr(sampled, name)[order]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0.0)
    alone = model.predict(pixels[1], host.text_of(host.ids[1:2]), num_samples=4)  # the shortest sentence
    torch.testing.assert_close(alone.probability[0], sampled.probability[1], atol=1e-5, rtol=0.0)
    assert (sampled.probability - mean_pass.probability).abs().max() > 1e-4


def test_autocast_and_other_types_stay_close(host):
    """Embeddings of length 1 within 0.05, after up to five blocks in bfloat16."""
    model = injected(host)
    half = pvl.inject_adapters(host.build().bfloat16(), CONFIG)
    with torch.no_grad():
        expected = host.run(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = host.run(model)

    torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.0)
    output: Tensor = host.run(half, image=host.image.bfloat16())
    assert output.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.pvl_adapters.parameters()} == {torch.float32}
    assert output.shape == expected.shape
    torch.testing.assert_close(host.run(model.double(), image=host.image.double()).float(), expected, atol=1e-4, rtol=0)
