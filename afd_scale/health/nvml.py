"""What NVIDIA's management library says of GPUs. The only file that knows it; it is imported where it is asked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

GIB = 2**30

# Bits of what keeps a clock down that are no normal state of a GPU under load; CUDA 12's names.
_SLOWED_BY = {0x08: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake"}
_ALLOWED = {0x01: "idle", 0x02: "a clock that was set", 0x04: "its power limit", 0x10: "sync boost", 0x100: "a display"}


@dataclass(frozen=True)
class Gpu:
    """What one GPU says of itself; None, or no entry, where it does not say.

    Attributes:
        processes: that compute on it.
        slowed_by: faults that keep its clock down at this moment.
        allowed: other reasons for a low clock.
        uncorrected, corrected: errors of its memory since the driver was loaded.
        remapped: rows of memory that have been replaced; of which `remap_pending` need a reset, and `remap_failed` had
            no replacement left.
        links: of NVLink, whether each one is up.
    """

    index: int
    name: str
    memory_gib: float | None = None
    used_gib: float | None = None
    processes: tuple[int, ...] = ()
    celsius: float | None = None
    watts: float | None = None
    watts_allowed: float | None = None
    mhz: float | None = None
    mhz_at_most: float | None = None
    slowed_by: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    uncorrected: int | None = None
    corrected: int | None = None
    remapped: int | None = None
    remap_pending: bool = False
    remap_failed: bool = False
    links: dict[int, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Driver:
    """The driver of a machine's GPUs.

    Attributes:
        cuda: the newest CUDA that it runs, (major, minor).
    """

    version: str
    cuda: tuple[int, int]


def load_nvml() -> Any | None:
    """The library, ready to be asked; None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def read_driver(nvml: Any) -> Driver:
    """What the driver is; raises what the library does."""
    cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
    return Driver(_text(nvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10))


def read_gpus(nvml: Any) -> list[Gpu]:
    """All GPUs of the machine that the driver shows."""
    return [read_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]


def read_gpu(nvml: Any, index: int) -> Gpu:
    """What one of them says."""
    ask = _Asking(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
    memory = ask("nvmlDeviceGetMemoryInfo")
    bits = ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
    counts = [
        ask("nvmlDeviceGetTotalEccErrors", kind, nvml.NVML_VOLATILE_ECC)
        for kind in (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED)
    ]
    by_corrected, by_uncorrected, pending, failed = ask("nvmlDeviceGetRemappedRows") or (None, None, 0, 0)
    links = {link: ask("nvmlDeviceGetNvLinkState", link) for link in range(nvml.NVML_NVLINK_MAX_LINKS)}
    return Gpu(
        index,
        _text(ask("nvmlDeviceGetName") or "GPU"),
        memory_gib=None if memory is None else memory.total / GIB,
        used_gib=None if memory is None else memory.used / GIB,
        processes=tuple(process.pid for process in ask("nvmlDeviceGetComputeRunningProcesses") or ()),
        celsius=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        watts=_thousandth(ask("nvmlDeviceGetPowerUsage")),
        watts_allowed=_thousandth(ask("nvmlDeviceGetEnforcedPowerLimit")),
        mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        mhz_at_most=ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        slowed_by=tuple(word for bit, word in _SLOWED_BY.items() if bits & bit),
        allowed=tuple(word for bit, word in _ALLOWED.items() if bits & bit),
        uncorrected=counts[0],
        corrected=counts[1],
        remapped=None if by_corrected is None else by_corrected + by_uncorrected,
        remap_pending=bool(pending),
        remap_failed=bool(failed),
        links={link: bool(state) for link, state in links.items() if state is not None},
    )


def gpu_meter(device: torch.device, nvml: Any = None) -> Callable[[], dict[str, float]]:
    """What reads utilisation, power, memory and temperature of a rank's GPU.

    Args:
        nvml: the library; None loads it, where the rank is on a GPU.
    Returns:
        Gives metrics, `system/gpu_...`; the utilisation is the share of the last moment in which a kernel ran. What the
        GPU does not say is left out, and on a CPU everything.
    """
    if device.type != "cuda":
        return dict
    nvml = nvml or load_nvml()
    if nvml is None:
        return dict
    # The library counts all GPUs of the machine, CUDA those that it is shown; both know the identity.
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return lambda: read_metrics(nvml, identity)


def read_metrics(nvml: Any, identity: str) -> dict[str, float]:
    """The metrics of `gpu_meter` at this moment.

    Args:
        identity: the GPU's UUID, as `nvidia-smi -L` prints it.
    """
    try:
        ask = _Asking(nvml, nvml.nvmlDeviceGetHandleByUUID(identity))
    except nvml.NVMLError:  # part of a GPU (MIG), or it has fallen off the bus
        return {}
    rates, memory = ask("nvmlDeviceGetUtilizationRates"), ask("nvmlDeviceGetMemoryInfo")
    values = {
        "gpu_utilisation": None if rates is None else rates.gpu / 100,
        "gpu_power_watts": _thousandth(ask("nvmlDeviceGetPowerUsage")),
        "gpu_memory_gib": None if memory is None else memory.used / GIB,
        "gpu_celsius": ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
    }
    return {f"system/{name}": float(value) for name, value in values.items() if value is not None}


class _Asking:
    """Asks one GPU; None where it, or the driver, does not know the answer."""

    def __init__(self, nvml: Any, handle: Any):
        self._nvml, self._handle = nvml, handle

    def __call__(self, question: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, question)(self._handle, *arguments)
        except self._nvml.NVMLError:  # a function that the driver lacks is one too
            return None


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _thousandth(value: float | None) -> float | None:
    return None if value is None else value / 1000
