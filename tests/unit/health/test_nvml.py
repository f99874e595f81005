"""What is read from NVIDIA's management library, from a stand-in for it."""

import torch

from afd_scale.health.nvml import Driver, gpu_meter, read_driver, read_gpu, read_gpus, read_metrics
from tests.unit.health.fake_nvml import FakeNvml, healthy


def test_metrics_of_a_rank_s_gpu_are_of_its_identity() -> None:
    nvml = FakeNvml(healthy(uuid="GPU-other", nvmlDeviceGetTemperature=99), healthy())
    assert read_metrics(nvml, "GPU-1234") == {
        "system/gpu_utilisation": 0.75, "system/gpu_power_watts": 612.5, "system/gpu_memory_gib": 2.0,
        "system/gpu_celsius": 41.0,
    }  # fmt: skip


def test_what_a_gpu_does_not_say_is_left_out() -> None:
    assert read_metrics(FakeNvml({"uuid": "GPU-1234", "nvmlDeviceGetPowerUsage": 5000}), "GPU-1234") == {
        "system/gpu_power_watts": 5.0
    }
    assert read_metrics(FakeNvml(healthy()), "GPU-gone") == {}


def test_there_are_no_metrics_on_a_cpu() -> None:
    assert gpu_meter(torch.device("cpu"), FakeNvml(healthy()))() == {}


def test_driver_and_gpus_are_read() -> None:
    nvml = FakeNvml(healthy(), {}, cuda=12080)
    assert read_driver(nvml) == Driver("580.95.05", (12, 8))
    gpu, silent = read_gpus(nvml)
    assert (gpu.index, gpu.name, gpu.memory_gib, gpu.used_gib) == (0, "NVIDIA H100 80GB HBM3", 80.0, 2.0)
    assert (gpu.celsius, gpu.watts, gpu.watts_allowed, gpu.mhz, gpu.mhz_at_most) == (41, 612.5, 700.0, 1755, 1980)
    assert gpu.slowed_by == ()
    assert gpu.allowed == ("idle",)
    assert (gpu.uncorrected, gpu.corrected, gpu.remapped, gpu.remap_pending) == (0, 0, 0, False)
    assert gpu.links == dict.fromkeys(range(18), True)
    assert (silent.name, silent.memory_gib, silent.uncorrected, silent.links) == ("GPU", None, None, {})


def test_what_slows_a_gpu_is_told_from_what_is_normal() -> None:
    gpu = read_gpu(FakeNvml(healthy(nvmlDeviceGetCurrentClocksThrottleReasons=0x4 | 0x40 | 0x8)), 0)
    assert gpu.slowed_by == ("hardware slowdown", "heat (hardware)")
    assert gpu.allowed == ("its power limit",)


def test_errors_of_memory_are_told_by_kind() -> None:
    nvml = FakeNvml(
        healthy(
            nvmlDeviceGetTotalEccErrors=lambda kind, counter: {0: 7, 1: 2}[kind],
            nvmlDeviceGetRemappedRows=(1, 3, 1, 0),
        )
    )
    gpu = read_gpu(nvml, 0)
    assert (gpu.uncorrected, gpu.corrected, gpu.remapped, gpu.remap_pending, gpu.remap_failed) == (2, 7, 4, True, False)
