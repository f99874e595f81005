"""What the command lines that read a student share."""

import argparse

from afd_scale.config.command_line import count
from afd_scale.config.presets import ARCHITECTURES, FAMILIES


def add_student_options(group: argparse._ArgumentGroup) -> None:
    """How a student is read and samples, where its source does not say so or something else is wanted."""
    add = group.add_argument
    add("--models", help="folder or hub id of Wan's text encoder and VAE, in diffusers' layout")
    add("--precision", choices=("fp32", "bf16", "fp8"), help="bf16 on a GPU, fp32 on a CPU")
    add("--window", type=count, metavar="N", help="latent frames that a chunk sees, in place of the student's own")
    add("--sink", type=count, metavar="N", help="of them, those of the start that stay")
    add("--positions", choices=("absolute", "window"), help="from where frames are counted")
    add("--at-prompt-change", choices=("recompute", "keep"), help="what becomes of the cache")
    add("--architecture", choices=tuple(ARCHITECTURES), help="of a source that states none")
    add("--family", choices=tuple(FAMILIES), help="of a source that states none")
