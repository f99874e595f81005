"""Self-Forcing's own file of a student: a torch file with `generator`."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from afd_scale.checkpoint.networks import STUDENT
from afd_scale.checkpoint.weights import written_whole


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
