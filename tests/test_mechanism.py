"""What the mechanism promises, on the five core hosts: depths, draws, modes, contexts, hooks, copies."""

from __future__ import annotations

import copy
import io

import open_clip
import pytest
import torch
from hosts import CORE_HOSTS, Host
from support import (
    CONFIG,
    assert_same_bits,
    blocks,
    gradients,
    injected,
    leaves,
    no_fast_path,
    normal,
    randomise,
    unchanged,
)
from thread_oracle import PlainTower, assert_equal_to_lockstep, run_in_threads
from tiny_models import JOINT_WIDTH, transformer, vit
from torch import Tensor, nn

import pvl_adapter as pvl


@pytest.fixture(params=CORE_HOSTS, ids=str)
def host(request: pytest.FixtureRequest) -> Host:
    return request.param


# --- where the towers meet -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depths", [(12, 5), (5, 12), (8, 3), (6, 6), (7, 4)], ids=str)
def test_towers_of_any_depths_meet_at_equal_relative_depth(depths):
    """Including halves, which are rounded up: 2 of 6 blocks against 3 of 8."""
    layers = tuple(range(min(depths)))
    host = Host(
        name="deep",
        make=lambda dropout: open_clip.CustomTextCLIP(JOINT_WIDTH, vit(depths[0]), transformer(depths[1])),
        depths=depths,
    )
    model = injected(host, config=pvl.PVLConfig(layers=layers, dim=4))
    plain = host.build().requires_grad_(False)
    towers = (
        PlainTower(plain.visual.transformer.resblocks, lambda: plain.encode_image(host.image)),
        PlainTower(plain.text.transformer.resblocks, lambda: plain.encode_text(host.ids)),
    )
    adapters = copy.deepcopy(model.pvl_adapters)

    expected = run_in_threads(towers, adapters, layers, text_mask=host.text_mask)

    assert_equal_to_lockstep(pvl.encode(model, host.image, host.ids), expected, model.pvl_adapters, adapters)


def test_no_block_is_dropped_or_run_twice(host):
    """Nor again in the backward pass, unless asked to. Counted at the first part of each block, since hooks on blocks
    themselves fire at their replay."""
    model = injected(host, config=pvl.PVLConfig(layers=(0, 1, 2), dim=8))
    runs = dict.fromkeys(blocks(model), 0)
    for name, block in blocks(model).items():
        first_part = next(part for part in block.modules() if not list(part.children()))
        first_part.register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))

    host.run(model).sum().backward()

    assert len(runs) == sum(host.depths)
    assert set(runs.values()) == {1}


def test_settings_reach_the_adapters_and_defaults_leave_the_first_and_last_block_out(host):
    (adapter,) = pvl.inject_adapters(
        host.build(), pvl.PVLConfig(layers=[1], dim=6, beta=0.5, gate_init=1.25)
    ).pvl_adapters
    default = pvl.inject_adapters(host.build()).pvl_adapters

    assert adapter.vision_down.weight.shape == (6, host.widths[0])
    assert adapter.text_up.weight.shape == (host.widths[1], 6)
    assert adapter.two_way.text_to_image.gate.item() == 1.25
    assert adapter.two_way.image_to_text.beta == 0.5
    assert len(default) == min(host.depths) - 2
    assert default[0].vision_down.weight.shape[0] == 256


# --- draws -----------------------------------------------------------------------------------------------------------


def test_train_mode_draws_anew_and_eval_mode_is_deterministic_and_spares_the_random_state(host):
    model, before = injected(host), torch.random.get_rng_state()
    image, text = host.image, host.text

    for run in (lambda: host.run(model), lambda: pvl.encode(model, image, text).image_embeds):
        mean = run()
        assert torch.equal(mean, run())
        assert torch.equal(torch.random.get_rng_state(), before)
        model.train()
        assert not torch.equal(run(), run())
        with pvl.sampling(model, sample=False):
            torch.testing.assert_close(run(), mean)
        model.eval()
        torch.random.set_rng_state(before)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_generators_and_noise_decide_the_draws_of_calls_and_of_encode_alike(host, training):
    model = injected(host).train(training)

    def encoded(**settings: object) -> Tensor:
        return pvl.encode(model, host.image, host.text, **settings).image_embeds

    def within(**settings: object) -> tuple[Tensor, Tensor]:
        with pvl.sampling(model, **settings):
            return host.run(model), encoded()

    kinds = {
        "generator": lambda seed: torch.Generator().manual_seed(seed),
        "noise": lambda seed: host.noise(CONFIG, seed=seed),
    }
    for name, make in kinds.items():
        first, same, other = (within(**{name: make(seed)}) for seed in (1, 1, 2))
        assert_same_bits(same, first)
        assert not torch.equal(other[0], first[0])
        assert not torch.equal(other[1], first[1])
        directly = [encoded(sample=True, **{name: make(1)}) for _ in range(2)]
        assert torch.equal(*directly)
    assert torch.equal(directly[0], first[1])  # the same noise either way
    assert not torch.equal(encoded(sample=True), encoded(sample=True))


# --- what features say of themselves ---------------------------------------------------------------------------------


def test_likeness_and_summary_are_those_of_a_loop():
    patches, sentence = normal(2, 20, 6), normal(2, 6, seed=1)
    joint = pvl.JointFeatures(patches, (4, 5), image_embeds=sentence, text_tokens=None, text_embeds=sentence)

    for b in range(2):
        directions, toward = [patch / patch.norm() for patch in patches[b]], sentence[b] / sentence[b].norm()
        cosines = sorted((float(direction @ toward) for direction in directions), reverse=True)
        expected = torch.tensor([cosines[0], sum(cosines[:2]) / 2, sum(cosines) / 20])  # a tenth of 20 are 2
        torch.testing.assert_close(joint.likeness()[b], expected)
        torch.testing.assert_close(joint.summary()[b], torch.cat([sum(directions) / 20, toward]))


# --- contexts and modes ----------------------------------------------------------------------------------------------


def test_contexts_nest_and_end_even_if_an_error_leaves_them(host):
    model = injected(host)
    joint = host.call(model)
    with pvl.disable_adapters(model):
        alone = host.call(model)
        with pvl.disable_adapters(model), pvl.sampling(model):
            assert_same_bits(host.call(model), alone)
        assert_same_bits(host.call(model), alone)

    for context in (pvl.disable_adapters, pvl.sampling):
        with pytest.raises(KeyError), context(model):
            raise KeyError
        assert_same_bits(host.call(model), joint)


def test_disabled_adapters_leave_gradients_and_autocast_of_the_host_bit_for_bit(host):
    model = host.build()

    def run() -> tuple[Tensor, list[Tensor | None]]:
        model.zero_grad()
        host.run(model).square().sum().backward()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            half = host.run(model)
        return half, [grad for name, grad in gradients(model).items() if not name.startswith("pvl_adapters.")]

    with no_fast_path():
        expected = run()
        pvl.inject_adapters(model, CONFIG).requires_grad_(True)
        with pvl.disable_adapters(model):
            assert_same_bits(run(), expected)


def test_frozen_towers_keep_their_dropout_asleep_unless_asked(host):
    calm = injected(host, dropout=0.5).train()
    with pvl.sampling(calm, sample=False):
        assert_same_bits(host.call(calm), host.call(calm))
        assert_same_bits(host.call(calm), host.call(calm.eval()))
    from_the_start = pvl.inject_adapters(host.build(dropout=0.5).train(), CONFIG)
    with pvl.sampling(from_the_start, sample=False):
        assert_same_bits(host.call(from_the_start), host.call(from_the_start))
    if host.name in ("open_clip-bert", "transformers-clip"):  # which have dropout
        awake = injected(host, dropout=0.5, config=pvl.PVLConfig(layers=[1], dim=8, tower_dropout=True)).train()
        with pvl.sampling(awake, sample=False):
            assert not torch.equal(host.run(awake), host.run(awake))
            assert torch.equal(host.run(awake.eval()), host.run(awake))


def test_trainable_parameters_are_counted(host, capsys):
    model = injected(host)

    pvl.print_trainable_parameters(model)

    trained = sum(parameter.numel() for parameter in model.pvl_adapters.parameters())
    assert f"{trained:,}" in capsys.readouterr().out


# --- injection and removal -------------------------------------------------------------------------------------------


def test_injection_keeps_class_keys_and_mode_and_checkpoints_of_the_host_still_load(host):
    model, other = host.build().train(), host.build(seed=1)
    keys = list(model.state_dict())

    pvl.inject_adapters(model, CONFIG)
    result = model.load_state_dict(other.state_dict(), strict=False)

    assert type(model) is type(other)
    assert [name for name in model.state_dict() if not name.startswith("pvl_adapters.")] == keys
    assert model.training
    assert not result.unexpected_keys
    assert all(name.startswith("pvl_adapters.") for name in result.missing_keys)
    with pvl.disable_adapters(model):
        torch.testing.assert_close(host.run(model.eval()), host.run(other))


@pytest.mark.parametrize("after", ["train", "eval", "disabling", "an_error", "a_prediction"])
def test_removal_restores_the_host_whatever_has_happened(host, after):
    model = host.build(dropout=0.1).train()

    with unchanged(model):
        pvl.inject_adapters(model, CONFIG)
        if after in ("train", "eval"):
            getattr(model, after)()
        elif after == "disabling":
            with pvl.disable_adapters(model):
                host.call(model.eval())
        elif after == "an_error":
            with pytest.raises(ValueError, match="expected"):
                host.call(model, image=host.image[:, :2])
        elif after == "a_prediction":
            pvl.MedCLIPSeg(model).predict(host.image, host.text, num_samples=2, prepared=True)
        pvl.remove_adapters(model)


def test_a_forward_that_the_user_has_replaced_stays_in_charge_and_comes_back(host):
    """As accelerate does to spread a model over devices."""
    model = host.build().requires_grad_(False)
    own = model.forward
    model.forward = wrapped = lambda *args, **kwargs: ("wrapped", own(*args, **kwargs))
    with no_fast_path():
        expected = host.call(model)
        pvl.inject_adapters(model, CONFIG)
        with pvl.disable_adapters(model):
            assert_same_bits(host.call(model), expected)
        pvl.remove_adapters(model)
        assert_same_bits(host.call(model), expected)
    assert model.forward is wrapped


def test_a_forward_that_the_user_has_put_on_blocks_is_used(host):
    model, used = host.build(), set()
    for name, block in blocks(model).items():

        def forward(*args: object, block: nn.Module = block, of: str = name, **kwargs: object) -> object:
            used.add(of)
            return type(block).forward(block, *args, **kwargs)

        block.forward = forward
    pvl.inject_adapters(model, CONFIG)
    used.clear()

    pvl.MedCLIPSeg(model).predict(host.image, host.text, num_samples=2, prepared=True)

    assert used == set(blocks(model))


# --- hooks and copies ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_hooks_on_blocks_see_the_hidden_states_of_the_joint_run_in_every_way_in(host):
    model = pvl.MedCLIPSeg(injected(host)).eval()
    seen: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    for name, block in blocks(model.clip).items():
        block.register_forward_hook(lambda _, __, output, name=name: seen.update({name: leaves(output)[0]}))
        block.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: given.update({name: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
    ways = {
        "call": lambda: host.call(model.clip),
        "encode": lambda: pvl.encode(model.clip, host.image, host.text),
        "logits": lambda: model(host.image, host.text),
        "predict": lambda: model.predict(host.image, host.text, num_samples=0, prepared=True),
    }
    found = {}
    for way, call in ways.items():
        call()
        found[way] = {"seen": dict(seen), "given": dict(given)}

    shapes = {tuple(hidden.shape) for hidden in found["call"]["seen"].values()}
    assert shapes == {(3, host.image_tokens, host.widths[0]), (3, host.text_length, host.widths[1])}
    assert len({tuple(hidden.flatten()[:4].tolist()) for hidden in seen.values()}) == sum(host.depths)
    for way in ways:
        for kind, hidden_states in found[way].items():
            assert hidden_states.keys() == blocks(model.clip).keys()
            for name, hidden in hidden_states.items():
                expected = found["call"][kind][name][:, : hidden.shape[1]]  # BERT's shared padding is cut off
                torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


def through_a_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file], ids=["copy", "pickle"])
def test_a_copy_is_equal_and_independent(host, copied):
    model = injected(host)
    joint = host.call(model)

    twin = copied(model)
    assert_same_bits(host.call(twin), joint)
    randomise(twin.pvl_adapters, seed=9)
    twin_output = host.run(twin)

    assert_same_bits(host.call(model), joint)
    assert not torch.equal(twin_output, host.run(model))
    with pvl.disable_adapters(model), pytest.raises(RuntimeError, match="disable_adapters"):
        host.call_alone(twin, *host.lone_calls[0])
    pvl.remove_adapters(model)
    assert torch.equal(host.run(twin), twin_output)
    pvl.remove_adapters(twin)
    torch.testing.assert_close(host.run(twin), host.run(model))
