"""Segmenters as ONNX files: onnxruntime computes what torch does, for any batch, sentence and noise."""

from __future__ import annotations

import copy
import importlib.util
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from hosts import HOSTS, Host
from support import CONFIG, HOST, images, injected, segmenter, unchanged
from tiny_models import END, JOINT_WIDTH, PAD, START, transformer, vit
from torch import Tensor

import pvl_adapter as pvl

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

QUICK = ("open_clip-bert",)  # half a minute each
PARAMETERS = [pytest.param(host, marks=[] if host.name in QUICK else pytest.mark.slow, id=str(host)) for host in HOSTS]


def not_optimised(patch: pytest.MonkeyPatch) -> None:
    """In half the time."""
    patch.setattr(torch.onnx, "export", partial(torch.onnx.export, optimize=False))


class Exported:
    """A segmenter beside its graph in onnxruntime."""

    def __init__(self, host: Host, path: Path) -> None:
        self.host = host
        self.model = segmenter(host)
        with pytest.MonkeyPatch.context() as patch:
            if host.name in QUICK:
                not_optimised(patch)
            pvl.export_onnx(self.model, path, text=host.text)
        self.session = session(path)

    def run(self, image: Tensor, text: dict[str, Tensor], noise: list[Tensor]) -> Tensor:
        """Logits [B, H, W]; noise is [B, A, V, C] and [B, A, L, C]."""
        return run(self.session, image=image, **text, image_noise=noise[0], text_noise=noise[1])

    def in_torch(self, image: Tensor, text: dict[str, Tensor], noise: list[Tensor]) -> Tensor:
        pairs = [pvl.NoisePair(image=one, text=other) for one, other in zip(*(n.unbind(1) for n in noise), strict=True)]
        with torch.no_grad():
            return self.model(image, text, noise=pairs).logits

    def inputs(self, batch: int, *, seed: int) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """Random images, sentences and noise; padding of another length each time where the tower allows it."""
        generator, host = torch.Generator().manual_seed(seed), self.host
        is_free = self.session.get_inputs()[1].shape[1] == "tokens"
        length = int(torch.randint(5, host.positions + 1, (), generator=generator)) if is_free else host.positions
        ids = torch.full((batch, length), PAD)
        for row in ids:
            words = int(torch.randint(3, length, (), generator=generator))
            row[:words] = torch.randint(3, START, (words,), generator=generator)
            row[0], row[words - 1] = START, END
        shapes = [(batch, len(CONFIG.layers), tokens, CONFIG.dim) for tokens in (host.image_tokens, length)]
        image = torch.randn(batch, 3, *host.image_size, generator=generator)
        return image, as_mapping(host, ids), [torch.randn(shape, generator=generator) for shape in shapes]


def as_mapping(host: Host, ids: Tensor) -> dict[str, Tensor]:
    text = host.text_of(ids)
    return text if isinstance(text, dict) else {"input_ids": text}


def session(path: Path) -> Any:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    return ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def run(graph: Any, **tensors: Tensor) -> Tensor:
    (logits,) = graph.run(None, {name: tensor.numpy() for name, tensor in tensors.items()})
    return torch.from_numpy(logits)


@pytest.fixture(scope="module", params=PARAMETERS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(request.param, tmp_path_factory.mktemp("onnx") / "model.onnx")


def test_onnxruntime_equals_torch_for_random_images_sentences_and_noise(exported):
    for seed, batch in enumerate((1, 2, 3, 4, 10)):
        inputs = exported.inputs(batch, seed=seed)

        torch.testing.assert_close(exported.run(*inputs), exported.in_torch(*inputs), atol=1e-4, rtol=0.0)


def test_one_file_takes_any_sentence_and_zero_noise_is_the_mean_pass(exported):
    image, text, noise = exported.inputs(2, seed=0)
    image[1] = image[0]

    zeros = [torch.zeros_like(each) for each in noise]
    mean = exported.run(image, text, zeros)
    with torch.no_grad():
        expected = exported.model(image, text, sample=False).logits

    assert (mean[0] - mean[1]).abs().max() > 0.01
    assert (mean - exported.run(image, text, noise)).abs().max() > 0.01
    torch.testing.assert_close(mean, expected, atol=1e-4, rtol=0.0)


def test_the_mean_over_seeded_noise_is_what_predict_gives(exported):
    model, host, samples = exported.model, exported.host, 4
    given: dict[int, list[pvl.NoisePair]] = defaultdict(list)

    def record(index: int) -> Any:
        return lambda module, args, kwargs: given[index].append(kwargs["noise"])

    handles = [
        adapter.register_forward_pre_hook(record(index), with_kwargs=True)
        for index, adapter in enumerate(model.clip.pvl_adapters)
    ]
    settings = {"num_samples": samples, "antithetic": False, "return_samples": True}
    prediction = model.predict(images(), host.text, seed=3, **settings)
    for handle in handles:
        handle.remove()

    noise = []
    for direction, tokens in (("image", host.image_tokens), ("text", host.text_length)):
        rows = [torch.cat([getattr(pair, direction) for pair in given[index]]) for index in sorted(given)]
        padded = [torch.nn.functional.pad(each, (0, 0, 0, tokens - each.shape[1])) for each in rows]  # [S B, .., C]
        noise.append(torch.stack(padded, dim=1))  # predict leaves out padding that nothing reads
    image = model.prepare(images()).repeat(samples, 1, 1, 1)
    text = {name: ids.repeat(samples, 1) for name, ids in as_mapping(host, host.ids).items()}
    probabilities = exported.run(image, text, noise).sigmoid().unflatten(0, (samples, -1))  # [S, B, H, W]

    torch.testing.assert_close(probabilities, prediction.samples, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(probabilities.mean(dim=0), prediction.probability, atol=1e-5, rtol=0.0)


@pytest.mark.slow
def test_a_model_of_another_type_in_train_mode_is_exported_in_float32_and_left_as_it_was(tmp_path, monkeypatch):
    not_optimised(monkeypatch)
    clip = open_clip.CLIP(JOINT_WIDTH, vit(2), transformer(2))
    model = pvl.MedCLIPSeg(pvl.inject_adapters(clip, pvl.PVLConfig(layers=(0,), dim=8))).bfloat16().train()
    path = tmp_path / "new" / "folder" / "model.onnx"

    with unchanged(model), torch.autocast("cpu"):
        assert pvl.export_onnx(model, path, text=HOST.ids, noise=False) == path

    graph = session(path)
    assert [one.name for one in graph.get_inputs()] == ["image", "input_ids"]
    with torch.no_grad():
        expected = copy.deepcopy(model).float().eval()(HOST.image, HOST.ids).logits
    torch.testing.assert_close(run(graph, image=HOST.image, input_ids=HOST.ids), expected, atol=1e-4, rtol=0.0)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert str(Path(pvl.__file__).parent).encode() not in path.read_bytes()  # nothing of this machine


@pytest.fixture
def fake_export(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tells torch's exporters to write what the test says."""

    class Program:
        content = b""
        model = SimpleNamespace(graph=())

        def save(self, path: Path) -> None:
            path.write_bytes(self.content)
            if not self.content:
                raise OSError("the disk is full")
            path.with_name(f"{path.name}.data").write_bytes(b"weights")  # as torch does for more than 1.5 GiB

    program = Program()
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: program)
    return program


def test_a_failed_export_leaves_the_file_that_was_there(fake_export, tmp_path):
    path = tmp_path / "model.onnx"
    fake_export.content = b"first"
    pvl.export_onnx(segmenter(), path, text=HOST.ids)

    fake_export.content = b""
    with pytest.raises(OSError, match="full"):
        pvl.export_onnx(segmenter(), path, text=HOST.ids)

    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert files == {"model.onnx": b"first", "model.onnx.data": b"weights"}


def test_what_cannot_be_exported_is_refused_with_what_to_do(tmp_path, monkeypatch):
    model, path = segmenter(), tmp_path / "model.onnx"

    with pytest.raises(TypeError, match=r"CLIP, expected a MedCLIPSeg: wrap a CLIP as MedCLIPSeg\(clip\)"):
        pvl.export_onnx(injected(HOST), path)
    with pytest.raises(TypeError, match="_orig_mod"):
        pvl.export_onnx(torch.compile(model), path)
    with pytest.raises(ValueError, match="is a folder"):
        pvl.export_onnx(model, tmp_path, text=HOST.ids)
    with pytest.raises(ValueError, match="does not tell its tokenizer"):
        pvl.export_onnx(model, path)
    with pytest.raises(ValueError, match="noise holds 2 pairs"), pvl.disable_adapters(model.clip):
        pvl.export_onnx(model, path, text=HOST.ids)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'onnx and onnxscript not installed: pip install "pvl-adapter\[onnx\]"'):
        pvl.export_onnx(model, path)
    assert not list(tmp_path.iterdir())
