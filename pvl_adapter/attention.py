"""Probabilistic cross-attention: keys and values are Gaussians, uncertain evidence gets less attention.

Implements the attention of MedCLIPSeg (Koleilat et al., CVPR 2026, arXiv 2602.20423), compatible with the released
weights (github HealthX-Lab/MedCLIPSeg, commit 8d7ef36). Differences from the release: `sample` and `num_samples` are
honoured, a context mask is accepted, and gradients are finite for a zero query row.

Shape alphabet: B batch, S value samples, Q query tokens, K context tokens, C adapter width.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvl_adapter.fused import CounterNoise, can_fuse, fused_attention

VARIANCE_FLOOR = 1e-6  # added to every variance, as released
_SQRT_FLOOR = 1e-12  # below this the uncertainty penalty is flat: sqrt has no finite gradient at 0


def probabilistic_attention(
    query: Tensor,
    key_mean: Tensor,
    key_var: Tensor,
    value_mean: Tensor,
    value_var: Tensor,
    *,
    beta: float | Tensor,
    context_mask: Tensor | None = None,
    noise: Tensor | CounterNoise | None = None,
) -> Tensor:
    """Attend to Gaussian keys and values, discounting uncertain keys.

    Computes `softmax(q k_mean^T / sqrt(C) - beta sqrt(q^2 k_var^T / C)) (v_mean + sqrt(v_var) noise)`, always in
    float32 or better, whatever the input type and autocast state.

    Args:
        query: [B, Q, C].
        key_mean: [B, K, C].
        key_var: [B, K, C], positive.
        value_mean: [B, K, C].
        value_var: [B, K, C], positive.
        beta: Weight of the uncertainty penalty, a number or one positive element; 0 gives ordinary attention.
        context_mask: [B, K] bool, True where a context token is real. A row without any real token attends to
            nothing and gives zeros.
        noise: [B, K, C] standard normal, for the values, shared by all queries, or its counters. None gives the mean.

    Returns:
        [B, Q, C], in the query's type.
    """
    if isinstance(beta, Tensor):  # beta sqrt(x) = sqrt(beta^2 x), so that nothing waits for its value
        key_var, beta = at_least_float32(key_var) * beta.square(), 1.0
    if can_fuse(query):
        inputs = (query, key_mean, key_var, value_mean, value_var)
        return fused_attention(*inputs, beta=beta, context_mask=context_mask, noise=noise)
    dtype = query.dtype
    noise = noise.tensor() if isinstance(noise, CounterNoise) else noise
    with autocast_off(query.device):
        query = at_least_float32(query) / math.sqrt(query.shape[-1])
        score_mean = query @ at_least_float32(key_mean).mT  # [B, Q, K]
        score_var = query.square() @ at_least_float32(key_var).mT  # [B, Q, K]
        scores = torch.sub(score_mean, score_var.clamp_min(_SQRT_FLOOR).sqrt(), alpha=beta)
        if context_mask is not None:
            padding = ~context_mask[:, None, :]  # [B, 1, K]
            scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        if context_mask is not None:
            weights = weights.masked_fill(padding, 0.0)  # only matters where every token is padding
        values = at_least_float32(value_mean)
        if noise is not None:
            values = torch.addcmul(values, at_least_float32(value_var).sqrt(), noise)
        return (weights @ values).to(dtype)  # [B, Q, C]


def kl_to_standard_normal(mean: Tensor, var: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """KL divergence of N(mean, var) from N(0, 1) in nats, averaged over real tokens, in float32 or better.

    Args:
        mean: [B, K, C].
        var: [B, K, C], positive.
        mask: [B, K] bool, True where a token is real; None means all are.

    Returns:
        [B, C]; 0 for a row without any real token.
    """
    mean, var = at_least_float32(mean), at_least_float32(var)
    divergence = (mean.square() + var - var.log() - 1.0) / 2  # [B, K, C]
    if mask is None:
        return divergence.mean(dim=1)
    return divergence.masked_fill(~mask[..., None], 0.0).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1)


class ProbCrossAttention(nn.Module):
    """Single-head probabilistic cross-attention with a gated residual.

    `out = sigmoid(gate) * out_proj(attention) + (1 - sigmoid(gate)) * query`.

    Args:
        dim: Token width C of query, context and output.
        beta: Weight of the uncertainty penalty.
        gate_init: Initial value of the learned gate, one number, before the sigmoid.
        learn_beta: Learn the weight, as its logarithm `log_beta`, from the initial value `beta` on.

    Source: arXiv 2602.20423; parameter names are those of the release.
    """

    def __init__(self, dim: int, *, beta: float = 2.35, gate_init: float = 0.0, learn_beta: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.beta = beta
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, 2 * dim)
        self.v_proj = nn.Linear(dim, 2 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.norm_k = nn.LayerNorm(dim)
        self.norm_v = nn.LayerNorm(dim)
        self.gate = nn.Parameter(torch.tensor([float(gate_init)]))  # one element: FSDP2 shards no scalars
        self.log_beta = nn.Parameter(torch.tensor([math.log(beta)])) if learn_beta else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        gate = state_dict.get(f"{prefix}gate")
        if gate is not None and gate.ndim == 0:  # as released
            state_dict[f"{prefix}gate"] = gate[None]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        query: Tensor,
        context: Tensor,
        *,
        context_mask: Tensor | None = None,
        sample: bool = True,
        num_samples: int = 1,
        noise: Tensor | CounterNoise | None = None,
        generator: torch.Generator | None = None,
        kl: list[Tensor] | None = None,
    ) -> Tensor:
        """Let `query` tokens read `context` tokens.

        Args:
            query: [B, Q, C].
            context: [B, K, C].
            context_mask: [B, K] bool, True where a context token is real; None means all are.
            sample: Sample the values; False uses their means and ignores the remaining arguments.
            num_samples: How many value samples S the output averages.
            noise: Standard normal noise to use, [B, K, C] or [S, B, K, C], or counters of the former.
            generator: Source of the noise when `noise` is not given; on the tokens' device.
            kl: A list to append the values' KL divergence from N(0, 1) to, [B, C]; see `kl_to_standard_normal`.

        Returns:
            [B, Q, C].

        Raises:
            ValueError: If shapes do not fit together or `num_samples` is below 1.
        """
        self._check(query, context, context_mask=context_mask)
        key_mean, key_var = self._gaussian(self.k_proj(context), self.norm_k)  # 2 x [B, K, C]
        value_mean, value_var = self._gaussian(self.v_proj(context), self.norm_v)  # 2 x [B, K, C]
        if kl is not None:
            kl.append(kl_to_standard_normal(value_mean, value_var, mask=context_mask))
        sampled_noise = None
        if sample:
            sampled_noise = mean_noise(
                value_var.shape,
                num_samples=num_samples,
                noise=noise,
                generator=generator,
                device=value_var.device,
                dtype=value_var.dtype,
            )
        attended = probabilistic_attention(
            self.q_proj(query),
            key_mean,
            key_var,
            value_mean,
            value_var,
            beta=self.beta if self.log_beta is None else at_least_float32(self.log_beta).exp(),
            context_mask=context_mask,
            noise=sampled_noise,
        )
        gate, dtype = self.gate.sigmoid(), query.dtype  # under autocast the projection may be of another type
        return torch.lerp(query, self.out_proj(attended).to(dtype), gate.to(dtype))  # [B, Q, C]

    @staticmethod
    def _gaussian(projected: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        mean, raw = projected.chunk(2, dim=-1)  # 2 x [B, K, C]
        return norm(mean), F.softplus(at_least_float32(raw)) + VARIANCE_FLOOR

    def _check(self, query: Tensor, context: Tensor, *, context_mask: Tensor | None) -> None:
        for name, tokens in (("query", query), ("context", context)):
            if tokens.ndim != 3 or tokens.shape[-1] != self.dim:
                raise ValueError(f"{name} has shape {tuple(tokens.shape)}, expected [batch, tokens, {self.dim}]")
        if query.shape[0] != context.shape[0]:
            raise ValueError(
                f"query holds a batch of {query.shape[0]} and context one of {context.shape[0]}; repeat the smaller one"
            )
        if context_mask is None:
            return
        if context_mask.shape != context.shape[:2] or context_mask.dtype != torch.bool:
            raise ValueError(
                f"context_mask is {context_mask.dtype} of shape {tuple(context_mask.shape)}, expected torch.bool of "
                f"shape {tuple(context.shape[:2])}, True where a token is real"
            )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, beta={self.beta}, learn_beta={self.log_beta is not None}"


def mean_noise(
    shape: torch.Size,
    *,
    num_samples: int,
    noise: Tensor | CounterNoise | None,
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor | CounterNoise:
    """Average of `num_samples` standard normal tensors of `shape`, given or sampled.

    The attention output is linear in the values, so averaging the noise once equals averaging the outputs.

    Raises:
        ValueError: If `num_samples` is below 1 or `noise` has another shape.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, expected 1 or more; for the mean use sample=False")
    if isinstance(noise, CounterNoise):
        return noise
    if noise is None:
        # One after another: a single sample costs no extra memory, and n samples need only one at a time.
        total = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for _ in range(num_samples - 1):
            total = total + torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return total / num_samples
    stacked = noise if noise.ndim == len(shape) + 1 else noise[None]  # [S, B, K, C]
    if stacked.shape != (num_samples, *shape):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, expected {(num_samples, *shape)}"
            + (f" or {tuple(shape)}" if num_samples == 1 else "")
        )
    return stacked.to(device=device, dtype=dtype).mean(dim=0)  # [B, K, C]


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """Context in which autocast leaves types alone, on every device (the meta device has no autocast to turn off)."""
    # Asked by name: torch.compile of torch 2.7 and 2.8 cannot trace torch.amp.is_autocast_available.
    return nullcontext() if device.type == "meta" else torch.autocast(device_type=device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in its own type, or in float32 if that has fewer bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
