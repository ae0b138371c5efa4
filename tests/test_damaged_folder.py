"""Checkpoint folders that are damaged, foreign or oversized are refused, and none is ever half written."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fakes import WORDS
from hosts import BY_NAME
from safetensors.torch import load_file, save_file
from saved_models import (
    assert_equal_models,
    config_file,
    contents,
    of_open_clip,
    official,
    rewrite,
    vocabulary,
    weights_file,
)
from support import edit_json, full_disk, kill_while, randomise, segmenter, truncate, unchanged
from torch import Tensor

import pvl_adapter as pvl


@pytest.fixture
def tiny(words) -> pvl.MedCLIPSeg:
    return official(words)


@pytest.fixture
def saved(tiny, tmp_path) -> Path:
    """A folder with the small official network, whole."""
    return tiny.save_pretrained(tmp_path / "folder")


@pytest.fixture
def other(tiny, tmp_path) -> pvl.MedCLIPSeg:
    """With another head and another tokenizer."""
    changed = copy.deepcopy(tiny)
    randomise(changed.head, seed=5)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("\n".join([*WORDS[:5], *WORDS[:4:-1]]))
    changed.tokenizer = transformers.BertTokenizerFast(str(tmp_path / "words" / "vocab.txt"))
    return changed


# --- saving over, and interrupted writing ----------------------------------------------------------------------------


def test_a_folder_can_be_saved_over_even_while_it_is_in_use(tiny, saved, other):
    (saved / "notes.txt").write_text("mine")
    before, loaded = weights_file(saved).read_bytes(), pvl.from_pretrained(saved)

    with weights_file(saved).open("rb") as reader:
        other.save_pretrained(saved)
        assert reader.read() == before

    assert_equal_models(loaded, tiny)
    assert_equal_models(pvl.from_pretrained(saved), other)
    assert (saved / "notes.txt").read_text() == "mine"  # what is not ours stays
    assert len(list(saved.glob("tokenizer-*"))) == 1
    tiny.save_pretrained(saved, whole=False)
    assert_equal_models(pvl.from_pretrained(saved, clip=pvl.remove_adapters(copy.deepcopy(tiny.clip))), tiny)


def test_where_a_folder_may_be(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    with pytest.raises(FileExistsError, match="file"):
        tiny.save_pretrained("file")
    assert Path("file").read_text() == "mine"
    Path("elsewhere").mkdir()
    Path("link").symlink_to("elsewhere")
    for folder in ("folder", ".", "link"):
        tiny.save_pretrained(folder)
        assert_equal_models(pvl.from_pretrained(folder), tiny)


@pytest.mark.parametrize("room", [0, 1000, 20_000], ids=["no_room", "little_room", "room_for_the_tokenizer"])
def test_a_full_disk_or_a_kill_while_writing_leaves_the_old_folder(tiny, saved, other, room):
    before = contents(saved.parent)
    for folder in (saved, saved.parent / "new"):
        with full_disk(room), pytest.raises(OSError, match=r"(?i)too large|written"):
            other.save_pretrained(folder)
    assert contents(saved.parent) == before
    assert not (saved.parent / "new").exists()

    if room:
        kill_while(lambda: other.save_pretrained(saved), room=room)
        assert list(saved.glob(".*.part"))
    assert_equal_models(pvl.from_pretrained(saved), tiny)
    other.save_pretrained(saved)

    assert not list(saved.glob(".*"))
    assert_equal_models(pvl.from_pretrained(saved), other)


def save_until(number: int, model: pvl.MedCLIPSeg, folder: Path) -> bool:
    """Save in a child that is killed before its `number`th change of the file system; whether it came so far."""
    child = os.fork()
    if child == 0:
        done = 0

        def killing(native: Callable[..., Any]) -> Callable[..., Any]:
            def step(*args: Any, **kwargs: Any) -> Any:
                nonlocal done
                done += 1
                if done > number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return native(*args, **kwargs)

            return step

        for name in ("rename", "replace", "unlink", "mkdir", "rmdir"):
            setattr(os, name, killing(getattr(os, name)))
        try:
            model.save_pretrained(folder)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("exists", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["over", "new"])
def test_a_save_that_is_killed_at_any_step_leaves_the_old_model_or_the_new_one(tiny, saved, other, tmp_path, exists):
    seen, number, killed = set(), 0, True
    while killed:
        folder = tmp_path / str(number) / "folder"
        folder.parent.mkdir()
        if exists:
            shutil.copytree(saved, folder)
        killed = save_until(number, other, folder)
        try:
            loaded = pvl.from_pretrained(folder)
        except FileNotFoundError:
            seen.add("none")
        else:
            which = "old" if torch.equal(loaded.head.mask_head[0].weight, tiny.head.mask_head[0].weight) else "new"
            assert_equal_models(loaded, tiny if which == "old" else other)
            seen.add(which)
        if number % 5 == 0 or not killed:
            other.save_pretrained(folder)
            assert_equal_models(pvl.from_pretrained(folder), other)
            assert len(list(folder.iterdir())) == 4  # weights, configuration, card and one tokenizer
        number += 1
    assert seen == {"old" if exists else "none", "new"}


# --- damaged or foreign files ----------------------------------------------------------------------------------------


KIND = "pvl_adapter.MedCLIPSeg"


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    return rewrite(weights_file, config_file, KIND, tensors=change)


def both(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return rewrite(weights_file, config_file, KIND, description=change)


def weights(content: bytes) -> Callable[[Path], object]:
    return lambda folder: weights_file(folder).write_bytes(content)


def header(content: bytes) -> Callable[[Path], object]:
    """Of the length that it announces."""
    return weights(len(content).to_bytes(8, "little") + content)


KEY = "clip.pvl_adapters.0.vision_down.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "truncated_weights": (truncate(weights_file, 0.5), ValueError, "model.safetensors is damaged"),
    "weights_without_their_end": (truncate(weights_file, 0.999), ValueError, "model.safetensors is damaged"),
    "no_weights": (lambda folder: weights_file(folder).unlink(), FileNotFoundError, "model.safetensors is missing"),
    "other_file_type": (weights(b"hello" * 100), ValueError, "damaged"),
    "header_of_lies": (
        header(b'{"x": {"dtype": "F32", "shape": [9999999, 9999999], "data_offsets": [0, 4]}}'), ValueError, "damaged"),
    "weights_of_others": (
        lambda folder: save_file(load_file(weights_file(folder)), weights_file(folder)), ValueError, "not saved by"),
    "deep_description": (
        lambda folder: save_file({}, weights_file(folder), metadata={KIND: "[" * 100_000}),
        ValueError, "damaged"),
    "missing_key": (tensors(lambda t: t.pop(KEY)), ValueError, f"missing: {KEY}"),
    "unknown_key": (tensors(lambda t: t.update(more=torch.zeros(2))), ValueError, "unexpected: more"),
    "other_shape": (tensors(lambda t: t.update({KEY: torch.zeros(8, 5)})), ValueError, rf"{KEY}.*\(8, 5\)"),
    "other_type": (
        tensors(lambda t: t.update({KEY: torch.zeros(8, 32, dtype=torch.int64)})), ValueError, f"{KEY}.*int64"),
    "truncated_config": (truncate(config_file, 0.5), ValueError, "config.json.*damaged.*remove"),
    "binary_config": (lambda folder: config_file(folder).write_bytes(b"\xff\xfe"), ValueError, "config.json.*damaged"),
    "edited_config": (edit_json(config_file, lambda c: c["adapters"].update(beta=1.0)), ValueError, "edited.*remove"),
    "newer": (both(lambda c: c.update(version=9)), ValueError, "version 9.*release"),
    "missing_entry": (both(lambda c: c.pop("adapters")), ValueError, "lacks.*adapters"),
    "list_for_settings": (both(lambda c: c.update(adapters=[])), ValueError, "PVLConfig"),
    "unknown_setting": (both(lambda c: c["adapters"].update(colour="red")), ValueError, "colour.*newer"),
    "wrong_setting": (both(lambda c: c["model"].update(num_upscale=-1)), ValueError, "num_upscale is -1"),
    "other_width": (both(lambda c: c["adapters"].update(dim=4)), ValueError, "shape"),
    "other_layers": (both(lambda c: c["adapters"].update(layers=[1])), ValueError, "unexpected"),
    "layers_beyond": (both(lambda c: c["adapters"].update(layers=[1, 9])), ValueError, "9"),
    "other_library": (both(lambda c: c["backbone"].update(library="jax")), ValueError, "'jax'"),
    "null_backbone": (both(lambda c: c.update(backbone=None)), ValueError, "no CLIP can be built"),
    "half_a_backbone": (both(lambda c: c["backbone"].pop("network")), ValueError, "no CLIP can be built"),
    "truncated_tokenizer": (truncate(vocabulary, 0.5), ValueError, "tokenizer.json is damaged"),
    "no_tokenizer_file": (lambda folder: vocabulary(folder).unlink(), FileNotFoundError, "tokenizer.json is missing"),
    "nothing_at_all": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], FileNotFoundError, "config.json"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused(saved, damage, error, message):
    damage(saved)

    with pytest.raises(error, match=message):
        pvl.from_pretrained(saved)


@pytest.mark.parametrize(
    "name", ["truncated_weights", "missing_key", "other_shape", "edited_config", "newer", "wrong_setting",
             "other_width", "other_layers", "layers_beyond", "no_tokenizer_file"],
)  # fmt: skip
def test_a_damaged_part_is_refused_and_the_clip_stays_as_it_was(tiny, tmp_path, name):
    damage, error, message = DAMAGE[name]
    folder = tiny.save_pretrained(tmp_path, whole=False)
    clip = pvl.remove_adapters(tiny.clip)
    damage(folder)

    with unchanged(clip), pytest.raises(error, match=message):
        pvl.from_pretrained(folder, clip=clip)


def test_what_counts_is_in_the_weights(tiny, saved, other, tmp_path):
    """Of two saves nothing is mixed; the copy of the configuration may be missing or otherwise laid out."""
    description = json.loads(config_file(saved).read_text())
    config_file(saved).write_bytes(json.dumps(description, sort_keys=True).replace(", ", ",\r\n").encode())
    assert_equal_models(pvl.from_pretrained(saved), tiny)
    config_file(saved).unlink()
    assert_equal_models(pvl.from_pretrained(saved), tiny)
    shutil.copy(config_file(other.save_pretrained(tmp_path / "other")), saved)
    with pytest.raises(ValueError, match="another save"):
        pvl.from_pretrained(saved)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_gate_may_be_a_number_or_one_element(tiny, saved, shape):
    """The published gates are numbers."""
    gates = [name for name in tiny.state_dict() if name.endswith(".gate")]
    tensors(lambda t: t.update({gate: t[gate].reshape(shape).clone() for gate in gates}))(saved)

    assert_equal_models(pvl.from_pretrained(saved), tiny)


# --- settings that would fill the memory -----------------------------------------------------------------------------


@contextmanager
def little_memory() -> Iterator[None]:
    """Whoever asks for more than 300 MB inside gets a MemoryError (Linux only)."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("the size of a process is read from /proc")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 300_000_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


HUGE: dict[str, dict[str, tuple[Any, ...]]] = {
    "official": {
        "adapters.dim": (10**6, 10**12),
        "adapters.layers": (list(range(100_000)),),
        "model.num_upscale": (100_000,),
        "model.context_length": (10**9,),
        "backbone.network.vision_layers": (100_000,),
        "backbone.network.text_layers": (100_000, 200),
        "backbone.network.vision_width": (10**6, 4096),
        "backbone.network.vocab_size": (10**9, 2000),
        "backbone.network.positions": (10**12, 5000),
        "backbone.network.text_intermediate": (10**8,),
    },
    "native": {"backbone.model.text_cfg.layers": (100_000,), "backbone.model.embed_dim": (20_000,)},
    "bert": {"backbone.text.num_hidden_layers": (100_000,), "backbone.model.embed_dim": (20_000,)},
    "transformers": {
        "backbone.config.text_config.num_hidden_layers": (100_000,),
        "backbone.config.projection_dim": (20_000,),
    },
}


@pytest.mark.parametrize("kind", HUGE)
def test_sizes_that_do_not_fit_are_refused_before_memory_is_spent(kind, tiny, open_clip_models, tmp_path):
    if kind in open_clip_models:
        tiny = of_open_clip(open_clip_models[kind])
    elif kind == "transformers":
        tiny = segmenter(BY_NAME["transformers-clip"])
    folder = tiny.save_pretrained(tmp_path / "folder")
    for path, value in ((path, value) for path, values in HUGE[kind].items() for value in values):
        changed = shutil.copytree(folder, tmp_path / "changed", dirs_exist_ok=True)

        def enlarge(description: dict[str, Any], path: str = path, value: Any = value) -> None:
            *parents, last = path.split(".")
            for name in parents:
                description = description[name]
            assert last in description
            description[last] = value

        both(enlarge)(changed)
        shown = len(value) if isinstance(value, list) else value
        with little_memory(), pytest.raises(ValueError, match=f"{path.rpartition('.')[2]} is {shown}|shape|missing"):
            pvl.from_pretrained(changed)
