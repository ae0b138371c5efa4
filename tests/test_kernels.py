"""Faster ways to compute matrix products: the same results, in every kind of layer, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from hosts import CORE_HOSTS, Host
from support import normal, segmenter, unchanged
from torch import nn

from pvl_adapter import kernels


@pytest.fixture(autouse=True)
def _faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever processor this is."""
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: True)


@pytest.mark.parametrize("host", CORE_HOSTS, ids=str)
def test_a_segmenter_gives_the_same_logits_and_is_left_as_it_was(host: Host):
    model = segmenter(host)
    with torch.no_grad():
        expected = model(host.image, host.text).logits
        with unchanged(model), kernels.fast_linears(model):
            got = model(host.image, host.text).logits

    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


ATTENTIONS = {
    "plain": {},
    "mask": {"attn_mask": torch.full((5, 5), -torch.inf).triu(1)},
    "boolean_mask": {"attn_mask": torch.ones(5, 5).triu(1).bool()},
    "mask_of_batch": {"attn_mask": normal(2 * 3, 5, 5)},
    "other_keys": {"key": normal(2, 5, 24, seed=1)},
    "weights": {"need_weights": True},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    "sequence_first": {},
    "no_batch": {},
}


@pytest.mark.parametrize("way", ["fast_linears", "batch_first"])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_an_attention_gives_what_it_gave_and_its_gradients(kind, way):
    attention = nn.MultiheadAttention(24, 3, batch_first=kind != "sequence_first").requires_grad_(False)
    settings = {"need_weights": False, **ATTENTIONS[kind]}
    keys = settings.pop("key", None)

    def run() -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens = normal(5, 24) if kind == "no_batch" else normal(2, 5, 24)
        tokens.requires_grad_(way == "batch_first")
        with torch.set_grad_enabled(way == "batch_first"):
            given = tokens if keys is None else keys
            output = attention(tokens, given, given, **settings)[0]
        if way == "batch_first":
            output.backward(normal(*output.shape, seed=1))
        return output.detach(), tokens.grad

    expected = run()
    with (
        unchanged(attention),
        kernels.fast_linears(attention) if way == "fast_linears" else kernels.batch_first_attention(),
    ):
        got = run()

    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_forward_that_another_library_has_put_on_is_used():
    layer = nn.Linear(4, 4)
    layer.forward = lambda tokens: tokens + 1

    with unchanged(layer), kernels.fast_linears(layer):
        assert torch.equal(layer(torch.zeros(4)), torch.ones(4))


def test_attention_that_is_trained_itself_gets_its_gradients():
    attention, tokens = nn.MultiheadAttention(24, 3, batch_first=True), normal(2, 5, 24)

    with kernels.batch_first_attention():
        attention(tokens, tokens, tokens, need_weights=False)[0].sum().backward()

    assert all(weight.grad is not None for weight in attention.parameters())
