"""Train a run: `deepspeed --hostfile hosts launch/train.py --config FILE [section.key=value ...]`.

The same file starts under python, torchrun, deepspeed and srun. Without --config it runs the embedded default, the toy
world, which a CPU finishes in minutes. Exit codes: 0 done, 2 bad input, or an alarm of train.stop_on_alarm (one line on
stderr), 3 told to stop (SIGTERM, SIGUSR1), or a judge's server is out of reach; it has saved, start it again to go on.
"""

import atexit
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from afd_scale.config import ConfigError, LostInputError, load_config
from afd_scale.config.command_line import Parser
from afd_scale.parallel.launchers import launched_as
from afd_scale.training.preemption import Preempted

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "toy" / "afd.yaml"


def main() -> int:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help=f"YAML of the run (default: {DEFAULT_CONFIG.name} of configs/toy)")
    parser.add_argument("--local_rank", type=int, help="given by some launchers; the environment says the same")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="over the values of the YAML file")
    options = parser.parse_intermixed_args()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True)
    log = logging.getLogger("afd_scale")
    # torch 2.13 renames the collectives that DeepSpeed 0.19 calls; nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    is_main = True
    try:
        launched = launched_as(os.environ)
        is_main = launched.rank == 0
        log.setLevel(logging.INFO if is_main else logging.WARNING)
        if options.config is None:
            log.info("no --config: running the embedded default, %s", DEFAULT_CONFIG)
        config = load_config(options.config or DEFAULT_CONFIG, options.overrides)
        # Heavy imports come after the config has been checked.
        from afd_scale.parallel.ranks import start_ranks
        from afd_scale.training.trainer import train

        with start_ranks(launched, config.engine.timeout_minutes, agreed=(ConfigError, Preempted)) as ranks:
            train(config, ranks)
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
