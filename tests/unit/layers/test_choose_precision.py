"""What a run's `precision` becomes here, and in which words it is refused."""

import logging
import sys

import pytest
import torch
from torch import nn

from afd_scale.layers.choose_precision import choose_precision
from afd_scale.layers.fp8_emulated import TILINGS, EmulatedFp8Linear

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_other_precisions_have_plain_linears(name, device):
    assert type(choose_precision(name, "delayed", device).linear(2, 3)) is nn.Linear


def test_fp8_on_a_cpu_is_emulated_and_says_so(caplog):
    with caplog.at_level(logging.INFO):
        precision = choose_precision("fp8", "current", CPU)
    assert isinstance(precision.linear(2, 3), EmulatedFp8Linear)
    assert "emulated FP8, a numerical stand-in, no faster" in caplog.text


@pytest.mark.parametrize("scaling", ["delayed", "nvfp4"])
def test_what_is_not_emulated_is_refused_on_a_cpu(scaling):
    with pytest.raises(ValueError, match=rf"^fp8_scaling \({scaling}\) must be one of current, row, block, mxfp8 on"):
        choose_precision("fp8", scaling, CPU)


@pytest.mark.parametrize("scaling", TILINGS)
def test_scaling_and_kept_blocks_reach_the_emulation(scaling):
    precision = choose_precision("fp8", scaling, CPU, keep_blocks=1)
    first, second = (precision.of_block(index, 3).linear(2, 3) for index in range(2))
    assert type(first) is nn.Linear
    assert second.tiling == TILINGS[scaling]


def test_fp8_on_a_gpu_without_transformer_engine_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(
        ValueError, match=r"^precision \(fp8\) must find Transformer Engine on a GPU: [^\n]*; install [^\n]*$"
    ):
        choose_precision("fp8", "current", GPU)
