"""Whether a machine's GPUs are sound, free and as fast as they can be."""

import os
from collections.abc import Sequence

import psutil

from afd_scale.health.findings import Finding
from afd_scale.health.nvml import Gpu

TOPIC = "GPUs"
_USED_SHARE = 0.05  # of the memory; a driver takes less for itself


def check_gpus(gpus: Sequence[Gpu] | None, local_ranks: int, ours: frozenset[int] = frozenset()) -> list[Finding]:
    """What is wrong with each, and whether there are enough.

    Args:
        gpus: None where there is no driver.
        local_ranks: of a run on this machine.
        ours: processes of the same job.
    """
    if gpus is None:
        return [Finding(TOPIC, "driver", "none: a run takes the CPU", "absent")]
    if not gpus:
        return [Finding(TOPIC, "driver", "shows no GPU", "wrong", "see `nvidia-smi` and the system's log")]
    findings = []
    if len(gpus) < local_ranks:
        findings.append(
            Finding(TOPIC, "number", f"{len(gpus)} for {local_ranks} ranks", "wrong",
                    "a rank takes a GPU: start fewer on this machine, or let the container see all")
        )  # fmt: skip
    kinds = sorted({f"{gpu.name} {gpu.memory_gib or 0:.0f} GiB" for gpu in gpus})
    if len(kinds) > 1:
        findings.append(
            Finding(TOPIC, "kinds", ", ".join(kinds), "warning", "every step waits for the slowest: take equal ones")
        )
    return findings + [finding for gpu in gpus for finding in check_gpu(gpu, ours)]


def check_gpu(gpu: Gpu, ours: frozenset[int] = frozenset()) -> list[Finding]:
    """Memory, clocks, errors and links of one."""
    name = f"GPU {gpu.index}"
    return [_memory(gpu, name, ours), _clocks(gpu, name), *_errors(gpu, name), _links(gpu, name)]


def of_this_job() -> frozenset[int]:
    """Processes that the same launcher started, this one among them."""
    launcher = psutil.Process().parent()
    siblings = launcher.children(recursive=True) if launcher is not None else []
    return frozenset({os.getpid(), *(process.pid for process in siblings)})


def _memory(gpu: Gpu, name: str, ours: frozenset[int]) -> Finding:
    if gpu.memory_gib is None or gpu.used_gib is None:
        return Finding(TOPIC, f"{name} memory", f"{gpu.name}; it does not say", "absent")
    words = f"{gpu.name}, {gpu.used_gib:.1f} of {gpu.memory_gib:.1f} GiB in use"
    others = [str(process) for process in gpu.processes if process not in ours]
    if others or (gpu.used_gib > _USED_SHARE * gpu.memory_gib and not gpu.processes):
        whose = f"by processes {', '.join(others)}" if others else "by a process of another container, or one that died"
        return Finding(TOPIC, f"{name} memory", words, "warning", f"it is in use {whose}: end it, or take another GPU")
    return Finding(TOPIC, f"{name} memory", words)


def _clocks(gpu: Gpu, name: str) -> Finding:
    if gpu.mhz is None or gpu.mhz_at_most is None:
        return Finding(TOPIC, f"{name} clock", "it does not say", "absent")
    parts = [f"{gpu.mhz:.0f} of {gpu.mhz_at_most:.0f} MHz"]
    parts += [f"{gpu.celsius:.0f} C"] if gpu.celsius is not None else []
    if gpu.watts is not None:
        parts.append(f"{gpu.watts:.0f} W" if gpu.watts_allowed is None else f"{gpu.watts:.0f} of {gpu.watts_allowed:.0f} W")  # fmt: skip # noqa: E501
    held = gpu.slowed_by + gpu.allowed
    words = ", ".join(parts) + (f", held by {', '.join(held)}" if held else "")
    if gpu.slowed_by:
        remedy = "let somebody look at cooling and power; it is slower until then, and all ranks wait for it"
        return Finding(TOPIC, f"{name} clock", words, "wrong", remedy)
    return Finding(TOPIC, f"{name} clock", words)


def _errors(gpu: Gpu, name: str) -> list[Finding]:
    what = f"{name} errors"
    if gpu.uncorrected is None:
        return [Finding(TOPIC, what, "its memory has no error correction, or it is off", "absent")]
    words = f"{gpu.uncorrected} uncorrected, {gpu.corrected or 0} corrected, {gpu.remapped or 0} rows replaced"
    if gpu.remap_failed:
        return [Finding(TOPIC, what, words, "wrong", "a bad row could not be replaced: take the GPU out of use")]
    if gpu.uncorrected or gpu.remap_pending:
        return [Finding(TOPIC, what, words, "wrong", "reset it (`nvidia-smi -r`, or restart the machine); if errors "
                        "come back, take it out of use")]  # fmt: skip
    return [Finding(TOPIC, what, words)]


def _links(gpu: Gpu, name: str) -> Finding:
    down = [str(link) for link, up in gpu.links.items() if not up]
    if not gpu.links:
        return Finding(TOPIC, f"{name} NVLink", "none", "absent")
    words = f"{len(gpu.links) - len(down)} of {len(gpu.links)} links up"
    if down:
        remedy = "see `nvidia-smi nvlink -s` and the fabric manager (`systemctl status nvidia-fabricmanager`)"
        return Finding(TOPIC, f"{name} NVLink", f"{words}, down: {', '.join(down)}", "wrong", remedy)
    return Finding(TOPIC, f"{name} NVLink", words)
