"""All that is looked at on a machine, and among the ranks of a job."""

import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from afd_scale.config import ConfigError, RunConfig
from afd_scale.data.storage import locations
from afd_scale.health import disks, gpus, links, memory, names, versions
from afd_scale.health.findings import Finding, located
from afd_scale.health.names import Host
from afd_scale.health.nvml import load_nvml, read_driver, read_gpus
from afd_scale.parallel.launchers import Launched
from afd_scale.parallel.ranks import Ranks
from afd_scale.planning.workload import workload

SEEN_SECONDS = 5.0  # until a network file system shows another machine's file


@dataclass(frozen=True)
class Asked:
    """What the machines are to be fit for.

    Attributes:
        config: of a run; None is any.
        hosts: of a hostfile.
        clean: remove what killed jobs left.
    """

    launched: Launched
    config: RunConfig | None = None
    hosts: Sequence[Host] = ()
    clean: bool = False
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def several_machines(self) -> bool:
        return len(self.hosts) > 1 or self.launched.size > self.launched.local_size

    @property
    def out(self) -> Path:
        return Path("runs") if self.config is None else self.config.out


@dataclass(frozen=True)
class Machine:
    """What was found on one machine.

    Attributes:
        gpu: name of its first GPU, where torch can use it.
    """

    host: str
    findings: list[Finding]
    versions: dict[str, str]
    gpu: str | None


def look_at_machine(asked: Asked) -> Machine:
    """All that one process finds by itself; on one rank of a machine."""
    nvml = load_nvml()
    driver = None if nvml is None else read_driver(nvml)
    usable = torch.cuda.is_available()
    faster = versions.installed("flash-attn-3") is not None
    config, launched = asked.config, asked.launched
    findings = [
        *versions.check_requirements(versions.requirements()),
        *versions.check_cuda(torch.version.cuda, driver, usable),
        *versions.check_cudnn(
            torch.cuda.get_device_capability() if usable else None,
            torch.backends.cudnn.version() if torch.version.cuda else None,
            _bundled_cudnn(),
            asked.environment.get("LD_LIBRARY_PATH", ""),
            faster,
        ),
        *versions.check_extensions(torch.version.cuda, None if config is None else config.precision),
        *gpus.check_gpus(None if nvml is None else read_gpus(nvml), launched.local_size, gpus.of_this_job()),
        memory.check_room(launched.local_size if usable else 0),
        *([memory.clean()] if asked.clean else []),
        *memory.check_leftovers(),
        *_look_at_disks(asked),
        *_look_at_names(asked),
    ]
    gpu = torch.cuda.get_device_name() if usable else None
    return Machine(socket.gethostname(), findings, versions.versions_here(driver), gpu)


def look_at_ranks(asked: Asked, ranks: Ranks) -> list[Finding]:
    """How ranks compute and exchange, and whether all machines see one run folder; a collective, the same on all."""
    hosts = links.everyones(ranks, socket.gethostname())
    findings = check_layout(asked.config, [hosts.count(host) for host in dict.fromkeys(hosts)])
    if any(finding.state == "wrong" for finding in findings):
        return findings  # its groups cannot be made
    sequence = 1 if asked.config is None else asked.config.parallel.sequence
    sharing = ranks.sharing_videos(sequence, timeout_minutes=2)
    gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else None
    measured = links.measure(sharing, hosts, links.ON_CPU if gpu is None else links.ON_GPU)
    return [*findings, *links.judge(measured, gpu), *_look_at_sharing(asked.out, ranks, hosts)]


def check_layout(config: RunConfig | None, ranks_of_machines: Sequence[int]) -> list[Finding]:
    """Whether a run can be laid out over machines with so many ranks each; none where nobody said how many."""
    topic, what = links.TOPIC, "layout"
    if not ranks_of_machines:
        return [Finding(topic, what, "not looked at: start under a launcher, or give --hostfile", "absent")]
    size, nodes = sum(ranks_of_machines), len(ranks_of_machines)
    words = f"{size} ranks on {nodes} {'machine' if nodes == 1 else 'machines'}"
    if len(set(ranks_of_machines)) > 1:
        words += f" ({', '.join(map(str, ranks_of_machines))})"
        return [Finding(topic, what, words, "wrong", "start as many ranks on each: samples are dealt to machines")]
    if config is None:
        return [Finding(topic, what, words)]
    try:
        workload(config, size)
    except ConfigError as error:
        return [Finding(topic, what, words, "wrong", str(error))]
    sequence, canonical = config.parallel.sequence, config.data.canonical_nodes
    if nodes % canonical and canonical % nodes:
        return [Finding(topic, what, words, "wrong", f"data.canonical_nodes ({canonical}) must divide the number of "
                        "machines or be a multiple of it")]  # fmt: skip
    words += f", {size // sequence} shares of a batch, {sequence} to a video"
    if ranks_of_machines[0] % sequence and sequence > 1:
        return [Finding(topic, what, words, "warning", f"parallel.sequence ({sequence}) should divide the "
                        f"{ranks_of_machines[0]} ranks of a machine: else a video's ranks exchange over the network")
                ]  # fmt: skip
    return [Finding(topic, what, words)]


def of_all_machines(machines: Sequence[Machine]) -> list[Finding]:
    """Their findings, with the machine's name where there are several, and whether they have the same versions."""
    if len(machines) == 1:
        return machines[0].findings
    found = [finding for machine in machines for finding in located(machine.findings, machine.host)]
    return found + versions.check_same({machine.host: machine.versions for machine in machines})


def can_meet(findings: Sequence[Finding]) -> bool:
    """Whether ranks that join would find each other."""
    return not any(finding.topic == names.TOPIC and finding.state == "wrong" for finding in findings)


def _bundled_cudnn() -> str | None:
    major = (torch.version.cuda or "").partition(".")[0]
    return versions.installed(f"nvidia-cudnn-cu{major}") if major else None


def _look_at_disks(asked: Asked) -> list[Finding]:
    config = asked.config
    needed = 0 if config is None else disks.needed_for_checkpoints(config)
    found = [disks.check_room("out", asked.out, needed), *disks.check_writing("out", asked.out)]
    if config is not None:
        caches = {location.cache: location.field for location in locations(config) if location.is_remote}
        found += [disks.check_room(f"cache of {name}", cache, 0) for cache, name in caches.items()]
        if config.engine.nvme_path is not None:
            found += [
                disks.check_room("engine.nvme_path", config.engine.nvme_path, 0),
                *disks.check_writing("engine.nvme_path", config.engine.nvme_path),
            ]
    return found


def _look_at_names(asked: Asked) -> list[Finding]:
    launched, environment, host = asked.launched, asked.environment, socket.gethostname()
    main, networks = names.resolve(launched.address), names.interfaces()
    towards = names.address_towards(main[0]) if main and not main[0].startswith("127.") else None
    several = asked.several_machines
    # One that only starts the ranks of others needs no name of its own.
    takes_part = launched.size > 1 or any(
        each.name == host or set(names.resolve(each.name)) & set(networks.values()) for each in asked.hosts
    )
    by_gloo = several and takes_part and not torch.cuda.is_available()
    found = [
        names.check_own_name(host, names.resolve(host), networks, environment, by_gloo, towards),
        *names.check_chosen_interfaces(environment, list(psutil.net_if_addrs())),
        *names.check_hosts(asked.hosts),
    ]
    if launched.size > 1:
        is_first = launched.rank < launched.local_size
        found.append(names.check_main_address(launched.address, int(launched.port), is_first, several))
    return found


def _look_at_sharing(out: Path, ranks: Ranks, hosts: Sequence[str]) -> list[Finding]:
    """Whether a file that the first machine writes is seen by all."""
    if len(set(hosts)) == 1:
        return []
    probe: Path | None = None
    if ranks.is_main:
        probe = disks.existing(out) / f".doctor-{uuid.uuid4().hex[:8]}"
        try:
            probe.touch()
        except OSError:
            probe = None  # said by that machine's own look
    probe = ranks.broadcast(probe)
    if probe is None:
        return []
    until = time.monotonic() + SEEN_SECONDS
    while not (seen := probe.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    blind = sorted({host for host, sees in zip(hosts, links.everyones(ranks, seen)) if not sees})
    ranks.barrier()
    if ranks.is_main:
        probe.unlink(missing_ok=True)
    words = f"{out} is seen by {len(set(hosts)) - len(blind)} of {len(set(hosts))} machines"
    if blind:
        return [Finding(disks.TOPIC, "out is shared", f"{words}, not by {', '.join(blind)}", "wrong",
                        "let `out` be a folder of a file system that all mount at the same path")]  # fmt: skip
    return [Finding(disks.TOPIC, "out is shared", words)]
