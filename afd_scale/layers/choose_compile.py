"""From a run's `compile` to what makes functions of the networks faster."""

import logging
from functools import partial
from typing import Literal

import torch

from afd_scale.layers.ops import Compile

log = logging.getLogger(__name__)

BACKEND = "inductor"
KINDS_OF_PASS = 64  # lengths, gradient or not, adapters: torch gives a function up after 8 of them


def choose_compile(choice: Literal["auto"] | bool, device: torch.device) -> Compile | None:
    """torch.compile, or None.

    Args:
        choice: `auto` compiles on a GPU.
    Raises:
        ValueError: there is no C++ compiler for a CPU.
    """
    if choice is False or (choice == "auto" and device.type != "cuda"):
        return None
    if device.type == "cpu" and BACKEND == "inductor":
        _check_compiler()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS_OF_PASS)
    log.info("compile: the parts of each block before and after its attention")
    return partial(torch.compile, backend=BACKEND, dynamic=False)


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # of a class of its own in each release
        raise ValueError("compile (true) must be auto or false on this machine: torch found no C++ compiler "
                         "(Debian: g++)") from error  # fmt: skip
