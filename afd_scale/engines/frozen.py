"""Phases of passes without gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from afd_scale.protocols import Engine
from afd_scale.types import pieces


@torch.no_grad()
def in_parts(engine: Engine, rows: int, run: Callable[[slice], Tensor]) -> Tensor:
    """See `Engine.frozen`."""
    with engine.resident():
        return torch.cat([run(part) for part in pieces(rows, engine.micro_batch)])
