"""The method written a second time, from the equations of the paper (arXiv 2602.20423), one number at a time.

Plain loops over float64 NumPy arrays; imports nothing of the library. Weights come as a mapping from the names of a
state dict to arrays. Slow on purpose: use small shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

Array = np.ndarray
Weights = Mapping[str, Array]


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """[T, in] to [T, out]."""
    out = np.zeros((len(x), len(weight)))
    for t in range(len(x)):
        for o in range(len(weight)):
            total = 0.0 if bias is None else bias[o]
            for i in range(x.shape[1]):
                total += x[t, i] * weight[o, i]
            out[t, o] = total
    return out


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    """[T, C], over C."""
    out = np.zeros_like(x)
    for t in range(len(x)):
        mean = sum(x[t]) / x.shape[1]
        variance = sum((value - mean) ** 2 for value in x[t]) / x.shape[1]
        for c in range(x.shape[1]):
            out[t, c] = (x[t, c] - mean) / math.sqrt(variance + eps) * weight[c] + bias[c]
    return out


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def softmax(scores: Sequence[float]) -> list[float]:
    highest = max(scores)
    exponentials = [math.exp(score - highest) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def attention_of_one(
    query: Array, context: Array, weights: Weights, *, beta: float, mask: Array | None, noise: Array | None
) -> Array:
    """One batch item: query [Q, C], context [K, C], mask [K], noise [K, C]; [Q, C]."""
    dim = query.shape[1]
    q = linear(query, weights["q_proj.weight"], weights["q_proj.bias"])
    k = linear(context, weights["k_proj.weight"], weights["k_proj.bias"])  # [K, 2C]: means, then raw variances
    v = linear(context, weights["v_proj.weight"], weights["v_proj.bias"])
    k_mean = layer_norm(k[:, :dim], weights["norm_k.weight"], weights["norm_k.bias"])
    v_mean = layer_norm(v[:, :dim], weights["norm_v.weight"], weights["norm_v.bias"])
    real = [j for j in range(len(context)) if mask is None or mask[j]]

    attended = np.zeros_like(query)
    for i in range(len(query)):
        scores = []
        for j in real:
            mean = variance = 0.0
            for c in range(dim):
                mean += q[i, c] * k_mean[j, c]
                variance += q[i, c] ** 2 * (softplus(k[j, dim + c]) + 1e-6)
            scores.append(mean / math.sqrt(dim) - beta * math.sqrt(variance / dim))
        for j, share in zip(real, softmax(scores) if real else [], strict=True):
            for c in range(dim):
                value = v_mean[j, c]
                if noise is not None:
                    value += math.sqrt(softplus(v[j, dim + c]) + 1e-6) * noise[j, c]
                attended[i, c] += share * value
    gate = sigmoid(weights["gate"].item())
    return gate * linear(attended, weights["out_proj.weight"], weights["out_proj.bias"]) + (1.0 - gate) * query


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
    outputs = []
    for draw in [None] if noise is None else noise:
        outputs.append(
            [
                attention_of_one(
                    query[b],
                    context[b],
                    weights,
                    beta=beta,
                    mask=None if mask is None else mask[b],
                    noise=None if draw is None else draw[b],
                )
                for b in range(len(query))
            ]
        )
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
    low_vision = np.stack([linear(x, weights["vision_down.weight"]) for x in vision])
    low_text = np.stack([linear(x, weights["text_down.weight"]) for x in text])
    low_vision = attention(
        low_vision, low_text, under(weights, "two_way.image_to_text."), beta=beta, mask=text_mask, noise=text_noise
    )
    low_text = attention(
        low_text, low_vision, under(weights, "two_way.text_to_image."), beta=beta, mask=vision_mask, noise=image_noise
    )
    return (
        np.stack([linear(x, weights["vision_up.weight"]) for x in low_vision]),
        np.stack([linear(x, weights["text_up.weight"]) for x in low_text]),
    )


def soft_targets(text: Array, *, temperature: float) -> Array:
    """[B, D] to [B, B]: softmax of the unit rows of T T^T / tau."""
    targets = []
    for i in range(len(text)):
        row = [float(sum(text[i] * text[j])) / temperature for j in range(len(text))]
        length = math.sqrt(sum(value**2 for value in row))
        targets.append(softmax([value / length for value in row]))
    return np.array(targets)


def soft_contrastive_loss(patches: Array, text: Array, *, temperature: float) -> float:
    """patches [B, N, D], text [B, D]."""
    batch, count = patches.shape[:2]
    image = np.zeros_like(text)
    for b in range(batch):
        for n in range(count):
            length = math.sqrt(sum(value**2 for value in patches[b, n]))
            for d in range(text.shape[1]):
                image[b, d] += patches[b, n, d] / length / count
    targets = soft_targets(text, temperature=temperature)
    loss = 0.0
    for i in range(batch):
        to_text = [float(sum(image[i] * text[j])) / temperature for j in range(batch)]
        to_image = [float(sum(text[i] * image[j])) / temperature for j in range(batch)]
        for j in range(batch):
            loss -= targets[i, j] * math.log(softmax(to_text)[j])
            loss -= targets[j, i] * math.log(softmax(to_image)[j])  # transposed as it is: rows need not sum to one
    return loss / batch / 2


def dice_loss(logits: Array, target: Array, *, by_row: bool) -> float:
    """[B, H, W]; per image, or per image row with row 0 left out."""
    losses = []
    for b in range(len(logits)):
        regions = [[h] for h in range(1, logits.shape[1])] if by_row else [list(range(logits.shape[1]))]
        for rows in regions:
            intersection = total = 0.0
            for h in rows:
                for w in range(logits.shape[2]):
                    probability = sigmoid(logits[b, h, w])
                    intersection += probability * target[b, h, w]
                    total += probability + target[b, h, w]
            losses.append(1.0 - (2.0 * intersection + 1e-5) / (total + 1e-5))
    return sum(losses) / len(losses)


def binary_cross_entropy(logits: Array, target: Array) -> float:
    pairs = list(zip(logits.ravel(), target.ravel(), strict=True))
    return sum(softplus(-x) if y else softplus(x) for x, y in pairs) / len(pairs)


def under(weights: Weights, prefix: str) -> dict[str, Array]:
    """The weights whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
