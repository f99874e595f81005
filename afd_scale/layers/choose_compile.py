"""From a run's `compile` to what makes functions of the networks faster."""

import logging
from functools import partial
from typing import Literal

import torch

from afd_scale.layers.compiler import has_c_compiler
from afd_scale.layers.ops import Compile

log = logging.getLogger(__name__)

BACKEND = "inductor"
KINDS_OF_PASS = 64  # lengths, gradient or not, adapters: torch gives a function up after 8 of them


def choose_compile(choice: Literal["auto"] | bool, device: torch.device) -> Compile | None:
    """torch.compile, or None.

    Args:
        choice: `auto` compiles on a GPU where there is a C compiler.
    Raises:
        ValueError: it is asked for, and there is no C compiler.
    """
    if choice is False or (choice == "auto" and device.type != "cuda"):
        return None
    if BACKEND == "inductor" and not has_c_compiler():
        if choice is True:
            raise ValueError(
                "compile (true) must be auto or false on this machine: there is no C compiler (Debian: g++)"
            )
        log.warning("compile auto: blocks are not compiled, there is no C compiler (Debian: g++)")
        return None
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS_OF_PASS)
    log.info(
        "compile: the parts of each block before and after its attention; the first pass of each length takes long"
    )
    # Without it bf16 numbers inside of a fused kernel are not rounded as between kernels, and other kernels are fused
    # with gradient than without: policies that are equal would predict other bits.
    options = {"emulate_precision_casts": True} if BACKEND == "inductor" else None
    return partial(torch.compile, backend=BACKEND, dynamic=False, options=options)
