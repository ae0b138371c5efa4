"""What injection promises, on every family: the host unharmed, adapters alone trained, nothing silently unadapted."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hosts import BY_NAME, HOSTS, PAD, Host
from support import (
    CONFIG,
    assert_same_bits,
    blocks,
    gradients,
    injected,
    leaves,
    normal,
    object_state,
    randomise,
    unchanged,
)
from torch import Tensor, nn

import pvl_adapter as pvl

ADAPTERS = "pvl_adapters."


def adapter_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: grad for name, grad in gradients(model).items() if name.startswith(ADAPTERS)}


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Frozen weights choose another kernel of MultiheadAttention, equal but for rounding (TOWERS.md)."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# --- the host unharmed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, pvl.PVLConfig(layers=[1], dim=4, tower_dropout=True)], ids=["calm", "drop"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_disabled_adapters_leave_the_host_bit_for_bit(host, training, config):
    model = host.build(dropout=0.3).train(training)
    model.requires_grad_(False)  # as injection does: torch folds some products otherwise where weights want gradients

    def run() -> object:
        torch.manual_seed(5)
        return host.call(model)

    with no_fast_path():
        expected = run()
        pvl.inject_adapters(model, config)
        joint = run()
        with pvl.disable_adapters(model):
            assert_same_bits(run(), expected)
        assert_same_bits(run(), joint)


def test_disabled_adapters_leave_the_host_bit_for_bit_under_autocast(host):
    model = host.build()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = host.call(model)
        pvl.inject_adapters(model, CONFIG)
        with pvl.disable_adapters(model):
            assert_same_bits(host.call(model), expected)


def test_disabled_adapters_leave_the_gradients_of_the_host_bit_for_bit(host):
    model = host.build()

    def run() -> dict[str, Tensor | None]:
        model.zero_grad()
        host.run(model).square().sum().backward()
        return {name: grad for name, grad in gradients(model).items() if not name.startswith(ADAPTERS)}

    with no_fast_path():
        expected = run()
        pvl.inject_adapters(model, CONFIG)
        model.requires_grad_(True)
        with pvl.disable_adapters(model):
            got = run()

    assert_same_bits(got, expected)


def test_disabling_ends_with_its_block_even_if_an_error_leaves_it(host):
    model = injected(host)
    joint = host.call(model)

    with pytest.raises(KeyError), pvl.disable_adapters(model):
        raise KeyError

    assert_same_bits(host.call(model), joint)


def test_disabling_may_be_nested(host):
    model = injected(host)
    with pvl.disable_adapters(model):
        alone = host.call(model)
        with pvl.disable_adapters(model):
            assert_same_bits(host.call(model), alone)
        assert_same_bits(host.call(model), alone)


def test_adapters_change_what_the_host_says(host):
    model = injected(host)
    with torch.no_grad(), pvl.disable_adapters(model):
        alone = host.run(model)

    assert (host.run(model) - alone).abs().max() > 1e-3


def test_injection_returns_the_same_object_and_keeps_class_keys_and_mode(host):
    model = host.build().train()
    keys = list(model.state_dict())

    returned = pvl.inject_adapters(model, CONFIG)

    assert returned is model
    assert type(model) is type(host.build())
    assert [name for name in model.state_dict() if not name.startswith(ADAPTERS)] == keys
    assert model.training


def test_a_checkpoint_of_the_host_still_loads_into_the_injected_host(host):
    model, other = injected(host), host.build(seed=1)

    result = model.load_state_dict(other.state_dict(), strict=False)

    assert not result.unexpected_keys
    assert all(name.startswith(ADAPTERS) for name in result.missing_keys)
    with pvl.disable_adapters(model):
        torch.testing.assert_close(host.run(model), host.run(other))


@pytest.mark.parametrize("after", ["nothing", "a_call", "train", "eval", "a_training_step", "disabling", "an_error"])
def test_removal_restores_the_very_same_object(host, after):
    model = host.build(dropout=0.1).train()
    first_child = next(iter(model.children()))
    first_child.eval()  # mixed modes and flags are the user's own
    next(first_child.parameters()).requires_grad_(False)
    expected = host.call(model.eval())
    model.train()
    first_child.eval()

    with unchanged(model):
        pvl.inject_adapters(model, CONFIG)
        if after == "a_call":
            host.call(model)
        elif after in ("train", "eval"):
            getattr(model, after)()
        elif after == "a_training_step":
            host.run(model.train()).sum().backward()
            torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0).step()
            model.zero_grad()
        elif after == "disabling":
            with pvl.disable_adapters(model):
                host.call(model.eval())
        elif after == "an_error":
            with pytest.raises(ValueError, match="expected"):
                host.call(model, image=host.image[:, :2])
        assert pvl.remove_adapters(model) is model

    with no_fast_path():
        assert_same_bits(host.call(model.eval()), expected)


def test_adapters_may_be_put_in_again_after_removal(host):
    model = injected(host)
    saved, joint = copy.deepcopy(model.pvl_adapters.state_dict()), host.call(model)

    pvl.remove_adapters(model)
    pvl.inject_adapters(model, CONFIG)
    model.pvl_adapters.load_state_dict(saved)

    assert_same_bits(host.call(model), joint)


def test_removal_returns_a_forward_that_the_user_had_replaced(host):
    model = host.build()
    calls = []
    own = model.forward

    def counting(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = counting
    pvl.remove_adapters(pvl.inject_adapters(model, CONFIG))
    host.call(model)

    assert model.forward is counting
    assert calls == [1]


def test_disabled_adapters_leave_a_forward_that_the_user_had_replaced_in_charge(host):
    """As accelerate does to spread a model over devices."""
    model = host.build().requires_grad_(False)
    own = model.forward
    model.forward = lambda *args, **kwargs: ("wrapped", own(*args, **kwargs))
    with no_fast_path():
        expected = host.call(model)
        pvl.inject_adapters(model, CONFIG)
        with pvl.disable_adapters(model):
            assert_same_bits(host.call(model), expected)


def test_a_host_moved_to_another_type_goes_on_working(host):
    model = injected(host)
    expected = host.run(model).detach()

    model.to(torch.float64)
    got = host.run(model, image=host.image.double())

    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), expected, atol=1e-4, rtol=0.0)


def test_a_bfloat16_host_runs_with_float32_adapters(host):
    model = host.build().bfloat16()
    pvl.inject_adapters(model, CONFIG)

    output = host.run(model, image=host.image.bfloat16())
    output.float().sum().backward()

    assert output.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.pvl_adapters.parameters()} == {torch.float32}
    assert all(torch.isfinite(grad).all() for grad in adapter_gradients(model).values())


def test_autocast_stays_close_to_float32(host):
    """Embeddings of length 1 within 0.05, after up to five blocks in bfloat16."""
    model = injected(host)
    with torch.no_grad():
        expected = host.run(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = host.run(model)

    torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.0)


# --- adapters alone trained ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_reach_all_adapters_and_nothing_else(host, training):
    model = injected(host).train(training)
    image_features, text_features = host.features(host.call(model))
    weights = normal(*image_features.shape, seed=3)

    (image_features * weights + text_features * weights.flip(0)).sum().backward()

    for name, gradient in gradients(model).items():
        if name.startswith(ADAPTERS):
            assert gradient is not None, name
            assert torch.isfinite(gradient).all(), name
            # A key bias shifts all scores alike, so its true gradient is zero.
            assert gradient.abs().max() > 0 or name.endswith("norm_k.bias"), name
        else:
            assert gradient is None, name


def test_the_host_is_frozen_and_a_training_step_moves_adapters_only(host):
    model = injected(host).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    host.run(model).square().sum().backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()

    assert all(p.requires_grad == name.startswith(ADAPTERS) for name, p in model.named_parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith(ADAPTERS), name


def test_frozen_towers_keep_their_dropout_asleep_unless_asked(host):
    calm = injected(host, dropout=0.5).train()
    with pvl.sampling(calm, sample=False):
        assert_same_bits(host.call(calm), host.call(calm))
        assert_same_bits(host.call(calm), host.call(calm.eval()))


@pytest.mark.parametrize("name", ["open_clip-bert", "transformers-clip"])
def test_tower_dropout_wakes_in_train_mode_if_asked(name):
    host = BY_NAME[name]
    awake = injected(host, dropout=0.5, config=pvl.PVLConfig(layers=[1], dim=8, tower_dropout=True)).train()

    with pvl.sampling(awake, sample=False):
        assert not torch.equal(host.run(awake), host.run(awake))
        awake.eval()
        assert torch.equal(host.run(awake), host.run(awake))


def test_trainable_parameters_are_counted(host, capsys):
    model = injected(host)
    trainable = sum(p.numel() for p in model.pvl_adapters.parameters())
    total = sum(p.numel() for p in model.parameters())

    pvl.print_trainable_parameters(model)

    printed = capsys.readouterr().out
    assert f"{trainable:,}" in printed
    assert f"{total:,}" in printed


def test_settings_reach_the_adapters(host):
    config = pvl.PVLConfig(layers=[1], dim=6, beta=0.5, gate_init=1.25)
    (adapter,) = pvl.inject_adapters(host.build(), config).pvl_adapters

    assert adapter.vision_down.weight.shape == (6, host.widths[0])
    assert adapter.text_up.weight.shape == (host.widths[1], 6)
    assert adapter.two_way.text_to_image.gate.item() == 1.25
    assert adapter.two_way.image_to_text.beta == 0.5


def test_by_default_adapters_sit_before_all_blocks_of_the_shallower_tower_but_the_first_and_last(host):
    model = pvl.inject_adapters(host.build())

    assert len(model.pvl_adapters) == min(host.depths) - 2
    assert model.pvl_adapters[0].vision_down.weight.shape[0] == 256


def test_an_injected_host_trains_under_distributed_data_parallel(tmp_path):
    host = BY_NAME["open_clip-bert"]
    model = injected(host).train()
    noise = host.noise(CONFIG)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)

    def step(call: nn.Module) -> dict[str, Tensor | None]:
        model.zero_grad()
        with pvl.sampling(model, noise=noise):
            torch.cat(host.features(host.call(call)), dim=-1).square().sum().backward()
        return {name: grad.clone() for name, grad in adapter_gradients(model).items()}

    try:
        assert_same_bits(step(nn.parallel.DistributedDataParallel(model)), step(model))
    finally:
        torch.distributed.destroy_process_group()


# --- draws -----------------------------------------------------------------------------------------------------------


def test_in_train_mode_every_call_draws_anew_and_in_eval_mode_none_does(host):
    model = injected(host)

    assert torch.equal(host.run(model.eval()), host.run(model))
    assert not torch.equal(host.run(model.train()), host.run(model))


def test_eval_mode_leaves_the_random_state_alone(host):
    model, before = injected(host), torch.random.get_rng_state()

    host.call(model)

    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_sampling_draws_whatever_the_mode_and_a_generator_reproduces(host, training):
    model = injected(host).train(training)

    def draw(seed: int) -> Tensor:
        with pvl.sampling(model, generator=torch.Generator().manual_seed(seed)):
            return host.run(model)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    with pvl.sampling(model):
        assert not torch.equal(host.run(model), host.run(model))


def test_sampling_may_ask_for_the_mean_in_train_mode(host):
    model = injected(host)
    expected = host.run(model.eval())

    with pvl.sampling(model.train(), sample=False):
        torch.testing.assert_close(host.run(model), expected)


def test_sampling_ends_with_its_block_even_if_an_error_leaves_it(host):
    model = injected(host)
    expected = host.run(model)

    with pytest.raises(KeyError), pvl.sampling(model):
        raise KeyError

    assert torch.equal(host.run(model), expected)


def test_given_noise_decides_the_draw(host):
    model = injected(host)
    noise = host.noise(CONFIG, seed=1)

    with pvl.sampling(model, noise=noise):
        first, second = host.run(model), host.run(model)
    with pvl.sampling(model, noise=host.noise(CONFIG, seed=2)):
        other = host.run(model)

    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_many_samples_approach_the_deterministic_answer(host):
    model = injected(host, config=pvl.PVLConfig(layers=[1], dim=8))
    with torch.no_grad():
        mean = host.run(model)
        with pvl.sampling(model, num_samples=1):
            one = (host.run(model) - mean).norm()
        with pvl.sampling(model, num_samples=400):
            many = (host.run(model) - mean).norm()

    assert many < one / 4


def test_encode_draws_as_the_host_call_does(host):
    model = injected(host)
    image, text = host.image, host.text

    def embeds(**settings: object) -> Tensor:
        return pvl.encode(model, image, text, **settings).image_embeds

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    assert torch.equal(embeds(), embeds())
    assert torch.equal(embeds(), embeds(sample=False))
    assert not torch.equal(embeds(sample=True), embeds(sample=True))
    with pvl.sampling(model, generator=generator()):
        inside = embeds()
    assert torch.equal(inside, embeds(sample=True, generator=generator()))
    assert torch.equal(embeds(noise=host.noise(CONFIG)), embeds(sample=True, noise=host.noise(CONFIG)))
    model.train()
    assert not torch.equal(embeds(), embeds())
    assert torch.equal(embeds(sample=False), embeds(sample=False))


# --- joint features --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_encode_gives_the_embeddings_of_the_host_call_before_normalisation(host, training):
    model = injected(host).train(training)
    with pvl.sampling(model, noise=host.noise(CONFIG)):
        joint = pvl.encode(model, host.image, host.text)
        image_features, text_features = host.features(host.call(model))

    torch.testing.assert_close(F.normalize(joint.image_embeds, dim=-1), image_features)
    torch.testing.assert_close(F.normalize(joint.text_embeds, dim=-1), text_features)


def test_encode_gives_tokens_of_the_joint_space_with_their_grid(host):
    joint = pvl.encode(injected(host), host.image, host.text)

    assert joint.grid == host.grid
    assert joint.patch_tokens.shape == (3, host.grid[0] * host.grid[1], host.joint_width)
    assert joint.text_tokens.shape == (3, host.text_length, host.joint_width)
    assert joint.image_embeds.shape == joint.text_embeds.shape == (3, host.joint_width)


def test_without_adapters_encode_gives_the_features_of_the_towers_alone(host):
    model = injected(host)
    with torch.no_grad(), pvl.disable_adapters(model):
        expected = host.features(host.call(model))
        joint = pvl.encode(model, host.image, host.text)

    torch.testing.assert_close(F.normalize(joint.image_embeds, dim=-1), expected[0])
    torch.testing.assert_close(F.normalize(joint.text_embeds, dim=-1), expected[1])


def test_a_pair_does_not_depend_on_its_batch(host):
    model = injected(host)
    together = pvl.encode(model, host.image, host.text)

    for b in range(len(host.image)):
        alone = pvl.encode(model, host.image[b : b + 1], host.text_of(host.ids[b : b + 1]))
        torch.testing.assert_close(alone.patch_tokens[0], together.patch_tokens[b], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone.text_embeds[0], together.text_embeds[b], atol=1e-5, rtol=1e-4)


def test_the_text_decides_what_the_image_says_and_the_image_what_the_text_says(host):
    model = injected(host)
    joint = pvl.encode(model, host.image, host.text)
    other_text = pvl.encode(model, host.image, host.text_of(host.ids.flip(0)))
    other_image = pvl.encode(model, host.image.flip(0), host.text)

    assert (other_text.patch_tokens - joint.patch_tokens).abs().max() > 1e-3
    assert (other_image.text_embeds - joint.text_embeds).abs().max() > 1e-4


# --- nothing silently unadapted --------------------------------------------------------------------------------------

LONE_CALLS = [(host, method, names) for host in HOSTS for method, names in host.lone_calls]


@pytest.mark.parametrize(("host", "method", "names"), LONE_CALLS, ids=lambda value: str(value) if value else None)
def test_a_tower_alone_raises_and_says_what_to_do(host, method, names):
    model = injected(host)
    expected = host.run(model)

    with pytest.raises(RuntimeError, match=r"(?s)sentences.*disable_adapters"):
        host.call_alone(model, method, names)

    assert torch.equal(host.run(model), expected)


@pytest.mark.parametrize(("host", "method", "names"), LONE_CALLS, ids=lambda value: str(value) if value else None)
def test_a_tower_alone_works_where_adapters_are_disabled(host, method, names):
    model = host.build().requires_grad_(False)
    with torch.no_grad():
        expected = host.call_alone(model, method, names)
        pvl.inject_adapters(model, CONFIG)
        with pvl.disable_adapters(model):
            assert_same_bits(host.call_alone(model, method, names), expected)


# --- calls as the host takes them ------------------------------------------------------------------------------------


def test_arguments_may_be_given_by_position_or_by_name(host):
    model = injected(host)
    by_name = host.call(model)

    if host.text_as_mapping:
        by_position = model(host.text["input_ids"], host.image, host.text["attention_mask"])
    else:
        by_position = model(host.image, host.text)

    assert_same_bits(by_position, by_name)


def test_the_return_type_is_that_of_the_host(host):
    expected = host.call(host.build())
    got = host.call(injected(host))

    assert type(got) is type(expected)
    assert (list(got) if isinstance(got, dict) else len(got)) == (
        list(expected) if isinstance(expected, dict) else len(expected)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"return_dict": False},
        {"output_hidden_states": True},
        {"output_hidden_states": True, "return_dict": False},
        {"return_loss": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_a_transformers_host_give_what_they_give_without_adapters(options):
    host = BY_NAME["transformers-clip"]
    plain, model = host.build(), injected(host)

    expected, got = host.call(plain, **options), host.call(model, **options)

    assert type(got) is type(expected)
    assert shapes(got) == shapes(expected)


def test_attention_maps_of_a_transformers_host_are_given_or_refused_but_not_silently_left_out():
    host = BY_NAME["transformers-clip"]
    plain, model = host.build(), injected(host)
    for one in (plain, model):
        one.set_attn_implementation("eager")
    expected = host.call(plain, output_attentions=True)

    try:
        got = host.call(model, output_attentions=True)
    except ValueError as error:
        assert "output_attentions" in str(error)  # noqa: PT017
    else:
        assert shapes(got) == shapes(expected)


def test_hidden_states_of_a_transformers_host_are_those_of_the_joint_run():
    host = BY_NAME["transformers-clip"]
    model = injected(host)

    output = host.call(model, output_hidden_states=True)

    vision, text = output.vision_model_output, output.text_model_output
    assert len(vision.hidden_states) == host.depths[0] + 1
    assert len(text.hidden_states) == host.depths[1] + 1
    torch.testing.assert_close(vision.hidden_states[-1], vision.last_hidden_state)
    torch.testing.assert_close(model.text_model.final_layer_norm(text.hidden_states[-1]), text.last_hidden_state)
    torch.testing.assert_close(host.features(output)[0], host.features(host.call(model))[0])


def test_a_transformers_host_does_without_an_attention_mask():
    """The end token tells what is padding."""
    host = BY_NAME["transformers-clip"]
    model = injected(host)

    without = model(input_ids=host.ids, pixel_values=host.image)

    assert_same_bits(host.features(without)[0], host.features(host.call(model))[0])


def test_hooks_on_blocks_see_the_hidden_states_of_the_joint_run(host):
    model = injected(host)
    seen = {}
    for name, block in blocks(model).items():
        block.register_forward_hook(lambda _, __, output, name=name: seen.update({name: leaves(output)[0]}))

    host.call(model)
    in_call = dict(seen)
    pvl.encode(model, host.image, host.text)

    assert len(seen) == sum(host.depths)
    assert {tuple(hidden.shape) for hidden in seen.values()} == {
        (3, host.image_tokens, host.widths[0]),
        (3, host.text_length, host.widths[1]),
    }
    for name, hidden in seen.items():
        torch.testing.assert_close(hidden, in_call[name])


# --- padding ---------------------------------------------------------------------------------------------------------

PADDABLE = [host for host in HOSTS if host.positions > host.text_length]


@pytest.mark.parametrize("host", PADDABLE, ids=str)
def test_masked_padding_never_changes_the_outputs(host):
    model = injected(host, config=pvl.PVLConfig(layers=(0, 1, 2), dim=8, mask_padding=True))

    joint, padded = pvl.encode(model, host.image, host.text), pvl.encode(model, host.image, padded_text(host))

    for name in ("image_embeds", "text_embeds", "patch_tokens"):
        torch.testing.assert_close(getattr(padded, name), getattr(joint, name), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(host.run(model, text=padded_text(host)), host.run(model), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("host", PADDABLE, ids=str)
def test_unmasked_padding_is_read_by_the_image_as_in_the_release(host):
    model = injected(host, config=pvl.PVLConfig(layers=(0, 1, 2), dim=8, mask_padding=False))

    change = host.run(model, text=padded_text(host)) - host.run(model)

    assert change.abs().max() > 1e-3


def test_what_stands_in_the_padding_does_not_matter_where_padding_is_told_by_the_end_token():
    host = BY_NAME["transformers-clip"]
    model = injected(host)
    ids, mask = host.text["input_ids"], host.text["attention_mask"]

    changed = pvl.encode(model, host.image, {"input_ids": ids.masked_fill(mask == 0, 7), "attention_mask": mask})

    torch.testing.assert_close(changed.patch_tokens, pvl.encode(model, host.image, host.text).patch_tokens)


# --- copies ----------------------------------------------------------------------------------------------------------


def through_a_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file], ids=["deepcopy", "pickle"])
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
    assert "forward" not in vars(model)
    pvl.remove_adapters(twin)
    torch.testing.assert_close(host.run(twin), host.run(model))


# --- helpers ---------------------------------------------------------------------------------------------------------


def padded_text(host: Host) -> Tensor | dict[str, Tensor]:
    """The host's text with padding up to all its positions."""
    return host.text_of(F.pad(host.ids, (0, host.positions - host.text_length), value=PAD))


def shapes(output: object) -> object:
    """The shapes of all tensors in an output, nested as they are."""
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, dict):
        return {name: shapes(value) for name, value in output.items()}
    return [shapes(value) for value in output]


def test_the_state_that_removal_is_compared_by_does_see_injection(host):
    """Guards the guard: `object_state` is what `unchanged` compares."""
    model = host.build()
    before = object_state(model)

    assert object_state(model) == before
    assert object_state(pvl.inject_adapters(model, CONFIG)) != before
