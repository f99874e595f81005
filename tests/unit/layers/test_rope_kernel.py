"""RoPE's Triton kernel on a CPU, by Triton's interpreter; skipped without Triton, which torch's CPU builds lack."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton")
def test_the_interpreted_kernel_rotates() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def check_kernel() -> None:
    from afd_scale.layers.rope import Rotation, _turn
    from afd_scale.layers.rope_kernel import launch

    for head_dim, heads in ((128, 3), (24, 2), (6, 1)):
        q = torch.randn(2, 37, heads, head_dim)
        k = torch.randn(2, 37, 3, heads, head_dim)[:, :, 1]  # as the cache and a fused product hand them over
        rotation = Rotation((range(5, 42),), 1, 1, 1, head_dim, torch.device("cpu"))
        q_out, buffer = torch.empty_like(q), torch.zeros(2, 60, heads, head_dim)
        angles = torch.view_as_real(rotation.turns)
        launch(q, k, angles, angles, q_out, buffer[:, 10:47])
        for ours, x in ((q_out, q), (buffer[:, 10:47], k)):
            torch.testing.assert_close(ours, _turn(x, rotation.turns))
        assert not buffer[:, :10].any()
        assert not buffer[:, 47:].any()
        own = Rotation((range(9),), 1, 1, 1, head_dim, torch.device("cpu"))  # of fewer tokens than a program takes
        q, q_out, k_out = q[:, :9], torch.empty_like(q[:, :9]), torch.empty(2, 37, heads, head_dim)
        launch(q, k, torch.view_as_real(own.turns), angles, q_out, k_out)
        for ours, x, turns in ((q_out, q, own.turns), (k_out, k, rotation.turns)):
            torch.testing.assert_close(ours, _turn(x, turns))


if __name__ == "__main__":
    check_kernel()
