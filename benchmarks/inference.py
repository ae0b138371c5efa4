"""Predicting with 30 samples: our engine against the released procedure, in one run.

    python benchmarks/inference.py                  # 12 minutes on 2 cores, 4 GiB; writes results/inference.json
    python benchmarks/inference.py --device cuda    # writes results/inference_cuda.json; not tried for want of a GPU

The published configuration at full size with random weights, one image. The released procedure: 31 passes through the
same modules, one after another, in float32. What the figures can be depends on the processor: the speed of its matrix
products is measured beside them. How good few samples are is another question, see sampling_quality.py.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from harness import peak_memory, side_by_side, write
from measures import ON_GPU, WITHOUT, kernel_launches, shares, without
from released import image_and_prompt, predict_as_released, released_network

import pvl_adapter as pvl

REPEATS = 2
SAMPLES = 30


def matrix_products(rows: int = 1576) -> dict[str, float]:
    """GFLOP/s of a 768 to 3072 layer: torch's default in float32, oneDNN in float32 (as a convolution), bfloat16."""
    x, weight = torch.randn(rows, 768), torch.randn(3072, 768)
    low = x.bfloat16(), weight.bfloat16()
    as_image, kernel = x.view(1, 1, rows, 768).permute(0, 3, 1, 2), weight[:, :, None, None]
    ways = {
        "float32": lambda: F.linear(x, weight),
        "float32_onednn": lambda: F.conv2d(as_image, kernel),
        "bfloat16": lambda: F.linear(*low),
        "float32_one_image": lambda: F.linear(x[:197], weight),
        "bfloat16_one_image": lambda: F.linear(low[0][:197], low[1]),
    }
    seconds = side_by_side(ways, repeats=15)
    sizes = {name: 197 if name.endswith("image") else rows for name in ways}
    return {name: round(2e-9 * sizes[name] * 768 * 3072 / seconds[name], 1) for name in ways}


def errors(got: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    return {
        "probability_rms": (got - expected).square().mean().sqrt().item(),
        "probability_largest": (got - expected).abs().max().item(),
        "mask_pixels_changed": ((got > 0.5) != (expected > 0.5)).float().mean().item(),
    }


def on_gpu() -> None:
    """The table of docs/inference.md on a GPU, with TF32 off and on; every way ends when the GPU has finished."""
    exact = released_network().cuda()
    low = copy.deepcopy(exact).bfloat16()
    compiled = copy.deepcopy(exact)
    for module in (*compiled.clip.pvl_adapters, compiled.head):
        module.compile(mode="reduce-overhead")
    image, text = (tensor.cuda() for tensor in image_and_prompt())

    def predict(model: pvl.MedCLIPSeg = exact, number: int | pvl.Auto = SAMPLES) -> torch.Tensor:
        return model.predict(image, text, num_samples=number, prepared=True).probability.cpu()  # waits

    def autocast() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return predict()

    ways = {
        "released": lambda: predict_as_released(exact, image, text).cpu(),
        "engine_float32": predict,
        **without(ON_GPU | {"leaving_out_unread_work": WITHOUT["leaving_out_unread_work"]}, predict),
        "engine_autocast_bfloat16": autocast,
        "engine_bfloat16": lambda: predict(low),
        "engine_float32_compiled": lambda: predict(compiled),
        "one_pair": lambda: predict(exact, 2),
        "auto_first_look": lambda: predict(exact, pvl.Auto(tolerance=1.0)),
        "mean_pass": lambda: predict(exact, 0),
    }
    reference, figures = predict(), {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        figures[f"float32_matmul_precision={precision}"] = {
            "seconds": side_by_side(ways, repeats=REPEATS),
            "float32_against_highest": errors(predict(), reference),
            "shares": shares(predict, synchronize=torch.cuda.synchronize),
        }
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        predict()
        figures[f"float32_matmul_precision={precision}"]["peak_mib"] = (
            torch.cuda.max_memory_allocated() - before
        ) / 2**20
    launches = {name: kernel_launches(way) for name, way in ways.items()}
    write("inference_cuda", {"weights": "random", "samples": SAMPLES, **figures, "kernel_launches": launches})


def on_cpu() -> None:
    exact = released_network()
    low = copy.deepcopy(exact).bfloat16()
    image, text = image_and_prompt()
    prompts = image_and_prompt(5, seed=1)[1]

    def predict(model: pvl.MedCLIPSeg = exact, number: int | pvl.Auto = SAMPLES) -> pvl.Prediction:
        return model.predict(image, text, num_samples=number, prepared=True)

    def autocast() -> pvl.Prediction:
        with torch.autocast("cpu", torch.bfloat16):
            return predict()

    ways = {
        "released": lambda: predict_as_released(exact, image, text),
        "engine_float32": predict,
        "24_samples": lambda: predict(exact, 24),
        "auto_first_look": lambda: predict(exact, pvl.Auto(tolerance=1.0)),
        "one_pair": lambda: predict(exact, 2),
        "mean_pass": lambda: predict(exact, 0),
        "engine_autocast_bfloat16": autocast,
        "engine_bfloat16": lambda: predict(low),
        "auto_first_look_bfloat16": lambda: predict(low, pvl.Auto(tolerance=1.0)),
        "mean_pass_bfloat16": lambda: predict(low, 0),
        **without(WITHOUT, predict),
    }
    seconds = side_by_side(ways, repeats=REPEATS)
    apart = [exact.predict(image, prompts[k : k + 1], num_samples=4, prepared=True).probability for k in range(5)]
    together = exact.predict(image, prompts, num_samples=4, prepared=True).probability
    in_float32 = predict()
    memory = {
        f"{name} S={count}": peak_memory(lambda model=model, count=count: predict(model, count)) / 2**20
        for name, model in (("float32", exact), ("bfloat16", low))
        for count in (8, 30, 120)
    }
    write(
        "inference",
        {
            "weights": "random",
            "samples": SAMPLES,
            "gflops": matrix_products(),
            "seconds": seconds,
            "times_faster_than_released": {name: seconds["released"] / value for name, value in seconds.items()},
            "bfloat16_against_float32_same_noise": errors(predict(low).probability, in_float32.probability),
            "autocast_against_float32_same_noise": errors(autocast().probability, in_float32.probability),
            "standard_error_rms_of_30": in_float32.standard_error.square().mean().sqrt().item(),
            "five_prompts_largest_difference": (together - torch.cat(apart)).abs().max().item(),
            "peak_mib_above_the_model": memory,
            "shares_of_float32": shares(predict, synchronize=lambda: None),
        },
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    on_gpu() if parser.parse_args().device == "cuda" else on_cpu()


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")
