"""Training checkpoints of Self-Forcing and its kin: a torch file with `generator`, `generator_ema`, `critic`."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from afd_scale.checkpoint.formats.wan import named
from afd_scale.checkpoint.lazy import Stored, Tree
from afd_scale.checkpoint.weights import written_whole

log = logging.getLogger(__name__)

STUDENT, EMA = "generator", "generator_ema"
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}


def choose_network(tree: Tree, path: Path, weights: str | None = None) -> dict[str, Stored]:
    """The one network of a tree that is the student's.

    Args:
        weights: `student` or `ema`; None takes the EMA where there is one.
    Raises:
        ValueError: it is not there, or several might be meant.
    """
    wanted = {"student": (STUDENT,), "ema": (EMA,), None: (EMA, STUDENT)}.get(weights, ())
    networks = {name: value for name, value in tree.items() if _is_network(value)}
    if name := next((name for name in wanted if name in networks), None):
        log.info("%s: reading its %s", path, name)
        tree = networks[name]
    elif weights not in (None, "student"):
        raise ValueError(f"weights ({path}) must hold {weights}: it is neither a run that has it, nor a training "
                         f"checkpoint with {EMA}")  # fmt: skip
    elif len(networks) == 1 and not _is_network(tree):
        (tree,) = networks.values()  # {"model": ...}, {"state_dict": ..., "epoch": 3}, {"module": ...}
    if stray := [name for name, value in tree.items() if not isinstance(value, Stored)]:
        raise ValueError(f"weights ({path}) must hold tensors, or `generator`: {named(stray)} is neither")
    return tree


def strip_wrappers(state: Mapping[str, Stored], path: Path) -> dict[str, Stored]:
    """Names without what FSDP, compile, checkpointing and outer modules put into them."""
    stripped: dict[str, Stored] = {}
    for key, stored in state.items():
        parts = [part for part in key.split(".") if part not in _WRAPPERS]
        while parts[0] in ("model", "module") and len(parts) > 1:
            del parts[0]
        name = ".".join(parts)
        if name in stripped:
            raise ValueError(f"weights ({path}) must hold one network: two tensors are named {name} without prefixes")
        stripped[name] = stored
    block = next((name for name in stripped if "blocks." in name), "blocks.")
    prefix = block[: block.index("blocks.")]  # of another outer module, where all names have it
    if all(name.startswith(prefix) for name in stripped):
        return {name.removeprefix(prefix): stored for name, stored in stripped.items()}
    return stripped


def write_self_forcing_file(state: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Write a `.pt` as Self-Forcing's code loads for its generator; it holds tensors alone, and says no config.

    Raises:
        ValueError: the path exists, has another suffix, or cannot be written.
    """
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"output ({path}) must end in .pt: Self-Forcing's layout is a torch file")
    tensors = {f"model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state}
    with written_whole(path) as partial, partial.open("wb") as file:
        try:
            torch.save({STUDENT: tensors}, file)
        except RuntimeError as error:  # with which torch (2.13) covers that the disk is full
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def _is_network(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(entry, Stored) for entry in value.values())
