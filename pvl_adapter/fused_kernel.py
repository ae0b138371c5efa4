"""The Triton kernel of `fused.fused_attention`; importing this file imports triton.

Shape alphabet: R rows, Q query tokens, K context tokens, C adapter width, E half of it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def attend(  # type: ignore[no-untyped-def]
    output,  # [R, Q, C]
    query,  # [R, Q, C]
    key_mean,  # [R, K, C], as the next three
    key_var,
    value_mean,
    value_var,
    mask,  # [R, K] of bytes, or None
    noise,  # [R, K, C], or None
    streams,  # [R] int64, or None
    signs,  # [R], or None
    beta,
    scale,
    queries,  # Q
    keys,  # K
    width: tl.constexpr,  # C
    half: tl.constexpr,  # E
    precision: tl.constexpr,
    block: tl.constexpr,
    block_e: tl.constexpr,
):
    """Each program computes some queries of one row, in channels e and half + e, by a running softmax over keys."""
    row = tl.program_id(0).to(tl.int64)
    q = tl.program_id(1) * block + tl.arange(0, block)
    e = tl.program_id(2) * block_e + tl.arange(0, block_e)
    largest = tl.full([block], -1e30, tl.float32)  # finite, so that a row of padding alone is no NaN
    total = tl.zeros([block], tl.float32)
    low = tl.zeros([block, block_e], tl.float32)  # channels e
    high = tl.zeros([block, block_e], tl.float32)  # channels half + e
    for first in range(0, keys, block):
        k = first + tl.arange(0, block)
        score = tl.zeros([block, block], tl.float32)
        score_var = tl.zeros([block, block], tl.float32)
        for channel in range(0, width, block):
            c = channel + tl.arange(0, block)
            of_query = (row * queries + q[:, None]) * width + c[None, :]  # [block, block]
            of_key = (row * keys + k[None, :]) * width + c[:, None]  # [block, block]
            real_query = (q[:, None] < queries) & (c[None, :] < width)
            real_key = (k[None, :] < keys) & (c[:, None] < width)
            x = tl.load(query + of_query, mask=real_query, other=0.0).to(tl.float32) * scale
            mean = tl.load(key_mean + of_key, mask=real_key, other=0.0).to(tl.float32)
            var = tl.load(key_var + of_key, mask=real_key, other=0.0).to(tl.float32)
            score = tl.dot(x, mean, score, input_precision=precision)
            score_var = tl.dot(x * x, var, score_var, input_precision=precision)
        score -= beta * tl.sqrt(tl.maximum(score_var, 1e-12))
        real = k < keys
        if mask is not None:
            real = real & (tl.load(mask + row * keys + k, mask=real, other=0) != 0)
        score = tl.where(real[None, :], score, float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(score, axis=1))
        weight = tl.exp(score - largest[:, None])
        kept = tl.exp(before - largest)
        total = total * kept + tl.sum(weight, axis=1)

        of_value = (row * keys + k[:, None]) * width + e[None, :]  # [block, block_e]
        real_low = (k[:, None] < keys) & (e[None, :] < half)
        real_high = real_low & (e[None, :] < width - half)
        low_value = tl.load(value_mean + of_value, mask=real_low, other=0.0).to(tl.float32)
        high_value = tl.load(value_mean + of_value + half, mask=real_high, other=0.0).to(tl.float32)
        if noise is not None or streams is not None:
            low_std = tl.sqrt(tl.load(value_var + of_value, mask=real_low, other=0.0).to(tl.float32))
            high_std = tl.sqrt(tl.load(value_var + of_value + half, mask=real_high, other=0.0).to(tl.float32))
            if noise is not None:
                low_noise = tl.load(noise + of_value, mask=real_low, other=0.0).to(tl.float32)
                high_noise = tl.load(noise + of_value + half, mask=real_high, other=0.0).to(tl.float32)
            else:  # as noise.py has it
                index = (k[:, None] * half + e[None, :] + 1).to(tl.uint64)
                z = tl.load(streams + row).to(tl.uint64) + index * 0x9E3779B97F4A7C15
                z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
                z = (z ^ (z >> 27)) * 0x94D049BB133111EB
                z = z ^ (z >> 31)
                uniform = ((z >> 40).to(tl.float32) + 0.5) * 5.9604644775390625e-08
                radius = tl.sqrt(-2.0 * tl.log(uniform)) * tl.load(signs + row).to(tl.float32)
                angle = (z & 0xFFFFFF).to(tl.float32) * 3.7450703096e-07  # 2 pi / 2^24
                low_noise, high_noise = radius * tl.cos(angle), radius * tl.sin(angle)
            low_value += low_std * low_noise
            high_value += high_std * high_noise
        low = tl.dot(weight, low_value, low * kept[:, None], input_precision=precision)
        high = tl.dot(weight, high_value, high * kept[:, None], input_precision=precision)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    of_output = (row * queries + q[:, None]) * width + e[None, :]  # [block, block_e]
    real_low = (q[:, None] < queries) & (e[None, :] < half)
    tl.store(output + of_output, low * share[:, None], mask=real_low)
    tl.store(output + of_output + half, high * share[:, None], mask=real_low & (e[None, :] < width - half))
