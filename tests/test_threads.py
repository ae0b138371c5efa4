"""One model, many threads, errors and interrupts: never a wrong answer, and nothing of a run is left behind."""

from __future__ import annotations

import ctypes
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle

import pytest
import torch
from hosts import BY_NAME
from support import HOST, blocks, images, injected, object_state, segmenter
from torch import Tensor, nn

import pvl_adapter as pvl

IMAGES = images()
Calls = dict[str, Callable[[], Tensor]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def calls_of(model: pvl.MedCLIPSeg) -> Calls:
    """Every way in, each with one right answer."""
    image, text = HOST.image, HOST.ids
    return {
        "mean": lambda: model.predict(IMAGES, text, num_samples=0).probability,
        "samples": lambda: model.predict(IMAGES, text, num_samples=2, seed=3, memory_budget=1).variance.nan_to_num(),
        "seeded": lambda: model.predict(IMAGES, text, num_samples=2, seed=4).probability,
        "logits": lambda: model(image, text).logits,
        "drawn": lambda: model(image, text, sample=True, generator=generator(5)).logits,
        "features": lambda: HOST.run(model.clip),
        "encode": lambda: pvl.encode(model.clip, image, text).text_embeds,
    }


MIX = ("mean", "samples", "seeded", "logits", "drawn", "features", "encode")


class Saboteur:
    """Hooks on blocks, adapters and head that raise after a number of passes, in the thread that asked for it."""

    def __init__(self, model: pvl.MedCLIPSeg) -> None:
        self.own = threading.local()
        self.handles = [part.register_forward_pre_hook(self.passed) for part in depths(model).values()]

    def passed(self, *_: object) -> None:
        if getattr(self.own, "left", None) is None:
            return
        self.own.left -= 1
        if self.own.left < 0:
            error, self.own.left = self.own.error, None
            raise error

    def ask(self, error: BaseException, *, after: int) -> None:
        self.own.error, self.own.left = error, after

    def forget(self) -> None:
        self.own.left = None


def depths(model: pvl.MedCLIPSeg) -> dict[str, nn.Module]:
    """Parts that a run passes, from the first block to the head."""
    inner = {name: next(part for part in block.modules() if not list(part.children()))
             for name, block in blocks(model.clip).items()}  # fmt: skip
    adapters = {f"adapter {k}": adapter for k, adapter in enumerate(model.clip.pvl_adapters)}
    return {**inner, **adapters, "head": model.head}


@contextmanager
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def stress(model: pvl.MedCLIPSeg, *, threads: int, rounds: int, sabotage: bool, interrupts: float = 0.0) -> None:
    """Mixed calls from many threads: each answer is right to the bit, a refusal, or the error that was asked for.

    Interrupts come at any bytecode, within torch's own contexts too; kernels that these leave on round otherwise.
    """
    calls = calls_of(model)
    saboteur, before = Saboteur(model), object_state(model)  # hooks let padding run too, which rounds otherwise
    expected = {name: call() for name, call in calls.items()}
    right: list[str] = []
    wrong: list[str] = []
    left = [rounds] * threads

    def one(chance: random.Random) -> None:
        name, error = chance.choice(MIX), chance.choice([KeyError("asked"), KeyboardInterrupt("asked")])
        kind = chance.random() if sabotage else 1.0
        torch.set_grad_enabled(True)  # an interrupt within torch's own no_grad leaves it on
        try:
            if kind < 0.1:
                model.predict(IMAGES, HOST.ids[:2])
            elif kind < 0.4:
                saboteur.ask(error, after=chance.randrange(12))
            answer = calls[name]()
        except (KeyError, KeyboardInterrupt):
            return
        except ValueError:
            assert kind < 0.1
        except RuntimeError as refusal:
            clear = ("thread", "running", *(["mode stack"] if interrupts else []))  # torch's own, cut in two
            if not any(word in str(refusal) for word in clear):
                wrong.append(f"{name}: {refusal}")
        else:
            same = torch.allclose if interrupts else torch.equal
            (right if same(answer, expected[name]) else wrong).append(name)
        finally:
            saboteur.forget()

    def work(index: int) -> None:
        chance = random.Random(index)
        while left[index]:
            with suppress(KeyboardInterrupt):  # it may come between two calls, or while one is answered
                left[index] -= 1
                try:
                    one(chance)
                except Exception as error:
                    wrong.append(repr(error))

    def start(index: int) -> threading.Thread:
        thread = threading.Thread(target=work, args=(index,), daemon=True)
        thread.start()
        return thread

    with switching_often():
        workers = [start(index) for index in range(threads)]
        chance, deadline = random.Random(-1), time.monotonic() + 200
        while interrupts and any(left) and time.monotonic() < deadline:
            time.sleep(interrupts)
            index = chance.randrange(threads)
            if not workers[index].is_alive():
                workers[index] = start(index)  # an interrupt between two calls has ended it
            thread = ctypes.c_ulong(workers[index].ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(KeyboardInterrupt))
        for worker in workers:
            worker.join(timeout=120)
    assert not any(worker.is_alive() for worker in workers), "a thread waits for ever"
    assert not wrong, f"{len(wrong)} of {len(wrong) + len(right)} wrong: {sorted(set(wrong))}"
    assert len(right) > (threads * rounds) // (20 if interrupts else 4)
    assert object_state(model) == before
    assert all(torch.equal(call(), expected[name]) for name, call in calls.items())


@pytest.mark.parametrize("sabotage", [False, True], ids=["calm", "with_errors"])
def test_threads_on_one_model_get_right_answers_or_refusals(sabotage):
    stress(segmenter(), threads=6, rounds=8, sabotage=sabotage)


@pytest.mark.slow
@pytest.mark.parametrize("interrupts", [0.0, 0.005], ids=["errors", "interrupts_anywhere"])
def test_thousands_of_calls_from_threads_get_right_answers_or_refusals(interrupts, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # an interrupt may end a thread
    stress(segmenter(), threads=6, rounds=700, sabotage=True, interrupts=interrupts)


CONTEXTS = {
    "disable_adapters": lambda model: pvl.disable_adapters(model.clip),
    "sampling": lambda model: pvl.sampling(model.clip, num_samples=3),
    "mean": lambda model: pvl.sampling(model.clip, sample=False),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_context_of_one_thread_does_not_reach_the_calls_of_another(context, training):
    """The towers have dropout, which disabling wakes in train mode."""
    host = BY_NAME["open_clip-bert"]
    model = pvl.MedCLIPSeg(injected(host, dropout=0.5)).train(training)

    def drawn() -> Tensor:
        return pvl.encode(model.clip, host.image, host.text, sample=True, generator=generator()).image_embeds

    expected, mean = drawn(), pvl.encode(model.clip, host.image, host.text, sample=False).image_embeds
    entered, done = threading.Event(), threading.Event()

    def hold() -> None:
        with CONTEXTS[context](model):
            entered.set()
            done.wait(60)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    entered.wait(60)
    try:
        assert torch.equal(drawn(), expected)
        plain = pvl.encode(model.clip, host.image, host.text).image_embeds
        assert torch.equal(plain, mean) != training  # drawn in train mode only
    except RuntimeError as refusal:
        assert "thread" in str(refusal)  # noqa: PT017
    finally:
        done.set()
        thread.join(60)
    assert torch.equal(drawn(), expected)


def test_predicting_in_one_thread_does_not_put_another_out_of_train_mode():
    model = segmenter().train()
    mean = segmenter()(HOST.image, HOST.ids).logits
    expected = model.predict(IMAGES, HOST.ids, num_samples=2).probability
    stop, wrong = threading.Event(), []

    def predict() -> None:
        while not stop.is_set():
            with suppress(RuntimeError):
                answer = model.predict(IMAGES, HOST.ids, num_samples=2).probability
                wrong.extend([] if torch.equal(answer, expected) else ["prediction"])

    thread = threading.Thread(target=predict, daemon=True)
    with switching_often():
        thread.start()
        for _ in range(12):
            try:
                logits = model(HOST.image, HOST.ids).logits
            except RuntimeError as refusal:
                assert "thread" in str(refusal) or "running" in str(refusal)  # noqa: PT017
            else:
                wrong += ["no sample was drawn"] if torch.allclose(logits, mean, atol=1e-4) else []
        stop.set()
        thread.join(60)

    assert not wrong
    assert all(module.training for module in (model, model.head, model.clip.pvl_adapters))


# --- nothing survives a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", MIX)
def test_an_error_at_any_depth_leaves_nothing_behind(entry):
    """An exception and an interrupt in turn."""
    model = segmenter()
    calls = calls_of(model)
    expected, before = {name: call() for name, call in calls.items()}, object_state(model)

    for (place, part), error in zip(depths(model).items(), cycle([KeyError, KeyboardInterrupt])):
        if place == "head" and entry in ("features", "encode"):
            continue

        def fail(*_: object, error: type[BaseException] = error) -> None:
            raise error

        handle = part.register_forward_pre_hook(fail)
        with pytest.raises(error):
            calls[entry]()
        handle.remove()
        assert object_state(model) == before, place
        for name in (entry, "features"):
            assert torch.equal(calls[name](), expected[name]), (place, name)
    assert torch.equal(calls["samples"](), expected["samples"])


def test_contexts_that_are_never_left_end_with_the_last_reference_to_them():
    model = segmenter()
    calls = calls_of(model)
    expected, before = {name: call() for name, call in calls.items()}, object_state(model)

    for context in CONTEXTS.values():
        stack = ExitStack()
        stack.enter_context(context(model))
        calls["logits"]()
        del stack

    assert object_state(model) == before
    assert all(torch.equal(call(), expected[name]) for name, call in calls.items())


@pytest.mark.parametrize("outer", MIX)
def test_a_call_from_a_hook_of_the_running_model_is_refused_and_the_running_one_goes_on(outer):
    model = segmenter()
    calls = calls_of(model)
    expected = {name: call() for name, call in calls.items()}
    refusals: list[str] = []

    def call_again(*_: object) -> None:
        for name in MIX:
            try:
                calls[name]()
            except RuntimeError as refusal:
                refusals.append(str(refusal))
            else:
                refusals.append("not refused")

    handle = model.clip.pvl_adapters[1].register_forward_pre_hook(call_again)
    answer = calls[outer]()
    handle.remove()

    assert refusals
    assert all("running" in refusal for refusal in refusals)
    assert torch.equal(answer, expected[outer])
    assert all(torch.equal(call(), expected[name]) for name, call in calls.items())
