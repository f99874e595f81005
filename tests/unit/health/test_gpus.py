"""GPUs that are sound and those that are not, from a stand-in for NVIDIA's library."""

from types import SimpleNamespace
from typing import Any

import pytest

from afd_scale.health.findings import Finding
from afd_scale.health.gpus import check_gpu, check_gpus
from afd_scale.health.nvml import read_gpu, read_gpus
from tests.unit.health.fake_nvml import GIB, FakeNvml, healthy


def looked_at(**changes: Any) -> list[Finding]:
    return check_gpu(read_gpu(FakeNvml(healthy(**changes)), 0), ours=frozenset({1}))


def test_no_driver_is_absent_and_no_gpu_is_wrong() -> None:
    assert [each.state for each in check_gpus(None, 8)] == ["absent"]
    assert [each.state for each in check_gpus([], 1)] == ["wrong"]


def test_a_sound_gpu() -> None:
    found = looked_at()
    assert [each.state for each in found] == ["ok"] * 4
    assert [each.value for each in found] == [
        "NVIDIA H100 80GB HBM3, 2.0 of 80.0 GiB in use",
        "1755 of 1980 MHz, 41 C, 612 of 700 W, held by idle",
        "0 uncorrected, 0 corrected, 0 rows replaced",
        "18 of 18 links up",
    ]


def link_4_down(link: int) -> int:
    return int(link != 4)


@pytest.mark.parametrize(
    ("changes", "what", "state", "words"),
    [
        ({"nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=7)]}, "memory", "warning", "processes 7"),
        ({"nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=1)]}, "memory", "ok", ""),
        ({"nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * GIB, used=9 * GIB)}, "memory", "warning", "container"),
        ({"nvmlDeviceGetCurrentClocksThrottleReasons": 0x40}, "clock", "wrong", "cooling"),
        ({"nvmlDeviceGetCurrentClocksThrottleReasons": 0x04}, "clock", "ok", ""),
        ({"nvmlDeviceGetTotalEccErrors": lambda kind, _: int(kind == 1)}, "errors", "wrong", "nvidia-smi -r"),
        ({"nvmlDeviceGetTotalEccErrors": lambda kind, _: int(kind == 0)}, "errors", "ok", ""),
        ({"nvmlDeviceGetRemappedRows": (0, 1, 1, 0)}, "errors", "wrong", "nvidia-smi -r"),
        ({"nvmlDeviceGetRemappedRows": (0, 1, 0, 1)}, "errors", "wrong", "out of use"),
        ({"nvmlDeviceGetNvLinkState": link_4_down}, "NVLink", "wrong", "nvidia-fabricmanager"),
    ],
)
def test_what_is_wrong_with_one(changes: dict[str, Any], what: str, state: str, words: str) -> None:
    (found,) = (each for each in looked_at(**changes) if each.what == f"GPU 0 {what}")
    assert found.state == state
    assert words in found.remedy


def test_what_a_gpu_does_not_say_is_absent() -> None:
    assert [each.state for each in check_gpu(read_gpu(FakeNvml({}), 0))] == ["absent"] * 4


def test_there_must_be_one_for_each_rank_and_all_alike() -> None:
    two = read_gpus(FakeNvml(healthy(), healthy(nvmlDeviceGetName="NVIDIA A100")))
    found = {each.what: each for each in check_gpus(two, 3)}
    assert (found["number"].value, found["number"].state) == ("2 for 3 ranks", "wrong")
    assert found["kinds"].state == "warning"
    assert [each.state for each in check_gpus(two[:1], 1)] == ["ok"] * 4
