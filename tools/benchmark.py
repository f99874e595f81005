"""Measure one thing by itself: `tools/benchmark.py NAME --json`.

    attention   block-causal attention, one call a chunk, against one dense masked call and against full attention by
                the same kernel: seconds, and their ratios beside the ratio of multiplications
    linear      the linears of a student's block, forward, on the tokens of a micro-batch
    rollout     the cached causal rollout of a micro-batch
    update      forward and backward of the student's teacher-forcing pass on a micro-batch
    step        a whole AFD step: rollout, discriminator, student
    data        reading shards of a 1.3B run: samples a second of one process, and what a job of 256 GPUs needs

linear, rollout, update and step take their shapes from a config (`--config FILE section.key=value ...`; by default Wan
1.3B's, on a CPU shrunk), and over it from `--shape`: `large` is 2 layers of Wan 1.3B's width and 216 tokens a chunk,
where products dominate; `host-bound` is 12 layers of width 128, frame by frame with 60 tokens a frame and 512 rows of
text, where what surrounds them does. They run with random weights, in plain torch on one device. MFU is the rate of
what the model needs (recomputation not counted) over the best of a square matrix product of the same dtype, measured in
turns. `bytes_moved` is what must be read and written at least. Peak memory is CUDA's; on a CPU there is no such figure.
AdamW's moments have the weights' dtype. rollout counts frames a second too, with and without decoding where
codec.models is a folder. On a GPU, and on a CPU with --profile, `profile` has the ten largest kernels (on a CPU
operators) of rollout, update or step.

`--against self-forcing --peer DIR` puts rollout or update beside Self-Forcing's own code, in a checkout of
github.com/guandeh17/Self-Forcing that you bring, in this process and with the same weights and noise:
    ratio           our time over theirs
    floor_ratio     our time over that of our matrix products and attention calls alone (benchmarks/floor.py)
    sharded_ratio   of rollout: behind the sharded engine, its weights gathered, over the plain modules
    max_difference  of what comes out, over the largest value: latents, or velocity and each weight's gradient
benchmarks/self_forcing.py says what of theirs is replaced; where it is more than data and sizes, `note` does too. Of
update the gradient goes through the clean chunks, as theirs does. Nothing of theirs computes a step of AFD. With one
thread of a CPU `seconds` are of its own time, so that other work on the cores does not count.
    tools/benchmark.py rollout --against self-forcing --peer DIR --shape host-bound --json
    tools/benchmark.py update --against self-forcing --peer DIR --shape large --repeats 3 --json

Variants take turns and their medians are compared, so that a machine that slows down for a while slows all of them.
With --json the only line printed is one JSON object. Exit 2: bad input, one line says which.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_scale.benchmarks.against import rollout_against, update_against
from afd_scale.benchmarks.data import benchmark_data
from afd_scale.benchmarks.networks import benchmark_linear, benchmark_rollout, benchmark_step, benchmark_update
from afd_scale.benchmarks.timing import medians
from afd_scale.chunks import Chunks
from afd_scale.config import RunConfig, load_config, one_line
from afd_scale.config.command_line import Parser, count, positive
from afd_scale.layers.attention import AttentionLayout, choose_backend
from afd_scale.rehearsal.shrink import small_wan

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Benchmark = Callable[[argparse.Namespace, torch.device], dict[str, Any]]
BACKENDS = ("auto", "sdpa", "flash", "flex", "fa4")

# Default shapes of `attention`: on a GPU those of Wan 1.3B at 832x480, on a CPU large enough for attention to dominate.
SHAPES = {
    "cpu": {"chunks": 7, "tokens_per_chunk": 240, "heads": 4, "head_dim": 64},
    "cuda": {"chunks": 7, "tokens_per_chunk": 4680, "heads": 12, "head_dim": 128},
}

CONFIG = Path(__file__).parents[1] / "configs" / "wan_1_3b" / "self_forcing_full.yaml"
ONE_DEVICE = (
    "parallel.sequence=1", "data.global_batch=1", "train.micro_batch=1", "method.rollouts_per_prompt=2",
    "student.activation_checkpointing=full", "method.discriminator.activation_checkpointing=full",
)  # fmt: skip
_STUDENT_AND_JUDGE = ("student", "method.discriminator")
_SMALL_NETWORK = tuple(f"{field}={size}" for field, size in small_wan(heads=4, head_width=32, layers=2).items())
SMALL = (
    *(f"{network}.{size}" for network in _STUDENT_AND_JUDGE for size in _SMALL_NETWORK),
    "data.latent_frames=6", "data.latent_height=16", "data.latent_width=16",
)  # fmt: skip

_HOST_BOUND = ("dim=128", "ffn_dim=512", "num_heads=4", "num_layers=12", "text_dim=128", "text_length=512",
               "freq_dim=64")  # fmt: skip
NETWORK_SHAPES = {
    "large": (
        *(f"{network}.{size}" for network in _STUDENT_AND_JUDGE for size in ("architecture=wan-1.3b", "num_layers=2")),
        "sampler.chunk_frames=3", "data.latent_frames=6", "data.latent_height=16", "data.latent_width=18",
    ),
    "host-bound": (
        *(f"{network}.{size}" for network in _STUDENT_AND_JUDGE for size in _HOST_BOUND), "sampler.chunk_frames=1",
        "data.latent_frames=7", "data.latent_height=12", "data.latent_width=20",
    ),
}  # fmt: skip


def parse(arguments: list[str] | None, device: torch.device) -> argparse.Namespace:
    """The command line; defaults follow the device."""
    parser = Parser(__doc__)
    parser.add_argument("name", choices=tuple(BENCHMARKS), metavar="NAME", help=f"one of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--backend", default="auto", choices=BACKENDS,
                        help="of attention, instead of the config's (default %(default)s)")  # fmt: skip
    parser.add_argument("--repeats", type=count, help="turns of each (default: 25 of attention, else 5)")
    parser.add_argument("--config", type=Path, help="run whose networks are measured")
    parser.add_argument("--shape", choices=tuple(NETWORK_SHAPES), help="of a config's networks and videos")
    parser.add_argument("--against", choices=("self-forcing",), help="whose code stands beside ours")
    parser.add_argument("--peer", type=Path, metavar="DIR", help="checkout of that code")
    parser.add_argument("--profile", action="store_true", help="on a CPU too, say what takes longest")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp8"), help="default fp32 on a CPU, else the config's")
    parser.add_argument("--samples", type=count, default=32, help="of data (default %(default)s)")
    parser.add_argument("--text-rows", type=count, default=512,
                        help="of a prompt's embedding, of 512 (default %(default)s)")  # fmt: skip
    parser.add_argument("--step-seconds", type=positive, default=8.0,
                        help="of a step, for what data must deliver (default %(default)s)")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the config")
    # Two threads wait for each other at every kernel: where other work shares the cores, that would be measured.
    parser.add_argument("--threads", type=count, default=1, help="of a CPU (default %(default)s)")
    for field, value in SHAPES[device.type].items():
        option = f"--{field.replace('_', '-')}"
        parser.add_argument(option, type=count, default=value, help="default %(default)s")
    options = parser.parse_intermixed_args(arguments)
    options.repeats = options.repeats or (25 if options.name == "attention" else 5)
    return options


def main(arguments: list[str] | None = None) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = parse(arguments, device)
    torch.set_num_threads(options.threads)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what is imported on the way prints and logs
            measured = _chosen(options)(options, device)
    except ValueError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    result = {"name": options.name, **measured, "device": machine}
    if device.type == "cpu" and result.get("precision") == "fp8":
        result["note"] = "FP8 is emulated on a CPU: its time says nothing"
    result |= {"threads": options.threads, "torch": torch.__version__}
    if options.json:
        print(json.dumps(result))
    else:
        largest = result.pop("profile", [])
        for key, value in result.items():
            number = ".3f" if isinstance(value, float) and abs(value) >= 0.001 else ".3g"
            print(f"{key:24} {value:{number}}" if isinstance(value, float) else f"{key:24} {value}")
        for each in largest:
            print(f"{each['share']:24.1%} of the time in {each['calls']} calls of {each['name']}")
    return 0


def benchmark_attention(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Forward and backward of our segments against a dense masked call, and full attention by the same kernel."""
    _refuse_config(options, "must be given shapes, as --chunks: it measures kernels, not a config")
    tokens = options.tokens_per_chunk
    layout = AttentionLayout.block_causal(options.chunks, Chunks(1))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backend = choose_backend(options.backend, device=device, dtype=dtype, head_dim=options.head_dim)
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, options.chunks * tokens, options.heads, options.head_dim)
    q, k, v, grad_out = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4))
    # The kernels add a mask of numbers; made once here, so that the dense call pays for no conversion.
    visible = layout.dense_mask(tokens).to(device)
    mask = torch.zeros(visible.shape, device=device, dtype=dtype).masked_fill_(~visible, float("-inf"))

    def segments(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return backend.attend(q, k, v, layout)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return backend.attend(q, k, v, AttentionLayout.full(options.chunks))

    variants: dict[str, Attend] = {"segments": segments, "dense": dense, "full": full}
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def forward(variant: Attend) -> None:
        with torch.no_grad():
            variant(*inputs)

    def forward_backward(variant: Attend) -> None:
        torch.autograd.grad(variant(*inputs), inputs, grad_out)

    seconds = medians(forward, variants, options.repeats, device)
    both = medians(forward_backward, variants, options.repeats, device)
    return {
        "forward_ratio": seconds["segments"] / seconds["dense"],
        "forward_backward_ratio": both["segments"] / both["dense"],
        "forward_ratio_to_full": seconds["segments"] / seconds["full"],
        "forward_backward_ratio_to_full": both["segments"] / both["full"],
        "flop_ratio": layout.pairs(tokens) / (options.chunks * tokens) ** 2,
        "forward_seconds": seconds,
        "forward_backward_seconds": both,
        "shape": {field: getattr(options, field) for field in SHAPES[device.type]},
        "dtype": str(dtype).removeprefix("torch."),
        "backend": f"{backend.name} ({backend.kernels})",
    }


def _refuse_config(options: argparse.Namespace, why: str) -> None:
    for given in filter(None, (options.config, options.precision, options.shape, *options.overrides)):
        raise ValueError(f"{options.name} ({given}) {why}")


def _of_config(benchmark: Callable[..., dict[str, Any]], **more: Any) -> Benchmark:
    """A benchmark whose shapes are a config's.

    Args:
        more: that it takes besides config, repeats and device.
    """

    def run(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
        return benchmark(_config(options, device), options.repeats, device, **more)

    return run


def _with_profile(benchmark: Callable[..., dict[str, Any]], **more: Any) -> Benchmark:
    """One that can say what takes longest."""

    def run(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
        profile = options.profile or device.type == "cuda"
        return _of_config(benchmark, profile=profile, **more)(options, device)

    return run


def _config(options: argparse.Namespace, device: torch.device) -> RunConfig:
    on_cpu = not options.config and device.type == "cpu"
    shape = NETWORK_SHAPES[options.shape] if options.shape else SMALL if on_cpu else ()
    chosen = (f"attention={options.backend}", *((f"precision={options.precision}",) if options.precision else ()))
    overrides = (*(() if options.config else ONE_DEVICE), *shape, *(("precision=fp32",) if on_cpu else ()), *chosen)
    return load_config(options.config or CONFIG, (*overrides, *options.overrides))


def _chosen(options: argparse.Namespace) -> Benchmark:
    """What the options ask for.

    Raises:
        ValueError: an option is not for it.
    """
    name = options.name
    if options.profile and name not in PROFILED:
        raise ValueError(f"--profile must be given with {', '.join(PROFILED)}, not with {name}")
    if options.against is None:
        if options.peer is not None:
            raise ValueError(f"--peer ({options.peer}) must come with --against: it says whose code that is")
        return BENCHMARKS[name]
    if options.peer is None:
        raise ValueError(f"--against ({options.against}) must come with --peer DIR, a checkout of "
                         "github.com/guandeh17/Self-Forcing")  # fmt: skip
    if name not in BESIDE:
        raise ValueError(f"--against ({options.against}) must be given with {' or '.join(BESIDE)}, not with {name}: "
                         "there is nothing of theirs to put beside it")  # fmt: skip
    return _with_profile(BESIDE[name], folder=options.peer)


def _data(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    _refuse_config(options, "takes no config: it reads videos of one size")
    return benchmark_data(options.samples, options.repeats, options.step_seconds, options.text_rows)


BENCHMARKS: Mapping[str, Benchmark] = {
    "attention": benchmark_attention,
    "linear": _of_config(benchmark_linear),
    "rollout": _with_profile(benchmark_rollout),
    "update": _with_profile(benchmark_update),
    "step": _with_profile(benchmark_step),
    "data": _data,
}
BESIDE = {"rollout": rollout_against, "update": update_against}
PROFILED = ("rollout", "update", "step")


if __name__ == "__main__":
    sys.exit(main())
