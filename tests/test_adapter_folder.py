"""Adapters on disk: saved and loaded exactly, checked before anything changes, and never half written.

Files, disks and processes that fail are those of test_checkpoint_folder.py, whose reader and writer this shares.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hosts import BY_NAME
from safetensors.torch import load_file, save_file
from saved_models import rewrite
from support import CONFIG, assert_same_bits, edit_json, full_disk, injected, kill_while, randomise, truncate, unchanged

import pvl_adapter as pvl
from pvl_adapter.atomic import staging_folder, write_atomically

HOST = BY_NAME["open_clip-inlined_text"]


def weights_file(folder: Path) -> Path:
    return folder / "pvl_adapters.safetensors"


def config_file(folder: Path) -> Path:
    return folder / "pvl_config.json"


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with adapters of `HOST`."""
    return pvl.save_adapters(injected(HOST), tmp_path / "adapters")


def test_saved_adapters_give_equal_outputs_in_a_fresh_and_in_an_injected_host(host, tmp_path):
    model, other = injected(host), injected(host)
    randomise(other.pvl_adapters, seed=5)
    assert not torch.equal(host.run(other), host.run(model))

    with unchanged(model):
        folder = pvl.save_adapters(model, tmp_path / "new" / "folder")
    fresh = host.build()

    assert folder == tmp_path / "new" / "folder"
    assert pvl.load_adapters(fresh, str(folder)) is fresh
    assert_same_bits(host.call(fresh), host.call(model))
    assert_same_bits(host.call(pvl.load_adapters(other, folder)), host.call(model))
    expected = model.pvl_adapters.state_dict()
    assert load_file(weights_file(folder)).keys() == expected.keys()  # no frozen weight
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]


def test_settings_and_types_travel_and_loaded_adapters_can_be_trained_and_taken_out(tmp_path):
    settings = {"layers": (1,), "dim": 6, "beta": 0.7, "gate_init": -0.5, "mask_padding": False, "tower_dropout": True}
    for config in (pvl.PVLConfig(dim=4), pvl.PVLConfig(**settings)):
        model, folder = injected(HOST, config=config), tmp_path / str(config.dim)
        expected, fresh = HOST.run(model).detach(), HOST.build()
        pvl.save_adapters(model.to(torch.float64), folder)
        with unchanged(fresh):
            pvl.load_adapters(fresh, folder)
            torch.testing.assert_close(HOST.run(fresh), expected, atol=1e-5, rtol=0.0)
            again = pvl.save_adapters(fresh, folder / "again")
            assert config_file(again).read_text() == config_file(folder).read_text()
            HOST.run(fresh).sum().backward()
            trained = {name for name, p in fresh.named_parameters() if p.grad is not None}
            assert trained == {name for name, _ in fresh.named_parameters() if name.startswith("pvl_adapters.")}
            pvl.remove_adapters(fresh)


# --- damaged or foreign files ----------------------------------------------------------------------------------------


def tensors(change: Callable[[dict], object]) -> Callable[[Path], object]:
    return rewrite(weights_file, config_file, "pvl_adapter", tensors=change)


def both(change: Callable[[dict], object]) -> Callable[[Path], object]:
    return rewrite(weights_file, config_file, "pvl_adapter", description=change)


KEY = "0.vision_down.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "truncated_weights": (truncate(weights_file, 0.5), ValueError, "safetensors is damaged"),
    "no_weights": (lambda folder: weights_file(folder).unlink(), FileNotFoundError, "safetensors is missing"),
    "weights_of_others": (
        lambda folder: save_file({"a": torch.zeros(1)}, weights_file(folder)), ValueError, "not saved by"),
    "missing_key": (tensors(lambda t: t.pop(KEY)), ValueError, f"missing: {KEY}"),
    "other_shape": (tensors(lambda t: t.update({KEY: torch.zeros(8, 5)})), ValueError, KEY),
    "edited_config": (edit_json(config_file, lambda c: c["config"].update(dim=3)), ValueError, "json was edited"),
    "config_of_nothing": (both(lambda c: c.clear()), ValueError, "lacks"),
    "wrong_setting": (both(lambda c: c["config"].update(dim=-1)), ValueError, "dim is -1"),
    "layers_beyond": (both(lambda c: c["config"].update(layers=[0, 9])), ValueError, "9"),
    "huge_width": (both(lambda c: c["config"].update(dim=10**9)), ValueError, "dim is 1000000000"),
    "huge_depth": (both(lambda c: c["config"].update(layers=list(range(10**6)))), ValueError, "layers is 1000000"),
    "other_layers": (both(lambda c: c["config"].update(layers=[0])), ValueError, "unexpected"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["fresh", "injected"])
@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_refused_and_the_host_stays_as_it_was(saved, damage, error, message, kind):
    model = HOST.build() if kind == "fresh" else injected(HOST)
    damage(saved)

    with unchanged(model), pytest.raises(error, match=message):
        pvl.load_adapters(model, saved)


def test_adapters_of_another_host_or_configuration_are_refused(saved):
    others = [host for host in BY_NAME.values() if host.depths != HOST.depths][:4]
    models = [host.build() for host in others] + [injected(host) for host in others]

    for model in models:
        with unchanged(model), pytest.raises(ValueError, match=r"trained on.*image_depth"):
            pvl.load_adapters(model, saved)
    model = injected(HOST, config=pvl.PVLConfig(layers=CONFIG.layers, dim=CONFIG.dim, beta=1.0))
    with unchanged(model), pytest.raises(ValueError, match=r"beta=1\.0.*beta=2\.35"):
        pvl.load_adapters(model, saved)


# --- interrupted writing ---------------------------------------------------------------------------------------------


def test_a_full_disk_and_a_kill_leave_the_old_adapters(saved):
    model = injected(HOST, config=pvl.PVLConfig(layers=CONFIG.layers, dim=CONFIG.dim, beta=0.1))
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    for room in (0, 1000):
        with full_disk(room), pytest.raises(OSError, match=r"(?i)too large|written"):
            pvl.save_adapters(model, saved)
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    kill_while(lambda: pvl.save_adapters(model, saved), room=1000)
    assert list(saved.glob(".*.part"))
    assert_same_bits(HOST.call(pvl.load_adapters(HOST.build(), saved)), HOST.call(injected(HOST)))
    config_file(saved).unlink()  # as of a save that was killed between its files
    assert_same_bits(HOST.call(pvl.load_adapters(HOST.build(), saved)), HOST.call(injected(HOST)))

    pvl.save_adapters(model, saved)

    assert_same_bits(HOST.call(pvl.load_adapters(HOST.build(), saved)), HOST.call(model))
    assert sorted(path.name for path in saved.iterdir()) == sorted(before)


def test_what_killed_writers_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    """As of the checkpoints of a training, which a file of its own name replaces."""
    file = tmp_path / "checkpoint.pt"
    kill_while(lambda: write_atomically(file, lambda path: path.write_bytes(bytes(5000))), room=1000)
    (left,) = tmp_path.glob(".checkpoint.pt.*.part")
    assert not file.exists()

    with staging_folder(tmp_path, name=file.name) as living:
        assert not left.exists()
        write_atomically(file, lambda path: path.write_text("new"))
        assert living.exists()

    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_text() == "new"
    with full_disk(10), pytest.raises(OSError, match="too large"):
        write_atomically(file, lambda path: path.write_bytes(bytes(5000)))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_text() == "new"
