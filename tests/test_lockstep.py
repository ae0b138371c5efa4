"""Two towers run block by block: equal to a lockstep written by hand, at the right depths, and compilable."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hosts import BY_NAME, Host
from support import CONFIG, assert_same_bits, blocks, gradients, injected, normal, randomise
from torch import Tensor, nn
from towers_by_hand import BY_HAND, Features, run_in_lockstep

import pvl_adapter as pvl
from pvl_adapter.injection import fusion_points

POINTS = {  # for the layers 0 and 2 of CONFIG, worked out by hand from the depths
    "open_clip-inlined_text": ((0, 0), (3, 2)),  # 5 and 3: 2/3 of 5 is 3.3
    "open_clip-text_transformer": ((0, 0), (2, 3)),  # 3 and 5
    "open_clip-bert": ((0, 0), (2, 3)),  # 3 and 4: 2/3 of 4 is 2.7
    "transformers-clip": ((0, 0), (3, 2)),  # 5 and 3
}
FEATURES = ("image_embeds", "patch_tokens", "text_embeds", "text_tokens")


@pytest.fixture(params=BY_HAND)
def written(request: pytest.FixtureRequest) -> Host:
    """The hosts whose towers are written out by hand."""
    return BY_NAME[request.param]


def by_hand(host: Host, model: nn.Module, noise: list[tuple[Tensor, Tensor]] | None) -> Features:
    """With the adapters of the injected `model` and the towers of a plain one."""
    return run_in_lockstep(
        host.name, host.build(), model.pvl_adapters, POINTS[host.name], host.image, host.text, noise=noise
    )


def test_without_adapters_the_towers_by_hand_are_those_of_the_host(written):
    """So that what is compared with is known to be right."""
    plain = written.build()

    features = run_in_lockstep(written.name, plain, [], [], written.image, written.text)

    image_features, text_features = written.features(written.call(plain))
    torch.testing.assert_close(F.normalize(features.image_embeds, dim=-1), image_features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(F.normalize(features.text_embeds, dim=-1), text_features, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampled", [False, True], ids=["mean", "sampled"])
def test_features_equal_those_of_a_lockstep_written_by_hand(written, sampled):
    model = injected(written)
    noise = written.noise(CONFIG) if sampled else None

    joint = pvl.encode(model, written.image, written.text, noise=noise)

    expected = by_hand(written, model, noise)
    for name in FEATURES:
        torch.testing.assert_close(getattr(joint, name), getattr(expected, name), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_host_call_equals_a_lockstep_written_by_hand(written, training):
    model = injected(written).train(training)
    noise = written.noise(CONFIG)

    with pvl.sampling(model, noise=noise):
        image_features, text_features = written.features(written.call(model))

    expected = by_hand(written, model, noise)
    torch.testing.assert_close(image_features, F.normalize(expected.image_embeds, dim=-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text_features, F.normalize(expected.text_embeds, dim=-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampled", [False, True], ids=["mean", "sampled"])
@pytest.mark.parametrize("entry", ["encode", "call"])
def test_adapter_gradients_equal_those_of_a_lockstep_written_by_hand(written, entry, sampled):
    model = injected(written)
    noise = written.noise(CONFIG) if sampled else None
    weights = normal(3, 16, seed=7)

    if entry == "encode":
        joint = pvl.encode(model, written.image, written.text, noise=noise)
        image_features, text_features = F.normalize(joint.image_embeds, dim=-1), F.normalize(joint.text_embeds, dim=-1)
    else:
        with pvl.sampling(model, sample=sampled, noise=noise):
            image_features, text_features = written.features(written.call(model))
    (image_features * weights + text_features * weights.flip(0)).sum().backward()
    got = {name: gradient.clone() for name, gradient in gradients(model.pvl_adapters).items()}

    model.zero_grad()
    expected = by_hand(written, model, noise)
    image_features = F.normalize(expected.image_embeds, dim=-1)
    text_features = F.normalize(expected.text_embeds, dim=-1)
    (image_features * weights + text_features * weights.flip(0)).sum().backward()
    largest = max(float(gradient.abs().max()) for gradient in gradients(model.pvl_adapters).values())
    torch.testing.assert_close(got, gradients(model.pvl_adapters), atol=1e-4 * largest, rtol=1e-4)


def test_every_adapter_has_a_say(written):
    """Changing any one of them alone changes the outcome."""
    model = injected(written, config=pvl.PVLConfig(layers=(0, 1, 2), dim=8))
    before = written.run(model).detach()

    for adapter in model.pvl_adapters:
        randomise(adapter, seed=3)
        after = written.run(model).detach()
        assert (after - before).abs().max() > 1e-4
        before = after


@pytest.mark.parametrize(
    ("image_depth", "text_depth", "expected"),
    [
        (12, 12, {1: (1, 1), 5: (5, 5), 10: (10, 10)}),
        (24, 12, {1: (2, 1), 5: (10, 5), 10: (20, 10)}),
        (12, 24, {1: (1, 2), 5: (5, 10), 10: (10, 20)}),
        (12, 10, {1: (1, 1), 4: (5, 4), 5: (6, 5), 8: (10, 8)}),
        (32, 24, {1: (1, 1), 2: (3, 2), 3: (4, 3), 12: (16, 12), 22: (29, 22)}),
        (5, 3, {0: (0, 0), 1: (2, 1), 2: (3, 2)}),
    ],
    ids=str,
)
def test_towers_of_unequal_depth_meet_at_equal_relative_depth(image_depth, text_depth, expected):
    assert fusion_points(list(expected), image_depth=image_depth, text_depth=text_depth) == tuple(expected.values())


@pytest.mark.parametrize(("image_depth", "text_depth"), [(12, 12), (24, 12), (12, 10), (32, 24), (12, 24), (64, 24)])
def test_every_layer_gets_its_own_point_within_half_a_block_of_its_relative_depth(image_depth, text_depth):
    shallower, deeper = sorted((image_depth, text_depth))

    points = fusion_points(range(shallower), image_depth=image_depth, text_depth=text_depth)

    assert len(points) == shallower
    for axis, depth in enumerate((image_depth, text_depth)):
        blocks = [point[axis] for point in points]
        assert blocks == sorted(set(blocks))
        assert blocks[0] == 0
        assert blocks[-1] < depth
    for image_block, text_block in points:
        assert abs(image_block / image_depth - text_block / text_depth) <= 0.5 / deeper + 1e-9


def test_no_block_of_either_tower_is_dropped_or_run_twice(host):
    """Counted at the first part of each block, since hooks on blocks themselves fire at their replay."""
    model = injected(host)
    runs = dict.fromkeys(blocks(model), 0)
    for name, block in blocks(model).items():
        first_part = next(part for part in block.modules() if not list(part.children()))
        first_part.register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))

    host.call(model)

    assert len(runs) == sum(host.depths)
    assert set(runs.values()) == {1}


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)], ids=["traced", "inductor"]
)
@pytest.mark.parametrize("name", ["open_clip-inlined_text", "transformers-clip"])
def test_a_training_step_compiles_to_one_graph_with_equal_gradients(name, backend):
    host = BY_NAME[name]
    model = injected(host).train()
    noise = host.noise(CONFIG)

    def step(call: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        with pvl.sampling(model, noise=noise):
            image_features, text_features = host.features(call(**host.arguments(host.image, host.text)))
        ((image_features + text_features.flip(0)) ** 3).sum().backward()
        found = {name: gradient.clone() for name, gradient in gradients(model.pvl_adapters).items()}
        return image_features.detach(), found

    expected = step(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    got = step(compiled)

    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)
    assert_same_bits(step(compiled)[0], got[0])
    torch._dynamo.reset()
