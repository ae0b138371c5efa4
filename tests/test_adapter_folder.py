"""Adapters on disk: saved and loaded exactly, checked before anything changes, and never half written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hosts import BY_NAME
from safetensors.torch import load_file, save_file
from support import (
    CONFIG,
    assert_same_bits,
    edit_json,
    full_disk,
    injected,
    kill_while,
    object_state,
    randomise,
    truncate,
    unchanged,
)

import pvl_adapter as pvl

HOST = BY_NAME["open_clip-inlined_text"]


def weights_file(folder: Path) -> Path:
    (found,) = folder.glob("*.safetensors")
    return found


def config_file(folder: Path) -> Path:
    (found,) = folder.glob("*.json")
    return found


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with adapters of `HOST`."""
    return pvl.save_adapters(injected(HOST), tmp_path / "adapters")


def test_saved_adapters_give_equal_outputs_in_a_fresh_host(host, tmp_path):
    model = injected(host)

    folder = pvl.save_adapters(model, tmp_path / "new" / "folder")
    fresh = host.build()

    assert folder == tmp_path / "new" / "folder"
    assert pvl.load_adapters(fresh, folder) is fresh
    assert_same_bits(host.call(fresh), host.call(model))


def test_saved_adapters_give_equal_outputs_in_an_injected_host(host, tmp_path):
    model, other = injected(host), injected(host)
    randomise(other.pvl_adapters, seed=5)
    assert not torch.equal(host.run(other), host.run(model))

    pvl.load_adapters(other, str(pvl.save_adapters(model, str(tmp_path))))

    assert_same_bits(host.call(other), host.call(model))


@pytest.mark.parametrize(
    "config",
    [
        pvl.PVLConfig(dim=4),
        pvl.PVLConfig(layers=(1,), dim=6, beta=0.7, gate_init=-0.5, mask_padding=False, tower_dropout=True),
    ],
    ids=["default_layers", "all_settings"],
)
def test_settings_travel_with_the_adapters(host, tmp_path, config):
    model = injected(host, config=config)

    fresh = pvl.load_adapters(host.build(), pvl.save_adapters(model, tmp_path))

    assert_same_bits(host.call(fresh), host.call(model))
    again = pvl.save_adapters(fresh, tmp_path / "again")
    assert config_file(again).read_text() == config_file(tmp_path).read_text()


def test_loaded_adapters_can_be_trained_and_taken_out_again(host, tmp_path):
    folder = pvl.save_adapters(injected(host), tmp_path)
    fresh = host.build()

    with unchanged(fresh):
        pvl.load_adapters(fresh, folder)
        host.run(fresh).sum().backward()
        trained = {name for name, p in fresh.named_parameters() if p.grad is not None}
        assert trained == {name for name, _ in fresh.named_parameters() if name.startswith("pvl_adapters.")}
        pvl.remove_adapters(fresh)


def test_saving_leaves_the_model_as_it_was(host, tmp_path):
    model = injected(host)

    with unchanged(model):
        pvl.save_adapters(model, tmp_path)


def test_no_frozen_weight_is_written(host, tmp_path):
    model = injected(host)

    tensors = load_file(weights_file(pvl.save_adapters(model, tmp_path)))

    expected = model.pvl_adapters.state_dict()
    assert len(tensors) == len(expected)
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(tensor.numel() for tensor in expected.values())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    bytes_of_adapters = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    assert weights_file(tmp_path).stat().st_size < bytes_of_adapters + 200 * len(expected)


def test_files_may_be_read_by_others_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        pvl.save_adapters(injected(HOST), tmp_path)
    finally:
        os.umask(before)

    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


# --- damaged or foreign files ----------------------------------------------------------------------------------------


def _edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load_file(weights_file(folder))
        change(tensors)
        save_file(tensors, weights_file(folder))

    return damage


KEY = "0.vision_down.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "truncated_weights": (truncate(weights_file, 0.5), ValueError, "safetensors.*damaged"),
    "empty_weights": (truncate(weights_file, 0.0), ValueError, "safetensors.*damaged"),
    "no_weights": (lambda folder: weights_file(folder).unlink(), FileNotFoundError, "safetensors is missing"),
    "other_file_type": (
        lambda folder: weights_file(folder).write_text("hello" * 100), ValueError, "safetensors.*damaged"),
    "missing_key": (_edit_tensors(lambda tensors: tensors.pop(KEY)), ValueError, f"missing.*{KEY}"),
    "unknown_key": (_edit_tensors(lambda tensors: tensors.update(more=torch.zeros(2))), ValueError, "unexpected.*more"),
    "renamed_key": (
        _edit_tensors(lambda tensors: tensors.update(renamed=tensors.pop(KEY))), ValueError, "missing.*renamed"),
    "other_shape": (
        _edit_tensors(lambda tensors: tensors.update({KEY: torch.zeros(8, 5)})), ValueError, rf"{KEY}.*\(8, 5\)"),
    "truncated_config": (truncate(config_file, 0.5), ValueError, "json"),
    "empty_config": (truncate(config_file, 0.0), ValueError, "json"),
    "no_config": (lambda folder: config_file(folder).unlink(), FileNotFoundError, "json is missing"),
    "binary_config": (lambda folder: config_file(folder).write_bytes(b"\xff\xfe\x00"), ValueError, "json"),
    "list_config": (lambda folder: config_file(folder).write_text("[]"), ValueError, "json"),
    "number_config": (lambda folder: config_file(folder).write_text("3"), ValueError, "json"),
    "list_in_config": (edit_json(config_file, lambda c: c.update(config=[])), ValueError, "json"),
    "config_of_nothing": (edit_json(config_file, lambda c: c.clear()), ValueError, "json"),
    "unknown_setting": (edit_json(config_file, lambda c: c["config"].update(colour="red")), ValueError, "colour"),
    "wrong_setting": (edit_json(config_file, lambda c: c["config"].update(dim=-1)), ValueError, "dim is -1"),
    "wrong_type": (edit_json(config_file, lambda c: c["config"].update(layers=1)), ValueError, "(layers|json)"),
    "layers_beyond": (edit_json(config_file, lambda c: c["config"].update(layers=[0, 9])), ValueError, "(layers|9)"),
    "other_width": (edit_json(config_file, lambda c: c["config"].update(dim=4)), ValueError, "(shape|dim)"),
    "other_layers": (edit_json(config_file, lambda c: c["config"].update(layers=[0])), ValueError, "unexpected|layers"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["fresh", "injected"])
@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_refused_and_the_host_stays_as_it_was(saved, damage, error, message, kind):
    model = HOST.build() if kind == "fresh" else injected(HOST)
    damage(saved)

    with unchanged(model), pytest.raises(error, match=message):
        pvl.load_adapters(model, saved)


@pytest.mark.parametrize("name", [name for name in BY_NAME if BY_NAME[name].depths != HOST.depths])
@pytest.mark.parametrize("kind", ["fresh", "injected"])
def test_adapters_of_another_host_are_refused(saved, name, kind):
    other = BY_NAME[name]
    model = other.build() if kind == "fresh" else injected(other)

    with unchanged(model), pytest.raises(ValueError, match=r"trained on.*image_depth"):
        pvl.load_adapters(model, saved)


def test_adapters_of_another_configuration_are_refused_by_an_injected_host(saved):
    model = injected(HOST, config=pvl.PVLConfig(layers=CONFIG.layers, dim=CONFIG.dim, beta=1.0))

    with unchanged(model), pytest.raises(ValueError, match=r"beta=1\.0.*beta=2\.35"):
        pvl.load_adapters(model, saved)


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", Path("nowhere/at_all")], ids=str)
def test_a_place_that_does_not_exist_is_refused(source):
    model = HOST.build()

    with unchanged(model), pytest.raises(FileNotFoundError, match=str(source)):
        pvl.load_adapters(model, source)


def test_a_failed_load_says_which_file_to_look_at(saved):
    config_file(saved).write_text("{")

    with pytest.raises(ValueError, match=str(config_file(saved))):
        pvl.load_adapters(HOST.build(), saved)


# --- interrupted writing ---------------------------------------------------------------------------------------------


def other_adapters() -> torch.nn.Module:
    model = injected(HOST)
    randomise(model.pvl_adapters, seed=5)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("room", [0, 1000], ids=["no_room", "little_room"])
def test_if_the_disk_is_full_the_old_files_stay(saved, room):
    model, before = other_adapters(), contents(saved)

    with full_disk(room), pytest.raises(Exception, match=r"(?i)too large|i/o|space"):
        pvl.save_adapters(model, saved)

    assert contents(saved) == before  # nothing half written lies about either
    assert_same_bits(HOST.call(pvl.load_adapters(HOST.build(), saved)), HOST.call(injected(HOST)))
    pvl.save_adapters(model, saved)
    assert_same_bits(HOST.call(pvl.load_adapters(HOST.build(), saved)), HOST.call(model))


def test_if_the_process_is_killed_while_writing_the_old_files_stay(saved):
    model, before = other_adapters(), contents(saved)

    kill_while(lambda: pvl.save_adapters(model, saved), room=1000)

    assert {name: content for name, content in contents(saved).items() if name in before} == before
    assert_same_bits(HOST.call(pvl.load_adapters(HOST.build(), saved)), HOST.call(injected(HOST)))
    pvl.save_adapters(model, saved)  # and leftovers are no obstacle
    assert_same_bits(HOST.call(pvl.load_adapters(HOST.build(), saved)), HOST.call(model))


def test_whoever_is_reading_the_old_file_goes_on_reading_it(saved):
    """A new file takes the place of the old one in one step, rather than the old one being overwritten."""
    before = weights_file(saved).read_bytes()

    with weights_file(saved).open("rb") as reader:
        pvl.save_adapters(other_adapters(), saved)

        assert reader.read() == before
    assert weights_file(saved).read_bytes() != before


def test_weights_and_settings_of_two_saves_are_never_mixed(saved, monkeypatch):
    """A save that stops between its two files must not pass for a good one with the old settings."""
    other = injected(HOST, config=pvl.PVLConfig(layers=CONFIG.layers, dim=CONFIG.dim, beta=0.1))
    randomise(other.pvl_adapters, seed=5)
    replaced = []
    native = os.replace

    def replace_once(source: str | Path, target: str | Path) -> Path:
        if replaced:
            raise OSError("no space left on device")
        replaced.append(target)
        native(source, target)
        return Path(target)

    monkeypatch.setattr(os, "replace", replace_once)
    monkeypatch.setattr(Path, "replace", replace_once)
    with pytest.raises(OSError, match="no space"):
        pvl.save_adapters(other, saved)
    monkeypatch.undo()

    fresh = HOST.build()
    before = object_state(fresh)
    try:
        pvl.load_adapters(fresh, saved)
    except ValueError:
        assert object_state(fresh) == before
    else:
        outputs = [HOST.run(model) for model in (fresh, injected(HOST), other)]
        assert torch.equal(outputs[0], outputs[1]) or torch.equal(outputs[0], outputs[2])


def test_saving_and_loading_under_another_type_keeps_the_values(host, tmp_path):
    model = injected(host)
    expected = host.run(model).detach()

    pvl.save_adapters(model.to(torch.float64), tmp_path)

    torch.testing.assert_close(host.run(pvl.load_adapters(host.build(), tmp_path)), expected, atol=1e-5, rtol=0.0)
