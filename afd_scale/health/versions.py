"""Whether the libraries of an environment fit each other, this package and the GPUs."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from afd_scale.health.findings import Finding
from afd_scale.health.nvml import Driver
from afd_scale.layers.attention.limits import Capability
from afd_scale.layers.attention.sdpa import slower_than_cudnn, version_words

TOPIC = "versions"
SHOWN = ("torch", "deepspeed", "mosaicml-streaming", "transformers", "diffusers")
FLASH_ATTENTION = ("flash-attn-3", "flash-attn", "flash-attn-4")
_FLASH_2 = Requirement("flash-attn>=2.7,<3")  # docs/cluster.md, "Attention kernels"

Installed = Callable[[str], str | None]


def installed(distribution: str) -> str | None:
    """Version of what pip calls so; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> list[str] | None:
    """What setup.py asks for; None where this package runs without being installed."""
    try:
        return metadata.requires("afd-scale")
    except metadata.PackageNotFoundError:
        return None


def versions_here(driver: Driver | None) -> dict[str, str]:
    """What must be the same on all machines of a run."""
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    found = {
        "python": platform.python_version(),
        **{name: installed(name) for name in SHOWN},
        "CUDA of torch": torch.version.cuda,
        "cuDNN": None if cudnn is None else version_words(cudnn),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None,
        "Transformer Engine": installed("transformer-engine"),
        "driver": None if driver is None else driver.version,
    }
    return {name: version for name, version in found.items() if version is not None}


def check_requirements(asked: Sequence[str] | None, version: Installed = installed) -> list[Finding]:
    """What setup.py asks for against what is installed; extras may be absent, a developer's are not looked at."""
    if asked is None:
        return [Finding(TOPIC, "afd-scale", "not installed: versions are not held against setup.py", "absent")]
    findings = []
    for requirement in map(Requirement, asked):
        extra = str(requirement.marker).partition('extra == "')[2].rstrip('"')
        if extra == "dev":
            continue
        name, found, range_ = requirement.name, version(requirement.name), str(requirement.specifier)
        if found is None and extra:
            findings.append(Finding(TOPIC, name, f"not installed; it is the extra {extra}", "absent"))
        elif found is None:
            findings.append(Finding(TOPIC, name, "not installed", "wrong", f"pip install '{name}{range_}'"))
        elif not requirement.specifier.contains(found, prereleases=True):
            findings.append(
                Finding(TOPIC, name, f"{found}, and setup.py asks for {range_}", "wrong",
                        f"pip install '{name}{range_}'")
            )  # fmt: skip
        elif name in SHOWN or extra:
            findings.append(Finding(TOPIC, name, found))
    return findings


def check_cuda(torch_cuda: str | None, driver: Driver | None, usable: bool) -> list[Finding]:
    """Whether torch's build goes with the driver.

    Args:
        torch_cuda: the CUDA that torch was built for; None for a CPU build.
        usable: torch finds a GPU.
    """
    if driver is None:
        build = "a CPU build" if torch_cuda is None else f"built for CUDA {torch_cuda}, no driver"
        return [Finding(TOPIC, "CUDA", build, "absent")]
    words = f"torch for {torch_cuda}, driver {driver.version} for up to {driver.cuda[0]}.{driver.cuda[1]}"
    if torch_cuda is None:
        return [
            Finding(TOPIC, "CUDA", f"torch is a CPU build, and there is a driver ({driver.version})", "wrong",
                    f"install torch from the index of CUDA {driver.cuda[0]}: https://pytorch.org/get-started/locally")
        ]  # fmt: skip
    if int(torch_cuda.partition(".")[0]) > driver.cuda[0]:  # of one major version, any minor runs on any
        return [
            Finding(TOPIC, "CUDA", words, "wrong",
                    f"update the driver, or install a build of torch for CUDA {driver.cuda[0]}")
        ]  # fmt: skip
    if not usable:
        return [
            Finding(TOPIC, "CUDA", f"{words}; torch finds no GPU", "wrong",
                    "see CUDA_VISIBLE_DEVICES, and what `python -c 'import torch; torch.zeros(1).cuda()'` says")
        ]  # fmt: skip
    return [Finding(TOPIC, "CUDA", words)]


def check_cudnn(
    capability: Capability | None, loaded: int | None, bundled: str | None, search_path: str, faster: bool
) -> list[Finding]:
    """Whether torch's attention gets cuDNN's kernels.

    Args:
        capability: of the GPU; None where there is none.
        loaded: as torch.backends.cudnn counts.
        bundled: version of the package that torch brought.
        search_path: LD_LIBRARY_PATH.
        faster: a kernel that attention prefers to torch's is installed.
    """
    if loaded is None:
        return [Finding(TOPIC, "cuDNN", "none is loaded", "absent")]
    words = version_words(loaded)
    systems = [folder for folder in search_path.split(os.pathsep) if folder and any(Path(folder).glob("libcudnn*.so*"))]
    if bundled is not None and _numbers(words) < _numbers(bundled)[:3]:
        where = f" (there is one in {', '.join(systems)})" if systems else ""
        return [
            Finding(TOPIC, "cuDNN", f"{words} is loaded, torch brought {bundled}", "warning" if faster else "wrong",
                    f"take an older one of the system off LD_LIBRARY_PATH{where}")
        ]  # fmt: skip
    reason = None if capability is None else slower_than_cudnn(capability, loaded)
    if reason is not None:
        return [Finding(TOPIC, "cuDNN", words, "warning" if faster else "wrong", reason)]
    return [Finding(TOPIC, "cuDNN", words)]


def check_extensions(torch_cuda: str | None, precision: str | None, version: Installed = installed) -> list[Finding]:
    """Transformer Engine and flash-attn, which are built against torch and CUDA.

    Args:
        precision: of the run that is asked about, if any.
    """
    findings = []
    engine = version("transformer-engine")
    wanted = precision == "fp8" and torch_cuda is not None
    if engine is None and wanted:
        findings.append(
            Finding(TOPIC, "Transformer Engine", "not installed, and precision is fp8", "wrong",
                    "pip install --no-build-isolation -e '.[transformer-engine]', or precision=bf16")
        )  # fmt: skip
    for major in (11, 12, 13):
        core = version(f"transformer-engine-cu{major}")
        if core is not None and torch_cuda is not None and int(torch_cuda.partition(".")[0]) != major:
            findings.append(
                Finding(TOPIC, "Transformer Engine", f"{core} for CUDA {major}, torch is for {torch_cuda}", "wrong",
                        "pip uninstall it, then pip install --no-build-isolation -e '.[transformer-engine]'")
            )  # fmt: skip
        if core is not None and engine is not None and core != engine:
            findings.append(
                Finding(TOPIC, "Transformer Engine", f"{engine}, its library for CUDA {major} is {core}", "wrong",
                        "install both in one version")
            )  # fmt: skip
    for name in FLASH_ATTENTION:
        found = version(name)
        if found is None:
            findings.append(Finding(TOPIC, name, "not installed", "absent"))
        elif name == "flash-attn" and not _FLASH_2.specifier.contains(found, prereleases=True):
            findings.append(
                Finding(TOPIC, name, f"{found}, and {_FLASH_2.specifier} is read", "wrong",
                        f"pip install --no-build-isolation '{_FLASH_2}', or uninstall it")
            )  # fmt: skip
        else:
            findings.append(Finding(TOPIC, name, found))
    return findings


def check_same(versions: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Whether machines have the same versions.

    Args:
        versions: by machine, of `versions_here`.
    """
    names = dict.fromkeys(name for found in versions.values() for name in found)
    findings = []
    for name in names:
        by_version: dict[str, list[str]] = {}
        for host, found in versions.items():
            by_version.setdefault(found.get(name, "none"), []).append(host)
        if len(by_version) > 1:
            words = "; ".join(f"{version} on {', '.join(hosts)}" for version, hosts in by_version.items())
            # CUDA of one major version goes with drivers of several.
            state, remedy = (
                ("warning", "let them be the same") if name == "driver" else ("wrong", "install one version")
            )
            findings.append(Finding(TOPIC, name, words, "warning" if state == "warning" else "wrong", remedy))
    return findings or [Finding(TOPIC, "of all machines", "the same")]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
