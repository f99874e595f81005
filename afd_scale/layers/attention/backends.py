"""Which kernels compute a run's attention: what was asked for, or the fastest that works here."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from afd_scale.layers.attention import fa4, flash, flex, sdpa
from afd_scale.layers.attention.limits import Attend, Capability, Limits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """Attention that works on this device.

    Attributes:
        name: as in the config.
        kernels: what computes it, in words.
        attend: for `ModelOps`.
    """

    name: str
    kernels: str
    attend: Attend


@dataclass(frozen=True)
class Candidate:
    """A backend that may be here.

    Attributes:
        limits: of each kind of device that it works on.
        load: imports its library, or raises ImportError.
        package: the library, as one would install it.
        elsewhere: why it works on no other device.
    """

    name: str
    kernels: str
    limits: Mapping[str, Limits]
    load: Callable[[], Attend]
    package: str = "torch"
    elsewhere: str = "it has no kernels there"

    def refusal(
        self, device_type: str, dtype: torch.dtype, head_dim: int, capability: Capability | None = None
    ) -> str | None:
        """Why its kernels do not fit, or None; imports nothing."""
        if device_type not in self.limits:
            return f"needs {' or '.join(self.limits)}, not {device_type}: {self.elsewhere}"
        return self.limits[device_type].refusal(dtype, head_dim, capability)


# By the speed to expect: on Hopper flash-attn 3 and cuDNN, which torch takes there, lead; elsewhere torch's kernels are
# flash-attn 2. flash-attn 4 is a pre-release, and comes after all that is proven.
FASTEST_FIRST = (
    Candidate("flash", "flash-attn 3", flash.LIMITS_3, flash.load_3, "flash-attn-3"),
    Candidate("sdpa", f"torch {torch.__version__}", sdpa.LIMITS, sdpa.load),
    Candidate("flash", "flash-attn 2", flash.LIMITS_2, flash.load_2, "flash-attn>=2.7,<3"),
    Candidate(
        "flex", "FlexAttention", flex.LIMITS, flex.load, "triton", "FlexAttention has no backward on other devices"
    ),
    Candidate("fa4", "flash-attn 4", fa4.LIMITS, fa4.load, "flash-attn-4"),
)


def choose_backend(name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The attention of a run; logs what it is, and what was faster but is not to be had.

    Args:
        name: "sdpa", "flash", "flex", "fa4", or "auto" for the fastest that works here.
        device, dtype, head_dim: of q, k and v.
    Raises:
        ValueError: the named one does not work here; all reasons in one line.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    backend, reasons = find_backend(name, device.type, dtype, head_dim, capability)
    if backend.name == "sdpa":
        kernel = sdpa.kernel_for(device, dtype, head_dim)
        words = [backend.kernels, f"{kernel} kernel"]
        if capability is not None:
            cudnn = torch.backends.cudnn.version()
            words.append("no cuDNN" if cudnn is None else f"cuDNN {sdpa.version_words(cudnn)}")
            warning = sdpa.slower_than_cudnn(capability, cudnn)
            if warning and kernel == sdpa.FLASH.name:
                log.warning("%s", warning)
        backend = replace(backend, kernels=", ".join(words))
    log.info("%s", "; ".join([f"attention: {backend.name} ({backend.kernels}) on {device.type}", *reasons]))
    return backend


def find_backend(
    name: str, device_type: str, dtype: torch.dtype, head_dim: int, capability: Capability | None = None
) -> tuple[Backend, list[str]]:
    """The same for any device, which is not asked: its backend, and why none before it."""
    candidates = [c for c in FASTEST_FIRST if name in ("auto", c.name)]
    assert candidates, f"no attention backend is called {name}"
    reasons: list[str] = []
    for candidate in candidates:
        reason = candidate.refusal(device_type, dtype, head_dim, capability)
        if reason is None:
            try:
                return Backend(candidate.name, candidate.kernels, candidate.load()), reasons
            except ImportError as error:
                reason = f"needs {candidate.package} ({' '.join(str(error).split())})"
        reasons.append(f"{candidate.kernels} {reason}")
    raise ValueError(f"attention ({name}): {'; '.join(reasons)}")
