"""What a student that only generates is made of."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from afd_scale.generation import student
from afd_scale.layers.fp8_emulated import EmulatedFp8Linear

ONE_RANK = SimpleNamespace(device=torch.device("cpu"), sequence=1, sequence_group=None)
BASE = Path(__file__).parents[3] / "configs" / "toy" / "base"


@pytest.mark.parametrize("kept", [None, 0, 1])
def test_what_the_run_kept_out_of_fp8_stays_out_of_it(monkeypatch: pytest.MonkeyPatch, kept: int | None) -> None:
    run = None if kept is None else SimpleNamespace(fp8_keep_blocks=kept)
    monkeypatch.setattr(student, "run_of", lambda source: run)
    blocks = student.load_student(BASE, ONE_RANK, precision="fp8").network.network.blocks
    kinds = [{type(module) for module in block.modules() if isinstance(module, nn.Linear)} for block in blocks]
    outer = {nn.Linear} if kept else {EmulatedFp8Linear}
    assert kinds == [outer, {EmulatedFp8Linear}, outer]
