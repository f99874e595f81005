"""Convert a student between our folder, diffusers and the Wan / Self-Forcing layout; export it to run elsewhere.

    tools/convert_checkpoint.py runs/my-run exported --to diffusers --dtype bfloat16
    tools/convert_checkpoint.py self_forcing_dmd.pt student --to afd --family self-forcing
    tools/convert_checkpoint.py runs/my-run exported --to pipeline --models Wan2.1-T2V-1.3B-Diffusers

Exit 0: done, the last line says what was written. Exit 2: bad input, one line says which.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from afd_scale.checkpoint.formats.diffusers import fill_diffusers_folder
from afd_scale.checkpoint.formats.pipeline import fill_pipeline_folder
from afd_scale.checkpoint.formats.served import STEPS, fill_served_folder
from afd_scale.checkpoint.formats.wan import write_wan_file
from afd_scale.checkpoint.load_student import read_student
from afd_scale.checkpoint.weights import save_weights, written_whole
from afd_scale.config.command_line import Parser
from afd_scale.config.models import PolicyConfig
from afd_scale.config.presets import ARCHITECTURES, FAMILIES
from afd_scale.evaluation.model_card import find_run, model_card, write_card
from afd_scale.progress import progress

DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
NO_MODELS = Path("none")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, help="run, checkpoint or student folder; diffusers or Wan folder; "
                        ".safetensors, .pt or .pth file")  # fmt: skip
    parser.add_argument("out", type=Path, help="folder to write; with `--to wan` a .safetensors file")
    parser.add_argument("--to", choices=("diffusers", "pipeline", "served", "wan", "afd"), required=True,
                        help="diffusers: a transformer's folder; pipeline: a whole one that diffusers runs; "
                        "served: one that FastVideo and SGLang serve")  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="keep")
    parser.add_argument("--architecture", choices=tuple(ARCHITECTURES), help="of a source that states none")
    parser.add_argument("--family", choices=tuple(FAMILIES), help="of a source that states none; default self-forcing")
    parser.add_argument("--no-ema", action="store_true", help="take `generator` where there is a `generator_ema` too")
    parser.add_argument("--models", type=Path, help="pipeline, served: folder in diffusers' layout whose VAE, text "
                        "encoder and tokenizer are copied; `none` leaves them out of a pipeline")  # fmt: skip
    parser.add_argument("--license", default="other", help="id of a licence, for the model card")
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
    _check_options(options)
    source = read_student(options.source, prefer_ema=not options.no_ema)
    for option, section, field in (("architecture", "student", "num_heads"), ("family", "sampler", "chunk_frames")):
        if getattr(options, option) is not None and field in source.stated[section]:
            raise ValueError(f"--{option} ({getattr(options, option)}) must not be given: {source.path} states its own")
    config = source.config(options.architecture, options.family)
    tensors = _converted(source.state, DTYPES[options.dtype])
    if options.to == "wan":
        write_wan_file(tensors, options.out, config)
    elif options.to == "afd":
        save_weights(tensors, options.out, config)
    else:
        _export(tensors, options, config)
    _report(source.kind, source.path, options, config)


def _check_options(options: argparse.Namespace) -> None:
    takes_models = options.to in ("pipeline", "served")
    if takes_models != (options.models is not None) or (options.to == "served" and options.models == NO_MODELS):
        needed = "name a folder with VAE and text encoder" if takes_models else "not be given"
        raise ValueError(f"--models ({options.models}) must {needed}: --to {options.to}")
    if not re.fullmatch(r"[\w.-]+", options.license):
        raise ValueError(f"--license ({options.license}) must be an id such as apache-2.0")


def _export(tensors: Iterator[tuple[str, Tensor]], options: argparse.Namespace, config: PolicyConfig) -> None:
    """A folder for others to use, with its model card."""
    run = find_run(options.source)
    models = None if options.models == NO_MODELS else options.models
    card = model_card(options.to, config, options.source, options.license, run, with_models=models is not None)
    with written_whole(options.out) as partial:
        partial.mkdir()
        if options.to == "diffusers":
            fill_diffusers_folder(tensors, partial, config)
        elif options.to == "pipeline":
            fill_pipeline_folder(tensors, partial, config, models)
        else:
            fill_served_folder(tensors, partial, config, options.models)
        write_card(partial, card, run)


def _converted(state: dict[str, Tensor], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    with progress("Writing") as on_tensor:
        for number, (name, tensor) in enumerate(state.items(), 1):
            yield name, tensor if dtype is None else tensor.to(dtype)
            on_tensor(number, len(state))


def _report(kind: str, path: Path, options: argparse.Namespace, config: PolicyConfig) -> None:
    student, family = config.student, config.sampler.family
    if student.prediction == "x0" and options.to not in ("afd", "pipeline"):
        print("note: this student predicts x0 where diffusers' schedulers and Wan's code expect a velocity: "
              "convert its output, (noisy - x0) / sigma")  # fmt: skip
    if options.to == "served" and config.sampler.timesteps != STEPS:
        steps = ", ".join(map(str, config.sampler.timesteps))
        print(f"note: FastVideo and SGLang take the steps {', '.join(map(str, STEPS))} unless told otherwise "
              f"(dmd_denoising_steps); this student's are {steps}")  # fmt: skip
    sizes = f"{student.num_layers} layers, dim {student.dim}, {student.num_heads} heads, family {family}"
    print(f"wrote {options.out} ({options.to}, {sizes}) from {kind} {path}")


if __name__ == "__main__":
    sys.exit(main())
