"""The method written a second time, from the equations of the paper (arXiv 2602.20423), in float64 NumPy.

Imports nothing of the library. Weights come as a mapping from the names of a state dict to arrays.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Array = np.ndarray
Weights = Mapping[str, Array]


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    """[T, C], over C."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * weight + bias


def softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


def sigmoid(x: Array) -> Array:
    return np.exp(-softplus(-x))


def softmax(scores: Array) -> Array:
    """[T, K], over K."""
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def attention_of_one(
    query: Array, context: Array, weights: Weights, *, beta: float, mask: Array | None, noise: Array | None
) -> Array:
    """One batch item: query [Q, C], context [K, C], mask [K], noise [K, C]; [Q, C]."""

    def project(name: str, x: Array) -> Array:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    dim = query.shape[1]
    q = project("q_proj", query)
    k_mean, k_raw = np.split(project("k_proj", context), 2, axis=1)  # means, then raw variances
    v_mean, v_raw = np.split(project("v_proj", context), 2, axis=1)
    k_mean = layer_norm(k_mean, weights["norm_k.weight"], weights["norm_k.bias"])
    values = layer_norm(v_mean, weights["norm_v.weight"], weights["norm_v.bias"])
    if noise is not None:
        values = values + np.sqrt(softplus(v_raw) + 1e-6) * noise

    real = np.full(len(context), True) if mask is None else mask
    attended = np.zeros_like(query)
    if real.any():
        variance = q**2 @ (softplus(k_raw) + 1e-6).T
        scores = q @ k_mean.T / np.sqrt(dim) - beta * np.sqrt(variance / dim)
        attended = softmax(scores[:, real]) @ values[real]
    gate = sigmoid(weights["gate"].item())
    return gate * project("out_proj", attended) + (1.0 - gate) * query


def attention(
    query: Array,
    context: Array,
    weights: Weights,
    *,
    beta: float,
    mask: Array | None = None,
    noise: Array | None = None,
) -> Array:
    """A batch: query [B, Q, C], context [B, K, C], mask [B, K], noise [S, B, K, C]; the mean over S of the outputs."""
    nothing = [None] * len(query)
    rows = nothing if mask is None else mask
    outputs = [
        [
            attention_of_one(*row, weights, beta=beta, mask=m, noise=n)
            for *row, m, n in zip(query, context, rows, draw, strict=True)
        ]
        for draw in ([nothing] if noise is None else noise)
    ]
    return np.mean(outputs, axis=0)


def adapter(
    vision: Array,
    text: Array,
    weights: Weights,
    *,
    beta: float,
    text_mask: Array | None = None,
    vision_mask: Array | None = None,
    image_noise: Array | None = None,
    text_noise: Array | None = None,
) -> tuple[Array, Array]:
    """Updates of vision [B, V, vision_dim] and text [B, L, text_dim].

    Masks [B, L] and [B, V]; noise of the image values [S, B, V, C] and of the text values [S, B, L, C].
    """
    low_vision, low_text = vision @ weights["vision_down.weight"].T, text @ weights["text_down.weight"].T
    low_vision = attention(
        low_vision, low_text, under(weights, "two_way.image_to_text."), beta=beta, mask=text_mask, noise=text_noise
    )
    low_text = attention(
        low_text, low_vision, under(weights, "two_way.text_to_image."), beta=beta, mask=vision_mask, noise=image_noise
    )
    return low_vision @ weights["vision_up.weight"].T, low_text @ weights["text_up.weight"].T


def soft_targets(text: Array, *, temperature: float) -> Array:
    """[B, D] to [B, B]: softmax of the unit rows of T T^T / tau."""
    similarity = text @ text.T / temperature
    return softmax(similarity / np.linalg.norm(similarity, axis=1, keepdims=True))


def soft_contrastive_loss(patches: Array, text: Array, *, temperature: float) -> float:
    """patches [B, N, D], text [B, D]."""
    image = (patches / np.linalg.norm(patches, axis=-1, keepdims=True)).mean(axis=1)
    targets = soft_targets(text, temperature=temperature)
    to_text, to_image = image @ text.T / temperature, text @ image.T / temperature
    # The targets are transposed as they are: rows need not sum to one.
    loss = -(targets * np.log(softmax(to_text))).sum() - (targets.T * np.log(softmax(to_image))).sum()
    return loss / len(text) / 2


def dice_loss(logits: Array, target: Array, *, by_row: bool) -> float:
    """[B, H, W]; per image, or per image row with row 0 left out."""
    probability = sigmoid(logits)
    if by_row:
        probability, target, axes = probability[:, 1:], target[:, 1:], (2,)
    else:
        axes = (1, 2)
    intersection, total = (probability * target).sum(axis=axes), (probability + target).sum(axis=axes)
    return float(np.mean(1.0 - (2.0 * intersection + 1e-5) / (total + 1e-5)))


def binary_cross_entropy(logits: Array, target: Array) -> float:
    return float(np.where(target != 0, softplus(-logits), softplus(logits)).mean())


def under(weights: Weights, prefix: str) -> dict[str, Array]:
    """The weights whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
