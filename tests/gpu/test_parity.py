"""Networks under ZeRO-3 on NCCL against plain torch on the same GPU: outputs, gradients, steps of AFD."""

from pathlib import Path

import pytest
import torch

from tests.distributed.processes import torchrun

pytest.importorskip("deepspeed")
SCRIPT = Path(__file__).parents[1] / "distributed" / "test_parity.py"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("data", "sequence"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_every_mesh_equals_one_process(data: int, sequence: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < data * sequence:
        pytest.skip(f"needs {data * sequence} GPUs")
    result = torchrun(data * sequence, SCRIPT, tmp_path, str(sequence), timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
