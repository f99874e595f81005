"""Networks under ZeRO-3 on NCCL against plain torch on the same GPU: outputs, gradients, steps of AFD."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")
from tests.distributed import test_parity
from tests.distributed.meshes import run_mesh

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_one_rank_equals_plain_torch(tmp_path: Path) -> None:
    run_mesh(test_parity.__file__, tmp_path, 1, 1)


@pytest.mark.parametrize(("data", "sequence"), [(1, 2), (2, 1), (2, 2)])
def test_every_mesh_equals_plain_torch(data: int, sequence: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < data * sequence:
        pytest.skip(f"needs {data * sequence} GPUs")
    run_mesh(test_parity.__file__, tmp_path, 1, 1)
    run_mesh(test_parity.__file__, tmp_path, data, sequence)
