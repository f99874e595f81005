"""Train a run: `deepspeed --hostfile hosts launch/train.py --config FILE [section.key=value ...]`.

The same file starts under python, torchrun, deepspeed and srun. Without --config it runs the embedded default, the toy
world, which a CPU finishes in minutes. Exit codes: 0 done, 2 bad input, an alarm of train.stop_on_alarm, or a disk that
stays full (one line on stderr), 3 told to stop (SIGTERM, SIGUSR1), or a judge's server is out of reach; it has saved,
start it again to go on; 1 anything else, such as ranks that are lost.
"""

import argparse
import atexit
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from afd_scale.config import ConfigError, LostInputError, load_config
from afd_scale.config.command_line import Parser
from afd_scale.files import write_text
from afd_scale.parallel.launchers import Launched, launched_as
from afd_scale.training.preemption import Preempted

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "toy" / "afd.yaml"


ENDS = {0: "done", 3: "stopped"}  # by exit code; any other is "failed"


def main() -> int:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help=f"YAML of the run (default: {DEFAULT_CONFIG.name} of configs/toy)")
    parser.add_argument("--local_rank", type=int, help="given by some launchers; the environment says the same")
    parser.add_argument("--ended", type=Path, metavar="FILE", help="the main rank writes one word there at its end: "
                        "done, stopped or failed; torchrun makes 1 of every other exit code")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="over the values of the YAML file")
    options = parser.parse_intermixed_args()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True)
    # torch 2.13 renames the collectives that DeepSpeed 0.19 calls; nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        launched = launched_as(os.environ)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    code = 1
    try:
        code = run(launched, options)
    finally:
        if options.ended is not None and launched.rank == 0:
            write_text(options.ended, ENDS.get(code, "failed") + "\n")
    return code


def run(launched: Launched, options: argparse.Namespace) -> int:
    """Train, or say why not; the exit code."""
    is_main = launched.rank == 0
    log = logging.getLogger("afd_scale")
    log.setLevel(logging.INFO if is_main else logging.WARNING)
    try:
        if options.config is None:
            log.info("no --config: running the embedded default, %s", DEFAULT_CONFIG)
        config = load_config(options.config or DEFAULT_CONFIG, options.overrides)
        # Heavy imports come after the config has been checked.
        from afd_scale.parallel.heartbeats import LostRanksError
        from afd_scale.parallel.orphans import stop_with_launcher
        from afd_scale.parallel.ranks import start_ranks
        from afd_scale.training.trainer import train

        stop_with_launcher()
        try:
            with start_ranks(launched, config.engine.timeout_minutes, agreed=(ConfigError, Preempted)) as ranks:
                train(config, ranks)
        except LostRanksError as error:
            print(f"error: rank {launched.rank}: {error}", file=sys.stderr)
            if not error.known:
                raise
            return 1
    except Preempted as stop:
        log.info("%s", stop)
        return 3
    except LostInputError as error:  # the other ranks do not know of it; their launcher ends them
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ConfigError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def leave(code: int) -> NoReturn:
    """End the process without taking the interpreter down.

    About one process in a hundred aborted there, its work done ("terminate called without an active exception": a
    thread of torch 2.13 or DeepSpeed 0.19 that nobody joined), and a launcher takes that for a failed run.
    """
    atexit._run_exitfuncs()  # streaming's shared memory, logging
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
