"""Is this machine, or are these machines, fit for a run? Before it starts, and while one runs.

    tools/doctor.py                                   this machine
    tools/doctor.py --config FILE section.key=value   and for this run: its folders, its layout, what it needs
    tools/doctor.py --hostfile launch/hosts           and whether these hosts are reached
    tools/doctor.py --clean                           and remove from shared memory what killed jobs left
    torchrun --nproc-per-node 8 tools/doctor.py       and how fast ranks compute and exchange: the slowest by name
    deepspeed --hostfile launch/hosts tools/doctor.py --config FILE      the same over machines

It looks at versions that must fit each other; GPUs: memory, clocks, errors, NVLink; free disk, its speed and clock;
shared memory and what is left in it; names and networks. A file of 64 MiB is written where `out` is, and removed.
--clean removes blocks that no process has open, and locks of numbers that no block in use has: never another job's.

Each line says `ok`, `absent` (not there, and need not be), `warning` (costs time, or may hurt another run) or `wrong`,
with what to do below it. Exit 0: nothing is wrong. Exit 1: something is. Exit 2: bad input, one line says which.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter

from afd_scale.config import ConfigError, LostInputError, load_config, one_line
from afd_scale.config.command_line import Parser
from afd_scale.health.checks import (
    Asked,
    Machine,
    can_meet,
    check_layout,
    look_at_machine,
    look_at_ranks,
    of_all_machines,
)
from afd_scale.health.findings import Finding, as_json, is_wrong, table
from afd_scale.health.links import TOPIC
from afd_scale.health.meeting import exchanged, within
from afd_scale.health.names import read_hostfile
from afd_scale.parallel.launchers import launched_as
from afd_scale.parallel.ranks import start_ranks

FOUND: TypeAdapter[Machine | None] = TypeAdapter(Machine | None)  # by the first rank of a machine
MEETING_SECONDS = 120  # for all ranks to come; as much again to measure


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--config", type=Path, help="YAML file of a run")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="hosts to look for, as deepspeed's")
    parser.add_argument("--clean", action="store_true", help="remove what killed jobs left in shared memory")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--local_rank", type=int, help="given by some launchers; the environment says the same")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as of launch/train.py")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    # torch 2.13 renames the collectives that DeepSpeed 0.19 calls; nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    is_main = True
    try:
        launched = launched_as(os.environ)
        is_main = launched.rank == 0
        if options.overrides and options.config is None:
            raise ConfigError(f"override ({options.overrides[0]}) must come with --config: it changes a run")
        asked = Asked(
            launched,
            None if options.config is None else load_config(options.config, options.overrides),
            () if options.hostfile is None else read_hostfile(options.hostfile),
            options.clean,
        )
        show = partial(print_findings, as_one_object=options.json)
        return alone(asked, show) if launched.size == 1 else together(asked, show)
    except ConfigError as error:  # on all ranks
        if is_main:
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def print_findings(findings: list[Finding], as_one_object: bool) -> None:
    print(json.dumps(as_json(findings)) if as_one_object else table(findings), flush=True)


def alone(asked: Asked, show: Callable[[list[Finding]], None]) -> int:
    """Of one process without a launcher."""
    layout = check_layout(asked.config, [host.slots for host in asked.hosts])
    findings = [*look_at_machine(asked).findings, *layout]
    show(findings)
    return int(is_wrong(findings))


def together(asked: Asked, show: Callable[[list[Finding]], None]) -> int:
    """Of all ranks, shown by the main one; where it is not reached, by the first rank of each machine."""
    launched = asked.launched
    machine = look_at_machine(asked) if launched.local_rank == 0 else None
    findings = [] if machine is None else machine.findings
    shows = machine is not None

    def give_up(why: str) -> None:
        place = f"rank {launched.rank} of {launched.size} at {launched.address}:{launched.port}"
        remedy = "mend what is said of names above; else NCCL_DEBUG=INFO says more (docs/cluster.md, NCCL)"
        if shows:
            show([*findings, Finding(TOPIC, "meeting", f"{place}: {why}", "wrong", remedy)])

    try:
        with exchanged(launched, machine, FOUND, MEETING_SECONDS) as found:
            findings, shows = of_all_machines([each for each in found if each is not None]), launched.rank == 0
            if not can_meet(findings):
                give_up("not tried, machines would wait for each other")
                return 1
            # A rank that waits in vain for nccl is told so, and not killed (torch 2.13).
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
            with (
                within(2 * MEETING_SECONDS, lambda: give_up(f"not done in {2 * MEETING_SECONDS} s")),
                start_ranks(launched, MEETING_SECONDS // 60) as ranks,
            ):
                findings = [*findings, *look_at_ranks(asked, ranks)]
    except (LostInputError, RuntimeError) as error:  # of torch.distributed, whatever lies behind it
        give_up(one_line(error))
        return 1
    if shows:
        show(findings)
    return int(is_wrong(findings))


if __name__ == "__main__":
    sys.exit(main())
