"""Convert a student between our folder, diffusers and the Wan / Self-Forcing layout.

    tools/convert_checkpoint.py runs/my-run exported --to diffusers --dtype bfloat16
    tools/convert_checkpoint.py self_forcing_dmd.pt student --to afd --family self-forcing

Exit 0: done, the last line says what was written. Exit 2: bad input, one line says which.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from afd_scale.checkpoint.formats.diffusers import write_diffusers_folder
from afd_scale.checkpoint.formats.wan import write_wan_file
from afd_scale.checkpoint.load_student import read_student
from afd_scale.checkpoint.weights import save_weights
from afd_scale.config.command_line import Parser
from afd_scale.config.presets import ARCHITECTURES, FAMILIES
from afd_scale.progress import progress

WRITERS = {"diffusers": write_diffusers_folder, "wan": write_wan_file, "afd": save_weights}
DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, help="run, checkpoint or student folder; diffusers or Wan folder; "
                        ".safetensors, .pt or .pth file")  # fmt: skip
    parser.add_argument("out", type=Path, help="folder to write; with `--to wan` a .safetensors file")
    parser.add_argument("--to", choices=tuple(WRITERS), required=True)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="keep")
    parser.add_argument("--architecture", choices=tuple(ARCHITECTURES), help="of a source that states none")
    parser.add_argument("--family", choices=tuple(FAMILIES), help="of a source that states none; default self-forcing")
    parser.add_argument("--no-ema", action="store_true", help="take `generator` where there is a `generator_ema` too")
    options = parser.parse_args(arguments)
    try:
        convert(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(options: argparse.Namespace) -> None:
    """Read, check, write, say what was written; ValueError in one line for bad input."""
    if options.out.exists():
        raise ValueError(f"out ({options.out}) must not exist: nothing is overwritten")
    source = read_student(options.source, prefer_ema=not options.no_ema)
    for option, section, field in (("architecture", "student", "num_heads"), ("family", "sampler", "chunk_frames")):
        if getattr(options, option) is not None and field in source.stated[section]:
            raise ValueError(f"--{option} ({getattr(options, option)}) must not be given: {source.path} states its own")
    config = source.config(options.architecture, options.family)
    tensors = _converted(source.state, DTYPES[options.dtype])
    WRITERS[options.to](tensors, options.out, config)
    student, family = config.student, config.sampler.family
    if student.prediction == "x0" and options.to != "afd":
        print("note: this student predicts x0 where diffusers' schedulers and Wan's code expect a velocity: "
              "convert its output, (noisy - x0) / sigma")  # fmt: skip
    sizes = f"{student.num_layers} layers, dim {student.dim}, {student.num_heads} heads, family {family}"
    print(f"wrote {options.out} ({options.to}, {sizes}) from {source.kind} {source.path}")


def _converted(state: dict[str, Tensor], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    with progress("Writing") as on_tensor:
        for number, (name, tensor) in enumerate(state.items(), 1):
            yield name, tensor if dtype is None else tensor.to(dtype)
            on_tensor(number, len(state))


if __name__ == "__main__":
    sys.exit(main())
