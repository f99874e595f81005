"""A stand-in for NVIDIA's management library: a machine with GPUs that are as a test says."""

from types import SimpleNamespace
from typing import Any

GIB = 2**30


class FakeNvml:
    """Answers as pynvml does.

    Args:
        gpus: one dict a GPU, from a function's name to what it returns; what is not there is not supported.
    """

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1
    NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 1
    NVML_VOLATILE_ECC = 0
    NVML_NVLINK_MAX_LINKS = 36

    def __init__(self, *gpus: dict[str, Any], cuda: int = 13000):
        self.gpus, self.cuda = gpus, cuda

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.95.05"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return self.cuda

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, identity: str) -> dict[str, Any]:
        for gpu in self.gpus:
            if gpu.get("uuid") == identity:
                return gpu
        raise self.NVMLError("Not Found")

    def __getattr__(self, question: str) -> Any:
        if not question.startswith("nvmlDeviceGet"):
            raise AttributeError(question)

        def answer(gpu: dict[str, Any], *arguments: Any) -> Any:
            if question not in gpu:
                raise self.NVMLError("Not Supported")
            value = gpu[question]
            return value(*arguments) if callable(value) else value

        return answer


def no_such_link() -> int:
    raise FakeNvml.NVMLError("Invalid Argument")


def healthy(**changes: Any) -> dict[str, Any]:
    """An H100 at rest, with changes."""
    return {
        "uuid": "GPU-1234",
        "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * GIB, used=2 * GIB),
        "nvmlDeviceGetComputeRunningProcesses": [],
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=75, memory=20),
        "nvmlDeviceGetTemperature": 41,
        "nvmlDeviceGetPowerUsage": 612_500,
        "nvmlDeviceGetEnforcedPowerLimit": 700_000,
        "nvmlDeviceGetClockInfo": 1755,
        "nvmlDeviceGetMaxClockInfo": 1980,
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1,
        "nvmlDeviceGetTotalEccErrors": 0,
        "nvmlDeviceGetRemappedRows": (0, 0, 0, 0),
        "nvmlDeviceGetNvLinkState": lambda link: 1 if link < 18 else no_such_link(),
        **changes,
    }
