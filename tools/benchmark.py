"""Measure one thing by itself: `tools/benchmark.py NAME --json`.

    attention   block-causal attention, one call a chunk, against one dense masked call (on a GPU against full attention
                too): seconds, and their ratios beside the ratio of multiplications

Variants take turns and their medians are compared, so that a machine that slows down for a while slows all of them.
With --json the only line printed is one JSON object. Exit 2: bad input, one line says which.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_scale.layers.attention import AttentionLayout, attend, attend_all

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(BENCHMARKS), metavar="NAME", help=f"one of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--repeats", type=_positive, default=9, help="turns of each variant, default %(default)s")
    parser.add_argument("--chunks", type=_positive, default=7, help="default %(default)s")
    parser.add_argument("--tokens-per-chunk", type=_positive, default=240, help="default %(default)s")
    parser.add_argument("--heads", type=_positive, default=4, help="default %(default)s")
    parser.add_argument("--head-dim", type=_positive, default=64, help="default %(default)s")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"--device ({options.device}) must be cpu: torch sees no GPU here", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    result = {"name": options.name, **BENCHMARKS[options.name](options), **_machine(options)}
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:28} {value:.4g}" if isinstance(value, float) else f"{key:28} {value}")
    return 0


def benchmark_attention(options: argparse.Namespace) -> dict[str, Any]:
    """Forward, and forward with backward, of our segments against a dense call under the same mask."""
    tokens, heads = options.tokens_per_chunk, options.heads
    layout = AttentionLayout.block_causal(options.chunks, chunk_frames=1)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, options.chunks * tokens, heads, options.head_dim)
    q, k, v, grad_out = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4))
    # The kernels add a mask of numbers; made once here, so that the dense call pays for no conversion.
    visible = layout.dense_mask(tokens).to(device)
    mask = torch.zeros(visible.shape, device=device, dtype=dtype).masked_fill_(~visible, float("-inf"))

    def segments(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, layout)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    variants: dict[str, Attend] = {"segments": segments, "dense": dense}
    if device.type == "cuda":
        variants["full"] = attend_all
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def forward_backward(variant: Attend) -> Callable[[], object]:
        return lambda: torch.autograd.grad(variant(*inputs), inputs, grad_out)

    with torch.no_grad():
        forward = _medians({n: lambda f=f: f(q, k, v) for n, f in variants.items()}, options.repeats, device)  # type: ignore[misc]
    both = _medians({n: forward_backward(f) for n, f in variants.items()}, options.repeats, device)
    return {
        "forward_ratio": forward["segments"] / forward["dense"],
        "forward_backward_ratio": both["segments"] / both["dense"],
        "flop_ratio": layout.pairs(tokens) / (options.chunks * tokens) ** 2,
        "forward_seconds": forward,
        "forward_backward_seconds": both,
        "shape": {"chunks": options.chunks, "tokens_per_chunk": tokens, "heads": heads, "head_dim": options.head_dim},
        "dtype": str(dtype).removeprefix("torch."),
    }


BENCHMARKS: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"attention": benchmark_attention}


def _medians(runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each run; they take turns, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    cuda = options.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(options.device) if cuda else "cpu",
        "threads": options.threads,
        "torch": torch.__version__,
    }


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"({text}) must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
