"""The other way of computing matrix products: the same results, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from support import injected, normal, randomise, unchanged
from torch import nn

import pvl_adapter as pvl
from pvl_adapter import kernels
from pvl_adapter.kernels import onednn_is_faster


@pytest.fixture(autouse=True)
def _faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever processor this is."""
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: True)


def test_a_segmenter_gives_the_same_logits_and_is_left_as_it_was(host):
    model = pvl.MedCLIPSeg(injected(host)).eval()
    randomise(model.head)
    with torch.no_grad():
        expected = model(host.image, host.text).logits

        with unchanged(model), kernels.fast_linears(model):
            got = model(host.image, host.text).logits

    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@torch.no_grad()
def test_a_linear_layer_takes_tokens_of_any_shape(shape, bias):
    layer, tokens = nn.Linear(24, 7, bias=bias), normal(*shape)
    expected = layer(tokens)

    with kernels.fast_linears(layer):
        got = layer(tokens)

    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "mask", "other_keys", "weights", "padding", "sequence_first"])
@torch.no_grad()
def test_an_attention_gives_what_it_gave(kind):
    attention = nn.MultiheadAttention(24, 3, batch_first=kind != "sequence_first").eval()
    tokens, others = normal(2, 5, 24), normal(2, 5, 24, seed=1)
    keys = others if kind == "other_keys" else tokens
    settings = {
        "mask": {"attn_mask": torch.full((5, 5), -torch.inf).triu(1)},
        "weights": {"need_weights": True},
        "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    }.get(kind, {})
    settings = {"need_weights": False, **settings}
    expected = attention(tokens, keys, keys, **settings)

    with kernels.fast_linears(attention):
        got = attention(tokens, keys, keys, **settings)

    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_forward_that_another_library_has_put_on_is_left_alone():
    layer = nn.Linear(4, 4)
    layer.forward = lambda tokens: tokens + 1

    with kernels.fast_linears(layer):
        assert torch.equal(layer(torch.zeros(4)), torch.ones(4))
    assert "forward" in layer.__dict__


def test_layers_are_put_back_after_an_error():
    layer = nn.Linear(4, 4)

    with unchanged(layer), pytest.raises(KeyError), kernels.fast_linears(layer):
        raise KeyError


def test_other_types_are_left_alone():
    layer = nn.Linear(4, 4).bfloat16()

    with kernels.fast_linears(layer):
        assert "forward" not in layer.__dict__


def test_measuring_which_way_is_faster_draws_nothing():
    before = torch.random.get_rng_state()

    assert onednn_is_faster.__wrapped__() in (True, False)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_frozen_attention_in_training_gives_what_it_gave_and_its_gradients():
    attention = nn.MultiheadAttention(24, 3, batch_first=True).requires_grad_(False).train()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        tokens = normal(2, 5, 24).requires_grad_()
        output = attention(tokens, tokens, tokens, need_weights=False)[0]
        output.backward(normal(2, 5, 24, seed=1))
        return output.detach(), tokens.grad

    expected = run()
    with unchanged(attention), kernels.batch_first_attention([attention]):
        got = run()

    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_attention_that_is_trained_itself_is_left_alone():
    attention = nn.MultiheadAttention(24, 3, batch_first=True)

    with kernels.batch_first_attention([attention]):
        assert "forward" not in attention.__dict__
