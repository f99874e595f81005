"""Seconds and bytes of things that take turns, so that a machine that slows down for a while slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def medians(
    run: Callable[[Any], None], variants: Mapping[str, Any], repeats: int, device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:  # fmt: skip
    """Median seconds to run each variant; they take turns, after one turn that does not count."""
    return {name: statistics.median(s) for name, s in _turns(run, variants, repeats, device, clock).items()}


def _turns(
    run: Callable[[Any], None], variants: Mapping[str, Any], repeats: int, device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each variant's turns."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, variant in variants.items():
            _wait(device)
            start = clock()
            run(variant)
            _wait(device)
            if turn > 0:
                seconds[name].append(clock() - start)
    return seconds


def rates(
    variants: Mapping[str, Callable[[], Any]], flops: Mapping[str, float], dtype: torch.dtype, repeats: int,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Median seconds, TFLOP/s, share of a square matrix product's best rate, in turns; and CUDA's peak memory.

    Args:
        flops: that each variant needs.
    """
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)

    def multiply() -> Tensor:
        return torch.matmul(a, b, out=product)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    turns = _turns(lambda variant: variant(), {**variants, "matmul": multiply}, repeats, device)
    peak = 2 * side**3 / min(turns.pop("matmul"))  # its fastest turn: what the machine can do
    seconds = {name: statistics.median(values) for name, values in turns.items()}
    rate = {name: flops[name] / taken for name, taken in seconds.items()}
    result = {
        "seconds": seconds,
        "tflops": {name: value / 1e12 for name, value in rate.items()},
        "mfu": {name: value / peak for name, value in rate.items()},
        "matmul_tflops": peak / 1e12,
        "matmul_side": side,
    }
    if device.type == "cuda":
        # What the matrices of the yardstick take is not the variants'.
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device) - 3 * a.nbytes
    return result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
