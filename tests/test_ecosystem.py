"""Injected hosts inside what people train and serve with: torch.compile, autocast, DDP, Accelerate, PEFT, Trainer."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import BY_NAME, CORE_HOSTS, Host
from support import (
    CONFIG,
    HOST,
    assert_close_gradients,
    assert_same_bits,
    gradients,
    images,
    injected,
    normal,
    segmenter,
)
from torch import Tensor, nn

import pvl_adapter as pvl
from pvl_adapter import noise
from pvl_adapter.joint import SharedPrefix

NAMES = [host.name for host in CORE_HOSTS]


@pytest.fixture(params=NAMES)
def host(request: pytest.FixtureRequest) -> Host:
    return BY_NAME[request.param]


def loss(features: Tensor) -> Tensor:
    """Of unit vectors, so their squares would do nothing."""
    return (features.float() ** 3).sum()


def training_step(host: Host, model: nn.Module, call: nn.Module | None = None) -> dict[str, Tensor | None]:
    """Gradients of one step with given noise."""
    model.zero_grad()
    with pvl.sampling(model, noise=host.noise(CONFIG)):
        loss(host.run(model if call is None else call)).backward()
    return {name: gradient.clone() for name, gradient in gradients(model.pvl_adapters).items()}


ONE_OF_EACH_LIBRARY = [HOST.name, "transformers-clip"]
COMPILED = [
    pytest.param(name, backend, marks=[] if (number, backend) == (0, "aot_eager") else pytest.mark.slow)
    for number, name in enumerate(NAMES)
    for backend in ("aot_eager", "inductor")
]


@pytest.mark.parametrize(("host", "backend"), COMPILED, indirect=["host"])
def test_a_compiled_model_is_one_graph_with_the_same_outputs_and_gradients_compiled_once(host, backend):
    torch._dynamo.reset()
    model = injected(host).train()
    with pvl.sampling(model, noise=host.noise(CONFIG)):
        expected = host.run(model).detach()
    expected_gradients = training_step(host, model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    got_gradients = training_step(host, model, compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close_gradients(training_step(host, model, compiled), expected_gradients)
        with pvl.sampling(model, noise=host.noise(CONFIG)):
            got = host.run(compiled).detach()

    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert_close_gradients(got_gradients, expected_gradients)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("counted", "backend"),
    [
        (True, "aot_eager"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((False, "aot_eager"), (False, "inductor"), (True, "inductor"))
        ),
    ],
)
def test_compiled_adapters_and_head_predict_the_same(counted, backend, monkeypatch):
    """As docs/inference.md says it for a GPU, where noise is counters."""
    torch._dynamo.reset()
    expected = segmenter().predict(images(), HOST.ids, num_samples=5).probability
    monkeypatch.setattr(noise, "is_available", lambda device: counted)
    model = segmenter()

    for module in (*model.clip.pvl_adapters, model.head):
        module.compile(fullgraph=True, backend=backend)
    got = model.predict(images(), HOST.ids, num_samples=5).probability

    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0.0)
    assert model.state_dict().keys() == segmenter().state_dict().keys()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("host", NAMES[::3], indirect=True)
def test_a_chunk_of_samples_is_one_graph_compiled_once_for_all_noise(host):
    """So a CUDA graph could hold it."""
    torch._dynamo.reset()
    model = segmenter(host)
    size, dim, adapters = host.image.shape[-2:], CONFIG.dim, len(CONFIG.layers)

    with torch.no_grad():
        prefix = SharedPrefix(model.clip, host.image, model.tokenize(host.text))
        shapes = [(6, tokens, dim) for tokens in (prefix.prefix.image.tokens, prefix.prefix.text.tokens)]
        draws = [
            [pvl.NoisePair(*(normal(*shape, seed=seed) for shape in shapes)) for _ in range(adapters)]
            for seed in range(2)
        ]

        def chunk(noise: list[pvl.NoisePair]) -> Tensor:
            return model.pixel_logits(prefix.encode([0, 1, 2, 0, 1, 2], noise=noise), size=size)

        compiled = torch.compile(chunk, fullgraph=True, backend="aot_eager")
        first = compiled(draws[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            second = compiled(draws[1])
        torch.testing.assert_close((first, second), (chunk(draws[0]), chunk(draws[1])), atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


def test_gradient_checkpointing_changes_no_gradient_by_a_bit_and_saves_activations(host):
    def saved(model: nn.Module) -> int:
        elements = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            host.run(model)
        return elements

    plain = injected(host)
    checkpointed = injected(host, config=dataclasses.replace(CONFIG, gradient_checkpointing=True))

    assert_same_bits(training_step(host, checkpointed), training_step(host, plain))
    assert saved(checkpointed) < 0.75 * saved(plain)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_prepares_an_injected_model(host, mixed_precision):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
    model = injected(host)
    expected = host.run(model).detach()
    optimizer = torch.optim.SGD(model.pvl_adapters.parameters(), lr=0.1)

    prepared, optimizer = accelerator.prepare(model, optimizer)
    got = host.run(prepared)
    accelerator.backward(loss(got))
    optimizer.step()

    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-5 if mixed_precision == "no" else 0.1, rtol=0.0)
    assert not torch.equal(host.run(prepared), got)


def test_trainers_see_the_arguments_the_host_takes(host):
    assert inspect.signature(injected(host).forward) == inspect.signature(host.build().forward)


def test_the_hugging_face_trainer_trains_the_adapters(tmp_path):
    transformers = pytest.importorskip("transformers")
    host = BY_NAME["transformers-clip"]
    model = injected(host)
    before = copy.deepcopy(model.state_dict())
    batch = host.arguments(host.image, host.text)
    items = [{name: value[index] for name, value in batch.items()} for index in range(3)]

    class ContrastiveTrainer(transformers.Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **_: Any) -> Tensor:
            return model(**inputs, return_loss=True).loss

    settings = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=3, report_to=[], save_strategy="no", use_cpu=True
    )
    ContrastiveTrainer(model=model, args=settings, train_dataset=items).train()

    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("pvl_adapters.") for name in changed)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """One process on the CPU."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_host_under_ddp_has_the_gradients_of_the_plain_one(host, mesh):
    model = injected(host)
    expected = training_step(host, model)
    shared = torch.nn.parallel.DistributedDataParallel(model)  # must outlive the backward pass

    assert_close_gradients(training_step(host, model, shared), expected)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two DDP processes, and one process alone, computed for every host."""
    folder = tmp_path_factory.mktemp("ddp")
    script = Path(__file__).with_name("ddp_worker.py")
    command, this_code = [sys.executable, str(script), str(folder), *NAMES], {"PYTHONPATH": str(script.parents[1])}
    outcome = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **this_code}
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(host, two_processes):
    """DDP over gloo, each process with its own part of the batch; a broken exchange would leave them different."""
    expected = torch.load(two_processes / f"{host}-alone.pt", weights_only=True)

    for rank in range(2):
        assert_close_gradients(torch.load(two_processes / f"{host}-{rank}.pt", weights_only=True), expected)


# --- libraries that change a model afterwards -------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["fc1"]], ids="-".join)
@pytest.mark.parametrize("wrap", ["get_peft_model", "inject_adapter_in_model"])
def test_lora_is_trained_beside_the_adapters_if_it_comes_first_and_refused_otherwise(wrap, targets):
    """`q_proj` is also what the adapters call one of their layers."""
    peft = pytest.importorskip("peft")
    host = BY_NAME["transformers-clip"]

    def add_lora(model: nn.Module) -> None:
        config = peft.LoraConfig(r=2, target_modules=targets)
        peft.get_peft_model(model, config) if wrap == "get_peft_model" else peft.inject_adapter_in_model(config, model)

    model = host.build()
    add_lora(model)
    pvl.inject_adapters(model, CONFIG)
    loss(host.run(model.train())).backward()
    trained = {name for name, gradient in gradients(model).items() if gradient is not None}
    lora = {name for name, _ in model.named_parameters() if "lora" in name}
    assert lora
    assert trained == lora | {name for name, _ in model.named_parameters() if name.startswith("pvl_adapters.")}
    assert not any(name.startswith("pvl_adapters.") for name in lora)

    other = pvl.inject_adapters(host.build(), CONFIG)
    with pytest.raises((RuntimeError, ValueError), match="PEFT"):  # noqa: PT012, at once or when it trains
        add_lora(other)
        host.run(other.train())


def test_the_dropout_of_lora_is_awake_in_training_beside_the_adapters():
    peft = pytest.importorskip("peft")
    host = BY_NAME["transformers-clip"]
    model = host.build(dropout=0.5)
    config = peft.LoraConfig(r=2, target_modules=["fc1"], lora_dropout=0.5, init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    pvl.inject_adapters(model, CONFIG)

    with pvl.sampling(model.train(), sample=False):
        assert not torch.equal(host.run(model), host.run(model))
        for name, module in model.named_modules():
            if "lora_dropout" in name and isinstance(module, nn.Dropout):
                module.p = 0.0
        assert torch.equal(host.run(model), host.run(model))  # the towers' own sleeps
    model.eval()
    assert torch.equal(host.run(model), host.run(model))


def test_a_model_under_fsdp_at_its_root_trains_and_predicts(mesh):
    model, plain = segmenter().train(), segmenter().train()
    scalar = model.clip.logit_scale  # of the host itself, which FSDP2 cannot shard
    torch.distributed.fsdp.fully_shard(model, mesh=mesh, ignored_params={scalar})

    for one in (plain, model):
        loss(one(HOST.image, HOST.ids, sample=False).logits).backward()
    expected = {name: gradient for name, gradient in gradients(plain).items() if gradient is not None}
    assert_close_gradients({name: gradients(model)[name].full_tensor() for name in expected}, expected)

    got, expected = (one.predict(images(), HOST.ids, num_samples=2).probability for one in (model, plain))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("when", ["before_injection", "after_injection"])
def test_fsdp_around_single_blocks_is_refused_with_the_reason(when, mesh):
    """Its hooks would gather a block's weights after lockstep has used them."""
    model = HOST.build()
    with pytest.raises((RuntimeError, ValueError), match="fully_shard"):  # noqa: PT012
        if when == "after_injection":
            pvl.inject_adapters(model, CONFIG)
        for block in model.visual.transformer.resblocks:
            torch.distributed.fsdp.fully_shard(block, mesh=mesh)
        if when == "before_injection":
            pvl.inject_adapters(model, CONFIG)
        HOST.run(model)


@pytest.mark.parametrize(
    "host",
    [pytest.param(name, marks=[] if name in ONE_OF_EACH_LIBRARY else pytest.mark.slow) for name in NAMES],
    indirect=True,
)
def test_an_injected_model_can_be_exported(host):
    model = injected(host)

    exported = torch.export.export(model, (), host.arguments(host.image, host.text))

    torch.testing.assert_close(host.run(exported.module()), host.run(model), atol=1e-5, rtol=1e-4)


def test_a_segmentation_output_is_a_tree_of_its_tensors():
    output = segmenter()(HOST.image, HOST.ids, kl=True)

    leaves, tree = torch.utils._pytree.tree_flatten(output)
    again = torch.utils._pytree.tree_unflatten(leaves, tree)

    assert len(leaves) == 4
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert type(again) is type(output)
    assert torch.equal(again.logits, output.logits)


def test_a_model_of_quantised_layers_is_refused_by_name_and_the_original_is_unharmed():
    model = segmenter()
    expected = model.predict(images(), HOST.ids, num_samples=2)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    with pytest.raises((RuntimeError, ValueError), match="quanti"):
        quantised.predict(images(), HOST.ids, num_samples=2)
    assert torch.equal(model.predict(images(), HOST.ids, num_samples=2).probability, expected.probability)
